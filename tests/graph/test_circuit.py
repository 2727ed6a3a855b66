"""Circuits: connectedness against networkx, set algebra, files."""

from __future__ import annotations

import copy
import json
import pickle
import random
import stat
from pathlib import Path

import networkx as nx
import pytest

from mechinterp.errors import FileFormatError, GraphError
from mechinterp.graph import Circuit, Edge, GraphShape, connected_edges_of, scored_edges
from mechinterp.graph.values import as_edge, as_score, plain_mapping

TOY = GraphShape(n_layers=2, n_heads=2)
GROUPED = GraphShape(n_layers=2, n_heads=4, n_kv_heads=2)
SMOLLM2 = GraphShape(n_layers=30, n_heads=9, n_kv_heads=3)


def random_circuit(seed: int) -> Circuit:
    generator = random.Random(seed)
    shape = GraphShape(
        generator.randint(1, 4),
        *generator.choice([(2, 2), (4, 2), (3, 1), (1, 1)]),
        parallel=generator.random() < 0.3,
        attn_only=generator.random() < 0.3,
    )
    edges = scored_edges(shape)
    chosen = generator.sample(edges, generator.randint(0, min(40, len(edges))))
    return Circuit.from_edges(shape, chosen, scores={edge: generator.gauss(0, 1) for edge in chosen[::2]})


@pytest.mark.parametrize("seed", range(150))
def test_connected_edges_are_those_on_paths(seed: int) -> None:
    """The oracle is networkx: an edge counts if embed reaches its start and its end reaches the logits."""
    circuit = random_circuit(seed)
    graph = nx.MultiDiGraph(circuit.graph)
    graph.add_nodes_from(["embed", "logits"])
    reached = nx.descendants(graph, "embed") | {"embed"}
    reaching = nx.ancestors(graph, "logits") | {"logits"}
    expected = [edge for edge in circuit.edges if edge.src in reached and edge.dst in reaching]
    assert list(circuit.connected().edges) == expected
    assert connected_edges_of(circuit.shape, circuit.edges) == tuple(expected)
    assert circuit.n_connected == len(expected) == circuit.connected().n_connected


def test_keys_reach_the_query_heads_of_their_group() -> None:
    path = ["embed->a0.kv1<k>", "a0.h2->logits"]
    assert Circuit.from_edges(GROUPED, path).n_connected == 2
    assert Circuit.from_edges(GROUPED, ["embed->a0.kv0<k>", "a0.h2->logits"]).n_connected == 0
    graph = Circuit.from_edges(GROUPED, path).graph
    assert list(graph.edges(keys=True, data="kind")) == [
        ("embed", "a0.kv1", "k", "scored"),
        ("a0.kv1", "a0.h2", "kv", "structural"),
        ("a0.h2", "logits", "in", "scored"),
    ]


@pytest.mark.parametrize("shape", [TOY, GROUPED, SMOLLM2], ids=repr)
def test_full_and_empty(shape: GraphShape) -> None:
    full, empty = Circuit.full(shape), Circuit.empty(shape)
    assert len(full) == full.n_connected == shape.n_edges
    assert full.nodes == shape.nodes
    assert len(empty) == empty.n_connected == 0
    assert empty.nodes == empty.heads() == ()
    assert bool(empty)
    assert full.edges == scored_edges(shape)


def test_edges_come_in_the_fixed_order_whatever_the_order_given() -> None:
    edges = list(scored_edges(TOY))
    random.Random(0).shuffle(edges)
    circuit = Circuit(TOY, {edge: float(i) for i, edge in enumerate(edges)})
    assert circuit.edges == tuple(circuit) == scored_edges(TOY)
    assert circuit.scores[edges[7]] == 7.0


def test_the_networkx_object() -> None:
    edge = Edge("a0.h1", "a1.h0", "k")
    circuit = Circuit.from_edges(TOY, [edge, "embed->m0"], scores={edge: -0.5})
    assert isinstance(circuit.graph, nx.MultiDiGraph)
    assert circuit.graph.edges[edge] == {"kind": "scored", "layer": 1, "head": 0, "score": -0.5}
    assert "score" not in circuit.graph.edges["embed", "m0", "in"]
    with pytest.raises(nx.NetworkXError, match=r"[Ff]rozen"):
        circuit.graph.add_edge("embed", "logits")
    changeable = circuit.graph.copy()
    changeable.remove_node("m0")
    assert "m0" in circuit.graph


def test_collapse_sums_over_ports() -> None:
    scores = {Edge("embed", "a1.h0", port): score for port, score in (("q", 2.0), ("k", -3.0))}
    plain = Circuit(TOY, {**scores, Edge("embed", "m0", "in"): None}).collapse()
    assert type(plain) is nx.DiGraph
    assert plain.edges["embed", "a1.h0"] == {
        "ports": "q,k", "kind": "scored", "layer": 1, "head": 0, "score": -1.0, "weight": 5.0,
    }  # fmt: skip
    assert "score" not in plain.edges["embed", "m0"]


