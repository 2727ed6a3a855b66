"""Circuits whose MLPs keep some of their neurons: values, set algebra against sets of single neurons, files, pictures."""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mechinterp.errors import FileFormatError, GraphError
from mechinterp.graph import Circuit, Edge, GraphShape, draw, random_neurons, random_pairs, scored_edges
from mechinterp.graph.graph import edges_among
from mechinterp.graph.inflate import inflate
from mechinterp.graph.neurons import as_neurons, nodes_of, parse_neuron

TOY = GraphShape(n_layers=3, n_heads=2)
GROUPED = GraphShape(n_layers=6, n_heads=4, n_kv_heads=2)
WIDTH = 3  # of an MLP, where one has to be known
PATH = ["embed->m0", "m0->a1.h1<v>", "a1.h1->m1", "m1->logits", "embed->m2"]


def some(**neurons: dict[int, float | None]) -> Circuit:
    return Circuit(TOY, dict.fromkeys(Circuit.from_edges(TOY, PATH), 1.0), neurons=neurons)


def test_mlps_with_some_neurons() -> None:
    circuit = some(m1={40: -0.5, 12: None}, m0={3: 2.0})
    assert repr(circuit) == f"Circuit: 5 edges (4 connected) of {TOY.n_edges}, 3 neurons of 2 MLPs, 6 nodes"
    assert circuit.neurons == {"m0": {3: 2.0}, "m1": {12: None, 40: -0.5}} and list(circuit.neurons) == ["m0", "m1"]
    assert list(circuit.neurons["m1"]) == [12, 40] and circuit.n_neurons == 3
    assert circuit.with_neurons(["L1.N40.mlp_post", "m1.n12", "m0.n3"]).neurons == {"m0": {3: None}, "m1": {12: None, 40: None}}
    assert circuit != circuit.with_neurons({}) and circuit.with_neurons({}).neurons == {}
    assert hash(circuit) == hash(some(m1={40: -0.5, 12: None}, m0={3: 2.0}))
    assert circuit.only(["m0->a1.h1<v>", "embed->m2"]).neurons == {"m0": {3: 2.0}}
    assert circuit.connected().neurons == circuit.neurons and some(m2={1: None}).connected().neurons == {}
    # Nothing passes an MLP without a neuron.
    assert some(m1={}).n_connected == 0 and some(m1={}).n_neurons == 0
    assert dict(circuit.graph.nodes(data="neurons")) | {"m1": None} == dict.fromkeys(circuit.nodes) | {"m0": "3"}
    assert circuit.graph.nodes["m1"]["neurons"] == circuit.collapse().nodes["m1"]["neurons"] == "12,40"
    for same in (copy.deepcopy(circuit), pickle.loads(pickle.dumps(circuit))):
        assert same == circuit and hash(same) == hash(circuit)
    assert inflate(circuit, seed=0)[0].neurons == circuit.neurons


def test_neurons_are_in_the_order_of_computation() -> None:
    deep = GraphShape(n_layers=11, n_heads=1)
    found = as_neurons(["m10.n3", "m2.n7", "m2.n5"], deep, ["m2", "m10"])
    assert [(mlp, list(kept)) for mlp, kept in found.items()] == [("m2", [5, 7]), ("m10", [3])]
    # One MLP under two of its names is one.
    assert as_neurons({"L2.mlp_out": {7: 0.5}, "m2": {5: None}}, deep, ["m2"]) == {"m2": {5: None, 7: 0.5}}


def test_names_of_neurons() -> None:
    assert parse_neuron("m13.n402") == parse_neuron("L13.N402.mlp_post") == ("m13", 402)
    assert [parse_neuron(name) for name in ("m3", "m3.h1", "a0.h1", "L3.N12.mlp_pre")] == [None] * 4
    assert nodes_of(["m3.n12", "m3.n1", "a0.h1", "m4"]) == {"m3", "a0.h1", "m4"}


# -- set algebra


