"""Marks of spans on lines that are written out: which, in which order, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from mechinterp.graph import Circuit, Edge, GraphShape
from mechinterp.graph.span_labels import label_spans, overlap, points_along, span_marks

SHAPE = GraphShape(n_layers=1, n_heads=2)
ONE, TWO = Edge("embed", "m0", "in"), Edge("m0", "logits", "in")
ACROSS = "0,0 30,0 60,0 90,0"


@dataclass
class Line:
    attr: dict[str, str]


@dataclass
class Drawing:
    lines: Sequence[Line] = field(default_factory=list)

    def edges(self) -> Sequence[Line]:
        return self.lines


def circuit_of(scores: dict[Edge, float], spans: dict[Edge, Sequence[str]], order: Sequence[str] = ()) -> Circuit:
    named: Any = {edge: dict.fromkeys(names) for edge, names in spans.items()}
    return Circuit(SHAPE, scores, {"spans": list(order)}, spans=named)


def labelled(circuit: Circuit, **places: str) -> dict[str, dict[str, str]]:
    """What is written on lines that are called e0 (of ONE), e1 (of TWO), or otherwise (of no edge of the circuit)."""
    drawing: Any = Drawing([Line({"id": name, "pos": place}) for name, place in places.items()])
    label_spans(drawing, circuit, {"e0": ONE, "e1": TWO}, {})
    return {line.attr["id"]: line.attr for line in drawing.lines}


def test_points_along_two_curves() -> None:
    line = Line({"pos": "e,9,9 0,0 1,2 3,2 4,0 5,-2 7,-2 8,0"})
    points = points_along(line)
    assert len(points) == 40 and points[0] == (0.0, 0.0) and points[20] == (4.0, 0.0)
    # Halfway: an eighth of the ends and three eighths of what pulls.
    assert points[10] == pytest.approx((2.0, 1.5)) and points[30] == pytest.approx((6.0, -1.5))


def test_boxes_overlap_where_they_share_an_area() -> None:
    box = (0.0, 0.0, 2.0, 2.0)
    assert overlap(box, (1.0, 1.0, 3.0, 3.0)) and overlap(box, (-1.0, -1.0, 3.0, 3.0)) and overlap(box, (0.5, 0.5, 1.0, 1.0))
    for away in ((2.0, 0.0, 4.0, 2.0), (-2.0, 0.0, 0.0, 2.0), (0.0, 2.0, 2.0, 4.0), (0.0, -2.0, 2.0, 0.0)):
        assert not overlap(box, away) and not overlap(away, box)


def test_names_stand_in_the_order_of_the_text() -> None:
    circuit = circuit_of({ONE: 1.0}, {ONE: ["a&b", "c"]}, ["c", "a&b"])
    assert ">c, a&amp;b</font>" in labelled(circuit, e0=ACROSS)["e0"]["label"]
    # What the provenance does not tell comes last, by the alphabet.
    several = circuit_of({ONE: 1.0}, {ONE: ["a", "b", "z"]}, ["z"])
    assert list(span_marks(several)) == ["z", "a", "b"]


def test_marks_stand_where_no_other_line_passes() -> None:
    circuit = circuit_of({ONE: 1.0}, {ONE: ["S1"]})
    alone = labelled(circuit, e0=ACROSS)["e0"]["lp"]
    crossed = labelled(circuit, e0=ACROSS, other="45,-60 45,-20 45,20 45,60")["e0"]["lp"]
    # In the middle, unless something passes there.
    assert abs(float(alone.split(",")[0]) - 45) < 3 and abs(float(crossed.split(",")[0]) - 45) > 6.2


def test_the_strongest_choose_first() -> None:
    both = circuit_of({ONE: 1.0, TWO: -3.0}, {ONE: ["S1"], TWO: ["S1"]})
    found = labelled(both, e0=ACROSS, e1=ACROSS)
    alone = labelled(replace(both, spans={TWO: {"S1": None}}), e0=ACROSS, e1=ACROSS)
    assert found["e1"]["lp"] == alone["e1"]["lp"] != found["e0"]["lp"]
    assert "lp" not in alone["e0"]
