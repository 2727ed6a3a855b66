"""A circuit as Graphviz sees it: its nodes and edges as marks, and where they go.

Layers are rows, from ``embed`` at the bottom to ``logits`` at the top, and inside a layer come KV heads,
heads, MLP. Graphviz's ``dot`` places the nodes. It reserves room for every long edge in every row that the
edge passes, which is beautiful for fifty edges, and many times too wide for a thousand across thirty layers;
so in larger circuits only the strongest edges take part in placing, and all are routed around the nodes
afterwards.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Final

import networkx as nx

from mechinterp.errors import missing_extra
from mechinterp.graph.circuit import Circuit
from mechinterp.graph.legend import box_of, decorate
from mechinterp.graph.nodes import Edge, GraphShape, parse_node
from mechinterp.graph.span_labels import label_spans, span_marks
from mechinterp.graph.style import BORDER, FAINT, FILL, FONT, INK, STRUCTURAL_LINE, Style, printable, spans_in_words

if TYPE_CHECKING:
    import pygraphviz

__all__ = ["edge_ids", "to_dot"]

ROW: Final = {"kv": 0, "head": 1, "mlp": 1}
PLACING_EDGES: Final = 100


def to_dot(circuit: Circuit, *, title: str, caption: str, labels: Mapping[str, str]) -> str:
    """The drawing as DOT text with all positions in it; ``dot -Tpng`` renders it as it is.

    Raises
    ------
    MissingExtraError
        If pygraphviz is not installed.
    """
    placing = placing_edges(circuit)
    placed = styled(circuit, labels, placing)
    add_rows(placed, circuit)
    placed.layout(prog="dot")
    if len(placing) == len(circuit):
        agraph = placed
        for node in agraph.nodes():
            if str(node).startswith("row "):
                agraph.remove_node(node)
    else:
        agraph = styled(circuit, labels, circuit.edges)
        positions = {name: placed.get_node(name).attr["pos"] for name in drawn_nodes(circuit)}
        for name, position in centred(positions).items():
            agraph.get_node(name).attr["pos"] = position
        agraph.graph_attr.update(splines="true", esep="+3")
        agraph.layout(prog="nop")
    label_spans(agraph, circuit, edge_ids(circuit), {str(node): box_of(node) for node in agraph.nodes()})
    decorate(agraph, circuit, title=title, caption=caption)
    return str(agraph.to_string())


def edge_ids(circuit: Circuit) -> dict[str, Edge]:
    """The id that each scored edge has in the SVG."""
    return {f"e{i}": edge for i, edge in enumerate(circuit.edges)}


def drawn_nodes(circuit: Circuit) -> tuple[str, ...]:
    """The circuit's nodes; of an empty circuit the two that every model has."""
    return circuit.nodes or ("embed", "logits")


def placing_edges(circuit: Circuit) -> Collection[Edge]:
    """The edges that say where nodes go: all of a small circuit, else the strongest ones at each node."""
    if len(circuit) <= PLACING_EDGES:
        return circuit.edges
    ranked = sorted(circuit.edges, key=lambda edge: -abs(circuit.scores[edge] or 0.0))
    chosen: set[Edge] = set()
    heard: set[str] = set()
    for edge in ranked:
        if len(chosen) < PLACING_EDGES // 2 or edge.src not in heard or edge.dst not in heard:
            chosen.add(edge)
            heard.update(edge[:2])
    return chosen


