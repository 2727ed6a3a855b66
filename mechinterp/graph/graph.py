"""The computation graph: every edge that a circuit of a model can be made of."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

import networkx as nx

from mechinterp.errors import GraphError
from mechinterp.graph.nodes import STRUCTURAL_PORT, Edge, GraphShape

__all__ = ["computation_graph", "connected_edges_of", "scored_edges"]


def scored_edges(model: object) -> tuple[Edge, ...]:
    """Which edges can be scored, cut or kept?

    Parameters
    ----------
    model
        A loaded model, a config, or a `GraphShape` (see `GraphShape.of`).

    Returns
    -------
    tuple of Edge
        Readers in the order of ``shape.readers`` (computation order; ports q, k, v), and for each reader its
        writers in the order of ``shape.writers``. The order is part of the interface: scores may be kept as
        an array beside it.

    Examples
    --------
    >>> for edge in scored_edges(GraphShape(n_layers=1, n_heads=1)):
    ...     print(edge)
    embed->a0.h0<q>
    embed->a0.h0<k>
    embed->a0.h0<v>
    embed->m0
    a0.h0->m0
    embed->logits
    a0.h0->logits
    m0->logits

    Notes
    -----
    O(edges); the 70,651 edges of SmolLM2-135M take about 50 ms the first time and are remembered per shape.
    """
    return index_of(GraphShape.of(model)).edges


def computation_graph(model: object) -> nx.MultiDiGraph[str]:
    """The whole computation graph as a networkx object, to run any graph algorithm on.

    Parameters
    ----------
    model
        A loaded model, a config, or a `GraphShape` (see `GraphShape.of`).

    Returns
    -------
    networkx.MultiDiGraph
        Keyed by port. Nodes carry ``kind``, ``layer`` and ``head`` (where they have one); edges carry
        ``kind`` (``"scored"``, or ``"structural"`` from a KV head to its query heads), and the reader's
        ``layer`` and ``head``. A new object each time: change it freely.

    Examples
    --------
    >>> graph = computation_graph(GraphShape(n_layers=12, n_heads=12))
    >>> graph
    <networkx.classes.multidigraph.MultiDiGraph object at ...>
    >>> graph.number_of_edges()
    32491
    """
    shape = GraphShape.of(model)
    return build_graph(shape, shape.nodes, ((edge, {}) for edge in scored_edges(shape)))


def build_graph(shape: GraphShape, nodes: Iterable[str], edges: Iterable[tuple[Edge, dict[str, object]]]) -> nx.MultiDiGraph[str]:
    """A MultiDiGraph of the given nodes and scored edges, and of the structural edges between those nodes."""
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph(
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        parallel=shape.parallel,
        attn_only=shape.attn_only,
    )
    places: dict[str, dict[str, object]] = {}
    for name in nodes:
        kind, layer, head = shape.parse(name)
        # Attributes that a node lacks are left out, not None: GraphML and GEXF cannot write None.
        where = {"layer": layer, "head": head}
        places[name] = {key: value for key, value in where.items() if value is not None}
        graph.add_node(name, kind=kind, **places[name])
    for edge, attributes in edges:
        graph.add_edge(edge.src, edge.dst, key=edge.port, kind="scored", **places[edge.dst], **attributes)
    for name, place in places.items():
        kv_node = shape.kv_node(name)
        if kv_node in places:
            graph.add_edge(kv_node, name, key=STRUCTURAL_PORT, kind="structural", **place)
    return graph


def collapsed(graph: nx.MultiDiGraph[str]) -> nx.DiGraph[str]:
    """The same with one edge for all ports, see `mechinterp.graph.Circuit.collapse`."""
    plain: nx.DiGraph[str] = nx.DiGraph(**graph.graph)
    plain.add_nodes_from(graph.nodes(data=True))
    for src, dst, port, data in graph.edges(keys=True, data=True):
        if not plain.has_edge(src, dst):
            place = {key: data[key] for key in ("kind", "layer", "head") if key in data}
            plain.add_edge(src, dst, ports=port, **place)
        else:
            plain[src][dst]["ports"] += "," + port
        if "score" in data:
            merged = plain[src][dst]
            merged["score"] = merged.get("score", 0.0) + data["score"]
            merged["weight"] = merged.get("weight", 0.0) + abs(data["score"])
    return plain


def edges_among(shape: GraphShape, nodes: Collection[str]) -> tuple[Edge, ...]:
    """Every edge whose two ends are among these nodes; the embedding and the logits always are.

    A KV head is among them where one of its query heads is.

    Examples
    --------
    >>> [str(edge) for edge in edges_among(GraphShape(n_layers=1, n_heads=2), {"a0.h1"})]
    ['embed->a0.h1<q>', 'embed->a0.h1<k>', 'embed->a0.h1<v>', 'embed->logits', 'a0.h1->logits']
    """
    present = {"embed", "logits", *nodes}
    present |= {kv for node in nodes if (kv := shape.kv_node(node)) is not None}
    return tuple(edge for edge in scored_edges(shape) if edge.src in present and edge.dst in present)


@dataclass(frozen=True, eq=False)
class EdgeIndex:
    """The scored edges of one shape with their positions, so that large circuits stay cheap.

    Nodes are numbered in the order of computation, edges in the order of `scored_edges`; the latter is sorted
    by reader, which is all that `connected` needs.
    """

    shape: GraphShape
    edges: tuple[Edge, ...]
    position: dict[Edge, int]
    src: tuple[int, ...]
    dst: tuple[int, ...]
    heads_of: dict[int, tuple[int, ...]]

    def positions(self, edges: Iterable[Edge]) -> list[int]:
        """Where the edges are in the fixed order; a `GraphError` says why one does not exist."""
        found = []
        for edge in edges:
            position = self.position.get(edge)
            if position is None:
                self.shape.check(edge)
                raise GraphError(f"There is no edge {edge}.")
            found.append(position)
        return found

    def connected(self, positions: Iterable[int]) -> list[int]:
        """Those of the given edges that lie on a path from embed to logits through given edges, in order.

        One pass each way suffices, because the order of edges is topological. Structural edges always
        conduct.
        """
        chosen = sorted(positions)
        src, dst, heads_of = self.src, self.dst, self.heads_of
        n_nodes = len(self.shape.nodes)
        from_embed, to_logits = bytearray(n_nodes), bytearray(n_nodes)
        from_embed[0] = to_logits[n_nodes - 1] = 1
        for edge in chosen:
            if from_embed[src[edge]]:
                reader = dst[edge]
                from_embed[reader] = 1
                for head in heads_of.get(reader, ()):
                    from_embed[head] = 1
        for edge in reversed(chosen):
            reader = dst[edge]
            # Heads of a KV node are settled by now: whatever reads them comes later in the order.
            if to_logits[reader] or any(to_logits[head] for head in heads_of.get(reader, ())):
                to_logits[reader] = to_logits[src[edge]] = 1
        return [edge for edge in chosen if from_embed[src[edge]] and to_logits[dst[edge]]]


@lru_cache(maxsize=16)
def index_of(shape: GraphShape) -> EdgeIndex:
    """The `EdgeIndex` of a shape, made once."""
    number = {name: i for i, name in enumerate(shape.nodes)}
    edges, src, dst = [], [], []
    writer_numbers = [number[name] for name in shape.writers]
    for node, port in shape.readers:
        heard = shape.n_writers_before(node)
        edges += [Edge(writer, node, port) for writer in shape.writers[:heard]]
        src += writer_numbers[:heard]
        dst += [number[node]] * heard
    return EdgeIndex(
        shape=shape,
        edges=tuple(edges),
        position={edge: i for i, edge in enumerate(edges)},
        src=tuple(src),
        dst=tuple(dst),
        heads_of={number[n]: tuple(number[h] for h in shape.heads_of(n)) for n in shape.nodes if shape.heads_of(n)},
    )


def connected_edges_of(model: object, edges: Iterable[Edge]) -> tuple[Edge, ...]:
    """Which of these edges lie on a path from embed to logits made of these edges?

    The rest cannot carry information from the input to the output. Where the rest of the network is held at
    the values of another *run* (resampling), leaving them out changes nothing. Under zero or mean ablation an
    edge whose writer hears nothing may still matter, because that writer's bias is not its ablated value.

    Parameters
    ----------
    model
        A loaded model, a config, or a `GraphShape`.
    edges
        Scored edges. Structural edges conduct always and need not be given.

    Returns
    -------
    tuple of Edge
        A part of `edges`, in the order of `scored_edges`.

    Raises
    ------
    GraphError
        If an edge does not exist.

    Examples
    --------
    >>> shape = GraphShape(n_layers=1, n_heads=2)
    >>> edges = [Edge("embed", "logits", "in"), Edge("a0.h0", "logits", "in")]
    >>> [str(edge) for edge in connected_edges_of(shape, edges)]
    ['embed->logits']

    Notes
    -----
    O(edges): two passes over the edges given, once they are sorted.
    """
    index = index_of(GraphShape.of(model))
    return tuple(index.edges[i] for i in index.connected(set(index.positions(edges))))
