"""What stands around a drawing that has its positions: title, layer bands, key to the lines, caption."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mechinterp.graph.circuit import Circuit
from mechinterp.graph.nodes import parse_node
from mechinterp.graph.span_labels import span_marks
from mechinterp.graph.style import BORDER, FAINT, FILL, FONT, INK, STRUCTURAL_LINE, Style, printable

if TYPE_CHECKING:
    import pygraphviz

__all__ = ["decorate"]

BAND: Final = "#f3f4f6"
LABEL_WIDTH: Final = 50.0  # of "layer 29" at the left edge
MARGIN: Final = 8.0
PAD: Final = 4.0  # around everything
DOT: Final = "0.01"  # inches, of what marks a corner
SMALL, LARGE = 9, 13  # type sizes, in points
LEADING: Final = 14.0
GAP: Final = 14.0  # between two entries of the key


def decorate(agraph: pygraphviz.AGraph, circuit: Circuit, *, title: str, caption: str) -> None:
    """Put title, layer bands, key and caption around a graph that has its positions."""
    boxes = {str(node): box_of(node) for node in agraph.nodes()}
    points = [point for edge in agraph.edges() for point in points_of(edge)]
    points += [corner for box in boxes.values() for corner in (box[:2], box[2:])]
    xs, ys = [x for x, _ in points], [y for _, y in points]

    # A small graph is not stretched to the width of its texts by more than they need.
    samples = [*marks_of(circuit, boxes), *lines_of(circuit)]
    widest = max((sample.width for sample in samples), default=0.0)
    wanted = max(widest, min(sum(sample.width for sample in samples), 300.0))
    wanted = max(wanted, text_width(title, LARGE), min(text_width(caption, SMALL), 300.0)) + 2 * MARGIN
    drawn = max(xs) - min(xs) + LABEL_WIDTH + 2 * MARGIN
    spare = max(0.0, wanted - drawn) / 2
    left, right = min(xs) - LABEL_WIDTH - MARGIN - spare, max(xs) + MARGIN + spare
    low, high = min(ys), max(ys)

    ink = Ink()
    layers: dict[int, list[tuple[float, float, float, float]]] = {}
    for name, box in boxes.items():
        layer = parse_node(name).layer
        if layer is not None:
            layers.setdefault(layer, []).append(box)
    tops: dict[int, float] = {}
    for layer, members in sorted(layers.items()):
        band_low, band_high = min(box[1] for box in members) - 5, max(box[3] for box in members) + 5
        ink.rectangle(left, band_low, right, band_high, BAND)
        ink.text(left + MARGIN, (band_low + band_high) / 2 - 3, f"layer {layer}", size=SMALL, colour=FAINT)
        if tops and layer - 1 not in tops:
            # Three dots, where layers that the circuit does not use are left out.
            middle = (tops[max(tops)] + band_low) / 2
            for shift in (-2.2, 0.0, 2.2):
                ink.dot(left + MARGIN + 12, middle + shift, FAINT)
        tops[layer] = band_high
    if title:
        ink.text(left + MARGIN, high + 12, title, size=LARGE, colour=INK)
        high += 12 + LARGE

    x, y = left + MARGIN, low - 20
    for sample in samples:
        if x + sample.width - GAP > right - MARGIN and x > left + MARGIN:
            x, y = left + MARGIN, y - LEADING
        if sample.fill:
            ink.rectangle(x, y - 2, x + 16, y + 8, sample.fill, border=BORDER)
        elif sample.line:
            ink.line(x, y + 3, x + 26, y + 3, sample.line)
        ink.text(x + sample.indent, y, sample.words, size=SMALL, colour=INK)
        x += sample.width
    columns = max(int((right - left - 2 * MARGIN) / text_width("x", SMALL)), 24)
    for line in textwrap.wrap(printable(caption), columns):
        y -= LEADING
        ink.text(left + MARGIN, y, line, size=SMALL, colour=FAINT)

    agraph.graph_attr.update(_background=ink.xdot, layout="nop2", pad=f"{PAD / 72}")
    # The bounding box is taken from nodes and edges alone: two invisible ones stretch it over the rest.
    # Whole points, so that the last row and column of a PNG are not half transparent.
    low = y - 6
    high, right = low + whole(high - low), left + whole(right - left)
    for corner, (corner_x, corner_y) in {"corner 0": (left, low), "corner 1": (right, high)}.items():
        place = f"{corner_x:.2f},{corner_y:.2f}"
        agraph.add_node(corner, pos=place, style="invis", shape="point", label="", width=DOT, height=DOT)


@dataclass(frozen=True)
class Sample:
    """One entry of the key: a line, a filled box or neither, and what it means."""

    words: str
    line: Mapping[str, str] | None = None
    fill: str = ""

    @property
    def indent(self) -> float:
        return 31.0 if self.line else 21.0 if self.fill else 0.0

    @property
    def width(self) -> float:
        return self.indent + text_width(self.words, SMALL) + GAP


def marks_of(circuit: Circuit, names: Iterable[str]) -> list[Sample]:
    """What the nodes and the letters at their bottom edges mean."""
    kinds = {parse_node(name).kind for name in names}
    words = {"head": "attention head", "kv": "KV head", "mlp": "MLP"}
    samples = [Sample(meaning, fill=FILL[kind]) for kind, meaning in words.items() if kind in kinds]
    if "head" in kinds:
        samples.append(Sample("q k v: read as query, key, value"))
    return samples


def lines_of(circuit: Circuit) -> list[Sample]:
    """What the lines mean."""
    style = Style.of(circuit)
    scores = [score for score in circuit.scores.values() if score is not None]
    samples = []
    for words, extreme in (("positive", max(scores, default=0.0)), ("negative", min(scores, default=0.0))):
        if (extreme > 0) == (words == "positive") and extreme:
            samples.append(Sample(f"{words}, up to {signed(extreme)}", style.attributes(extreme)))
    if style.strongest and min(map(abs, scores)) < style.full / 10:
        tenth = math.copysign(float(f"{style.full / 10:.0e}"), max(scores, key=abs))
        samples.append(Sample(signed(tenth), style.attributes(tenth)))
    if style.clipped:
        samples.append(Sample(f"full width from {style.full:.3g} on"))
    if len(scores) < len(circuit):
        samples.append(Sample("no score", style.attributes(None)))
    if any(kind == "structural" for _, _, kind in circuit.graph.edges(data="kind")):
        samples.append(Sample("keys and values of a group", STRUCTURAL_LINE))
    marks = span_marks(circuit)
    if marks:
        samples.append(Sample("on a line: the part of the prompt at which it carries"))
        samples += [Sample(f"{mark} = {name}") for name, mark in marks.items() if mark != printable(name)]
        if len(circuit.spans) < len(circuit):
            samples.append(Sample("without a mark: everywhere"))
    return samples


def whole(length: float) -> float:
    """At least this length, such that with the corners' own size and the padding it is a whole number of points."""
    around = 72 * float(DOT) + 2 * PAD
    return math.ceil(length + around) - around