def test_set_algebra_is_that_of_sets() -> None:
    edges = scored_edges(TOY)
    left = Circuit(TOY, dict.fromkeys(edges[:20], 1.0), {"method": "left"})
    right = Circuit(TOY, dict.fromkeys(edges[10:40], 2.0))
    assert set((left | right).edges) == set(edges[:40])
    assert set((left & right).edges) == set(edges[10:20])
    assert set((left - right).edges) == set(edges[:10])
    assert (left | right).scores[edges[15]] == (left & right).scores[edges[15]] == 1.0
    assert (right | left).scores[edges[15]] == 2.0
    assert left.iou(right) == right.iou(left) == 10 / 40
    assert left.iou(left) == Circuit.empty(TOY).iou(Circuit.empty(TOY)) == 1.0
    assert (left | right).provenance["left"] == {"method": "left"}
    with pytest.raises(
        GraphError,
        match=r"of different models: one of \d+ layers of \d+ heads.*, and one of .* Only circuits of one shape",
    ):
        left.iou(Circuit.empty(GROUPED))


def test_membership_heads_and_headline() -> None:
    edges = ["embed->a0.h1<v>", "a0.h1->a1.h0<k>", "a1.h0->logits", "a1.h1->logits"]
    circuit = Circuit.from_edges(TOY, edges, provenance={"task": "ioi", "model": "smollm2", "method": "eap-ig"})
    assert "a1.h0->logits" in circuit
    assert Edge("a1.h0", "logits", "in") in circuit
    assert "a0.h0->logits" not in circuit
    assert None not in circuit
    assert circuit.heads() == ("a0.h1", "a1.h0")
    assert repr(circuit) == "Circuit: 4 edges (3 connected) of 46, 5 nodes, ioi on smollm2 by eap-ig"
    assert repr(Circuit(TOY, {})) == "Circuit: 0 edges (0 connected) of 46, 0 nodes"


def test_a_circuit_is_a_value() -> None:
    provenance = {"model": "toy", "sizes": [1, 2]}
    scores = {Edge("embed", "m0", "in"): 1.0}
    circuit = Circuit(TOY, scores, provenance)
    provenance["sizes"].append(3)
    scores[Edge("embed", "logits", "in")] = 2.0
    assert len(circuit) == 1
    assert circuit.provenance["sizes"] == [1, 2]
    with pytest.raises(TypeError):
        circuit.scores[Edge("embed", "logits", "in")] = 1.0
    for twin in (copy.deepcopy(circuit), pickle.loads(pickle.dumps(circuit))):
        assert twin == circuit
        assert hash(twin) == hash(circuit)


def test_to_frame() -> None:
    pytest.importorskip("pandas")
    frame = Circuit(TOY, {Edge("embed", "m0", "in"): 1.5, Edge("embed", "logits", "in"): None}).to_frame()
    assert list(frame.columns) == ["src", "dst", "port", "value"]
    assert frame.values.tolist()[0] == ["embed", "m0", "in", 1.5]
    assert frame["value"].isna().tolist() == [False, True]


@pytest.mark.parametrize("seed", range(20))
def test_files_round_trip(tmp_path: Path, seed: int) -> None:
    circuit = random_circuit(seed)
    circuit = Circuit(circuit.shape, circuit.scores, {"seed": seed, "sites": ("a", "ü"), "path": Path("x")})
    circuit = circuit.with_report({"faithfulness": [0.1, 0.2 + 1e-17], "random": None})
    written = circuit.save(tmp_path / "deep" / "circuit.json")
    assert Circuit.load(written) == circuit
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep", written]


def test_file_layout(tmp_path: Path) -> None:
    path = Circuit(TOY, {Edge("embed", "a0.h0", "k"): 0.25}).save(tmp_path / "c.json")
    content = json.loads(path.read_text())
    assert (content["format"], content["version"]) == ("mechinterp-circuit", 1)
    assert content["edges"] == {"embed->a0.h0<k>": 0.25}
    assert '\n  "embed->a0.h0<k>": 0.25\n' in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Circuit(TOY, {}).save(tmp_path / "c.json")
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        Circuit.full(TOY).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


