"""Graphviz's SVG made fit to stand in a page: self-contained, titled with scores, and centred in any font."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Final

from mechinterp.graph.circuit import Circuit
from mechinterp.graph.nodes import Edge
from mechinterp.graph.style import spans_in_words

__all__ = ["clean_svg"]

EDGE: Final = re.compile(r'<g id="(?P<id>e\d+)" class="edge">\s*<title>[^<]*</title>')
NODE: Final = re.compile(r'<g id="n_[^"]*" class="node">.*?</g>', re.DOTALL)
OUTLINE: Final = re.compile(r'<path [^>]*\bd="(?P<d>[^"]*)"')
LINE: Final = re.compile(r'<text [^>]*text-anchor="start" x="[^"]*"[^>]*font-size="(?P<size>[\d.]+)"[^>]*>')
# Smaller than any name or label: the letters of the ports, which stay where they are.
PORT_SIZE: Final = 7.5


def clean_svg(raw: str, ids: Mapping[str, Edge], circuit: Circuit) -> str:
    """The SVG element alone, with each edge's score, and its spans, in its title.

    Graphviz's prologue names a DTD on the network, which inline SVG has no use for. Texts in its tables begin
    at a place that was computed for the font of the machine that drew; in a browser with another font they
    would be off centre, so they are anchored at the middle of their node.
    """

    def titled(match: re.Match[str]) -> str:
        edge = ids[match["id"]]
        score = circuit.scores[edge]
        words = str(edge) if score is None else f"{edge}  {score:+.4g}"
        words = "\n".join([words, *spans_in_words(circuit, edge)])
        return f'<g id="{match["id"]}" class="edge">\n<title>{html.escape(words)}</title>'

    element = EDGE.sub(titled, raw[raw.index("<svg") :])
    element = NODE.sub(lambda match: centred_texts(match[0]), element)
    return element.replace("<svg ", '<svg role="img" ', 1)


def centred_texts(node: str) -> str:
    """A node's group with its name and label anchored at the middle."""
    outline = OUTLINE.search(node)
    if outline is None:
        return node
    xs = [float(x) for x, _ in re.findall(r"(-?[\d.]+),(-?[\d.]+)", outline["d"])]
    middle = f'text-anchor="middle" x="{(min(xs) + max(xs)) / 2:.2f}"'

    def anchored(match: re.Match[str]) -> str:
        if float(match["size"]) < PORT_SIZE:
            return match[0]
        return re.sub(r'text-anchor="start" x="[^"]*"', middle, match[0])

    return LINE.sub(anchored, node)