def signed(number: float) -> str:
    """Three digits and a sign; the minus is the typographic one."""
    return f"{number:+.3g}".replace("-", "\N{MINUS SIGN}")


def text_width(text: str, size: int) -> float:
    """About how wide a line is, in points: no font can be measured here, so a wide one is assumed."""
    return 0.6 * size * len(text)


def box_of(node: Any) -> tuple[float, float, float, float]:
    """(left, bottom, right, top) of a placed node, in points; Graphviz gives sizes in inches."""
    x, y = map(float, node.attr["pos"].split(","))
    half_width, half_height = 36 * float(node.attr["width"]), 36 * float(node.attr["height"])
    return x - half_width, y - half_height, x + half_width, y + half_height


def points_of(edge: Any) -> list[tuple[float, float]]:
    """The control points of a routed edge, in points."""
    spline = edge.attr["pos"] or ""
    pairs = (point.split(",")[-2:] for point in spline.replace(";", " ").split())
    return [(float(x), float(y)) for x, y in pairs]


class Ink:
    """Collects drawing operations in Graphviz's xdot language, which every output format understands."""

    def __init__(self) -> None:
        self.operations: list[str] = []

    @property
    def xdot(self) -> str:
        return " ".join(self.operations)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, colour: str, *, border: str = "") -> None:
        self.colour("c", border or colour)
        self.colour("C", colour)
        self.operations.append(f"P 4 {x0:.2f} {y0:.2f} {x1:.2f} {y0:.2f} {x1:.2f} {y1:.2f} {x0:.2f} {y1:.2f}")

    def dot(self, x: float, y: float, colour: str) -> None:
        self.colour("c", colour)
        self.colour("C", colour)
        self.operations.append(f"E {x:.2f} {y:.2f} 0.7 0.7")

    def line(self, x0: float, y0: float, x1: float, y1: float, attributes: Mapping[str, str]) -> None:
        self.colour("c", attributes["color"])
        for word in (f"setlinewidth({attributes['penwidth']})", attributes.get("style", "solid")):
            self.operations.append(f"S {len(word)} -{word}")
        self.operations.append(f"L 2 {x0:.2f} {y0:.2f} {x1:.2f} {y1:.2f}")
        self.operations.append("S 5 -solid S 15 -setlinewidth(1)")

    def text(self, x: float, y: float, words: str, *, size: int, colour: str) -> None:
        words = printable(words)
        self.colour("c", colour)
        self.operations.append(f"F {size} {len(FONT)} -{FONT}")
        # -1: left-aligned. Lengths are in bytes.
        width, length = text_width(words, size), len(words.encode())
        self.operations.append(f"T {x:.2f} {y:.2f} -1 {width:.2f} {length} -{words}")

    def colour(self, pen_or_fill: str, colour: str) -> None:
        self.operations.append(f"{pen_or_fill} {len(colour)} -{colour}")