VALID = {"format": "mechinterp-circuit", "version": 1, "shape": {"n_layers": 2, "n_heads": 2}, "edges": {}}
BROKEN = [
    ("not json", "is not JSON (Expecting value"),
    ("[]", "is not a circuit: its format is 'list', not 'mechinterp-circuit'. Circuits are JSON files"),
    ('{"format": "other"}', "is not a circuit: its format is 'other'"),
    ({**VALID, "version": 4}, "is of version 4; this mechinterp reads versions 1 to 3. Upgrade mechinterp."),
    ({key: VALID[key] for key in ("format", "version", "shape")}, "but a broken one: it lacks 'edges'"),
    ({**VALID, "shape": {"layers": 2}}, "but a broken one:"),
    ({**VALID, "shape": None}, "but a broken one:"),
    ({**VALID, "edges": []}, "but a broken one:"),
    ({**VALID, "provenance": 7}, "but a broken one: provenance is a int. Give a mapping of names to values."),
    ({**VALID, "edges": {"embed->m9": 1}}, "but a broken one: There is no node m9: the layers are 0 to 1."),
    ({**VALID, "edges": {"embed->m0": "x"}}, "but a broken one: The score of embed->m0 is 'x'."),
    ('{"format": "mechinterp-circuit", "version": 1, "shape": {"n_layers": 1, "n_heads": 1}, '
     '"edges": {"embed->m0": NaN}}', "The score of embed->m0 is nan."),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BROKEN, ids=[message[:30] for _, message in BROKEN])
def test_broken_files_say_what_is_wrong(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(FileFormatError) as caught:
        Circuit.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_stands_for_the_circuit_in_it(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError) as caught:
        Circuit.load(tmp_path)
    assert str(caught.value) == f"{tmp_path} is a folder without a circuit.json. Give the file that Circuit.save() wrote."
    circuit = Circuit.from_edges(TOY, ["embed->logits"])
    circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path) == circuit


@pytest.mark.parametrize("name", ["ioi.svg", "ioi.PNG", "ioi.html"])
def test_pictures_are_drawn_not_saved(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        Circuit.from_edges(TOY, ["embed->logits"]).save(tmp_path / name)
    assert str(caught.value) == (
        f"{name!r} ends like a picture, and a circuit is saved as JSON. For the picture: mi.draw(circuit).save({name!r})"
    )
    assert list(tmp_path.iterdir()) == []


def test_binary_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b"\x80\xff\x00")
    with pytest.raises(FileFormatError, match="is not JSON"):
        Circuit.load(tmp_path / "c.json")
    with pytest.raises(FileNotFoundError):
        Circuit.load(tmp_path / "none.json")


