"""Sweeps, estimates and edges under other ablations than the corrupt prompt's values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.errors import MetricError

KINDS: list[Any] = ["zero", "mean", "mean-pos", mi.Ablation("resample-shuffled", seed=3)]


def logit_diff(logits: Tensor, task: mi.Task) -> Tensor:
    rows = torch.arange(len(task))
    answer = logits[rows, task.answer_pos].detach()
    return answer[rows, task.right[:, 0]] - answer[rows, task.wrong[:, 0]]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_sweep_is_one_edited_run_for_each_site(setting: Any, kind: Any) -> None:
    model, task = setting.model, setting.task
    found = mi.patch(model, task, "L*.H*.z", direction="noise", ablation=kind, normalize=False)
    ablation = kind if isinstance(kind, mi.Ablation) else mi.Ablation(kind)
    clean = logit_diff(model(task.clean), task)
    for layer in range(2):
        for head in range(4):
            edit = ablation.edit(model, task, f"L{layer}.H{head}.z")
            expected = logit_diff(mi.run(model, task, edits=[edit]).logits, task) - clean
            torch.testing.assert_close(found.per_example[layer, head], expected, atol=1e-5, rtol=0)
    assert found.values.abs().max() > 0.05
    assert found.provenance["ablation"] == str(ablation)
    # A unit is what the corrupt prompts do.
    unit = found.baseline["corrupt"] - found.baseline["clean"]
    scaled = mi.patch(model, task, "L*.H*.z", direction="noise", ablation=kind)
    torch.testing.assert_close(scaled.per_example * unit, found.per_example, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["zero", "mean-pos"])
def test_an_edge_is_a_circuit_without_it(setting: Any, kind: str) -> None:
    """Two ways to the same number: replayed from the reader on, and as one forward pass of all but that edge."""
    model, task = setting.model, setting.task
    found = mi.edge_effects(model, task, ablation=kind, normalize=False)
    full = mi.Circuit.full(model)
    without = [full - mi.Circuit.from_edges(full.shape, [edge]) for edge in full.edges]
    outs = mi.run_circuits(model, task, without, ablation=kind)
    torch.testing.assert_close(outs.circuits - outs.clean, found.per_example, atol=3e-5, rtol=1e-5)


def test_parts_take_means_over_the_whole_task(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = setting.model, setting.task
    whole = mi.attribute(model, task, unit="edge", ablation="mean-pos")
    edges = mi.edge_effects(model, task, "*->logits", ablation="mean-pos")
    monkeypatch.setattr("mechinterp.patching.edges._WRITTEN_DIFFERENCES", 1)
    torch.testing.assert_close(
        mi.attribute(model, task, unit="edge", ablation="mean-pos", memory=1).per_example, whole.per_example, atol=2e-5, rtol=1e-4
    )
    again = mi.edge_effects(model, task, "*->logits", ablation="mean-pos")
    torch.testing.assert_close(again.per_example, edges.per_example, atol=2e-5, rtol=0)
    assert "completeness_error" not in whole.provenance


def test_an_estimate_is_the_slope_towards_the_ablated_values(setting: Any) -> None:
    """By hand: the clean gradient at each head's z, times minus z."""
    model, task = setting.model, setting.task
    found = mi.attribute(model, task, "L1.H*.z", ablation="zero", normalize=False)
    run = mi.run(model, task, capture="L1.z", grad=True)
    rows = torch.arange(len(task))
    answer = run.logits[rows, task.answer_pos]
    metric = answer[rows, task.right[:, 0]] - answer[rows, task.wrong[:, 0]]
    (gradient,) = torch.autograd.grad(metric.sum(), run["L1.z"])
    expected = -(gradient * run["L1.z"]).sum(dim=(1, 3)).T.detach()
    torch.testing.assert_close(found.per_example.reshape(4, -1), expected, atol=1e-5, rtol=0)


def test_a_circuit_found_under_zeros() -> None:
    """What zero ablation removes counts also where clean and corrupt prompts agree."""
    toy = mi.toys.induction()
    truth = toy.truth["zero"]
    effects = mi.edge_effects(toy.model, toy.task, ablation="zero").as_dict()
    ranked = sorted(effects, key=lambda edge: -abs(effects[edge]))
    assert {mi.Edge(*edge) for edge in ranked[: len(truth.edges)]} == set(truth.edges)  # type: ignore[misc]
    circuit = mi.discover(toy.model, toy.task, edges=5, ablation="zero")
    assert circuit.provenance["ablation"] == "zero"


def test_messages(setting: Any) -> None:
    with pytest.raises(
        MetricError, match=r"^the values of the ablation 'zero' are put into the clean run, so direction='denoise'"
    ):
        mi.patch(setting.model, setting.task, "L*.z", ablation="zero")
    with pytest.raises(MetricError, match=r"^ablation= and corruption= are two ways to say what is put in; give one of them$"):
        mi.patch(
            setting.model, setting.task, "L*.z", ablation="zero", direction="noise", corruption=mi.Zero("L0.resid_pre[changed]")
        )
