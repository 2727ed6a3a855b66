"""Pictures: complete, self-contained, escaped, and the same in all formats."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mechinterp.errors import GraphError, MissingExtraError
from mechinterp.graph import Circuit, Edge, GraphShape, connected_edges, draw, parse_node, scored_edges
from mechinterp.graph.legend import box_of, points_of
from mechinterp.graph.span_labels import points_along, span_marks

pytest.importorskip("pygraphviz")

ROOT = Path(__file__).parents[2]
TOY = GraphShape(n_layers=2, n_heads=2)
GROUPED = GraphShape(n_layers=6, n_heads=4, n_kv_heads=2)
SVG = "{http://www.w3.org/2000/svg}"
NASTY = "<script>alert('x')</script>\"&\x07\n$data ü]]>"


def circuit_of(n: int, shape: GraphShape = GROUPED) -> Circuit:
    generator = random.Random(0)
    scores = {edge: generator.gauss(0, 1) ** 3 for edge in scored_edges(shape)}
    return connected_edges(shape, scores, n, provenance={"task": "ioi", "model": "toy", "method": "eap"})


def marks(svg: str, kind: str) -> dict[str, str]:
    """Title of each node or edge in an SVG, by id."""
    groups = (g for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if g.get("class") == kind)
    return {group.get("id", ""): group.findtext(f"{SVG}title", "") for group in groups}


# 60 edges are routed where dot places them, 150 around nodes that stand already.
@pytest.mark.parametrize("n", [1, 60, 150])
def test_every_node_and_edge_is_drawn(n: int) -> None:
    circuit = circuit_of(n)
    svg = draw(circuit, max_edges=n + 4).svg
    titles = marks(svg, "edge")
    drawn = {Edge.parse(title.split()[0]): title.split()[1] for name, title in titles.items() if name[0] == "e"}
    assert drawn.keys() == set(circuit.edges)
    assert all(float(text) == pytest.approx(circuit.scores[edge], rel=1e-3) for edge, text in drawn.items())
    assert marks(svg, "node").keys() == {f"n_{name}" for name in circuit.nodes}
    structural = {f"s_{dst}" for _, dst, kind in circuit.graph.edges(data="kind") if kind == "structural"}
    assert {name for name in titles if name[0] == "s"} == structural


@pytest.mark.parametrize("n", [60, 150])
def test_layers_are_rows_from_the_bottom_up(n: int) -> None:
    circuit = circuit_of(n)
    heights = {}
    for group in ElementTree.fromstring(draw(circuit, max_edges=n + 4).svg).iter(f"{SVG}g"):
        if group.get("class") == "node":
            heights[group.get("id", "")[2:]] = -float(group.find(f"{SVG}text").get("y"))
    layer = {name: circuit.shape.parse(name).layer for name in circuit.nodes}
    for low in circuit.nodes:
        for high in circuit.nodes:
            if layer[low] is not None and layer[high] is not None and layer[low] < layer[high]:
                assert heights[low] < heights[high]
    assert heights["embed"] == min(heights.values())
    assert heights["logits"] == max(heights.values())


def test_sign_is_shown_without_colour_too() -> None:
    positive, negative = Edge("embed", "m0", "in"), Edge("m0", "logits", "in")
    svg = draw(Circuit(TOY, {positive: 4.0, negative: -1.0})).svg
    paths = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        if group.get("class") == "edge":
            paths[group.findtext(f"{SVG}title", "").split()[0]] = group.find(f"{SVG}path").attrib
    solid, dashed = paths["embed->m0"], paths["m0->logits"]
    assert "stroke-dasharray" not in solid
    assert "stroke-dasharray" in dashed
    assert solid["stroke"] != dashed["stroke"]
    assert float(solid["stroke-width"]) > float(dashed["stroke-width"])
    assert "positive, up to +4" in svg
    assert "negative, up to \N{MINUS SIGN}1" in svg


def test_ports_are_cells_of_the_head() -> None:
    for shape, ports in ((TOY, ["q", "k", "v"]), (GROUPED, ["q"])):
        circuit = Circuit.from_edges(shape, ["embed->a0.h0<q>", "a0.h0->logits"])
        groups = ElementTree.fromstring(draw(circuit).svg).iter(f"{SVG}g")
        head = next(group for group in groups if group.get("id") == "n_a0.h0")
        assert [text.text for text in head.iter(f"{SVG}text")] == (["a0.h0", *ports] if len(ports) > 1 else [*ports, "a0.h0"])


def test_captions_say_what_is_left_out() -> None:
    dangling = circuit_of(60) | Circuit.from_edges(GROUPED, ["embed->a5.h3<q>", "embed->a0.kv0<v>"])
    assert draw(circuit_of(60)).caption == "All 60 edges of the circuit, 784 in the model."
    n = dangling.n_connected
    assert n < len(dangling)
    assert draw(dangling).caption.startswith(f"The {n} edges on paths from embed to logits, of {len(dangling)} in")
    some = draw(dangling, max_edges=20)
    assert some.caption == (
        f"The strongest 20 that connect, of {n} edges on paths from embed to logits; "
        f"{len(dangling)} in the circuit, 784 in the model."
    )
    assert len(some.circuit) == some.circuit.n_connected == 20
    assert len(draw(dangling, connected=False).circuit) == len(dangling)
    assert draw(dangling, connected=False, max_edges=9).caption.startswith("The strongest 9 of ")
    assert repr(some) == f"Diagram: 20 edges and {len(some.circuit.nodes)} nodes of a circuit of {len(dangling)} edges"
    assert some.caption.split(";")[0] in " ".join(re.findall(r">([^<]*)</text>", some.svg))


@pytest.mark.parametrize("edges", [[], ["m0->logits"]], ids=["empty", "dangling"])
def test_circuits_without_a_path_can_be_drawn(edges: list[str]) -> None:
    assert marks(draw(Circuit.from_edges(TOY, edges)).svg, "node").keys() == {"n_embed", "n_logits"}


def test_the_key_explains_nodes_ports_and_widths() -> None:
    def key(circuit: Circuit) -> str:
        # xdot draws in cairo without spaces of its own: the words are as they were given.
        return " | ".join(text for text in ElementTree.fromstring(draw(circuit).svg).itertext() if text.strip())

    grouped = key(circuit_of(60))
    assert all(words in grouped for words in ("attention head", "KV head", "MLP", "q k v: read as query, key, value"))
    plain = key(Circuit.from_edges(TOY, ["embed->m0", "m0->logits"]))
    assert "MLP" in plain
    assert "head" not in plain and "q k v" not in plain


def test_one_huge_edge_does_not_make_the_others_thin() -> None:
    circuit = circuit_of(60)
    edges = list(circuit.scores)
    scores = {**dict.fromkeys(edges, 0.5), edges[0]: 1000.0}
    svg = draw(Circuit(GROUPED, scores), connected=False).svg
    assert "full width from 0.5 on" in svg
    assert "positive, up to +1e+03" in svg
    widths = {
        float(width) for width in re.findall(r'class="edge">(?:(?!</g>).)*?<path[^>]*stroke-width="([\d.]+)"', svg, re.DOTALL)
    }
    assert 4.0 in widths and min(widths) >= 1.0
    # In a small picture the strongest edge sets the scale, and nothing has to be said.
    small = dict(list(scores.items())[:10])
    assert "full width" not in draw(Circuit(GROUPED, small), connected=False).svg


def test_layers_that_are_left_out_are_marked() -> None:
    def dots(*edges: str) -> int:
        return draw(Circuit.from_edges(GROUPED, edges)).svg.count("<ellipse")

    assert dots("embed->m0", "m0->m1", "m1->logits") == 0
    assert dots("embed->m0", "m0->m4", "m4->logits") == 3
    assert dots("embed->m0", "m0->m2", "m2->m5", "m5->logits") == 6


def test_a_png_is_opaque() -> None:
    """Every pixel of every row, the last one and the last column too; measured with matplotlib's reader."""
    image = pytest.importorskip("matplotlib.image")
    for n in (5, 20, 60):
        pixels = image.imread(io.BytesIO(draw(circuit_of(n)).render("png")))
        assert pixels.shape[2] == 3 or pixels[..., 3].min() == 1.0
        assert pixels[0, 0, :3].tolist() == [1.0, 1.0, 1.0]


