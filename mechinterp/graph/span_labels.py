"""Where along its line each edge of a drawing says at which spans of the prompts it carries something."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from mechinterp.graph.circuit import Circuit
from mechinterp.graph.nodes import Edge
from mechinterp.graph.style import FONT, INK, printable

if TYPE_CHECKING:
    import pygraphviz

__all__ = ["label_spans", "span_marks"]

SIZE: Final = 7  # of the type, in points
LONGEST: Final = 7  # letters; longer names are numbered, and the key says which is which
MOST: Final = 150  # edges; beyond, lines lie too close for words on them
SAMPLES: Final = 40  # points of a line
CELL: Final = 6.0

Box = tuple[float, float, float, float]
Point = tuple[float, float]


def span_marks(circuit: Circuit) -> dict[str, str]:
    """What stands on a line for each span: its name, or where that is long, as are most names of two, its number.

    Numbers follow the text as far as the provenance tells its order, else the alphabet. Nothing in pictures of many edges.
    """
    used = {span for spans in circuit.spans.values() for span in spans}
    if not used or len(circuit) > MOST:
        return {}
    told = circuit.provenance.get("spans", ())
    order = {name: i for i, name in enumerate(told if isinstance(told, list | tuple) else ())}
    ranked = sorted(used, key=lambda name: (order.get(name, len(order)), name))
    if max(map(len, ranked)) <= LONGEST:
        return {name: printable(name) for name in ranked}
    return {name: str(number) for number, name in enumerate(ranked, start=1)}


def label_spans(agraph: pygraphviz.AGraph, circuit: Circuit, ids: Mapping[str, Edge], boxes: Mapping[str, Box]) -> None:
    """Put the marks of its spans on each edge that has any, where they hide least.

    Of some places on its line and beside it each mark takes the one at which it lies on no node and no other mark, and on as
    few other lines, and as little of its own, as can be.
    """
    marks = span_marks(circuit)
    if not marks:
        return
    # How many lines pass through each cell of a grid.
    crowd = Counter(cell for edge in agraph.edges() for cell in set(map(cell_of, points_along(edge))))
    taken = list(boxes.values())
    # The strongest edges choose first.
    named = [(ids[edge.attr["id"]], edge) for edge in agraph.edges() if edge.attr["id"] in ids]
    named.sort(key=lambda each: -abs(circuit.scores[each[0]] or 0.0))
    for edge, drawn in named:
        points = points_along(drawn)
        if edge not in circuit.spans or not points:
            continue
        names = [name for name in marks if name in circuit.spans[edge]]
        words = ", ".join(marks[name] for name in names)
        half_width, half_height = 0.3 * SIZE * len(words) + 2, SIZE / 2 + 1.5
        sides = ((0.0, 0.0), (half_width + 2, 0.0), (-half_width - 2, 0.0), (0.0, half_height + 2), (0.0, -half_height - 2))
        inner = range(len(points) // 6, len(points) - len(points) // 6)
        least, best = math.inf, points[0]
        for place in inner:
            for right, up in sides:
                x, y = points[place][0] + right, points[place][1] + up
                box = (x - half_width, y - half_height, x + half_width, y + half_height)
                own = sum(box[0] < px < box[2] and box[1] < py < box[3] for px, py in points) / len(points)
                cost = 100.0 * sum(overlap(box, other) for other in taken) + 3.0 * lines_in(box, crowd) + 30.0 * own
                # Beside the line only where that is clearly better, and rather in the middle.
                cost += 6.0 * bool(right or up) + abs(place / len(points) - 0.5)
                if cost < least:
                    least, best = cost, (x, y)
        x, y = best
        taken.append((x - half_width, y - half_height, x + half_width, y + half_height))
        drawn.attr["label"] = (
            f'<<table border="0" cellborder="0" cellspacing="0" cellpadding="1" bgcolor="#ffffff"><tr><td>'
            f'<font face="{FONT}" color="{INK}" point-size="{SIZE}">{html.escape(words)}</font></td></tr></table>>'
        )
        drawn.attr["lp"] = f"{x:.2f},{y:.2f}"


def points_along(edge: Any) -> list[Point]:
    """Points of an edge's line: Graphviz gives cubic Bezier curves, with the tips of arrows in front (``e,x,y``)."""
    spline = (edge.attr["pos"] or "").split(";")[0].split()
    pairs = [tuple(map(float, part.split(","))) for part in spline if part[0] not in "es"]
    pieces = [pairs[i : i + 4] for i in range(0, len(pairs) - 3, 3)]
    steps = max(2, SAMPLES // max(1, len(pieces)))
    found: list[Point] = []
    for (x0, y0), (x1, y1), (x2, y2), (x3, y3) in pieces:
        for step in range(steps):
            t = step / steps
            a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
            found.append((a * x0 + b * x1 + c * x2 + d * x3, a * y0 + b * y1 + c * y2 + d * y3))
    return found


def cell_of(point: Point) -> tuple[int, int]:
    return int(point[0] // CELL), int(point[1] // CELL)


def lines_in(box: Box, crowd: Mapping[tuple[int, int], int]) -> int:
    """How often lines pass through the cells of a box."""
    (left, low), (right, high) = cell_of(box[:2]), cell_of(box[2:])
    return sum(crowd.get((x, y), 0) for x in range(left, right + 1) for y in range(low, high + 1))


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
