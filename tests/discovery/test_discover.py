"""From scores to a circuit: the planted ones are found, and the result says how it was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mechinterp as mi
from mechinterp.discovery.discover import METHODS, SELECTIONS, edge_scores
from mechinterp.errors import GraphError, MetricError

TOYS = ["induction", "gqa_induction", "copy", "memory"]


# By definition: RelP gives queries and keys no score, AtP* in two layers none to what acts through the other layer alone, and
# flow asks what is large, not what the answer hangs on.
BLIND = {"relp": {"induction", "gqa_induction"}, "atp-star": {"induction", "gqa_induction"}, "flow": set(TOYS)}


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("method", list(METHODS))
def test_finds_the_planted_circuit(name: str, method: str) -> None:
    toy = mi.toys.build(name)
    truth = toy.truth["resample"]
    # Half of the pairs find it, and the other half judge it.
    found_on, held_out = toy.task[:8].split(seed=0)
    circuit = mi.discover(toy.model, found_on, method=method, edges=len(truth), seed=0 if METHODS[method].drawn else None)
    assert (circuit.iou(truth) == 1.0) == (name not in BLIND.get(method, ()))
    if method in ("eap-ig", "acdc"):
        report = mi.evaluate(circuit, toy.model, held_out, seed=0)
        assert report.faithfulness == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("selection", list(SELECTIONS))
def test_selections_find_the_planted_circuit(name: str, selection: Any) -> None:
    toy = mi.toys.build(name)
    truth = toy.truth["resample"]
    assert mi.discover(toy.model, toy.task[:8], edges=len(truth), selection=selection).iou(truth) == 1.0


def test_scores_are_those_of_attribute(setting: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, edges=30, steps=3)
    scores = edge_scores(mi.attribute(setting.model, setting.task, unit="edge", steps=3))
    assert len(scores) == mi.GraphShape.of(setting.model).n_edges
    assert {edge: scores[edge] for edge in circuit.edges} == dict(circuit.scores)
    assert circuit.n_connected == len(circuit) >= 30


def test_methods_are_the_estimators_they_name(setting: Any) -> None:
    options: dict[str, Any] = {"edges": 10, "selection": "top"}
    for method, steps in (("eap", 0), ("eap-ig", 4)):
        circuit = mi.discover(setting.model, setting.task, method=method, steps=4, **options)
        scores = edge_scores(mi.attribute(setting.model, setting.task, unit="edge", steps=steps))
        assert {edge: scores[edge] for edge in circuit.edges} == dict(circuit.scores)
    default = mi.discover(setting.model, setting.task, **options)
    assert default.provenance["estimator"] == "EAP-IG inputs, 5 midpoints"


def test_edges_are_kept_by_rank(setting: Any) -> None:
    scores = edge_scores(mi.attribute(setting.model, setting.task, unit="edge", steps=2))
    options: dict[str, Any] = {"steps": 2, "selection": "top"}
    by_size = mi.discover(setting.model, setting.task, edges=12, **options)
    assert set(by_size.edges) == set(sorted(scores, key=lambda edge: -abs(scores[edge]))[:12])
    by_value = mi.discover(setting.model, setting.task, edges=12, signed=True, **options)
    assert set(by_value.edges) == set(sorted(scores, key=lambda edge: -scores[edge])[:12])
    assert set(by_size.edges) != set(by_value.edges)
    over = mi.discover(setting.model, setting.task, threshold=0.2, steps=2)
    assert set(over.edges) == {edge for edge, score in scores.items() if abs(score) >= 0.2}
    helping = mi.discover(setting.model, setting.task, threshold=0.2, steps=2, signed=True)
    assert set(helping.edges) == {edge for edge, score in scores.items() if score >= 0.2}
    assert 0 < len(helping) < len(over)


def test_the_number_of_edges_is_bounded_by_the_model(setting: Any) -> None:
    every = mi.GraphShape.of(setting.model).n_edges
    assert every < 200
    assert len(mi.discover(setting.model, setting.task, steps=1)) == every
    with pytest.raises(GraphError) as caught:
        mi.discover(setting.model, setting.task, edges=every + 1)
    assert str(caught.value) == f"{every + 1} edges were asked for, and only {every} have a score. Ask for at most {every}."


def test_metric_and_direction_are_passed_on(setting: Any) -> None:
    for options in ({"metric": "prob_diff"}, {"direction": "denoise"}, {"metric": "kl"}):
        circuit = mi.discover(setting.model, setting.task, edges=5, selection="top", steps=2, **options)
        scores = edge_scores(mi.attribute(setting.model, setting.task, unit="edge", steps=2, **options))  # type: ignore[arg-type]
        assert {edge: scores[edge] for edge in circuit.edges} == dict(circuit.scores)
        for key, value in options.items():
            assert circuit.provenance[key] == value
    with pytest.raises(MetricError, match=r"^'kl' is at its minimum in the clean run"):
        mi.discover(setting.model, setting.task, method="eap", metric="kl")


def test_provenance_says_how_it_was_found(setting: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, edges=20, steps=3, signed=True)
    said = dict(circuit.provenance)
    assert said.pop("seconds") >= 0
    assert said["baseline"] == pytest.approx(mi.attribute(setting.model, setting.task).baseline, abs=1e-5)
    expected = {
        "model": setting.model.name,
        "task": "random",
        "prompts": 5,
        "metric": "logit_diff",
        "direction": "noise",
        "method": "eap-ig",
        "estimator": "EAP-IG inputs, 3 midpoints",
        "forwards": 5,
        "backwards": 3,
        "normalized": True,
        "ablation": "resample (the corrupt prompt of each pair)",
    }
    assert {key: said[key] for key in expected} == expected
    assert said["selection"].items() >= {"rule": "connected", "n": 20, "signed": True}.items()
    assert repr(circuit).endswith(f"random on {setting.model.name} by eap-ig")


def test_nothing_is_lost_in_a_file(setting: Any, tmp_path: Path) -> None:
    circuit = mi.discover(setting.model, setting.task, edges=20)
    again = mi.Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert again == circuit
    assert (again.scores, again.provenance) == (circuit.scores, circuit.provenance)
    assert json.loads((tmp_path / "circuit.json").read_text())["format"] == "mechinterp-circuit"


def test_the_same_twice(setting: Any) -> None:
    first, second = (mi.discover(setting.model, setting.task, edges=20) for _ in range(2))
    assert dict(first.scores) == dict(second.scores)


def test_nothing_runs_before_the_options_are_checked(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise RuntimeError("a forward pass")

    monkeypatch.setattr("mechinterp.discovery.methods.attribute", run)
    every = mi.GraphShape.of(setting.model).n_edges
    for options, error in (
        ({"edges": every + 1}, GraphError),
        ({"metric": "accuracy"}, MetricError),
        ({"metric": "kl", "method": "eap"}, MetricError),
        ({"metric": "logitdiff"}, MetricError),
    ):
        with pytest.raises(error):
            mi.discover(setting.model, setting.task, **options)
    with pytest.raises(RuntimeError, match="a forward pass"):
        mi.discover(setting.model, setting.task, edges=every)


def test_provenance_says_how_far_down_the_ranking_it_went(setting: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, edges=20, steps=1)
    scores = edge_scores(mi.attribute(setting.model, setting.task, unit="edge", steps=1))
    best = sorted(scores, key=lambda edge: -abs(scores[edge]))[: circuit.provenance["selection"]["taken"]]
    assert set(circuit.edges) <= set(best)
    assert best[-1] in mi.Circuit.from_edges(setting.model, best).connected()


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "eap_ig"}, "there is no method 'eap_ig'. Did you mean 'eap-ig' or 'eap'?"),
        ({"selection": "topp"}, "there is no selection 'topp'. Did you mean 'top'?"),
        ({"edges": 5, "threshold": 0.1}, "edges=5 and threshold=0.1 are two ways to choose; give one of them"),
        ({"method": "mask"}, "the method 'mask' draws numbers; give it a seed, such as seed=0"),
        (
            {"method": "eap", "seed": 3},
            "the method 'eap' draws nothing, so that seed=3 would change nothing; leave it out (it goes with 'mask'; prompts "
            "have the seed of their task, an ablation its own: mi.Ablation(..., seed=...))",
        ),
        (
            {"threshold": -0.1},
            "threshold=-0.1 is below every absolute score, so that all edges would be kept; give one from 0 on, or rank by value "
            "with signed=True",
        ),
        (
            {"method": "acdc", "direction": "denoise"},
            "the method 'acdc' starts from the clean run; leave out direction='denoise'",
        ),
        ({"unit": "neurons"}, "unit='neurons': write 'edge', 'node' or 'neuron'"),
        (
            {"unit": "node", "method": "screen-verify"},
            "the method 'screen-verify' works on edges alone; for unit='node' there are 'eap', 'eap-ig', ",
        ),
        ({"threshold": float("nan")}, "threshold=nan: give a number, such as 0.01 of the difference to explain"),
        ({"nodes": 3}, "nodes=3 goes with unit='node' or 'neuron'; of edges, give edges= or threshold="),
        ({"unit": "node", "nodes": 11}, "nodes=11: this model has 10 heads and MLPs to choose from; give 0 to 10"),
        ({"unit": "node", "nodes": 1, "edges": 2}, "edges=2 and nodes=1 are two ways to choose; give one of them"),
        ({"edges": -1}, "n=-1 is not a number of edges. Give a whole number from 0 to "),
    ],
)
def test_messages(setting: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError) as caught:
        mi.discover(setting.model, setting.task, **options)
    assert str(caught.value).startswith(message)


def test_edge_scores_come_from_edges(setting: Any) -> None:
    with pytest.raises(GraphError) as caught:
        edge_scores(mi.attribute(setting.model, setting.task))
    assert str(caught.value) == ("these effects are over ('node',); edges come from mi.attribute(model, task, unit='edge')")


def test_a_negative_threshold_is_one_of_values(setting: Any) -> None:
    scores = edge_scores(mi.attribute(setting.model, setting.task, unit="edge", steps=2))
    found = mi.discover(setting.model, setting.task, threshold=-0.01, signed=True, steps=2)
    assert set(found.edges) == {edge for edge, score in scores.items() if score >= -0.01}
    assert 0 < len(found) < len(scores)
