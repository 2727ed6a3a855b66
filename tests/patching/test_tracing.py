"""Causal tracing, windows and plans: sweeps with another corruption, several layers in a cell, and the cost said before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mechinterp as mi
from mechinterp.errors import SelectorError


def logit_diff(logits: Tensor, task: mi.Task) -> Tensor:
    rows = torch.arange(len(task))
    answer = logits[rows, task.answer_pos]
    return (answer[rows, task.right[:, 0]] - answer[rows, task.wrong[:, 0]]).detach()


def noise(task: mi.Task, d_model: int) -> Tensor:
    """For one position of each prompt."""
    return torch.randn(len(task), d_model, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("over", [("layer", "pos"), ("layer",)])
def test_tracing_is_restoring_one_state_after_another(setting: Any, over: tuple[str, ...]) -> None:
    """One ordinary run for each state, in a run with noise on the embedding of one position."""
    model, task = setting.model, setting.task
    corrupted = mi.Add("L0.resid_pre[changed]", noise(task, model.cfg.d_model))
    found = mi.patch(model, task, "L*.resid_post", over=over, corruption=corrupted, normalize=False)
    clean = mi.run(model, task, capture="L*.resid_post")
    noised = logit_diff(mi.run(model, task, edits=[corrupted]).logits, task)
    assert found.baseline["clean"] == pytest.approx(float(logit_diff(clean.logits, task).mean()), abs=1e-5)
    assert found.baseline["corrupt"] == pytest.approx(float(noised.mean()), abs=1e-5)
    for layer in range(model.cfg.n_layers):
        for pos in range(8) if "pos" in over else [None]:
            where = f"L{layer}.resid_post" + ("" if pos is None else f"[{pos}]")
            restored = mi.run(model, task, edits=[corrupted, mi.Replace(where, clean[where].clone())])
            cell = found.per_example[layer] if pos is None else found.per_example[layer, pos]
            torch.testing.assert_close(cell, logit_diff(restored.logits, task) - noised, atol=1e-5, rtol=0)
    assert found.per_example.abs().max() > 0.1
    assert found.provenance["corruption"] == [repr(corrupted)]


def test_the_other_direction_puts_noised_values_into_the_clean_run(setting: Any) -> None:
    model, task = setting.model, setting.task
    corrupted = mi.Add("L0.resid_pre[changed]", noise(task, model.cfg.d_model))
    found = mi.patch(model, task, "L*.mlp_out", direction="noise", corruption=[corrupted], normalize=False)
    other = mi.run(model, task, edits=[corrupted], capture="L*.mlp_out")
    clean = logit_diff(model(task.clean), task)
    for layer in range(model.cfg.n_layers):
        site = f"L{layer}.mlp_out"
        moved = mi.run(model, task, edits=[mi.Replace(site, other[site])])
        torch.testing.assert_close(found.per_example[layer], logit_diff(moved.logits, task) - clean, atol=1e-5, rtol=0)


def test_what_cannot_be_replayed_gets_the_same_noise_in_every_row(setting: Any) -> None:
    """A function that draws anew at each call would give packed rows other noise than the corrupt run had."""
    model, task = setting.model, setting.task
    calls = []

    def shake(value: Tensor, site: mi.Site) -> Tensor:
        calls.append(site)
        return value + torch.randn(value.shape, generator=torch.Generator().manual_seed(len(calls)))

    embed = "embed" if "embed" in model.sites else "L0.resid_pre"
    found = mi.patch(model, task, embed, over=("pos",), corruption=mi.Call(f"{embed}[changed]", shake))
    assert len(calls) == 1
    # The noise is on one position of each prompt: taking it away there restores everything, elsewhere nothing.
    for row, pos in enumerate(task.positions["changed"].tolist()):
        assert found.per_example[pos, row].abs() > 1e-3
        others = [place for place in range(8) if place != pos]
        torch.testing.assert_close(found.per_example[others, row], torch.zeros(7), atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [2, 3])
def test_windows_patch_neighbouring_layers_together(tiny_gpt2: Any, setting: Any, window: int) -> None:
    model, task = tiny_gpt2(n_layers=4, seed=3), setting.task
    found = mi.patch(model, task, "L*.mlp_out", window=window, normalize=False)
    assert found.axes == ("layer",)
    for layer in range(4):
        layers = [at for at in range(layer - (window - 1) // 2, layer + window // 2 + 1) if 0 <= at < 4]
        together = mi.patch(model, task, " | ".join(f"L{at}.mlp_out" for at in layers), over=(), normalize=False)
        torch.testing.assert_close(found.per_example[layer], together.per_example.reshape(-1), atol=1e-5, rtol=0)
    clean = mi.run(model, task, capture="L*.mlp_out")
    edits = [mi.Replace(f"L{at}.mlp_out", clean[f"L{at}.mlp_out"]) for at in (1, 2)]
    by_hand = mi.run(model, task.corrupt, edits=edits).logits
    first = mi.patch(model, task, "L*.mlp_out", window=2, normalize=False).per_example[1]
    torch.testing.assert_close(first, logit_diff(by_hand, task) - logit_diff(model(task.corrupt), task), atol=1e-5, rtol=0)


def test_windows_need_layers(setting: Any) -> None:
    with pytest.raises(SelectorError, match=r"window=3 takes layers to slide over; L0\.resid_pre has the axes pos"):
        mi.patch(setting.model, setting.task, "L0.resid_pre", over=("pos",), window=3)
    with pytest.raises(SelectorError, match=r"window=0: give the number of layers that are patched together, 1 or more"):
        mi.patch(setting.model, setting.task, "L*.resid_pre", window=0)


def test_a_plan_is_what_the_sweep_then_costs(setting: Any) -> None:
    model, task = setting.model, setting.task
    mi.patch(model, task, "L0.H0.z")
    with FlopCounterMode(display=False) as counter:
        plan = mi.plan(model, task, "L*.H*.z")
    assert counter.get_total_flops() == 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(task.clean)
        model(task.corrupt)
    both = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        mi.patch(model, task, "L*.H*.z")
    # Beside the plan there are the clean and the corrupt run, which unembed the answer positions only.
    assert plan.flops < counter.get_total_flops() <= 1.1 * plan.flops + both
    assert (plan.cells, plan.replayed, plan.unchanged) == (8, 8, 0)
    early = mi.plan(model, task, "L*.H*.z[0:2]")
    assert (early.cells, early.unchanged, early.calls) == (16, 16, 0)
    assert mi.plan(model, task, "L*.H*.z", corruption=mi.Zero("L0.mlp_out")).flops > plan.flops
    assert mi.plan(model, task, "L*.H*.z", metric="kl").flops > plan.flops
    assert mi.plan(model, task, "L*.H*.z", memory=1).calls == 8


def test_metrics_that_read_the_answers_only_are_measured_on_those_alone(setting: Any) -> None:
    model, task = setting.model, setting.task
    for name in ("logit_diff", "accuracy"):
        metric = mi.tasks.METRICS[name]
        by_hand = mi.patch(
            model, task, "L*.H*.z", metric=lambda logits, task, metric=metric: metric(logits, task), normalize=False
        )
        found = mi.patch(model, task, "L*.H*.z", metric=name, normalize=False)
        torch.testing.assert_close(found.per_example, by_hand.per_example, atol=1e-5, rtol=0)
