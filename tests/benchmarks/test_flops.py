"""Budgets that are exact: floating-point operations, counted by torch. ``make bench`` prints them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import mechinterp as mi


@pytest.fixture(scope="module")
def small() -> mi.Model:
    torch.manual_seed(0)
    return mi.load(GPT2LMHeadModel(GPT2Config()), name="gpt2-small-random")


def pairs(first_difference: int) -> mi.Task:
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(0, 50257, (8, 15), generator=generator)
    corrupt = clean.clone()
    corrupt[:, first_difference:] = torch.randint(0, 50257, (8, 15 - first_difference), generator=generator)
    return mi.Task(name="random", clean=clean, corrupt=corrupt, right=[5] * 8, wrong=[6] * 8)


@pytest.mark.parametrize(("first_difference", "most"), [(0, 0.41), (10, 0.20)])
def test_head_sweep(small: mi.Model, first_difference: int, most: float) -> None:
    task = pairs(first_difference)
    mi.patch(small, task[:1], "L11.H0.z")  # the check of replay runs once, and is not part of the sweep
    with FlopCounterMode(display=False) as full, torch.no_grad():
        small(task.clean)
    with FlopCounterMode(display=False) as sweep:
        mi.patch(small, task, "L*.H*.z")
    share = sweep.get_total_flops() / (144 * full.get_total_flops())
    what = f"all 144 heads of a GPT-2-small shape, 8 pairs of 15 tokens that differ from {first_difference}"
    print(f"\n{what}: {share:.3f} of one full forward each")  # noqa: T201
    assert share <= most
