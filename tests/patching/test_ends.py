"""Positions from the end of prompts of unequal length: each prompt's own, in every method that takes a selector."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.discovery.describe import _places
from mechinterp.errors import SelectorError

LENGTHS = [8, 5, 6, 4]


@pytest.fixture
def task() -> mi.Task:
    clean = torch.randint(1, 61, (4, 8), generator=torch.Generator().manual_seed(5))
    corrupt = clean.clone()
    corrupt[:, 1] = (clean[:, 1] + 7) % 60 + 1
    mask = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
    return mi.Task(name="uneven", clean=clean, corrupt=corrupt, right=[3, 9, 27, 40], wrong=[8, 5, 33, 2], mask=mask)


@pytest.mark.parametrize("method", [mi.patch, mi.attribute])
@pytest.mark.parametrize("at", ["L*.H*.z[-1]", "L1.resid_pre[-2]", "L0.mlp_out[1]"])
def test_each_prompt_alone(tiny_gpt2: Callable[..., mi.Model], tiny_llama: Any, task: mi.Task, method: Any, at: str) -> None:
    for model in (tiny_gpt2(seed=1), tiny_llama(seed=1)):
        together = method(model, task, at, direction="noise", normalize=False)
        for row, length in enumerate(LENGTHS):
            alone = mi.Task(
                name="one",
                clean=task.clean[row : row + 1, :length],
                corrupt=task.corrupt[row : row + 1, :length],
                right=task.right[row : row + 1],
                wrong=task.wrong[row : row + 1],
            )
            wanted = method(model, alone, at, direction="noise", normalize=False).per_example[..., 0]
            torch.testing.assert_close(together.per_example[..., row], wanted, atol=5e-5, rtol=1e-4)
        assert float(together.per_example.abs().max()) > 1e-3


def test_names_stay_readable(tiny_gpt2: Callable[..., mi.Model], task: mi.Task) -> None:
    effects = mi.patch(tiny_gpt2(seed=1), task, "L*.resid_pre[-2,-1]", normalize=False)
    assert effects.axes == ("layer", "pos")
    assert effects.coords["pos"] == ("last-1", "last")
    assert effects.provenance["at"] == "L*.resid_pre[-2,-1]"
    # Of prompts of one length the numbers stay.
    equal = mi.patch(tiny_gpt2(seed=1), task[:1], "L*.resid_pre[-1]", normalize=False)
    assert equal.coords["pos"] == (-1,)
    taken = replace(task, positions={"last": task.lengths - 1})
    with pytest.raises(SelectorError, match=r"^task 'uneven' has a position named 'last'; say it by that name, or rename it$"):
        mi.patch(tiny_gpt2(seed=1), taken, "L0.z[-1]")


def test_positions_that_a_prompt_does_not_have(tiny_gpt2: Callable[..., mi.Model], task: mi.Task) -> None:
    message = (
        "there is no position 4 in prompt 3 of task 'uneven', which has 4 tokens; leave the prompt out, or give each prompt its "
        "own position by a name"
    )
    with pytest.raises(SelectorError, match=f"^{re.escape(message)}$"):
        mi.patch(tiny_gpt2(seed=1), task, "L0.z[4]")
    with pytest.raises(SelectorError, match=r"^there is no position -5 in prompt 3 of task"):
        mi.attribute(tiny_gpt2(seed=1), task, "L0.z[-5]")


def test_padding_is_no_place(task: mi.Task) -> None:
    _, onehot = _places(task)
    assert onehot.sum(dim=(1, 2)).tolist() == LENGTHS
