"""Hypothesis tests of a circuit: each number again by hand, and the verdicts on circuits that are known."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import binom, binomtest

import mechinterp as mi
from mechinterp.core.testing import hsic_test, sign_test
from mechinterp.discovery.hypotheses import hypotheses_of
from mechinterp.errors import EditError, GraphError, MetricError
from mechinterp.graph.inflate import inflate


@pytest.fixture(scope="module")
def one(settings: dict[str, Any]) -> Any:
    return settings["llama"]


@pytest.fixture(scope="module")
def circuit(one: Any) -> mi.Circuit:
    return mi.discover(one.model, one.task, edges=15, method="eap")


def test_every_number_by_hand(one: Any, circuit: mi.Circuit) -> None:
    found = mi.check_hypotheses(circuit, one.model, one.task, seed=3, inflated=6, quantile=0.7, permutations=50)
    runs = mi.run_circuits(one.model, one.task, [circuit, mi.Circuit.full(one.model) - circuit])
    assert found.equivalence == sign_test(runs.circuits[0] - runs.clean, margin=0.1, rounding=1e-5)
    assert found.independence.p == hsic_test(runs.circuits[1], runs.clean, seed=3, permutations=50).p

    def change(of: mi.Circuit, edge: mi.Edge) -> float:
        less = of - mi.Circuit.from_edges(one.model, [edge])
        pair = mi.run_circuits(one.model, one.task, [of, less]).circuits
        return float((pair[0] - pair[1]).abs().mean())

    draw, chance = random.Random(3), []
    for i in range(6):
        more, new = inflate(circuit, seed=3 + i)
        chance.append(change(more, draw.choice(new)))
    assert found.inflated.tolist() == pytest.approx(chance, abs=1e-5)
    assert found.edges == circuit.connected().edges
    for i in (0, len(found.edges) // 2):
        own = change(circuit, found.edges[i])
        assert float(found.changes[i]) == pytest.approx(own, abs=1e-5)
        beaten = sum(own > other + 1e-4 for other in chance)
        assert int(found.beaten[i]) == beaten
        assert float(found.edge_p[i]) == pytest.approx(binomtest(beaten, 6, 0.7, alternative="less").pvalue)
    # Two runs, the circuit, each edge; two runs, the rest, each inflated circuit twice.
    assert found.provenance["forwards"] == 2 + 1 + len(found.edges) + 2 + 1 + 2 * 6
    # Holm over the edges, then over the three hypotheses.
    least = sorted(found.edge_p.tolist())
    assert float(found.edge_adjusted.min()) == pytest.approx(min(1.0, least[0] * len(least)))
    raw = [found.equivalence.p_differ, found.independence.p, float(found.edge_adjusted.min())]
    assert found.p_values["equivalence"] >= raw[0]
    assert min(found.p_values.values()) == pytest.approx(min(1.0, 3 * min(raw)))
    # Needless is what is left of the edges' own p after the correction.
    level = sorted(found.edge_p.tolist())[0] * 1.01
    assert replace(found, level=level).needless == ()
    assert len(replace(found, level=level, edge_adjusted=found.edge_p).needless) >= 1
    # At the level is not below it.
    p = found.p_values["equivalence"]
    assert "equivalence" not in replace(found, level=p).rejected and "equivalence" in replace(found, level=p * 1.01).rejected
    plain = found.to_json()
    assert plain["edge_p"] == found.edge_adjusted.tolist()
    assert json.loads(json.dumps(plain)) == plain
    again = mi.check_hypotheses(circuit, one.model, one.task, seed=3, inflated=6, quantile=0.7, permutations=50)
    assert again.p_values == found.p_values


def test_what_differs_by_rounding_is_not_beaten(one: Any) -> None:
    """100 units in the last place of the largest clean number: 1.2e-4 of ten."""
    model, task = one.model, one.task[:2]
    edges = mi.Circuit.full(model).edges[:3]

    def runs(*rows: float) -> mi.CircuitRuns:
        circuits, nothing = torch.tensor(rows)[:, None].expand(-1, 2), torch.zeros(2)
        return mi.CircuitRuns("logit_diff", torch.tensor([10.0, -4.0]), nothing, circuits, torch.ones(1, 2), nothing)

    outs, others = runs(1.0, 1.5, 1.50005, 1.5005), runs(0.0, 1.0, 0.5, 1.0, 0.5)
    found = hypotheses_of(outs, others, edges, model, task, seed=0)
    assert found.inflated.tolist() == [0.5, 0.5] and found.beaten.tolist() == [0, 0, 2]


def test_a_planted_circuit_is_not_rejected_and_a_padded_one_is() -> None:
    toy = mi.toys.induction(n=8)
    truth = toy.truth["zero"]
    ideal = mi.check_hypotheses(truth, toy.model, toy.task, ablation="zero", seed=0, inflated=12)
    assert ideal.rejected == () and ideal.needless == ()
    # Every prompt is a tie, which shows that they are the same: 8 prompts and a margin of 0.4.
    assert ideal.equivalence.ties == 8
    # Everything ablated is run as well, beside either.
    assert ideal.provenance["forwards"] == 2 + 1 + len(truth) + 1 + 2 + 1 + 2 * 12 + 1
    sure = mi.check_hypotheses(truth, toy.model, toy.task, ablation="zero", seed=0, epsilon=0.4, inflated=1)
    assert sure.equivalence.p_same == pytest.approx(binom.cdf(4, 8, 0.9))
    # A large p is no equality.
    assert f", 8 ties; that it is within 0.1 of even is not shown, p {ideal.equivalence.p_same:.3g})" in repr(ideal)
    assert f", 8 ties; that it is within 0.4 of even is shown, p {sure.equivalence.p_same:.3g})" in repr(sure)
    idle = ["a0.h0->logits", "embed->a0.h0<v>"]
    padded = truth | mi.Circuit.from_edges(toy.model, idle)
    found = mi.check_hypotheses(padded, toy.model, toy.task, ablation="zero", seed=0, inflated=12)
    assert "minimality" in found.rejected
    assert "a0.h0->logits" in {str(edge) for edge in found.needless}
    assert not set(truth) & set(found.needless)
    assert "minimality: p" in repr(found) and "REJECTED" in repr(found)
    assert "REJECTED" in found._repr_html_()


def test_a_part_of_the_circuit_is_not_equivalent() -> None:
    toy = mi.toys.copy()
    truth = toy.truth["resample"]
    half = mi.Circuit.from_edges(toy.model, list(truth)[: len(truth) // 2]) | mi.Circuit.from_edges(toy.model, ["embed->logits"])
    found = mi.check_hypotheses(half, toy.model, toy.task, seed=0, inflated=3, epsilon=0.1)
    assert "equivalence" in found.rejected
    assert found.equivalence.losses == len(toy.task)


def test_a_random_path_goes_from_end_to_end() -> None:
    shape = mi.GraphShape(n_layers=3, n_heads=4, n_kv_heads=2)
    like = mi.random_edges(mi.Circuit.from_edges(shape, ["embed->a1.kv0<v>", "a1.h0->a2.h3<q>", "a2.h3->logits"]), seed=0)
    sizes = set()
    for seed in range(40):
        more, new = inflate(like, seed=seed)
        assert new and not set(new) & set(like) and set(more) == set(like) | set(new)
        path, _ = inflate(mi.Circuit.empty(shape), seed=seed)
        assert path.n_connected == len(path)
        sizes.add(len(path))
        assert inflate(like, seed=seed)[1] == new
    assert len(sizes) > 2
    with pytest.raises(GraphError, match="has every edge, so that no path can be added to it"):
        inflate(mi.Circuit.full(shape), seed=0)


def test_refusals(one: Any, circuit: mi.Circuit) -> None:
    with pytest.raises(GraphError, match="has no connected edge, so there is nothing to test"):
        mi.check_hypotheses(mi.Circuit.empty(one.model), one.model, one.task, seed=0)
    with pytest.raises(MetricError, match="hypotheses are tested over prompts, and the task has 1; give at least 2"):
        mi.check_hypotheses(circuit, one.model, one.task[0], seed=0)
    with pytest.raises(MetricError, match=r"quantile=1.5, inflated=30: give a share between 0 and 1, and at least one circuit"):
        mi.check_hypotheses(circuit, one.model, one.task, seed=0, quantile=1.5)
    with pytest.raises(EditError, match=r"there is no correction 'holme'"):
        mi.check_hypotheses(circuit, one.model, one.task, seed=0, correction="holme", inflated=1)
    assert torch.is_tensor(mi.check_hypotheses(circuit, one.model, one.task, seed=0, sample=2, inflated=1).changes)
