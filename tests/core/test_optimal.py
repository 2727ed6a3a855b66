"""Optimal constants: never worse than means, found where one was planted, and as good as scipy's on a plain module."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.optimal import answer_change, fit_constants
from mechinterp.core.reference import means_over
from mechinterp.errors import EditError
from tests.reference import Intervention

AT = "L0.H1.z | L1.H2.z | L0.mlp_out | L1.mlp_out | L0.resid_pre | L1.N3.mlp_post"


def losses(model: Any, task: mi.Task, values: mi.Cache) -> Tensor:
    """Of constants, each alone: by edits of ours, one forward pass each."""
    rows = torch.arange(len(task))
    with torch.no_grad():
        clean = model(task.clean)[rows, task.answer_pos].log_softmax(-1)
        found = []
        for site in values:
            out = mi.run(model, task.clean, edits=[mi.Replace(site, values[site].contiguous())]).logits
            answer = out[rows, task.answer_pos].log_softmax(-1)
            found.append((clean.exp() * (clean - answer)).sum(-1).mean())
    return torch.stack(found)


def test_never_worse_than_the_mean(setting: Any) -> None:
    model, task = setting.model, setting.task
    best = mi.Ablation("optimal", steps=40).values(model, task, AT)
    mean = mi.Ablation("mean").values(model, task, AT)
    found, before = losses(model, task, best), losses(model, task, mean)
    assert (found <= before + 1e-6).all()
    assert (found < 0.9 * before).sum() >= 4
    for site in best:
        value = best[site].flatten(start_dim=2) if site.neuron is None else best[site][:, :, None]
        # One constant for all prompts and positions.
        assert len(value.flatten(end_dim=1).unique(dim=0)) == 1
    # Nothing is drawn.
    again = mi.Ablation("optimal", steps=40).values(model, task, AT)
    assert all(
        torch.equal(again.whole[site][0, 0], best.whole[site][0, 0]) for site in best.whole if not best.whole[site].isnan().any()
    )


def test_without_steps_it_is_the_mean(setting: Any) -> None:
    best, mean = (mi.Ablation(kind, steps=0).values(setting.model, setting.task, AT) for kind in ("optimal", "mean"))
    for site in best:
        assert torch.equal(best[site], mean[site])


def test_the_loss_is_that_of_a_brute_force(setting: Any) -> None:
    model, task, reference = setting.model, setting.task, setting.reference
    means = mi.Ablation("mean").values(model, task, "L0.mlp_out | L1.mlp_out")
    sites = list(means)
    found = answer_change(model, task.clean, task.answer_pos, sites, [means[site][:1, :1] for site in sites])
    rows = torch.arange(len(task))
    clean = reference.run(task.clean)[0][rows, task.answer_pos].log_softmax(-1)
    for node, loss in zip(("m0", "m1"), found.tolist(), strict=True):
        mean = reference.run(task.clean)[1][node].mean(dim=(0, 1))
        out, _ = reference.run(task.clean, Intervention(put={node: lambda value, mean=mean: mean.expand_as(value)}))
        answer = out[rows, task.answer_pos].log_softmax(-1)
        assert loss == pytest.approx((clean.exp() * (clean - answer)).sum(-1).mean().item(), abs=1e-5)


def test_the_planted_constant_is_found(setting: Any) -> None:
    """With one prompt, the last MLP's value at the answer is a constant that changes nothing; the mean is another one."""
    model = setting.model
    task = setting.task[[2, 2]]
    site = mi.Site("mlp_out", 1)
    true = mi.run(model, task, capture="L1.mlp_out")[site][:1, task.answer_pos[0], :]
    mean = mi.Ablation("mean").values(model, task, site)[site][:1, 0]
    best = mi.Ablation("optimal", steps=200).values(model, task, site)[site][:1, 0]
    rows = [task.clean, task.answer_pos, [site]]
    loss = [answer_change(model, *rows, [value[:, None]]).item() for value in (mean, best, true)]
    assert loss[2] == pytest.approx(0, abs=1e-6)
    assert loss[1] < 1e-2 * loss[0]
    assert loss[0] > 0.05
    # What the logits see of it is the planted constant, too.
    assert (best - true).norm() < 0.7 * (mean - true).norm()


def test_as_good_as_scipy(settings: Any) -> None:
    """On a forward pass written by hand in float64, which shares no code with ours."""
    from scipy.optimize import minimize

    model, task, reference = settings["gpt2"].model, settings["gpt2"].task, settings["gpt2"].reference
    rows = torch.arange(len(task))
    clean = reference.run(task.clean)[0][rows, task.answer_pos].log_softmax(-1).detach()

    def loss(point: Any) -> tuple[float, Any]:
        a = torch.tensor(point, requires_grad=True)
        out, _ = reference.run(task.clean, Intervention(put={"m1": lambda value: a.expand_as(value)}))
        answer = out[rows, task.answer_pos].log_softmax(-1)
        value = (clean.exp() * (clean - answer)).sum(-1).mean()
        return value.item(), torch.autograd.grad(value, a)[0].numpy()

    mean = reference.run(task.clean)[1]["m1"].mean(dim=(0, 1)).numpy()
    theirs = minimize(loss, mean, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    ours = mi.Ablation("optimal", steps=300).values(model, task, "L1.mlp_out")["L1.mlp_out"][0, 0].double().numpy()
    assert loss(ours)[0] == pytest.approx(theirs.fun, rel=0.02)
    assert loss(np.asarray(mean))[0] > 1.2 * theirs.fun


def test_memory_changes_no_number(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = setting.model, setting.task
    whole = mi.Ablation("optimal", steps=5).values(model, task, AT)
    for rows in (1, 20):
        monkeypatch.setattr("mechinterp.core.optimal.rows_per_forward", lambda model, length, rows=rows: rows)
        parts = mi.Ablation("optimal", steps=5).values(model, task, AT)
        torch.testing.assert_close(losses(model, task, parts), losses(model, task, whole), atol=1e-3, rtol=0.02)


def test_what_was_not_asked_for_is_no_number(setting: Any) -> None:
    found = mi.Ablation("optimal", steps=1).values(setting.model, setting.task, "L1.H2.z")
    assert found["L1.H2.z"].isfinite().all()
    assert found["L1.H0.z"].isnan().all()


def test_the_model_is_left_alone(setting: Any) -> None:
    model, state = setting.model, torch.get_rng_state()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.hf.modules()]
    found = mi.Ablation("optimal", steps=2).values(model, setting.task, "L1.H2.z")
    assert not found["L1.H2.z"].requires_grad
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.hf.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("L1.H2.z[3]", "an optimal constant is the same at all positions; ask for it at L1.H2.z, not at L1.H2.z[3]"),
        ("L1.z | L1.H2.z", "L1.H2.z overlaps another site that was asked for, and each needs a constant of its own"),
    ],
)
def test_refused(setting: Any, at: str, message: str) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        mi.Ablation("optimal", steps=1).values(setting.model, setting.task, at)


def test_tokens_alone_are_fitted_at_their_last_position(setting: Any) -> None:
    model, tokens = setting.model, setting.task.clean
    found = mi.Ablation("optimal", steps=3).values(model, tokens, "L1.mlp_out")["L1.mlp_out"]
    selection = mi.select("L1.mlp_out", model.cfg)
    means = means_over(model, tokens, selection, pooled=True)
    expected = fit_constants(model, tokens, torch.full((5,), 7), selection, means, steps=3)[selection.sites[0]]
    assert torch.equal(found, expected.expand_as(found))
