"""The two runs that every method starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import MetricError
from mechinterp.patching.compare import compare_runs, unit_of
from mechinterp.tasks import logit_diff


def test_who_receives_and_who_gives(setting: Any) -> None:
    model, task = setting.model, setting.task
    wanted = mi.select("L*.mlp_out", model.cfg)
    runs = {way: compare_runs(model, task, wanted, direction=way) for way in ("denoise", "noise")}  # type: ignore[arg-type]
    site = wanted.sites[1]
    clean, corrupt = (mi.run(model, tokens, capture=site)[site] for tokens in (task.clean, task.corrupt))
    assert not torch.equal(clean, corrupt)
    for way, own, other, tokens in (
        ("denoise", corrupt, clean, task.corrupt),
        ("noise", clean, corrupt, task.clean),
    ):
        assert torch.equal(runs[way].tokens, tokens)
        torch.testing.assert_close(runs[way].receiver[site], own, atol=1e-6, rtol=0)
        torch.testing.assert_close(runs[way].other[site], other, atol=1e-6, rtol=0)
        rows = torch.arange(len(task))
        torch.testing.assert_close(
            runs[way].received(), logit_diff(model(tokens)[rows, task.answer_pos], task), atol=1e-5, rtol=0
        )


def test_the_reference_of_kl_is_the_clean_run_in_both_directions(setting: Any) -> None:
    for way in ("denoise", "noise"):
        runs = compare_runs(setting.model, setting.task, mi.Selection(()), metric="kl", direction=way)  # type: ignore[arg-type]
        assert runs.baseline["clean"] == 0.0
        assert runs.baseline["corrupt"] > 0.01
        assert torch.equal(runs.received() == 0.0, torch.full((5,), way == "noise"))


@pytest.mark.parametrize(("direction", "unit"), [("denoise", 1.5), ("noise", -1.5)])
def test_unit_is_the_other_run_minus_the_receiving_one(setting: Any, direction: Any, unit: float) -> None:
    assert unit_of({"clean": 2.0, "corrupt": 0.5}, direction, metric=logit_diff, task=setting.task) == unit
    with pytest.raises(MetricError) as caught:
        unit_of({"clean": 0.5, "corrupt": 0.5}, direction, metric=logit_diff, task=setting.task)
    assert str(caught.value) == (
        "logit_diff is 0.5 on the clean and 0.5 on the corrupt prompts of task 'random': there is no difference to "
        "explain. Use other corrupt prompts, another metric, or normalize=False"
    )


def test_two_forward_passes_without_gradients(setting: Any) -> None:
    calls: list[bool] = []
    handle = setting.model.block(0).register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    try:
        runs = compare_runs(setting.model, setting.task, mi.select("L*.z", setting.model.cfg))
    finally:
        handle.remove()
    assert calls == [False, False]
    assert not any(value.requires_grad for value in (*runs.clean.whole.values(), runs.clean_logits))


def test_provenance_names_where_it_comes_from(setting: Any) -> None:
    said = compare_runs(setting.model, setting.task, mi.Selection(())).provenance(method="x")
    assert {key: said[key] for key in ("model", "task", "prompts", "metric", "direction", "method")} == {
        "model": setting.model.name,
        "task": "random",
        "prompts": 5,
        "metric": "logit_diff",
        "direction": "denoise",
        "method": "x",
    }
    assert set(said["versions"]) == {"torch", "transformers", "transformer-lens"}
