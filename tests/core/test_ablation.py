"""Ablation values against sums written out by hand, and against plain Hugging Face hooks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.ablation import ABLATIONS
from mechinterp.errors import EditError

SITES = "L*.z | L*.mlp_out | L0.resid_pre | L1.k | L1.mlp_post"
LENGTHS = [8, 5, 7, 5, 8]


@pytest.fixture(scope="module")
def padded(settings: Any) -> mi.Task:
    """The prompts of the settings, cut to unequal lengths; what is behind them is noise that must not count."""
    task = settings["gpt2"].task
    mask = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
    return mi.Task("padded", task.clean, task.corrupt, task.right, task.wrong, mask=mask, positions={"mark": [2, 0, 3, 4, 1]})


def runs_of(model: Any, tokens: Tensor, at: str = SITES) -> dict[str, Tensor]:
    return {str(site): value for site, value in mi.run(model, tokens, capture=at).cache.items()}


# -- every kind by hand ----------------------------------------------------------------------------


def test_zero(setting: Any) -> None:
    model, task = setting.model, setting.task
    at = "L1.z | L0.mlp_out | embed | L1.k_in | L1.mlp_post | L0.pattern | logits"
    found = mi.Ablation("zero").values(model, task, at)
    for site, value in runs_of(model, task.clean, at).items():
        assert torch.equal(found[site], torch.zeros_like(value))
        assert found[site].dtype == value.dtype


def test_mean_is_a_sum_by_hand(setting: Any, padded: mi.Task) -> None:
    """Per node, over real tokens alone, pooled over positions and at each one."""
    model = setting.model
    pooled = mi.Ablation("mean").values(model, padded, SITES)
    by_position = mi.Ablation("mean-pos").values(model, padded, SITES)
    for site, value in runs_of(model, padded.clean).items():
        flat = value.flatten(start_dim=2).double()
        rows = [flat[i, p] for i, length in enumerate(LENGTHS) for p in range(length)]
        mean = (sum(rows) / 33).float().reshape(value.shape[2:])
        torch.testing.assert_close(pooled[site], mean.expand_as(value), atol=1e-6, rtol=0)
        for p in range(8):
            rows = [flat[i, p] for i, length in enumerate(LENGTHS) if p < length]
            mean = (sum(rows) / len(rows)).float().reshape(value.shape[2:])
            torch.testing.assert_close(by_position[site][:, p], mean.expand(5, *mean.shape), atol=1e-6, rtol=0)
        # Neither the last token's value, nor one for all heads, nor with the padding: each is another number.
        assert (pooled[site] - value.mean(dim=(0, 1))).abs().max() > 1e-3
    assert (pooled["L0.H0.z"] - pooled["L0.H1.z"]).abs().max() > 1e-3


def test_mean_of_a_pattern_is_for_each_position(setting: Any, padded: mi.Task) -> None:
    value = runs_of(setting.model, padded.clean, "L1.pattern")["L1.pattern"]
    found = mi.Ablation("mean-pos").values(setting.model, padded, "L1.pattern")["L1.pattern"]
    torch.testing.assert_close(found[0, :, 7], value[[0, 4], :, 7].mean(dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[3, :, 6], value[[0, 2, 4], :, 6].mean(dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(5, 4, 8), atol=1e-5, rtol=0)


def test_a_mean_does_not_depend_on_memory(setting: Any, padded: mi.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mi.Ablation("mean").values(setting.model, padded, SITES)
    monkeypatch.setattr("mechinterp.core.reference.rows_per_forward", lambda model, length: 2)
    parts = mi.Ablation("mean").values(setting.model, padded, SITES)
    for site in whole:
        torch.testing.assert_close(parts[site], whole[site], atol=1e-5, rtol=0)


def test_padding_adds_nothing(setting: Any) -> None:
    model, short = setting.model, setting.task
    wide = [torch.cat([tokens, torch.full((5, 4), 17)], dim=1) for tokens in (short.clean, short.corrupt)]
    mask = torch.arange(12) < torch.full((5, 1), 8)
    task = mi.Task("wide", *wide, short.right, short.wrong, mask=mask)
    for kind in ("mean", "mean-pos", "resample", "resample-shuffled"):
        ablation = mi.Ablation(kind, seed=1)
        one, other = ablation.values(model, short, SITES), ablation.values(model, task, SITES)
        for site in one:
            torch.testing.assert_close(other[site][:, :8], one[site], atol=1e-5, rtol=0)


def test_a_reference_of_its_own(setting: Any, padded: mi.Task) -> None:
    model = setting.model
    reference = torch.randint(0, 61, (4, 9))
    for given in (reference, mi.Task("other", reference, reference.flip(0), [1] * 4, [2] * 4)):
        pooled = mi.Ablation("mean", reference=given).values(model, padded, "L1.z")["L1.z"]
        by_position = mi.Ablation("mean-pos", reference=given).values(model, padded, "L1.z")["L1.z"]
        value = runs_of(model, reference, "L1.z")["L1.z"]
        torch.testing.assert_close(pooled, value.mean(dim=(0, 1)).expand(5, 8, -1, -1), atol=1e-6, rtol=0)
        torch.testing.assert_close(by_position, value.mean(dim=0)[:8].expand(5, -1, -1, -1), atol=1e-6, rtol=0)
    # As long as the longest prompt is enough; what is behind it does not matter.
    short = padded[[1, 2, 3]]
    assert mi.Ablation("mean-pos", reference=reference[:, :7]).values(model, short, "L1.z")["L1.z"].shape[:2] == (3, 8)


def test_resampling_is_the_corrupt_run(setting: Any, padded: mi.Task) -> None:
    found = mi.Ablation().values(setting.model, padded, SITES)
    for site, value in runs_of(setting.model, padded.corrupt).items():
        assert torch.equal(found[site], value)


def test_shuffling_takes_prompts_of_equal_length(setting: Any, padded: mi.Task) -> None:
    model = setting.model
    task = padded[[0, 1, 3, 4, 0, 1]]
    found = mi.Ablation("resample-shuffled", seed=2).values(model, task, "L1.z")["L1.z"]
    value = runs_of(model, task.clean, "L1.z")["L1.z"]
    partners = []
    for i, length in enumerate([8, 5, 5, 8, 8, 5]):
        near = [(found[i, :length] - value[j, :length]).abs().max().item() < 1e-5 for j in range(6)]
        # Prompts 0 and 4 are the same, and 1 and 5.
        partners.append({j for j, is_it in enumerate(near) if is_it})
        assert partners[-1] <= ({0, 3, 4} if length == 8 else {1, 2, 5})
        assert partners[-1]
    again = mi.Ablation("resample-shuffled", seed=2).values(model, task, "L1.z")["L1.z"]
    assert torch.equal(again, found)
    others = [mi.Ablation("resample-shuffled", seed=seed).values(model, task, "L1.z")["L1.z"] for seed in range(4)]
    assert any(not torch.equal(other, found) for other in others)


def test_shuffling_draws_from_a_reference(setting: Any, padded: mi.Task) -> None:
    model = setting.model
    mask = torch.arange(9) < torch.tensor([5, 7, 8, 8])[:, None]
    tokens = torch.randint(0, 61, (4, 9))
    reference = mi.Task("other", tokens, tokens.flip(0), [1] * 4, [2] * 4, mask=mask)
    found = mi.Ablation("resample-shuffled", reference=reference, seed=0).values(model, padded, "L1.z")["L1.z"]
    value = runs_of(model, tokens, "L1.z")["L1.z"]
    for i, (length, donors) in enumerate(zip(LENGTHS, [[2, 3], [0], [1], [0], [2, 3]], strict=True)):
        assert min((found[i, :length] - value[j, :length]).abs().max().item() for j in donors) < 1e-5


# -- one object, three uses ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in ABLATIONS if kind != "optimal"])
@pytest.mark.parametrize("at", ["L0.H1.z | L1.mlp_out", "L*.H*.z", "L1.z[-1] | L0.mlp_out[mark]", "L1.N3.mlp_post"])
def test_the_edit_puts_the_values_there(setting: Any, padded: mi.Task, kind: str, at: str) -> None:
    model, task = setting.model, padded[[0, 1, 3, 4]]
    ablation = mi.Ablation(kind, seed=0)
    values = ablation.values(model, task, at)
    edit = ablation.edit(model, task, at)
    found = mi.run(model, task, edits=[edit], capture=at)
    for site in values:
        assert torch.equal(found[site], values[site])
    one_by_one = [mi.Replace(site, values[site].contiguous()) for site in values]
    assert torch.equal(found.logits, mi.run(model, task, edits=one_by_one).logits)
    assert mi.edit_from_json(edit.to_json()) == edit


def test_the_edit_of_a_mean_fits_other_prompts(setting: Any, padded: mi.Task) -> None:
    edit = mi.Ablation("mean").edit(setting.model, padded, "L1.H2.z")
    found = mi.run(setting.model, torch.randint(0, 61, (2, 13)), edits=[edit], capture="L1.H2.z")["L1.H2.z"]
    assert len(found.flatten(end_dim=1).unique(dim=0)) == 1


def test_rows_at_a_time(setting: Any, padded: mi.Task) -> None:
    for kind in ("zero", "mean", "mean-pos", "resample"):
        ablation = mi.Ablation(kind)
        whole, part = ablation.values(setting.model, padded, SITES), ablation.source(setting.model, padded, SITES)
        for site in whole:
            pieces = torch.cat([part(slice(first, first + 2))[site] for first in (0, 2, 4)])
            torch.testing.assert_close(pieces, whole[site], atol=1e-5, rtol=0)
        marked = part(slice(2, 4))["L1.z[mark]"]
        torch.testing.assert_close(marked, whole["L1.z[mark]"][2:4], atol=1e-5, rtol=0)


def test_constants_take_no_memory(setting: Any, padded: mi.Task) -> None:
    value = mi.Ablation("mean").values(setting.model, padded, "L1.z")["L1.z"]
    assert value.untyped_storage().nbytes() == 4 * 32


# -- how it shows itself ---------------------------------------------------------------------------


def test_names(padded: mi.Task) -> None:
    shown = {
        mi.Ablation(): "resample",
        mi.Ablation("zero", seed=3): "zero",
        mi.Ablation("mean", reference=padded): "mean, over padded, 5 prompts",
        mi.Ablation("mean-pos", reference=torch.zeros(2, 3, dtype=torch.long)): "mean-pos, over tokens, 2 prompts",
        mi.Ablation("resample-shuffled", seed=3): "resample-shuffled, seed 3",
        mi.Ablation("optimal", steps=20): "optimal, 20 steps",
    }
    assert [str(ablation) for ablation in shown] == list(shown.values())
    assert repr(mi.Ablation("mean")) == "Ablation(mean: its mean over all tokens of the reference prompts)"
    assert mi.Ablation("mean", reference=padded) == mi.Ablation("mean", reference=padded)
    assert mi.Ablation("mean") != mi.Ablation("zero")
    assert mi.Ablation("mean") != "mean"


def corrupt_without_a_pair(setting: Any, padded: mi.Task) -> object:
    return mi.Ablation().values(setting.model, padded.clean, "L0.z")


def alone_of_its_length(setting: Any, padded: mi.Task) -> object:
    return mi.Ablation("resample-shuffled", seed=0).values(setting.model, padded, "L0.z")


def no_donor(setting: Any, padded: mi.Task) -> object:
    reference = torch.zeros(2, 7, dtype=torch.long)
    return mi.Ablation("resample-shuffled", reference=reference, seed=0).values(setting.model, padded, "L0.z")


def too_short(setting: Any, padded: mi.Task) -> object:
    return mi.Ablation("mean-pos", reference=padded.clean[:, :6]).values(setting.model, padded, "L0.z")


def pooled_pattern(setting: Any, padded: mi.Task) -> object:
    return mi.Ablation("mean").values(setting.model, padded, "L0.pattern")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda *_: mi.Ablation("men"), "there is no ablation 'men'. Did you mean 'mean'?"),
        (
            lambda *_: mi.Ablation("resample-shuffled"),
            "the ablation 'resample-shuffled' draws prompts; write mi.Ablation('resample-shuffled', seed=0)",
        ),
        (
            lambda *_: mi.Ablation("optimal", steps=-1),
            "steps=-1: give the number of steps of the fit, 0 for the mean itself",
        ),
        (
            corrupt_without_a_pair,
            "the ablation 'resample' takes values from corrupt prompts, and these are tokens alone; give a task, or draw "
            "among them: mi.Ablation('resample-shuffled', seed=0)",
        ),
        (
            alone_of_its_length,
            "the task has one prompt of 7 tokens, so there is no other one to take values from; give more prompts of that "
            "length, or use another ablation, such as 'mean-pos'",
        ),
        (
            no_donor,
            "the reference has no prompt of 5 tokens, so there is no other one to take values from; give more prompts of that "
            "length, or use another ablation, such as 'mean-pos'",
        ),
        (
            too_short,
            "the reference has no prompt with a token at position 6, and the prompts have positions 0 to 7; give longer "
            "prompts, or use 'mean', one value for all positions",
        ),
        (
            pooled_pattern,
            "the mean of L0.pattern over all positions means nothing, as each position sees others; use 'mean-pos'",
        ),
    ],
)
def test_refused(setting: Any, padded: mi.Task, make: Callable[..., object], message: str) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        make(setting, padded)