def drawn(seed: int) -> Circuit:
    generator = random.Random(seed)
    edges = generator.sample(scored_edges(TOY), generator.randint(1, 40))
    circuit = Circuit.from_edges(TOY, edges)
    kept: dict[str, dict[int, float | None]] = {}
    for mlp in ("m0", "m1", "m2"):
        if mlp in circuit.nodes and generator.random() < 0.6:
            kept[mlp] = dict.fromkeys(generator.sample(range(WIDTH), generator.randint(0, WIDTH)))
    return Circuit(TOY, circuit.scores, neurons=kept)


def single(circuit: Circuit) -> set[Any]:
    """Every edge between single neurons, heads and the rest."""

    def parts(node: str) -> list[Any]:
        if not node.startswith("m"):
            return [node]
        return [(node, neuron) for neuron in circuit.neurons.get(node, range(WIDTH))]

    return {(u, v, edge.port) for edge in circuit for u in parts(edge.src) for v in parts(edge.dst)}


@pytest.mark.parametrize("seed", range(60))
def test_set_algebra_is_that_of_edges_between_neurons(seed: int) -> None:
    left, right = drawn(seed), drawn(1000 + seed // 2)
    assert single(left & right) == single(left) & single(right)
    either = left | right
    assert single(either) >= single(left) | single(right)
    # No neuron more than needed.
    assert set(either) == {*left, *right}
    assert {part for edge in single(either) for part in edge[:2]} <= {
        part for each in (left, right) for edge in either for node in edge[:2] if node in each.nodes for part in ends(each, node)
    }
    shared = {node for edge in left if edge in right for node in edge[:2]}
    kept = [(left.neurons.get(mlp), right.neurons.get(mlp)) for mlp in shared]
    if all(theirs is None or (mine is not None and mine.keys() <= theirs.keys()) for mine, theirs in kept):
        assert single(left - right) == single(left) - single(right)
    else:
        with pytest.raises(GraphError, match="and the left one neurons of it that the right one lacks"):
            left - right


def ends(circuit: Circuit, node: str) -> list[Any]:
    return [(node, i) for i in circuit.neurons.get(node, range(WIDTH))] if node.startswith("m") else [node]


def test_agreement_counts_edges_and_neurons() -> None:
    left, right = some(m0={1: 1.0, 2: 2.0}, m1={5: 3.0}), some(m0={2: 9.0, 7: 9.0}, m1={5: 9.0})
    assert left.iou(right) == (5 + 2) / (5 + 4) and left.iou(left) == 1.0
    assert (left & right).neurons == {"m0": {2: 2.0}, "m1": {5: 3.0}}
    assert (left | right).neurons == {"m0": {1: 1.0, 2: 2.0, 7: 9.0}, "m1": {5: 3.0}}
    assert (left & right.with_neurons({})).neurons == left.neurons and (left | right.with_neurons({})).neurons == {}
    assert set(left & some(m0={3: None})) == {edge for edge in left if "m0" not in edge}
    with pytest.raises(GraphError) as caught:
        left.iou(some(m0={1: None}))
    assert str(caught.value) == (
        "m1 is whole in one of these circuits and keeps some neurons in the other, and how many there are is not known here. "
        "Compare the edges alone: circuit.with_neurons({})."
    )
    with pytest.raises(GraphError, match="m1 is whole in one of these circuits"):
        some(m0={1: None}).iou(left)
    with pytest.raises(GraphError) as caught:
        left - right
    assert str(caught.value) == (
        "Both circuits have edges of m0, and the left one neurons of it that the right one lacks: what is left of these edges is "
        "no edge of a circuit. Compare the edges alone: circuit.with_neurons({})."
    )


# -- files


def test_files_of_circuits_with_neurons(tmp_path: Path) -> None:
    circuit = some(m0={3: 2.0, 1: None}, m1={})
    path = circuit.save(tmp_path / "c.json")
    assert Circuit.load(path) == circuit
    content = json.loads(path.read_text())
    assert content["version"] == 3 and content["neurons"] == {"m0": {"1": None, "3": 2.0}, "m1": {}}
    # What has no neurons is written as it always was.
    plain = json.loads(circuit.with_neurons({}).save(path).read_text())
    assert plain.keys() == content.keys() - {"neurons"} and plain["version"] == 1
    for neurons, said in (
        ({"m0": {"x": 1.0}}, "invalid literal for int"),
        ({"m7": {"1": 1.0}}, "There is no node m7"),
        ({"a1.h1": {"1": 1.0}}, "There are neurons of a1.h1, and only MLPs have neurons"),
    ):
        path.write_text(json.dumps(content | {"neurons": neurons}))
        with pytest.raises(FileFormatError, match=f"a broken one: {said}"):
            Circuit.load(path)


# -- chance


@pytest.mark.parametrize("seed", range(5))
def test_random_circuits_have_as_many_heads_mlps_and_neurons(seed: int) -> None:
    edges = edges_among(GROUPED, ["a1.h0", "a3.h2", "m0", "m2", "m5"])
    like = Circuit.from_edges(GROUPED, edges).with_neurons(["m0.n1", "m0.n2", "m0.n9", "m5.n4"])
    rival = random_pairs(like, seed=seed, d_mlp=12)
    assert rival == random_neurons(like, seed=seed, d_mlp=12) == random_pairs(like, seed=seed, d_mlp=12)
    kinds = Counter(GROUPED.parse(name).kind for name in rival.nodes)
    assert kinds["head"] == 2 and kinds["mlp"] == 3
    assert sorted(len(kept) for kept in rival.neurons.values()) == [1, 3]
    assert all(0 <= i < 12 for kept in rival.neurons.values() for i in kept)
    assert all(list(kept) == sorted(kept) for kept in rival.neurons.values())
    assert set(rival) == set(edges_among(GROUPED, rival.nodes))
    assert rival.nodes != like.nodes
    # Half of the edges: about half of its own.
    half = like.only(like.edges[::2])
    fewer = random_neurons(half, seed=seed, d_mlp=12)
    whole = len(edges_among(GROUPED, half.connected().nodes))
    assert abs(len(fewer) / half.n_connected - 1) < 0.5 and half.n_connected < whole
    spans: dict[Edge, dict[str, float | None]] = {edge: {"S": None} for edge in like.edges[::2]}
    spanned = random_pairs(Circuit(GROUPED, like.scores, spans=spans, neurons=like.neurons), seed=seed, d_mlp=12)
    assert spanned.with_neurons({}).everywhere().edges == rival.edges and spanned.spans


def test_random_circuits_are_like_the_connected_part() -> None:
    edges = edges_among(GROUPED, ["a1.h0", "a3.h2", "m0", "m2", "m5"])
    like = Circuit.from_edges(GROUPED, edges).with_neurons(["m0.n1", "m0.n2", "m0.n9", "m5.n4"])
    half = like.only(edges[::2])
    dangling = half | Circuit.from_edges(GROUPED, ["embed->m4", "a0.h0->logits"]).with_neurons(["m4.n1"])
    assert half.connected().neurons.keys() == like.neurons.keys() and set(half.connected().nodes) == set(like.nodes)
    share, seen = half.n_connected / len(like), set()
    for seed in range(20):
        rival = random_neurons(like, seed=seed, d_mlp=12)
        # The same nodes are drawn for half of the edges, and of theirs as large a share.
        fewer = random_neurons(half, seed=seed, d_mlp=12)
        assert random_neurons(dangling, seed=seed, d_mlp=12) == fewer
        assert set(fewer) < set(rival) and len(fewer) == round(share * len(rival))
        assert fewer.neurons.items() <= rival.neurons.items()
        seen |= {i for kept in rival.neurons.values() for i in kept}
    assert seen == set(range(12))
    # One edge less is less than all.
    most = like.only(edge for edge in edges if edge != Edge("embed", "logits", "in"))
    assert len(random_neurons(most, seed=0, d_mlp=12)) < len(random_neurons(like, seed=0, d_mlp=12))
    # Few edges: an MLP whose edges were not drawn has no neurons either.
    path = Circuit.from_edges(GROUPED, ["embed->m0", "m0->m2", "m2->m5", "m5->logits"]).with_neurons(["m0.n1", "m2.n4", "m5.n3"])
    few = [random_neurons(path, seed=seed, d_mlp=12) for seed in range(30)]
    assert all(set(each.neurons) == {name for name in each.nodes if name.startswith("m")} for each in few)
    assert {len(each) for each in few} == {4} and {len(each.neurons) for each in few} >= {2, 3}


def test_random_neurons_are_drawn_from_a_number() -> None:
    with pytest.raises(GraphError) as caught:
        random_pairs(some(m1={2: None}), seed=0)
    assert str(caught.value) == (
        "this circuit keeps some neurons of MLPs; say how many there are to draw from: d_mlp=model.cfg.d_mlp"
    )


# -- pictures


def test_diagrams_say_how_many_neurons() -> None:
    diagram = draw(some(m0={3: 2.0, 1: None}, m1={5: None}), labels={"m0": "facts"})
    assert dict(diagram.labels) == {"m0": "facts · 2 neurons", "m1": "1 neuron"}
    assert diagram.caption.endswith(" in the model. Of its MLPs 2 keep some neurons alone, 3 in all.")
    assert "facts · 2 neurons" in diagram.svg and "1 neuron<" in diagram.svg
    data = json.loads(re.search(r'id="data">(.*?)</script>', diagram.html, re.DOTALL)[1])  # type: ignore[index]
    assert data["labels"] == {"m0": "facts · 2 neurons", "m1": "1 neuron"}


def test_of_edges_without_scores_those_among_the_best_nodes_are_drawn() -> None:
    edges = edges_among(GROUPED, ["a1.h0", "a3.h2", "m0", "m2", "m5"])
    scores = {"a1.h0": 0.1, "a3.h2": -3.0, "m2": 0.2, "m5": 2.0}
    circuit = Circuit(
        GROUPED,
        dict.fromkeys(edges),
        {"selection": {"node_scores": scores}},
        neurons={"m0": {1: 1.5, 4: -1.5}, "m2": {3: 0.2}},
    )
    shown = draw(circuit, max_edges=12).circuit
    assert set(shown) <= set(edges_among(GROUPED, ["a3.h2", "m0", "m5"]))
    assert {"a3.h2", "a3.kv1", "m0", "m5"} <= set(shown.nodes) and len(shown) >= 10


# -- messages


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ({"m9": {1: None}}, "There is no node m9: the layers are 0 to 2."),
        ({"a0.h1": {1: None}}, "There are neurons of a0.h1, and only MLPs have neurons. Name MLPs, such as m0."),
        ({"m1": [12, 40]}, "The neurons of m1 are [12, 40]. Give each index a score or None, such as dict.fromkeys([12, 40])."),
        ({"m1": {-1: None}}, "-1 is not a neuron of m1. Neurons are whole numbers from 0 on."),
        ({"m1": {"4": None}}, "'4' is not a neuron of m1. Neurons are whole numbers from 0 on."),
        ({"m1": {True: None}}, "True is not a neuron of m1. Neurons are whole numbers from 0 on."),
        ({"m1": {4: "x"}}, "The score of m1.n4 is 'x'. Give a finite number, or None for no score."),
        (["m1"], "'m1' is not the name of a neuron. Neurons are written m3.n12 or L3.N12.mlp_post."),
        (["m7.n1"], "There is no node m7: the layers are 0 to 2."),
        (5, "neurons is a int. Give a mapping of MLPs to their neurons, or names like m3.n12."),
    ],
)
def test_neurons_that_cannot_be(neurons: object, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        as_neurons(neurons, TOY, ["m0", "m1"])
    assert str(caught.value) == message


def test_neurons_of_an_mlp_that_is_not_in_the_circuit() -> None:
    with pytest.raises(GraphError) as caught:
        Circuit.from_edges(TOY, ["embed->logits"]).with_neurons(["m1.n3"])
    assert str(caught.value) == "There are neurons of m1, which no edge of the circuit has. Add edges of it, or leave it out."
