"""The networkx island: circuits are made, read, compared and drawn here, without torch or a model."""

from mechinterp.graph.certificate import Certificate
from mechinterp.graph.checks import check_circuit, check_everywhere
from mechinterp.graph.circuit import Circuit
from mechinterp.graph.draw import Diagram, draw
from mechinterp.graph.graph import computation_graph, connected_edges_of, scored_edges
from mechinterp.graph.mib import load_mib, save_mib
from mechinterp.graph.nodes import Edge, GraphShape, Node, edges_called, parse_node
from mechinterp.graph.pairs import best_pairs, random_neurons, random_pairs
from mechinterp.graph.select import connected_edges, greedy_edges, random_edges, threshold_edges, top_edges

__all__ = [
    "Certificate",
    "Circuit",
    "Diagram",
    "Edge",
    "GraphShape",
    "Node",
    "best_pairs",
    "check_circuit",
    "check_everywhere",
    "computation_graph",
    "connected_edges",
    "connected_edges_of",
    "draw",
    "edges_called",
    "greedy_edges",
    "load_mib",
    "parse_node",
    "random_edges",
    "random_neurons",
    "random_pairs",
    "save_mib",
    "scored_edges",
    "threshold_edges",
    "top_edges",
]
