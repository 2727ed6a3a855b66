"""Tests of paired numbers beside scipy, and beside sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom, binomtest

from mechinterp.core.testing import binomial, hsic, hsic_test, sign_test
from mechinterp.errors import EditError


@pytest.mark.parametrize(("n", "chance"), [(0, 0.3), (1, 0.5), (30, 0.9), (200, 0.6), (5, 0.0), (5, 1.0)])
def test_binomial_is_scipy_s(n: int, chance: float) -> None:
    assert binomial(n, chance).tolist() == pytest.approx(binom.pmf(range(n + 1), n, chance).tolist(), abs=1e-12)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (9, 1), (3, 17), (40, 24)])
def test_without_a_margin_it_is_the_two_sided_sign_test(wins: int, losses: int) -> None:
    found = sign_test(torch.tensor([1.0] * wins + [-0.5] * losses + [0.0] * 3))
    assert (found.wins, found.losses, found.ties) == (wins, losses, 3)
    assert found.p_differ == pytest.approx(binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0)


@pytest.mark.parametrize("margin", [0.05, 0.1, 0.3])
@pytest.mark.parametrize(("wins", "losses"), [(20, 0), (12, 8), (10, 10), (2, 18)])
def test_with_a_margin_by_hand(wins: int, losses: int, margin: float) -> None:
    n = wins + losses
    found = sign_test(torch.tensor([2.0] * wins + [-2.0] * losses), margin=margin)
    far = [k for k in range(n + 1) if abs(k / n - 0.5) >= abs(wins / n - 0.5) - 1e-12]
    by_hand = sum(math.comb(n, k) * (0.5 + margin) ** k * (0.5 - margin) ** (n - k) for k in far)
    assert found.p_differ == pytest.approx(min(1.0, by_hand))
    # It is the mean of differences that a public implementation puts here; size must not matter.
    assert sign_test(torch.tensor([200.0] * wins + [-0.01] * losses), margin=margin) == found
    one_sided = [
        binomtest(wins, n, 0.5 + margin, alternative="less").pvalue,
        binomtest(wins, n, 0.5 - margin, alternative="greater").pvalue,
    ]
    assert found.p_same == pytest.approx(max(one_sided))


def test_ties_speak_for_being_the_same() -> None:
    tied = sign_test(torch.tensor([1e-7, -1e-7] * 100), margin=0.1, rounding=1e-6)
    assert (tied.wins, tied.losses, tied.ties) == (0, 0, 200)
    assert tied.p_differ == 1.0
    assert tied.p_same == pytest.approx(binomtest(100, 200, 0.6, alternative="less").pvalue)
    assert tied.p_same < 0.01


@pytest.mark.parametrize(("wins", "losses"), [(6, 3), (3, 6)])
def test_an_odd_tie_counts_against_being_the_same(wins: int, losses: int) -> None:
    found = sign_test(torch.tensor([1.0] * wins + [-1.0] * losses + [0.0] * 3), margin=0.1)
    # One and a half ties on either side: two where that is the larger chance.
    one_sided = [binom.cdf(wins + 2, 12, 0.6), binom.sf(wins + 1 - 1, 12, 0.4)]
    assert found.p_same == pytest.approx(max(one_sided))


def test_no_chance_is_above_one() -> None:
    """Sums of all probabilities round to a little more."""
    assert max(sign_test(torch.tensor([1.0, -1.0] * n)).p_differ for n in range(1, 40)) <= 1.0


def brute_hsic(a: list[float], b: list[float]) -> float:
    """trace(K H L H) / (n - 1)^2, entry by entry."""
    n = len(a)

    def kernel(values: list[float]) -> list[list[float]]:
        distances = sorted(abs(x - y) for x in values for y in values if x != y)
        # The lower of the two in the middle, as torch takes it; each distance is there twice.
        width = distances[(len(distances) - 1) // 2]
        return [[math.exp(-((x - y) ** 2) / (2 * width**2)) for y in values] for x in values]

    k, m = kernel(a), kernel(b)
    h = [[(i == j) - 1 / n for j in range(n)] for i in range(n)]
    total = 0.0
    for i in range(n):
        for j in range(n):
            for p in range(n):
                for q in range(n):
                    total += k[i][j] * h[j][p] * m[p][q] * h[q][i]
    return total / (n - 1) ** 2


def test_hsic_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(9, generator=generator), torch.randn(9, generator=generator)
    assert hsic(a, b) == pytest.approx(brute_hsic(a.double().tolist(), b.double().tolist()))
    assert hsic(a, torch.full((9,), 2.0)) == pytest.approx(0.0, abs=1e-15)
    # A scale, a shift and a sign change nothing.
    assert hsic(-3 * a + 1, b) == pytest.approx(hsic(a, b), rel=1e-5)


def test_dependence_is_seen_without_correlation() -> None:
    a = torch.randn(60, generator=torch.Generator().manual_seed(0))
    parabola = hsic_test(a, a**2, seed=0, permutations=200)
    assert parabola.p == pytest.approx(1 / 201)
    assert abs(float(torch.corrcoef(torch.stack([a, a**2]))[0, 1])) < 0.5
    assert hsic_test(a, a**2, seed=0, permutations=200) == parabola


def test_equal_dependence_is_as_large() -> None:
    """Two classes of two: what maps classes to classes has the same sum, but for its last bits."""
    a, b = torch.tensor([0.1, 0.1, 0.7, 0.7]), torch.tensor([3.0, 3.0, -1.0, -1.0])
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(4, generator=generator).tolist() for _ in range(300)]
    same = sum({*order[:2]} in ({0, 1}, {2, 3}) for order in orders)
    found = hsic_test(a, b, seed=5, permutations=300)
    assert 50 < same < 150 and found.p == pytest.approx((same + 1) / 301)
    assert found.statistic == pytest.approx(hsic(a, b)) and found.statistic > 0.05


def test_independent_numbers_are_rejected_as_often_as_the_level() -> None:
    generator = torch.Generator().manual_seed(1)
    p = [
        hsic_test(torch.randn(20, generator=generator), torch.randn(20, generator=generator), seed=i, permutations=39).p
        for i in range(200)
    ]
    assert sum(value <= 0.05 for value in p) / 200 == pytest.approx(0.05, abs=0.045)
    assert sum(value <= 0.5 for value in p) / 200 == pytest.approx(0.5, abs=0.12)


def test_what_is_constant_but_for_rounding_depends_on_nothing() -> None:
    noise = torch.arange(10.0) * 1e-8
    assert hsic_test(noise, noise, seed=0, permutations=50, rounding=1e-6).p == 1.0
    assert hsic_test(noise, noise, seed=0, permutations=50).p < 0.05


def test_messages() -> None:
    with pytest.raises(EditError, match=r"margin=0.5: give a number from 0 up to 0.5, how far the chance may be from one half"):
        sign_test(torch.ones(3), margin=0.5)
    with pytest.raises(EditError, match="permutations=0: give at least 1; 1000 are usual"):
        hsic_test(torch.ones(3), torch.ones(3), seed=0, permutations=0)