def test_forty_edges_of_thirty_layers_fit_a_page() -> None:
    """Thirty-layer models: forty edges fit a page of 500 by 700 points at nine points of type."""
    circuit = Circuit.load(ROOT / "circuits" / "ioi-smollm2-135m" / "circuit.json")
    box = re.search(r'viewBox="0.00 0.00 ([\d.]+) ([\d.]+)"', draw(circuit, max_edges=40).svg)
    assert box
    assert float(box[1]) <= 610 and float(box[2]) <= 700


def test_edges_keep_clear_of_nodes() -> None:
    """No edge is drawn through the middle of a node that it does not belong to."""
    circuit = Circuit.load(ROOT / "circuits" / "ioi-smollm2-135m" / "circuit.json")
    for n in (30, 40, 100):
        graph = pygraphviz_of(draw(circuit, max_edges=n).dot)
        boxes = {str(node): box_of(node) for node in graph.nodes() if not str(node).startswith("corner")}
        struck = set()
        for edge in graph.edges():
            for x, y in along(points_of(edge)):
                for name, (left, low, right, high) in boxes.items():
                    inside = left + 3 < x < right - 3 and low + 3 < y < high - 3
                    if inside and name not in (str(edge[0]), str(edge[1])):
                        struck.add((str(edge[0]), str(edge[1]), name))
        assert not struck