MESSAGES = [
    (
        lambda: Circuit(TOY, {Edge("m1", "m0", "in"): 1.0}),
        "There is no edge m1->m0: m1 is not computed before m0.",
    ),
    (
        lambda: Circuit(TOY, {Edge("embed", "m0", "in"): float("nan")}),
        "The score of embed->m0 is nan. Give a finite",
    ),
    (
        lambda: as_score(Edge("embed", "m0", "in"), "x"),
        "The score of embed->m0 is 'x'. Give a finite number",
    ),
    (lambda: as_edge(7), "7 is not an edge. Give Edge(src, dst, port), or a text such as"),
    (
        lambda: Circuit(TOY, {}, {"x": object()}),
        "provenance['x'] is a object, which JSON cannot hold. Give numbers",
    ),
    (
        lambda: Circuit(TOY, {}, {"x": [{"y": float("inf")}]}),
        "provenance['x'][0]['y'] is inf, which JSON cannot",
    ),
    (lambda: plain_mapping({1: 2}, "provenance"), "provenance has the key 1. JSON has only texts as keys."),
    (
        lambda: Circuit(TOY, {}, report={"x": {1: 2}}),
        "report['x'] has the key 1. JSON has only texts as keys.",
    ),
]


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[message[:40] for _, message in MESSAGES])
def test_messages(call, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        call()
    assert message in str(caught.value)


# -- spans

A, B, C = (Edge.parse(text) for text in ("embed->a0.h1<v>", "a0.h1->logits", "m0->logits"))


def spanned(**spans: dict[str, float | None] | None) -> Circuit:
    """A circuit of the edges named: a mapping of spans, or None for everywhere."""
    edges = {{"A": A, "B": B, "C": C}[name]: at for name, at in spans.items()}
    scores = {edge: sum(s or 0.0 for s in at.values()) if at else 5.0 for edge, at in edges.items()}
    return Circuit(TOY, scores, spans={edge: at for edge, at in edges.items() if at})


def test_edges_at_some_spans() -> None:
    circuit = spanned(A={"S": 1.0, "end": -0.5}, B=None, C={"end": 2.0})
    assert repr(circuit) == f"Circuit: 3 edges (2 connected) of {TOY.n_edges}, 4 pairs of edge and span, 4 nodes"
    assert (len(circuit), circuit.n_pairs, circuit.n_connected, circuit.connected().n_pairs) == (3, 4, 2, 3)
    assert circuit.connected() == spanned(A={"S": 1.0, "end": -0.5}, B=None) == circuit.only(["a0.h1->logits", A])
    assert circuit != circuit.everywhere() and circuit.everywhere().spans == {} and len(circuit.everywhere()) == 3
    assert (
        circuit.graph.edges["embed", "a0.h1", "v"]["spans"] == "S,end"
        and "spans" not in circuit.graph.edges["a0.h1", "logits", "in"]
    )
    frame = circuit.to_frame()
    assert list(frame.columns) == ["src", "dst", "port", "span", "value"]
    assert frame["value"].tolist() == [1.0, -0.5, 5.0, 2.0]
    assert [span for span in frame["span"] if isinstance(span, str)] == ["S", "end", "end"]
    for same in (copy.deepcopy(circuit), pickle.loads(pickle.dumps(circuit))):
        assert same == circuit and hash(same) == hash(circuit)


def test_set_algebra_of_spans() -> None:
    left = spanned(A={"S": 1.0, "end": 2.0}, B=None)
    right = spanned(A={"end": 9.0, "IO": 3.0}, B={"S": 4.0}, C={"S": 7.0})
    both = left & right
    assert both.spans == {A: {"end": 2.0}, B: {"S": None}} and both.scores == {A: 2.0, B: 5.0}
    either = left | right
    assert either.spans == {A: {"S": 1.0, "end": 2.0, "IO": 3.0}, C: {"S": 7.0}} and either.scores == {A: 6.0, B: 5.0, C: 7.0}
    assert (right | left).spans == {A: {"end": 9.0, "IO": 3.0, "S": 1.0}, C: {"S": 7.0}}
    less = right - left
    assert less.spans == {A: {"IO": 3.0}, C: {"S": 7.0}} and less.scores == {A: 3.0, C: 7.0}
    assert (left & spanned(A={"IO": 1.0})).scores == {}
    a, c = spanned(A={"S": 1.0, "end": 2.0}), spanned(A={"end": 1.0}, C={"end": 1.0})
    assert a.iou(c) == 1 / 3 and a.iou(a) == 1.0 and spanned(B=None).iou(spanned(B=None, C={"S": 1.0})) == 0.5
    for call in (lambda: left - right, lambda: left.iou(right)):
        with pytest.raises(GraphError) as caught:
            call()
        assert str(caught.value) == (
            "a0.h1->logits is at all positions in one of these circuits and at some spans in the other, and which spans there "
            "are is not known here. Compare the edges alone: circuit.everywhere()."
        )


def test_files_of_circuits_with_spans(tmp_path: Path) -> None:
    circuit = spanned(A={"S": 1.0, "end": -0.5}, B=None, C={"end": None})
    path = circuit.save(tmp_path / "c.json")
    assert Circuit.load(path) == circuit
    content = json.loads(path.read_text())
    assert content["version"] == 2 and content["spans"]["embed->a0.h1<v>"] == {"S": 1.0, "end": -0.5}
    # What has no spans is written as it always was.
    assert json.loads(circuit.everywhere().save(path).read_text()).keys() == content.keys() - {"spans"}
    assert json.loads(path.read_text())["version"] == 1
    path.write_text(json.dumps(content | {"spans": {"m1->logits": {"S": 1.0}}}))
    with pytest.raises(FileFormatError, match="a broken one: There are spans of m1->logits, which is not in the circuit"):
        Circuit.load(path)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({B: {"S": 1.0}}, "There are spans of a0.h1->logits, which is not in the circuit. Give it a score too, or None."),
        ({A: {}}, "The spans of embed->a0.h1<v> are {}. Give each name of task.spans a score or None, or leave it out."),
        ({A: "end"}, "The spans of embed->a0.h1<v> are 'end'. Give each name of task.spans a score or None, or leave it out."),
        ({A: {3: 1.0}}, "spans of embed->a0.h1<v> has the key 3. JSON has only texts as keys."),
        ([A], "spans is a list. Give a mapping of edges to the names of their spans."),
    ],
    ids=["stranger", "none", "text", "number", "list"],
)
@pytest.mark.usefixtures("unchecked_types")
def test_spans_that_cannot_be(spans: object, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        Circuit(TOY, {A: 1.0}, spans=spans)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_only_edges_that_there_are() -> None:
    with pytest.raises(GraphError, match=r"^m0->logits is not in this circuit of 1 edge\.$"):
        spanned(A=None).only([C])


def test_spans_come_in_the_order_of_the_edges() -> None:
    shape = GraphShape(n_layers=1, n_heads=1, attn_only=True)
    first, last = "embed->a0.h0<v>", "a0.h0->logits"
    circuit = Circuit(
        shape,
        {Edge.parse(last): None, Edge.parse(first): None},
        spans={Edge.parse(last): {"a": None}, Edge.parse(first): {"b": None}},
    )
    assert tuple(circuit.spans) == circuit.edges == (Edge.parse(first), Edge.parse(last))
