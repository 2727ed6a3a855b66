"""Estimate all, measure the best: what exact effects say of the planted circuits, and an honest account of when it stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.discovery.choosing import Search, edge_scores
from mechinterp.discovery.screening import _settled, screen_and_verify

OPTIONS: dict[str, Any] = {"method": "screen-verify", "steps": 2, "selection": "top"}


def test_measured_edges_have_their_exact_scores(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechinterp.discovery.screening._BATCH", 5)
    model, task = setting.model, setting.task
    circuit = mi.discover(model, task, edges=4, **OPTIONS)
    exact = edge_scores(mi.edge_effects(model, task))
    for edge, score in circuit.scores.items():
        assert score == pytest.approx(exact[edge], abs=1e-5)
    said = circuit.provenance["screening"]
    assert said["measured"] == min(5 * said["rounds"], len(exact))
    assert circuit.provenance["estimator"].startswith(f"exact effects of {said['measured']} edges, EAP-IG inputs")


def test_stops_only_where_nothing_left_reaches_up(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stated condition, from the numbers that the result reports."""
    monkeypatch.setattr("mechinterp.discovery.screening._BATCH", 5)
    stops = set()
    for options in ({"edges": 1}, {"edges": 4}, {"edges": 60}, {"threshold": 0.5}, {"edges": 2, "selection": "connected"}):
        circuit = mi.discover(setting.model, setting.task, **(OPTIONS | options))
        said = circuit.provenance["screening"]
        stops.add(said["stop"])
        if said["stop"] == "heuristic":
            least = options.get("threshold", min(abs(score) for score in circuit.scores.values() if score is not None))
            assert least >= said["highest_estimate_left"] + said["largest_error_of_last_batch"] - 1e-6
            assert said["measured"] < setting.model.cfg.n_layers * 100
        else:
            assert said["highest_estimate_left"] is None
            assert said["measured"] == mi.GraphShape.of(setting.model).n_edges
    assert "heuristic" in stops


def test_all_measured_is_exact(setting: Any) -> None:
    shape = mi.GraphShape.of(setting.model)
    found = mi.discover(setting.model, setting.task, edges=shape.n_edges, **OPTIONS)
    exact = mi.discover(setting.model, setting.task, method="exact", edges=shape.n_edges, selection="top")
    assert found.provenance["screening"]["stop"] == "all measured"
    assert dict(found.scores) == pytest.approx(dict(exact.scores), abs=1e-6)


def test_fewer_runs_than_exact_on_a_sparse_circuit() -> None:
    toy = mi.toys.build("induction")
    truth = toy.truth["resample"]
    circuit = mi.discover(toy.model, toy.task, method="screen-verify", edges=len(truth))
    assert circuit.iou(truth) == 1.0
    assert circuit.provenance["forwards"] < circuit.shape.n_edges / 4
    assert circuit.provenance["screening"]["stop"] == "heuristic"


@pytest.mark.parametrize("signed", [False, True])
def test_what_is_reported_is_of_the_edges_that_were_measured_and_left(
    setting: Any, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From all estimates and all exact effects, without looking at which edges were measured."""
    monkeypatch.setattr("mechinterp.discovery.screening._BATCH", 5)
    model, task = setting.model, setting.task
    estimate, exact = mi.attribute(model, task, unit="edge", steps=2).values, mi.edge_effects(model, task).values
    for n in (1, 3):
        found = screen_and_verify(Search(model=model, task=task, edges=n, steps=2, signed=signed, selection="top"))
        said, left = found.provenance["screening"], found.values == estimate
        assert int((~left).sum()) == said["measured"]
        torch.testing.assert_close(found.values[~left], exact[~left], atol=1e-5, rtol=0)
        size = estimate if signed else estimate.abs()
        if said["stop"] == "heuristic":
            assert said["highest_estimate_left"] == pytest.approx(float(size[left].max()))
            # Everything that ranks before the last edge taken was measured.
            mixed = found.values if signed else found.values.abs()
            best = mixed.argsort(descending=True)[:n]
            assert not left[best].any()
        if said["rounds"] == 1:
            batch = size.argsort(descending=True)[:5]
            assert set(batch.tolist()) == set((~left).nonzero()[:, 0].tolist())
            error = (exact - estimate)[batch].abs().max()
            assert said["largest_error_of_last_batch"] == pytest.approx(float(error), abs=1e-5)


def test_the_first_batch_is_the_best_by_the_size_that_is_asked_for(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold of anything is reached at once where nothing that is left can be that large."""
    monkeypatch.setattr("mechinterp.discovery.screening._BATCH", 5)
    model, task = setting.model, setting.task
    estimate, exact = mi.attribute(model, task, unit="edge", steps=2).values, mi.edge_effects(model, task).values
    for signed in (False, True):
        found = screen_and_verify(Search(model=model, task=task, threshold=50.0, steps=2, signed=signed))
        size = estimate if signed else estimate.abs()
        batch = size.argsort(descending=True)[:5]
        assert set((found.values != estimate).nonzero()[:, 0].tolist()) == set(batch.tolist())
        said = found.provenance["screening"]
        assert (said["rounds"], said["measured"], said["stop"]) == (1, 5, "heuristic")
        error = (exact - estimate)[batch].abs().max()
        assert said["largest_error_of_last_batch"] == pytest.approx(float(error), abs=1e-5)
        assert said["highest_estimate_left"] == pytest.approx(float(size.sort(descending=True).values[5]))


def test_it_does_not_stop_before_what_is_taken_was_measured(setting: Any) -> None:
    """However far what is left lies below."""
    model = setting.model
    effects = mi.attribute(model, setting.task, unit="edge", steps=1)
    edges = [mi.Edge(*label) for label in effects.coords["edge"]]  # type: ignore[misc]
    search = Search(model=model, task=setting.task, edges=3, selection="top")
    best = effects.values.abs().argsort(descending=True)
    measured = torch.ones(len(edges), dtype=torch.bool)
    assert _settled(search, effects, measured, edges, 0.0)
    for place, settled in ((0, False), (2, False), (3, True)):
        some = measured.clone()
        some[best[place]] = False
        assert _settled(search, effects, some, edges, 0.0) == settled
    least = float(effects.values.abs()[best[2]])
    assert _settled(search, effects, measured, edges, least - 1e-6) and not _settled(
        search, effects, measured, edges, least + 1e-6
    )
