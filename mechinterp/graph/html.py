"""A drawing as one HTML file to look around in: pan, zoom, scores on hovering, a threshold.

The file needs no network and no other file. The picture in it is the SVG that is saved for papers, to the
last curve; a short script finds its edges by their ids. All texts are escaped: for HTML where they are text,
and for a script element where they are data.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib import resources
from string import Template

from mechinterp.graph.circuit import Circuit
from mechinterp.graph.nodes import Edge
from mechinterp.graph.style import printable, spans_in_words

__all__ = ["to_page"]


def to_page(
    svg: str,
    circuit: Circuit,
    ids: Mapping[str, Edge],
    *,
    title: str,
    caption: str,
    labels: Mapping[str, str],
) -> str:
    """The page, given the picture and which edge has which id in it."""
    edges = [[identity, *edge, circuit.scores[edge], spans_in_words(circuit, edge)] for identity, edge in ids.items()]
    structural = [[src, dst] for src, dst, kind in circuit.graph.edges(data="kind") if kind == "structural"]
    data = {"edges": edges, "structural": structural, "labels": dict(labels)}
    template = Template(resources.files("mechinterp.graph").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(printable(title)),
        caption=html.escape(caption),
        svg=svg,
        data=json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    )
