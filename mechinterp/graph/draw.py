"""Drawing circuits: as SVG, PNG, PDF or DOT for a paper, as one HTML file for looking around in."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Final

from mechinterp.errors import GraphError, MissingExtraError, did_you_mean
from mechinterp.graph.circuit import Circuit
from mechinterp.graph.connect import best_connected
from mechinterp.graph.dot import edge_ids, to_dot
from mechinterp.graph.files import write_atomically
from mechinterp.graph.graph import index_of
from mechinterp.graph.html import to_page
from mechinterp.graph.nodes import counted, node_name
from mechinterp.graph.svg import clean_svg

__all__ = ["Diagram", "draw"]

SUFFIXES: Final = (".dot", ".svg", ".png", ".pdf", ".html")
PNG_DPI: Final = 144


def draw(
    circuit: Circuit,
    *,
    max_edges: int = 100,
    connected: bool = True,
    title: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Diagram:
    """What does the circuit look like?

    Layers are rows, ``embed`` at the bottom and ``logits`` at the top. Blue solid edges have positive scores,
    orange dashed ones negative scores, and the width grows with the square root of the size (from 20 edges on
    up to their 98th percentile, which the key says). Edges enter a head at its port q, k or v. KV heads of
    grouped-query models are joined to their query heads by dotted lines. Layers that the picture does not
    need are left out, which three dots at the left say. Edges that carry at some spans of the prompts say at
    which: by name, or by numbers that the key explains; of more than 150 edges on hovering alone.
    An MLP that keeps some of its neurons says how many.

    Parameters
    ----------
    circuit
        What to draw.
    max_edges
        Draw at most so many edges: the strongest ones that are connected among themselves. What is left out
        is said in the caption. Forty edges are legible in a paper, a hundred on a page of their own, more on a
        screen that one can zoom.
    connected
        False draws edges also where no path from embed to logits uses them.
    title
        Default: task, model and method from the circuit's provenance. ``""`` for none.
    labels
        A second line for some nodes, ``{"a9.h6": "name mover"}``; ``"L9.H6"`` names the same head.

    Returns
    -------
    Diagram
        Shows itself in a notebook; ``.save("circuit.svg")`` writes it.

    Raises
    ------
    GraphError
        If `max_edges` is not a positive number, or a label is for a node that the model does not have.

    Examples
    --------
    >>> from mechinterp.graph import GraphShape
    >>> circuit = Circuit.from_edges(GraphShape(n_layers=1, n_heads=1), ["embed->m0", "m0->logits"])
    >>> draw(circuit, labels={"m0": "facts"})
    Diagram: 2 edges and 3 nodes of a circuit of 2 edges

    Notes
    -----
    Nothing is laid out until the diagram is shown or saved: 0.1 s for 100 edges, about 10 s for 1000.
    """
    if not isinstance(max_edges, int) or isinstance(max_edges, bool) or max_edges < 1:
        raise GraphError(f"max_edges={max_edges!r} is not a number of edges. Give a whole number of at least 1.")
    named = {node_name(name): label for name, label in (labels or {}).items()}
    for name in named:
        circuit.shape.parse(name)
    title = circuit.origin if title is None else title
    drawable = circuit.connected() if connected else circuit
    shown = strongest(drawable, max_edges, connected)
    for mlp, kept in shown.neurons.items():
        named[mlp] = " · ".join(filter(None, (named.get(mlp), counted(len(kept), "neuron"))))
    return Diagram(shown, title=title, caption=caption_of(circuit, shown, connected), labels=named, of=circuit)


@dataclass(frozen=True, eq=False, repr=False)
class Diagram:
    """A drawing of a circuit, laid out when it is first shown or saved.

    Parameters
    ----------
    circuit
        The edges that are drawn.
    title, caption
        Texts above and below.
    labels
        A second line for some nodes.
    of
        The circuit that the drawing is of, which may have more edges.
    """

    circuit: Circuit
    title: str
    caption: str
    labels: Mapping[str, str] = field(default_factory=dict)
    of: Circuit | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", MappingProxyType(dict(self.labels)))

    @cached_property
    def dot(self) -> str:
        """DOT text with all positions; ``dot -Tpdf file.dot`` renders it as it is. Needs pygraphviz."""
        return to_dot(self.circuit, title=self.title, caption=self.caption, labels=self.labels)

    @cached_property
    def svg(self) -> str:
        """A self-contained SVG element. Hovering over an edge shows its score and spans. Needs pygraphviz."""
        return clean_svg(self.render("svg").decode(), edge_ids(self.circuit), self.circuit)

    @cached_property
    def html(self) -> str:
        """One self-contained interactive page: pan, zoom, scores, a threshold. Needs pygraphviz."""
        name = self.title or "Circuit"
        return to_page(
            self.svg,
            self.circuit,
            edge_ids(self.circuit),
            title=name,
            caption=self.caption,
            labels=self.labels,
        )

    def render(self, format: str) -> bytes:
        """The picture in any format that Graphviz knows, such as ``"png"`` or ``"pdf"``."""
        text = self.dot
        import pygraphviz

        agraph = pygraphviz.AGraph(text)
        if format == "png":
            # Opaque: on a dark page dark lines on nothing would be lost.
            agraph.graph_attr.update(dpi=str(PNG_DPI), bgcolor="#ffffff")
        return bytes(agraph.draw(format=format, prog="nop2"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture; the suffix says as what: ``.dot .svg .png .pdf .html``. Folders are made.

        Raises
        ------
        GraphError
            If the suffix is none of these.
        MissingExtraError
            If pygraphviz is not installed.
        """
        target = Path(path)
        suffix = target.suffix.lower()
        if suffix not in SUFFIXES:
            raise GraphError(f"{target.name!r} does not end like a picture that can be drawn. {did_you_mean(suffix, SUFFIXES)}")
        match suffix:
            case ".dot":
                content = self.dot.encode()
            case ".svg":
                content = ('<?xml version="1.0" encoding="UTF-8"?>\n' + self.svg).encode()
            case ".html":
                content = self.html.encode()
            case _:
                content = self.render(suffix[1:])
        write_atomically(target, content)
        return target

    def __repr__(self) -> str:
        of = self.of or self.circuit
        drawn = f"{counted(len(self.circuit), 'edge')} and {counted(len(self.circuit.nodes), 'node')}"
        return f"Diagram: {drawn} of a circuit of {counted(len(of), 'edge')}"

    def _repr_svg_(self) -> str | None:
        # Without pygraphviz a notebook shows the one-line repr; asking for the picture by name still raises.
        try:
            svg = self.svg
        except MissingExtraError:
            return None
        return re.sub(r'(width="[\d.]+pt") height="[\d.]+pt"', r'\1 style="max-width:100%;height:auto"', svg, count=1)