def styled(circuit: Circuit, labels: Mapping[str, str], edges: Collection[Edge]) -> pygraphviz.AGraph:
    """All nodes of a circuit and some of its edges with their Graphviz attributes, without positions."""
    shape, style = circuit.shape, Style.of(circuit)
    plain: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    for name in drawn_nodes(circuit):
        plain.add_node(name, **node_attributes(shape, name, labels.get(name)))
    for src, dst, port, kind in circuit.graph.edges(keys=True, data="kind"):
        if kind == "structural":
            attributes = {"weight": "8", "id": f"s_{dst}", **STRUCTURAL_LINE}
            plain.add_edge(src, dst, key=port, **attributes)
    # Graphviz draws in this order: the strongest come last, on top of the others.
    for identity, edge in sorted(edge_ids(circuit).items(), key=lambda item: abs(circuit.scores[item[1]] or 0.0)):
        if edge in edges:
            attributes = style.attributes(circuit.scores[edge])
            if edge in circuit.spans:
                # Graphviz draws no comments: a tooltip would be a link around the edge.
                attributes["comment"] = "; ".join(spans_in_words(circuit, edge))
            if edge.port != "in":
                attributes["headport"] = f"{edge.port}:s"
            plain.add_edge(edge.src, edge.dst, key=edge.port, id=identity, **attributes)
    try:
        agraph = nx.nx_agraph.to_agraph(plain)
    except ImportError as error:
        raise missing_extra("drawing a circuit", "pygraphviz", "draw") from error
    # Marks on the lines need room between rows.
    room = "0.36" if span_marks(circuit) else "0.24"
    agraph.graph_attr.update(rankdir="BT", ranksep=room, nodesep="0.14", newrank="true", outputorder="edgesfirst", fontname=FONT)
    agraph.node_attr.update(
        shape="box",
        style="rounded,filled",
        fontname=FONT,
        fontsize="11",
        height="0.2",
        width="0.3",
        margin="0.03,0.02",
    )
    return agraph


def add_rows(agraph: pygraphviz.AGraph, circuit: Circuit) -> None:
    """Hold the nodes of each row at one height, and the rows in order, also where no edge does."""
    by_row: dict[tuple[float, int], list[str]] = {}
    for name in drawn_nodes(circuit):
        kind, layer, _ = parse_node(name)
        height = float(layer) if layer is not None else (-math.inf if kind == "embed" else math.inf)
        by_row.setdefault((height, ROW.get(kind, 0)), []).append(name)
    below = None
    for number, place in enumerate(sorted(by_row)):
        anchor = f"row {number}"
        agraph.add_node(anchor, style="invis", shape="point", label="", width="0.01", height="0.01")
        agraph.add_subgraph([*by_row[place], anchor], rank="same")
        if below is not None:
            agraph.add_edge(below, anchor, style="invis", weight="0")
        below = anchor


def centred(positions: Mapping[str, str]) -> dict[str, str]:
    """The positions with embed and logits, which are alone in their rows, moved to the middle."""
    xs = [float(position.split(",")[0]) for position in positions.values()]
    middle = (min(xs) + max(xs)) / 2
    return {
        name: f"{middle},{position.split(',')[1]}" if name in ("embed", "logits") else position
        for name, position in positions.items()
    }


def node_attributes(shape: GraphShape, name: str, label: str | None) -> dict[str, str]:
    """A node as a small table: its name, the ports at which it reads, and its label."""
    kind = parse_node(name).kind
    ink = "#ffffff" if kind in ("embed", "logits") else INK
    ports = [port for port in shape.ports(name) if port != "in"]
    span = ' colspan="3"' if len(ports) > 2 else ""
    title = f'<td{span}><font color="{ink}">{html.escape(name)}</font></td>'
    lines = [f"<tr>{title}</tr>"]
    if len(ports) > 2:
        # A port is a place on the bottom edge: with three of them, they are a line of their own.
        letters = "".join(port_cell(port) for port in ports)
        lines.append(f"<tr>{letters}</tr>")
    elif ports:
        rows = ' rowspan="2"' if label else ""
        left, right = port_cell(ports[0], rows), port_cell(ports[1] if len(ports) == 2 else "", rows)
        lines = [f"<tr>{left}{title}{right}</tr>"]
    if label:
        small = f'<font color="{ink}" point-size="8"><i>{html.escape(printable(label))}</i></font>'
        lines.insert(1, f"<tr><td{span}>{small}</td></tr>")
    table = f'<<table border="0" cellborder="0" cellspacing="0" cellpadding="1">{"".join(lines)}</table>>'
    return {"label": table, "fillcolor": FILL[kind], "color": BORDER, "id": f"n_{name}"}


def port_cell(port: str, more: str = "") -> str:
    """The letter of a port; without one an empty cell, which keeps the name in the middle."""
    if not port:
        return f'<td width="9"{more}></td>'
    return f'<td port="{port}" width="9" valign="bottom"{more}><font color="{FAINT}" point-size="7">{port}</font></td>'
