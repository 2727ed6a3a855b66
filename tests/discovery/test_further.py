"""The dearer questions together: each number is what the function that asks it alone gives, from fewer passes."""

from __future__ import annotations

from typing import Any

import pytest

import mechinterp as mi
from mechinterp.core.ablation import as_ablation
from mechinterp.discovery.further import look_further, told
from mechinterp.errors import MetricError


@pytest.fixture(scope="module")
def one(settings: dict[str, Any]) -> Any:
    return settings["llama"]


@pytest.fixture(scope="module")
def scores(one: Any) -> mi.Effects:
    return mi.attribute(one.model, one.task, unit="edge", steps=3)


@pytest.fixture(scope="module")
def circuit(one: Any) -> mi.Circuit:
    return mi.discover(one.model, one.task, edges=12, steps=3)


def test_every_number_is_that_of_the_question_alone(one: Any, circuit: mi.Circuit, scores: mi.Effects) -> None:
    found, cost = look_further(
        circuit, one.model, one.task, seed=2, ablation=as_ablation("resample", seed=2), metric=None, scores=scores
    )
    assert found["prompts"] == len(one.task)
    whole = mi.completeness(circuit, one.model, one.task, seed=2)
    assert found["completeness"]["worst"] == pytest.approx(whole.worst.gap, abs=1e-5)
    assert found["completeness"]["random"] == pytest.approx(whole.mean(), abs=1e-5)
    drops = mi.minimality(circuit, one.model, one.task, seed=2, sample=50)
    assert found["minimality"]["median"] == pytest.approx(float(drops.values.median()), abs=1e-5)
    assert found["minimality"]["edges"] == len(drops.values) == 12
    tests = mi.check_hypotheses(circuit, one.model, one.task, seed=2, sample=50)
    assert found["hypotheses"]["p"] == pytest.approx(tests.p_values)
    assert found["hypotheses"]["p_same"] == pytest.approx(tests.equivalence.p_same)
    assert found["hypotheses"]["needless"] == len(tests.needless)
    rest = mi.run_circuits(one.model, one.task, mi.Circuit.full(one.model) - circuit)
    gap = float((rest.clean - rest.empty).mean())
    assert found["without"] == pytest.approx(float((rest.circuits[0] - rest.empty).mean()) / gap, abs=1e-5)
    assert set(found["ablations"]) == {"zero", "mean"}
    for kind, share in found["ablations"].items():
        outs = mi.run_circuits(one.model, one.task, circuit, ablation=kind)
        by_hand = (outs.circuits[0] - outs.empty).mean() / (outs.clean - outs.empty).mean()
        assert share == pytest.approx(float(by_hand), abs=1e-4)
    curve = mi.size_curve(scores, one.model, one.task)
    assert (found["curve"]["cpr"], found["curve"]["cmd"]) == pytest.approx((curve.cpr, curve.cmd), abs=1e-5)
    assert found["curve"]["connected"] == list(curve.connected)
    again = mi.stability(scores, one.model, edges=12, seed=2, resamples=50)
    assert found["stability"]["jaccard"] == pytest.approx(again.mean)
    assert found["stability"]["core"] == len(again.core())
    # What minimality and its test take away is run once, and not twice.
    alone = [whole.provenance, drops.provenance, tests.provenance, curve.provenance]
    assert cost < sum(each["forwards"] for each in alone) + 8 - len(drops.values)


def test_sentences(one: Any, circuit: mi.Circuit, scores: mi.Effects) -> None:
    options: dict[str, Any] = {"thorough": True, "thorough_prompts": 3, "scores": scores}
    report = mi.evaluate(circuit, one.model, one.task, seed=2, random_circuits=0, **options)
    assert report.further["prompts"] == 3 and report.prompts == len(one.task)
    lines = list(told(report.further))
    starts = [
        "what follows was asked on 3 of the prompts",
        f"everything but the circuit has faithfulness {report.further['without']:.3f}",
        "incompleteness ",
        "minimality, 12 edges removed one at a time: the median drop is ",
        "faithfulness under other ablations: zero ",
        "hypotheses of an ideal circuit: equivalence p ",
        f"{report.further['hypotheses']['needless']} of 12 edges do no more than random ones; that the circuit does as well as "
        "the model, within a margin, is ",
        "over all sizes CPR ",
        f"chosen again from {len(one.task)} resampled prompts: Jaccard ",
    ]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert all(line in repr(report) for line in lines)
    # Each size once: of few edges several shares come to none.
    sizes = [point.split(":")[0] for point in lines[-2].split("connected edges ")[1].split(", ")]
    assert sizes == list(map(str, dict.fromkeys(report.further["curve"]["connected"]))) and "0" in sizes


@pytest.mark.parametrize(
    ("p", "said"), [(0.284, "is not shown (p 0.284)"), (0.05, "is not shown (p 0.05)"), (0.003, "is shown (p 0.003)")]
)
def test_equality_is_shown_or_not(p: float, said: str) -> None:
    tests = {"p": {"equivalence": 1.0}, "p_same": p, "rejected": [], "needless": 1, "edges": 5}
    assert list(told({"hypotheses": tests})) == [
        "hypotheses of an ideal circuit: equivalence p 1; rejected: none",
        f"1 of 5 edges do no more than random ones; that the circuit does as well as the model, within a margin, {said}",
    ]


def test_edges_are_removed_one_at_a_time() -> None:
    drops = {"edges": 5, "median": 0.1, "least": 0.0, "no_drop": 2}
    assert list(told({"minimality": drops})) == [
        "minimality, 5 edges removed one at a time: the median drop is 0.1000; 2 of them can go, each alone, without a drop"
    ]


def test_what_is_asked_in_vain(one: Any, circuit: mi.Circuit, scores: mi.Effects) -> None:
    with pytest.raises(MetricError) as caught:
        mi.evaluate(circuit, one.model, one.task, seed=0, thorough=True, thorough_prompts=0)
    assert str(caught.value) == "thorough_prompts=0: give a number of prompts from 1 on; 16 are usual"
    with pytest.raises(MetricError) as caught:
        mi.evaluate(circuit, one.model, one.task, seed=0, scores=scores)
    assert str(caught.value) == (
        "scores= are for the size curve and stability, which a thorough judgement has: pass thorough=True too"
    )


def test_a_circuit_without_a_number_of_edges_has_no_stability(one: Any, scores: mi.Effects) -> None:
    circuit = mi.discover(one.model, one.task, threshold=0.05, steps=3)
    found, _ = look_further(
        circuit, one.model, one.task, seed=0, ablation=as_ablation("resample", seed=0), metric=None, scores=scores
    )
    assert "curve" in found and "stability" not in found