def strongest(circuit: Circuit, n: int, connected: bool) -> Circuit:
    """At most n edges of a circuit, the best by absolute score, connected ones if so asked."""
    if len(circuit) <= n:
        return circuit
    index = index_of(circuit.shape)
    scores: Iterable[float | None] = circuit.scores.values()
    if not any(scores):
        # Edges among chosen nodes have no scores of their own: those among the best nodes are drawn.
        sizes = node_sizes(circuit)
        scores = [min(sizes.get(edge.src, 0.0), sizes.get(edge.dst, 0.0)) for edge in circuit]
    size = {i: abs(score or 0.0) for i, score in zip(index.positions(circuit), scores, strict=True)}
    ranked = sorted(size, key=lambda i: (-size[i], i))
    keep = best_connected(index, ranked, n)[1] if connected else []
    if not 0 < len(keep) <= n:
        # Where nothing of that size is connected, edges that dangle are better than none.
        keep = ranked[:n]
    return circuit.only(index.edges[i] for i in keep)


def node_sizes(circuit: Circuit) -> dict[str, float]:
    """The size of each node's score: of a KV head its best query head's, of an MLP that of its neurons together."""
    shape, known = circuit.shape, circuit.provenance.get("selection", {}).get("node_scores", {})
    sizes = {name: abs(score) for name, score in known.items() if name in shape.nodes}
    sizes |= {mlp: sum(abs(score or 0.0) for score in kept.values()) for mlp, kept in circuit.neurons.items()}
    best = {name: max(sizes.get(head, 0.0) for head in heads) for name in circuit.nodes if (heads := shape.heads_of(name))}
    return sizes | best | {"embed": math.inf, "logits": math.inf}


def caption_of(circuit: Circuit, shown: Circuit, connected: bool) -> str:
    """What is drawn, and what is left out."""
    total, reach = len(circuit), circuit.n_connected
    if len(shown) == total:
        drawn = f"All {total} edges of the circuit" if total != 1 else "The one edge of the circuit"
    elif connected and len(shown) == reach:
        drawn = f"The {counted(reach, 'edge')} on paths from embed to logits, of {total} in the circuit"
    elif connected and reach < total:
        drawn = f"The strongest {len(shown)} that connect, of {counted(reach, 'edge')} on paths from embed to logits; "
        drawn += f"{total} in the circuit"
    else:
        which = f"The strongest {len(shown)}" if any(circuit.scores.values()) else f"{len(shown)} among the best nodes"
        drawn = f"{which}{' that connect,' if connected else ''} of {counted(total, 'edge')} in the circuit"
    at = f" They carry at some spans of the prompts: {counted(shown.n_pairs, 'pair')} of edge and span." if shown.spans else ""
    if circuit.neurons:
        here = "" if circuit.n_neurons == shown.n_neurons else f", {shown.n_neurons} of them here"
        at += f" Of its MLPs {len(circuit.neurons)} keep some neurons alone, {circuit.n_neurons} in all{here}."
    return f"{drawn}, {circuit.shape.n_edges} in the model.{at}"
