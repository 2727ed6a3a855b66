"""Scores beside a known circuit: by hand on four edges, and beside scikit-learn."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

import mechinterp as mi
from mechinterp.errors import GraphError
from mechinterp.graph import scored_edges

# embed -> q, k, v of the one head, embed -> logits, head -> logits.
SHAPE = mi.GraphShape(n_layers=1, n_heads=1, attn_only=True)
Q, K, V, DIRECT, OUT = scored_edges(SHAPE)
TRUTH = mi.Circuit.from_edges(SHAPE, [V, OUT])


def test_by_hand_on_four_edges() -> None:
    """Two that belong (3 and 1) among two that do not (2 and 0.5), and one that ties: of 6 pairs, 4 and a half are right."""
    scores = {V: 3.0, OUT: -1.0, DIRECT: 2.0, Q: 0.5, K: 1.0}
    assert mi.auroc(scores, TRUTH) == pytest.approx((3 + 1 + 0.5) / 6)
    # By value, -1 is the least of all.
    assert mi.auroc(scores, TRUTH, signed=True) == pytest.approx(3 / 6)


def test_what_is_missing_is_never_found() -> None:
    """A public tool counts edges of the truth that the other graph lacks as true positives."""
    # Nothing scored: pure chance, and not perfect.
    assert mi.auroc({}, TRUTH) == 0.5
    # One of two found: it beats all three, the missing one ties with the two unscored and is below the third.
    assert mi.auroc({V: 1.0, DIRECT: 0.0}, TRUTH) == pytest.approx((3 + 0.5 * 2) / 6)
    nothing = mi.compare_to_known(mi.Circuit.empty(SHAPE), TRUTH)
    assert (nothing.right, nothing.precision, nothing.recall, nothing.auroc) == (0, 0.0, 0.0, None)
    assert nothing.missed == TRUTH.edges
    some = mi.compare_to_known(mi.Circuit(SHAPE, {V: 1.0, DIRECT: 2.0}), TRUTH)
    assert (some.right, some.missed, some.extra) == (1, (OUT,), (DIRECT,))
    assert (some.precision, some.recall, some.iou) == (0.5, 0.5, pytest.approx(1 / 3))
    assert repr(some) == (
        "Recovery: precision 0.500, recall 0.500, AUROC 0.500; 1 edge right, 1 missed (a0.h0->logits), 1 extra (embed->logits)"
    )
    assert some.to_json()["missed"] == ["a0.h0->logits"]
    plain = mi.compare_to_known(mi.Circuit(SHAPE, {V: 1.0, OUT: None}), TRUTH)
    assert (plain.right, plain.missed) == (2, ())
    # A score of 0 is one.
    assert mi.compare_to_known(mi.Circuit(SHAPE, {V: 1.0, DIRECT: 0.0}), TRUTH).auroc == pytest.approx((3 + 0.5 * 2) / 6)
    more = mi.compare_to_known(mi.Circuit(SHAPE, dict.fromkeys([V, OUT, DIRECT, Q], 1.0)), TRUTH)
    assert (more.precision, more.recall, more.iou) == (0.5, 1.0, 0.5)


def test_five_edges_are_named() -> None:
    full = mi.Circuit.full(SHAPE)
    # Nothing is left to rank above.
    found = mi.compare_to_known(mi.Circuit(SHAPE, {V: 1.0}), full)
    assert found.auroc is None
    assert repr(mi.compare_to_known(mi.Circuit.empty(SHAPE), full)).endswith(
        "5 missed (embed->a0.h0<q>, embed->a0.h0<k>, embed->a0.h0<v>, embed->logits, a0.h0->logits), 0 extra"
    )
    wide = mi.Circuit.full(mi.GraphShape(n_layers=1, n_heads=2, attn_only=True))
    told = repr(mi.compare_to_known(mi.Circuit.empty(wide.shape), wide))
    listed = ", ".join(str(edge) for edge in wide.edges[:5])
    assert told.endswith(f"{len(wide)} missed ({listed}, ...), 0 extra")


def test_beside_scikit_learn() -> None:
    shape = mi.GraphShape(n_layers=3, n_heads=4, n_kv_heads=2)
    edges, draw = scored_edges(shape), random.Random(0)
    truth = mi.Circuit.from_edges(shape, draw.sample(edges, 20))
    scores = {edge: round(draw.gauss(1.0 if edge in truth else 0.0, 1.0), 1) for edge in edges}
    labels = [edge in truth for edge in edges]
    assert mi.auroc(scores, truth) == pytest.approx(roc_auc_score(labels, [abs(scores[edge]) for edge in edges]))
    assert mi.auroc(scores, truth, signed=True) == pytest.approx(roc_auc_score(labels, [scores[edge] for edge in edges]))
    part = {edge: score for edge, score in scores.items() if draw.random() < 0.5}
    lowest = [abs(part[edge]) if edge in part else -1.0 for edge in edges]
    assert mi.auroc(part, truth) == pytest.approx(roc_auc_score(labels, lowest))


def test_refusals() -> None:
    with pytest.raises(GraphError, match="the known circuit has 0 of 5 edges; a ranking is judged by some that belong"):
        mi.auroc({}, mi.Circuit.empty(SHAPE))
    with pytest.raises(GraphError, match=r"a3.h0->logits has a score, and the graph of the truth \(1 layer"):
        mi.auroc({mi.Edge("a3.h0", "logits", "in"): 1.0}, TRUTH)
    other = mi.Circuit.empty(mi.GraphShape(n_layers=2, n_heads=1))
    with pytest.raises(GraphError, match="a circuit of 2 layers of 1 head cannot be compared with a known one of 1 layer"):
        mi.compare_to_known(other, TRUTH)
    with pytest.raises(GraphError, match="the known circuit has no edge, so there is nothing to find"):
        mi.compare_to_known(TRUTH, mi.Circuit.empty(SHAPE))


@pytest.mark.usefixtures("unchecked_types")
def test_what_is_no_circuit() -> None:
    scores = mi.Effects("x", ("edge",), {"edge": (tuple(V),)}, torch.ones(1, 2))
    truths: Any = mi.toys.induction(n=4).truth
    each = (lambda: mi.auroc(scores, truths), lambda: mi.compare_to_known(TRUTH, truths))
    for call in each:
        with pytest.raises(GraphError) as caught:
            call()
        assert str(caught.value) == (
            f"several circuits ({', '.join(truths)}) were given where one belongs; choose one: truth['resample']"
        )
    wrong: dict[str, Any] = {
        "a Effects was given where a circuit belongs: the scores come first, then the known circuit": (mi.auroc, TRUTH, scores),
        "a list was given where a circuit belongs: scores come first, mi.attribute(model, task, unit='edge'), then the "
        "known circuit": (mi.auroc, [1.0], TRUTH),
        "scores were given where a circuit belongs: choose edges first, mi.discover(model, task, edges=...), or rank all of "
        "them, mi.auroc(scores, truth)": (mi.compare_to_known, scores, TRUTH),
        "a dict was given where a circuit belongs: the circuit that was found comes first, then the known one": (
            mi.compare_to_known,
            {V: 1.0},
            TRUTH,
        ),
        "the name 'c1.json' was given where a circuit belongs; load it: mi.Circuit.load(path)": (
            mi.compare_to_known,
            TRUTH,
            "c1.json",
        ),
    }
    for message, (ask, first, second) in wrong.items():
        with pytest.raises(GraphError) as caught:
            ask(first, second)
        assert str(caught.value) == message
