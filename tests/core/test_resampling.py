"""Intervals and tests against scipy's, and against every case counted by hand."""

from __future__ import annotations

import math
import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.resampling import adjusted, bootstrap_interval, sign_flip
from mechinterp.errors import EditError


@pytest.fixture
def drawn() -> Tensor:
    """Five cells of 24 prompts, of different mean and width."""
    numbers = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    return numbers * torch.tensor([[1.0], [2.0], [0.5], [1.0], [3.0]]) + torch.tensor([[0.0], [1.0], [0.3], [-0.6], [0.2]])


def effects(numbers: Tensor, **coords: Any) -> mi.Effects:
    labels = coords or {"layer": tuple(range(len(numbers)))}
    return mi.Effects("x", tuple(labels), labels, numbers)


# -- bootstrap -------------------------------------------------------------------------------------


def test_the_interval_is_numpys(drawn: Tensor) -> None:
    """The same draws, averaged and sorted by numpy."""
    found = bootstrap_interval(drawn, confidence=0.9, resamples=500, seed=7)
    rows = torch.randint(0, 24, (500, 24), generator=torch.Generator().manual_seed(7)).numpy()
    means = drawn.numpy()[:, rows].mean(axis=-1)
    for end, share in zip(found, (0.05, 0.95), strict=True):
        np.testing.assert_allclose(end.numpy(), np.quantile(means, share, axis=1), atol=1e-6)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_interval_is_scipys(drawn: Tensor, confidence: float) -> None:
    from scipy.stats import bootstrap

    low, high = effects(drawn).interval(confidence, 20_000, seed=0)
    for i in range(5):
        theirs = bootstrap(
            (drawn[i].double().numpy(),),
            np.mean,
            confidence_level=confidence,
            n_resamples=20_000,
            method="percentile",
            rng=np.random.default_rng(1),
        ).confidence_interval
        width = theirs.high - theirs.low
        assert low[i].item() == pytest.approx(theirs.low, abs=0.02 * width)
        assert high[i].item() == pytest.approx(theirs.high, abs=0.02 * width)


def test_the_seed_decides(drawn: Tensor) -> None:
    found = effects(drawn)
    many = torch.randn(2, 60)
    state = torch.get_rng_state()
    first, again, other = (torch.stack(found.interval(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first[0] < found.values).all()
    assert (first[1] > found.values).all()
    tests = [effects(many).p_values(seed=seed, permutations=300) for seed in (1, 1, 2)]
    assert torch.equal(tests[0], tests[1])
    assert not torch.equal(tests[0], tests[2])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError):
        found.interval()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        found.p_values()  # type: ignore[call-arg]


def test_many_cells_in_parts(drawn: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = effects(drawn).interval(seed=0), effects(drawn[:, :8]).p_values(seed=0), effects(drawn).p_values(seed=0)
    monkeypatch.setattr("mechinterp.core.resampling._AT_ONCE", 1)
    parts = effects(drawn).interval(seed=0), effects(drawn[:, :8]).p_values(seed=0), effects(drawn).p_values(seed=0)
    torch.testing.assert_close(parts, whole)


def test_axes_are_kept(drawn: Tensor) -> None:
    grid = effects(drawn[:4].reshape(2, 2, 24), layer=(0, 1), head=(0, 1))
    line = effects(drawn[:4])
    for one, other in zip(grid.interval(seed=0), line.interval(seed=0), strict=True):
        assert torch.equal(one.flatten(), other)
        assert one.shape == (2, 2)
    assert torch.equal(grid.p_values(seed=0, correction="bh").flatten(), line.p_values(seed=0, correction="bh"))


def test_what_one_prompt_says(recwarn: pytest.WarningsRecorder) -> None:
    one = effects(torch.tensor([[2.0], [0.0]]))
    assert torch.stack(one.interval(seed=0)).isnan().all()
    # Either sign is as far from 0.
    assert one.p_values(seed=0).tolist() == [1.0, 1.0]
    assert not recwarn.list


def test_a_cell_without_a_number() -> None:
    found = effects(torch.tensor([[1.0, math.nan, 2.0], [1.0, 2.0, 3.0]]))
    assert torch.stack(found.interval(seed=0)).isnan().tolist() == [[True, False], [True, False]]
    assert found.p_values(seed=0).isnan().tolist() == [True, False]
    corrected = found.p_values(seed=0, correction="holm")
    assert corrected.isnan().tolist() == [True, False]
    # It is no test, so the other is the only one.
    assert corrected[1] == found.p_values(seed=0)[1] == 0.25


# -- sign flips ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_few_prompts_are_counted_out(drawn: Tensor, n: int) -> None:
    values = drawn[:, :n].double()
    # Equal numbers make equal means, which rounding must not tell apart.
    values[0] = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.6, 0.7, -0.1, 0.4])[:n]
    found = effects(values).p_values(seed=0)
    for row, p in zip(values.tolist(), found.tolist(), strict=True):
        sums = [abs(sum(sign * x for sign, x in zip(signs, row, strict=True))) for signs in product((1, -1), repeat=n)]
        assert p == pytest.approx(sum(each >= abs(sum(row)) - 1e-9 for each in sums) / 2**n, abs=1e-12)
        assert p >= 2 ** (1 - n)


