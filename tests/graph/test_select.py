"""Choosing edges: against definitions that are slow and plain."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mechinterp.errors import GraphError
from mechinterp.graph import (
    Circuit,
    Edge,
    GraphShape,
    connected_edges,
    greedy_edges,
    parse_node,
    random_edges,
    scored_edges,
    threshold_edges,
    top_edges,
)

TOY = GraphShape(n_layers=3, n_heads=2)
GROUPED = GraphShape(n_layers=3, n_heads=4, n_kv_heads=2)
SMOLLM2 = GraphShape(n_layers=30, n_heads=9, n_kv_heads=3)


def gaussian(shape: GraphShape, seed: int = 0) -> dict[Edge, float]:
    generator = random.Random(seed)
    return {edge: generator.gauss(0, 1) ** 3 for edge in scored_edges(shape)}


@pytest.mark.parametrize("n", [0, 1, 7, 60])
@pytest.mark.parametrize("signed", [False, True])
def test_top_edges_are_the_largest(n: int, signed: bool) -> None:
    scores = gaussian(TOY)
    key = scores.get if signed else lambda edge: abs(scores[edge])
    circuit = top_edges(TOY, scores, n, signed=signed, provenance={"method": "eap"})
    assert set(circuit.edges) == set(sorted(scores, key=key, reverse=True)[:n])
    assert all(circuit.scores[edge] == scores[edge] for edge in circuit)
    assert circuit.provenance["method"] == "eap"
    assert circuit.provenance["selection"] == {"rule": "top", "n": n, "signed": signed}


def test_ties_go_to_the_earlier_edge() -> None:
    edges = scored_edges(TOY)
    scores = dict.fromkeys(reversed(edges), 1.0)
    assert top_edges(TOY, scores, 5).edges == edges[:5]


def test_threshold_keeps_what_reaches_it() -> None:
    scores = gaussian(TOY)
    assert set(threshold_edges(TOY, scores, 0.5).edges) == {e for e, s in scores.items() if abs(s) >= 0.5}
    assert set(threshold_edges(TOY, scores, 0.5, signed=True).edges) == {e for e, s in scores.items() if s >= 0.5}


@pytest.mark.parametrize("shape", [TOY, GROUPED], ids=repr)
@pytest.mark.parametrize("seed", range(10))
def test_greedy_grows_from_the_logits(shape: GraphShape, seed: int) -> None:
    """The plain definition: of all edges whose reader is present, take the best, until there are enough."""
    scores = gaussian(shape, seed)
    present, taken = {"logits"}, []
    for _ in range(25):
        best = max((e for e in scores if e.dst in present and e not in taken), key=lambda e: abs(scores[e]))
        taken.append(best)
        present |= {best.src, shape.kv_node(best.src) or best.src}
    circuit = greedy_edges(shape, scores, 25)
    assert set(circuit.edges) == set(taken)
    assert all(greedy_edges(shape, scores, n).edges for n in (1, 2, 3))


def test_greedy_stops_where_the_scores_end() -> None:
    scores = {Edge("m2", "logits", "in"): 1.0, Edge("embed", "m0", "in"): 5.0}
    assert greedy_edges(TOY, scores, 2).edges == (Edge("m2", "logits", "in"),)


@pytest.mark.parametrize("shape", [TOY, GROUPED, SMOLLM2], ids=repr)
@pytest.mark.parametrize("n", [1, 2, 5, 20, 60])
def test_connected_edges_are_all_connected_and_about_n(shape: GraphShape, n: int) -> None:
    circuit = connected_edges(shape, gaussian(shape), n)
    assert len(circuit) == circuit.n_connected
    assert n <= len(circuit) <= n + 4


@pytest.mark.parametrize("seed", range(25))
def test_connected_edges_keep_the_weak_link(seed: int) -> None:
    """One weak edge leads into a strong part: it is kept, and weaker edges of the strong part go instead."""
    shape = GraphShape(n_layers=6, n_heads=3)
    generator = random.Random(seed)
    scores = {e: 1 + generator.random() for e in scored_edges(shape) if e.src != "embed"}
    weak = Edge("embed", "a0.h0", "v")
    circuit = connected_edges(shape, {**scores, weak: 0.001}, 30)
    assert weak in circuit
    assert len(circuit) == circuit.n_connected == 30


def test_connected_edges_are_the_top_ones_where_that_works() -> None:
    scores = dict.fromkeys(scored_edges(TOY), 0.0)
    path = [Edge("embed", "m0", "in"), Edge("m0", "a2.h1", "k"), Edge("a2.h1", "logits", "in")]
    scores |= {edge: 1.0 + i for i, edge in enumerate(path)}
    assert connected_edges(TOY, scores, 3).edges == tuple(path)
    assert connected_edges(TOY, scores, 3).provenance["selection"]["taken"] == 3


def test_too_few_scores_to_connect_n_edges() -> None:
    scores = {
        Edge("embed", "logits", "in"): 1.0,
        Edge("m0", "logits", "in"): 5.0,
        Edge("embed", "m1", "in"): 2.0,
    }
    assert connected_edges(TOY, scores, 3).edges == (Edge("embed", "logits", "in"),)
    assert connected_edges(TOY, {}, 0).edges == ()


@pytest.mark.parametrize("match", ["classes", "connected"])
@pytest.mark.parametrize("n", [1, 10, 200, 1000])
def test_random_circuits_have_the_same_connected_size(match: str, n: int) -> None:
    like = connected_edges(SMOLLM2, gaussian(SMOLLM2), n)
    drawn = random_edges(like, seed=3, match=match)
    assert len(drawn) == drawn.n_connected == like.n_connected
    assert drawn == random_edges(like, seed=3, match=match)
    assert drawn.edges != random_edges(like, seed=4, match=match).edges or n < 10
    assert set(drawn.scores.values()) == {None}
    assert drawn.provenance["selection"]["seed"] == 3


def test_random_circuits_match_dangling_ones_by_connected_size() -> None:
    like = top_edges(SMOLLM2, gaussian(SMOLLM2), 2000)
    assert like.n_connected < len(like)
    assert random_edges(like, seed=0).n_connected == like.n_connected
    assert len(random_edges(Circuit.empty(SMOLLM2), seed=0)) == 0
    assert random_edges(Circuit.full(TOY), seed=0).edges == scored_edges(TOY)


def test_classes_are_matched_in_proportion() -> None:
    shape = GraphShape(n_layers=8, n_heads=4)
    scores = {e: s * (100 if parse_node(e.dst).kind == "mlp" else 1) for e, s in gaussian(shape).items()}
    like = connected_edges(shape, scores, 120)

    def into_mlps(circuit: Circuit) -> int:
        return Counter(parse_node(edge.dst).kind for edge in circuit)["mlp"]

    by_class = random_edges(like, seed=0, match="classes")
    by_chance = random_edges(like, seed=0, match="connected")
    assert into_mlps(by_class) > 0.7 * into_mlps(like)
    assert into_mlps(by_chance) < 0.3 * into_mlps(like)


@pytest.mark.parametrize("n", [60, 200, 1000])
def test_kinds_are_matched_after_what_dangles_is_dropped(n: int) -> None:
    """Few edges are of another kind, and edges into the logits, which dangle least, are not too many."""

    def kinds(circuit: Circuit) -> Counter[tuple[str, str, str]]:
        return Counter((parse_node(e.src).kind, parse_node(e.dst).kind, e.port) for e in circuit.connected())

    like = connected_edges(SMOLLM2, gaussian(SMOLLM2), n)
    wanted = kinds(like)
    others, into_logits = [], []
    for seed in range(4):
        got = kinds(random_edges(like, seed=seed))
        others.append(sum((got - wanted).values()) / n)
        into_logits.append(sum(count for kind, count in got.items() if kind[1] == "logits"))
    asked = sum(count for kind, count in wanted.items() if kind[1] == "logits")
    # Measured: 0.10, 0.07, 0.02 and less on the mean; by plain proportions 0.17, 0.10, 0.04, and twice as many into the logits.
    assert sum(others) / 4 < 0.12
    assert abs(sum(into_logits) / 4 - asked) <= max(3, 0.25 * asked)


def test_only_the_seed_given_matters() -> None:
    like = connected_edges(TOY, gaussian(TOY), 10)
    random.seed(0)
    first = random_edges(like, seed=0)
    random.seed(1)
    assert random_edges(like, seed=0) == first


NAN = {Edge("embed", "logits", "in"): float("nan")}
MESSAGES = [
    (
        lambda: top_edges(TOY, gaussian(TOY), 1000),
        "1000 edges were asked for, and only 100 have a score. Ask for at",
    ),
    (
        lambda: top_edges(TOY, gaussian(TOY), -1),
        "n=-1 is not a number of edges. Give a whole number from 0 to 100.",
    ),
    (
        lambda: greedy_edges(TOY, NAN, 1),
        "The score of embed->logits is nan. Edges are chosen by finite scores",
    ),
    (lambda: top_edges(GROUPED, {Edge("embed", "a0.h0", "k"): 1.0}, 1), "Use embed->a0.kv0<k>."),
    (lambda: random_edges(Circuit.empty(TOY), seed=0, match="class"), "Did you mean 'classes'?"),
]


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[message[:40] for _, message in MESSAGES])
def test_messages(call, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        call()
    assert message in str(caught.value)
