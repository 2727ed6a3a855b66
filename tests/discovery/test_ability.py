from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import binomtest

import mechinterp as mi


def test_a_toy_does_its_task_and_not_on_corrupt_prompts() -> None:
    toy = mi.toys.induction(n=40)
    found = mi.check_task(toy.model, toy.task)
    assert (found.accuracy, found.corrupt_accuracy, found.first, found.prompts) == (1.0, 0.0, 1.0, 40)
    assert found.clean > 0 > found.corrupt
    assert repr(found).startswith(
        "Ability: induction on toy:induction, 40 prompts: accuracy 1.000 (0.912 to 1.000), 0.000 on corr"
    )


@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
def test_against_the_model_run_by_hand(tiny_llama: Any, metric: str) -> None:
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 61, (50, 6), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 2] = (corrupt[:, 2] + 1) % 61
    task = mi.Task(
        name="any", clean=clean, corrupt=corrupt, right=[[1, 2]] * 50, wrong=[[3, 4]] * 50, answer_pos=[3] * 25 + [5] * 25
    )
    found = mi.check_task(model, task, metric=metric)
    with torch.no_grad():
        logits = model(clean)[torch.arange(50), task.answer_pos]
        other = model(corrupt)[torch.arange(50), task.answer_pos]
    right = (logits[:, [1, 2]].amax(1) > logits[:, [3, 4]].amax(1)).float().mean()
    assert found.accuracy == pytest.approx(float(right))
    wins = (other[:, [1, 2]].amax(1) > other[:, [3, 4]].amax(1)).float().mean()
    assert found.corrupt_accuracy == pytest.approx(float(wins))
    assert found.first == pytest.approx(sum(int(each) in (1, 2) for each in logits.argmax(1)) / 50)
    if metric == "logit_diff":
        assert found.corrupt == pytest.approx(float((other[:, [1, 2]].mean(1) - other[:, [3, 4]].mean(1)).mean()), abs=1e-5)
    else:
        away = (logits.softmax(-1) * (logits.log_softmax(-1) - other.log_softmax(-1))).sum(-1).mean()
        assert found.clean == pytest.approx(0, abs=1e-6) and found.corrupt == pytest.approx(float(away), abs=1e-5)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (64, 64), (90, 128)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    from mechinterp.discovery.ability import _wilson

    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert _wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("name", ["agreement", "gender", "docstring"])
def test_smollm2_does_the_new_tasks(smollm2: mi.Model, name: str) -> None:
    """Right and wrong trade places in the counterfactual, and so do the model's answers."""
    found = mi.check_task(smollm2, mi.tasks.TASKS[name](smollm2.tokenizer, n=16, seed=0))
    assert found.accuracy >= 15 / 16 and found.corrupt_accuracy <= 2 / 16
    assert found.clean > 2 and found.corrupt < -2