def test_rounding_does_not_tell_equal_means_apart() -> None:
    # Some of them cancel, so that flipping these gives the same sum, but for the last bit.
    whole = (-6, -7, 1, 6, 8, -6, 2)
    found = effects(torch.tensor([whole], dtype=torch.float64) / 10).p_values(seed=0)
    sums = [abs(sum(sign * x for sign, x in zip(signs, whole, strict=True))) for signs in product((1, -1), repeat=7)]
    assert found.item() == sum(each >= abs(sum(whole)) for each in sums) / 128


def test_the_exact_test_is_scipys(drawn: Tensor) -> None:
    from scipy.stats import permutation_test

    found = effects(drawn[:, :12]).p_values(seed=0)
    for row, p in zip(drawn[:, :12].double().numpy(), found.tolist(), strict=True):
        theirs = permutation_test((row,), np.mean, permutation_type="samples", n_resamples=2**13)
        assert p == pytest.approx(theirs.pvalue, abs=1e-9)


def test_the_drawn_test_is_near_the_exact_one(drawn: Tensor) -> None:
    exact = sign_flip(drawn[:, :14], permutations=2**14, seed=0)
    found = sign_flip(drawn[:, :14], permutations=10_000, seed=0)
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0)
    # What was seen is one of the patterns, so that nothing is impossible.
    far = sign_flip(torch.full((1, 60), 5.0), permutations=99, seed=0)
    assert far.item() == pytest.approx(1 / 100)


def test_nothing_to_see_is_seen_as_often_as_it_should() -> None:
    chance = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0))
    found = effects(chance).p_values(seed=0)
    for level in (0.05, 0.2, 0.5):
        assert (found <= level).double().mean().item() == pytest.approx(level, abs=0.03)
    assert (effects(chance).p_values(seed=0, correction="holm") <= 0.05).sum() == 0
    assert effects(chance + 3).p_values(seed=0, correction="bh").max() < 0.01


# -- corrections -----------------------------------------------------------------------------------


def test_benjamini_hochberg_is_scipys() -> None:
    from scipy.stats import false_discovery_control

    p = torch.tensor([0.04, 0.001, 0.9, 0.03, 0.03, 0.2, 0.0005, 1.0, 0.008], dtype=torch.float64)
    np.testing.assert_allclose(adjusted(p, "bh").numpy(), false_discovery_control(p.numpy()), atol=1e-12)


def test_holm_by_hand() -> None:
    p = torch.tensor([0.04, 0.01, 0.5, 0.011], dtype=torch.float64)
    # Sorted .01 .011 .04 .5 times 4 3 2 1 is .04 .033 .08 .5, never falling.
    torch.testing.assert_close(adjusted(p, "holm"), torch.tensor([0.08, 0.04, 0.5, 0.04], dtype=torch.float64))
    assert adjusted(torch.tensor([0.9, 0.8]), "holm").tolist() == [1.0, 1.0]


# -- tables and refusals ---------------------------------------------------------------------------


def test_statistics_in_tables(drawn: Tensor) -> None:
    found = effects(drawn[:4].reshape(2, 2, 24), layer=(0, 1), head=(0, 1))
    low, high = found.interval(seed=0)
    frame = found.to_frame(low=low, high=high, p_value=found.p_values(seed=0, correction="holm"))
    assert list(frame.columns) == ["layer", "head", "value", "standard_error", "low", "high", "p_value"]
    assert frame["low"].tolist() == low.flatten().tolist()
    assert frame["p_value"].tolist() == found.p_values(seed=0, correction="holm").flatten().tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.interval(1.5, seed=0), "confidence=1.5: give a share between 0 and 1, such as 0.95"),
        (lambda e: e.interval(resamples=0, seed=0), "resamples=0: give at least 1; 2000 are usual"),
        (lambda e: e.p_values(permutations=0, seed=0), "permutations=0: give at least 1; 10000 are usual"),
        (lambda e: e.p_values(correction="hom", seed=0), "there is no correction 'hom'. Did you mean 'holm'?"),
        (
            lambda e: e.to_frame(p_value=torch.ones(3)),
            "column 'p_value' of shape [3] cannot join a table of layer, value, standard_error; give it another name, or a "
            "number for each cell, [5]",
        ),
        (
            lambda e: e.to_frame(layer=torch.ones(5)),
            "column 'layer' of shape [5] cannot join a table of layer, value, standard_error; give it another name, or a "
            "number for each cell, [5]",
        ),
    ],
)
def test_refused(drawn: Tensor, call: Any, message: str) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        call(effects(drawn))


def test_a_planted_effect_stands_out() -> None:
    toy = mi.toys.induction()
    found = mi.patch(toy.model, toy.task, "L*.H*.z")
    certain = found.p_values(seed=0, correction="holm") < 0.01
    assert certain.nonzero().tolist() == [[0, 3], [1, 5]]
    low, high = found.interval(seed=0)
    assert (low <= found.values).all()
    assert (high >= found.values).all()
    assert ((low > 0.1) == certain).all()


@pytest.mark.parametrize(("n", "low", "high"), [(10, 0.87, 0.92), (50, 0.93, 0.965)])
def test_intervals_hold_the_truth_as_often_as_is_said(n: int, low: float, high: float) -> None:
    """95 % intervals of the mean of n normal numbers around 1, which at 10 are known to be too narrow."""
    values = torch.randn(2000, n, generator=torch.Generator().manual_seed(n)) + 1
    least, most = bootstrap_interval(values, confidence=0.95, resamples=500, seed=1)
    assert low < float(((least < 1) & (most > 1)).float().mean()) < high