def pygraphviz_of(dot: str) -> Any:
    import pygraphviz

    return pygraphviz.AGraph(dot)


def along(controls: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Points on the cubic curves of an edge; the first control point is the arrow's tip."""
    spline = controls[1:]
    for first in range(0, len(spline) - 3, 3):
        a, b, c, d = spline[first : first + 4]
        for step in range(21):
            t = step / 20
            weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
            yield tuple(sum(w * p[i] for w, p in zip(weights, (a, b, c, d), strict=True)) for i in (0, 1))  # type: ignore[misc]


def test_labels_may_name_sites() -> None:
    circuit = circuit_of(20)
    name = circuit.heads()[0]
    layer, head = parse_node(name).layer, parse_node(name).head
    assert draw(circuit, labels={f"L{layer}.H{head}": "mine"}).svg == draw(circuit, labels={name: "mine"}).svg
    with pytest.raises(GraphError, match=r"^There is no node a9.h0: the layers are 0 to 5.$"):
        draw(circuit, labels={"L9.H0": "x"})


def test_one_edge_is_not_edges() -> None:
    one = Circuit.from_edges(TOY, ["embed->logits"])
    assert repr(one) == "Circuit: 1 edge (1 connected) of 46, 2 nodes"
    assert repr(draw(one)) == "Diagram: 1 edge and 2 nodes of a circuit of 1 edge"
    assert draw(one).caption == "The one edge of the circuit, 46 in the model."


def test_pages_open_at_full_width() -> None:
    """The view is cut to the window's proportions; the whole picture is a button away."""
    page = draw(circuit_of(20)).html
    assert "if (opened.width > 0) view[3] = Math.min(whole[3], whole[2] * opened.height / opened.width);" in page
    # And the box to find nodes understands "L9.H6".
    assert '.replace(/^l(\\d+)\\.(h|kv)/, "a$1.$2")' in page


def test_titles() -> None:
    assert draw(circuit_of(5)).title == "ioi on toy by eap"
    assert draw(circuit_of(5), title="").title == ""
    assert "mine" in draw(circuit_of(5), title="mine").svg


@pytest.mark.parametrize("suffix", ["dot", "svg", "png", "pdf", "html"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = draw(circuit_of(20)).save(tmp_path / "deep" / f"circuit.{suffix}")
    begins = {
        "dot": b"digraph",
        "svg": b"<?xml",
        "png": b"\x89PNG",
        "pdf": b"%PDF",
        "html": b"<!DOCTYPE html>",
    }
    assert path.read_bytes().lstrip().startswith((begins[suffix], b"strict " + begins[suffix]))


def test_dot_text_renders_to_the_same_picture() -> None:
    import pygraphviz

    diagram = draw(circuit_of(150), max_edges=160)
    again = pygraphviz.AGraph(diagram.dot).draw(format="svg", prog="nop2").decode()
    assert re.findall(r' d="[^"]*"', again) == re.findall(r' d="[^"]*"', diagram.svg)


def test_drawing_twice_is_the_same() -> None:
    assert draw(circuit_of(60)).svg == draw(circuit_of(60)).svg


def test_nothing_points_outside() -> None:
    page = draw(circuit_of(60)).html
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<(link|img|iframe|object|base)\b|\bsrc=|@import|url\(|fetch\(|<script[^>]*\bsrc", page)
    assert "<!DOCTYPE svg" not in page


def test_labels_are_escaped_everywhere() -> None:
    circuit = Circuit(GROUPED, dict.fromkeys(circuit_of(20).scores, 1.0), {"task": NASTY})
    diagram = draw(circuit, labels={circuit.heads()[0]: NASTY})
    assert "alert('x')" in " ".join(ElementTree.fromstring(diagram.svg).itertext())
    assert not re.search(r"<script>\s*alert", diagram.svg)
    page = diagram.html
    assert len(re.findall(r"<script\b", page)) == len(re.findall(r"</script>", page)) == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["labels"] == {circuit.heads()[0]: NASTY}
    for suffix in ("png", "pdf"):
        assert diagram.render(suffix)


def test_the_page_knows_every_edge_by_its_id() -> None:
    circuit = circuit_of(60)
    page = draw(circuit).html
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert {Edge(src, dst, port): score for _, src, dst, port, score, _ in data["edges"]} == dict(circuit.scores)
    for identity, *_ in data["edges"]:
        assert page.count(f'<g id="{identity}" class="edge">') == 1
    for _, head in data["structural"]:
        assert page.count(f'<g id="s_{head}" class="edge">') == 1


def box_of_mark(edge: Any, words: str) -> tuple[float, float, float, float]:
    x, y = map(float, edge.attr["lp"].split(","))
    return x - 2.1 * len(words), y - 4, x + 2.1 * len(words), y + 4


def apart(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_spans_stand_on_their_lines_and_hide_no_node_or_each_other() -> None:
    import pygraphviz

    plain = circuit_of(30)
    names = ("S1", "S1..end", "end")
    some = {edge: {names[i % 3]: 1.0, **({"end": None} if i % 5 == 0 else {})} for i, edge in enumerate(plain) if i != 7}
    circuit = Circuit(GROUPED, plain.scores, {"spans": list(names)}, spans=some)
    diagram = draw(circuit)
    # The text of an edge's group is its mark, so that it comes and goes with the edge.
    groups = {g.get("id"): g for g in ElementTree.fromstring(diagram.svg).iter(f"{SVG}g") if g.get("class") == "edge"}
    told = {identity: "".join(text.text or "" for text in group.iter(f"{SVG}text")) for identity, group in groups.items()}
    for i, edge in enumerate(circuit.edges):
        assert told[f"e{i}"] == ", ".join(name for name in names if name in some.get(edge, {}))
    assert "on a line: the part of the prompt at which it carries" in diagram.svg
    assert "without a mark: everywhere" in diagram.svg
    agraph = pygraphviz.AGraph(diagram.dot)
    marked = [box_of_mark(edge, told[edge.attr["id"]]) for edge in agraph.edges() if told.get(edge.attr["id"])]
    nodes = [box_of(node) for node in agraph.nodes() if not str(node).startswith("corner")]
    assert len(marked) == 29
    hidden = sum(not apart(mark, node) for mark in marked for node in nodes)
    crossed = sum(not apart(mark, other) for i, mark in enumerate(marked) for other in marked[:i])
    assert hidden + crossed <= 1
    # Near its own line: not further than beside it.
    for edge in agraph.edges():
        if told.get(edge.attr["id"]):
            x, y = map(float, edge.attr["lp"].split(","))
            assert min(abs(px - x) + abs(py - y) for px, py in points_along(edge)) < 2.1 * len(told[edge.attr["id"]]) + 12
    without = draw(plain)
    assert "on a line" not in without.svg
    assert not any("<text" in group for group in without.svg.split('<g id="e')[1:30])


def test_long_names_of_spans_are_numbered_in_the_order_of_the_text() -> None:
    edges = circuit_of(3).edges
    names = ("zebra..crossing", "crossing", "crossing..")
    spans = {edge: {name: 1.0} for edge, name in zip(edges, reversed(names), strict=False)}
    circuit = Circuit(GROUPED, dict.fromkeys(edges, 1.0), {"spans": list(names)}, spans=spans)
    svg = draw(circuit).svg
    for number, name in enumerate(names, start=1):
        assert f"{number} = {name}" in svg
    # Without that order the alphabet; of many edges nothing.
    assert span_marks(replace(circuit, provenance={})) == {"crossing": "1", "crossing..": "2", "zebra..crossing": "3"}
    many = circuit_of(160)
    crowded = Circuit(GROUPED, many.scores, spans={edge: {"S1": 1.0} for edge in many})
    assert span_marks(crowded) == {} and span_marks(many) == {}
    assert span_marks(crowded.only(crowded.edges[:150])) == {"S1": "S1"}


def test_spans_are_told_with_the_edges() -> None:
    plain = circuit_of(20)
    edge = plain.edges[3]
    diagram = draw(Circuit(GROUPED, plain.scores, spans={edge: {"S1": 0.25, "S1..end": -0.5, "end": None}}))
    assert diagram.caption.endswith(" in the model. They carry at some spans of the prompts: 22 pairs of edge and span.")
    assert marks(diagram.svg, "edge")["e3"] == f"{edge}  {plain.scores[edge]:+.4g}\nS1..end  -0.5\nS1  +0.25\nend"
    assert diagram.dot.count('comment="S1..end  -0.5; S1  +0.25; end"') == diagram.dot.count("comment=") == 1
    data = json.loads(re.search(r'id="data">(.*?)</script>', diagram.html, re.DOTALL)[1])
    assert [spans for *_, spans in data["edges"] if spans] == [["S1..end  -0.5", "S1  +0.25", "end"]]


def test_notebooks_show_circuits_and_diagrams() -> None:
    circuit = circuit_of(20)
    svg = circuit._repr_svg_()
    assert svg == draw(circuit)._repr_svg_()
    assert svg.startswith("<svg")
    assert "max-width:100%" in svg


def test_without_pygraphviz(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    diagram = draw(circuit_of(5))
    with pytest.raises(MissingExtraError, match=r"^drawing a circuit needs pygraphviz. .* 'mechinterp-hooks\[draw\]'$"):
        diagram.save(tmp_path / "c.svg")
    assert diagram._repr_svg_() is None
    assert list(tmp_path.iterdir()) == []


MESSAGES = [
    (
        lambda: draw(circuit_of(5)).save("c.jpg"),
        "'c.jpg' does not end like a picture that can be drawn. Did you mean '.png'?",
    ),
    (lambda: draw(circuit_of(5)).save("c.htm"), "Did you mean '.html'?"),
    (
        lambda: draw(circuit_of(5), max_edges=0),
        "max_edges=0 is not a number of edges. Give a whole number of at least 1.",
    ),
    (lambda: draw(circuit_of(5), labels={"a9.h0": "x"}), "There is no node a9.h0: the layers are 0 to 5."),
]


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[message[:40] for _, message in MESSAGES])
def test_messages(call, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        call()
    assert message in str(caught.value)


def test_the_island_is_light() -> None:
    """Circuits can be read and drawn where there is no torch; pygraphviz waits until something is drawn."""
    code = "import sys, mechinterp.graph; print({'torch', 'pygraphviz', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
