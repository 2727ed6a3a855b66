"""What prompts drawn by chance say of a mean over prompts: bootstrap intervals, sign-flip tests, corrections for many tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from mechinterp.errors import EditError, did_you_mean

__all__ = ["CORRECTIONS", "adjusted", "bootstrap_interval", "draws", "sign_flip", "sign_test"]

# Numbers held at once: cells times resamples.
_AT_ONCE = 1 << 23


def draws(n: int, *, resamples: int, seed: int) -> Tensor:
    """``[resample n]``: for each resample, n of n prompts, drawn with replacement."""
    return torch.randint(0, n, (resamples, n), generator=torch.Generator().manual_seed(seed))


def bootstrap_interval(per_example: Tensor, *, confidence: float, resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap of the mean over the last axis: prompts are drawn with replacement, the same for all cells.

    Of few prompts it is too narrow: measured on means of normal numbers, 95 % intervals hold the truth 90 % of the time at 10
    prompts, 93 % at 20 and 95 % at 50; of skewed ones (exponential) 87 %, 90 % and 93 %.

    Parameters
    ----------
    per_example
        ``[cell batch]``.

    Returns
    -------
    tuple
        ``[cell]`` lower and upper ends; nan for a single prompt.
    """
    if not 0 < confidence < 1:
        raise EditError(f"confidence={confidence}: give a share between 0 and 1, such as 0.95")
    if resamples < 1:
        raise EditError(f"resamples={resamples}: give at least 1; 2000 are usual")
    cells, n = per_example.shape
    if n < 2:
        return torch.full((cells,), torch.nan), torch.full((cells,), torch.nan)
    drawn = draws(n, resamples=resamples, seed=seed)
    # How often each prompt was drawn: all means of a cell are one matrix product.
    share = torch.zeros(resamples, n).scatter_add_(1, drawn, torch.ones(resamples, n)) / n
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail])
    parts = torch.split(per_example.float().cpu(), max(1, _AT_ONCE // resamples))
    low, high = torch.cat([torch.quantile(part @ share.T, ends, dim=1) for part in parts], dim=1)
    return low, high


def sign_flip(per_example: Tensor, *, permutations: int, seed: int) -> Tensor:
    """How often would the mean over the last axis be as far from 0 if each prompt's sign were chance?

    p = share of sign patterns s in {-1, 1}^batch with |mean(s x)| >= |mean(x)|. All 2^batch patterns are counted if they are
    no more than ``permutations``, else that many are drawn, and the observed one is counted among them.

    Parameters
    ----------
    per_example
        ``[cell batch]``.

    Returns
    -------
    Tensor
        ``[cell]``; nan where a number is not finite.
    """
    if permutations < 1:
        raise EditError(f"permutations={permutations}: give at least 1; 10000 are usual")
    values = per_example.double().cpu()
    n = values.shape[1]
    exact = 2**n <= permutations
    if exact:
        patterns = torch.arange(2**n)[:, None] >> torch.arange(n) & 1
    else:
        patterns = torch.randint(0, 2, (permutations, n), generator=torch.Generator().manual_seed(seed))
    signs = 1.0 - 2.0 * patterns.double()
    found = []
    for part in torch.split(values, max(1, _AT_ONCE // len(signs))):
        observed = part.sum(dim=1).abs()
        # Sums in another order differ in the last bits, and would not count as equal.
        least = observed - 1e-12 * part.abs().sum(dim=1)
        further = ((part @ signs.T).abs() >= least[:, None]).sum(dim=1).double()
        share = further / len(signs) if exact else (further + 1) / (len(signs) + 1)
        found.append(share.where(observed.isfinite(), torch.nan))
    return torch.cat(found)


def sign_test(differences: Tensor) -> Tensor:
    """In how many prompts is the difference above 0, and how often would chance alone do that?

    p = P(X >= number above 0) with X ~ Binomial(batch, 1/2). One-sided, exact, nothing is drawn, and nothing is assumed of the
    size of differences. A difference of exactly 0 counts as not above it.

    Parameters
    ----------
    differences
        ``[cell batch]``.

    Returns
    -------
    Tensor
        ``[cell]``, in float64; the smallest that n prompts can give is 2^-n. nan where a number is not finite.

    Examples
    --------
    >>> sign_test(torch.tensor([[1.0, 2.0, 0.5], [1.0, -1.0, 0.0]])).tolist()
    [0.125, 0.875]
    """
    n = differences.shape[1]
    tail, total = [], 0
    for least in range(n, -1, -1):
        total += math.comb(n, least)
        tail.append(total / 2**n)
    above = (differences > 0).sum(dim=1).cpu()
    p = torch.tensor(tail[::-1], dtype=torch.float64)[above]
    return p.where(differences.isfinite().all(dim=1).cpu(), torch.nan)


def _holm(p: Tensor) -> Tensor:
    """Family-wise error: max over smaller ones of (m - rank + 1) p."""
    m = len(p)
    order = p.argsort()
    scaled = (p[order] * torch.arange(m, 0, -1)).cummax(dim=0).values
    return torch.empty_like(p).scatter_(0, order, scaled.clamp(max=1))


def _benjamini_hochberg(p: Tensor) -> Tensor:
    """False discovery rate: min over larger ones of p m / rank."""
    m = len(p)
    order = p.argsort(descending=True)
    scaled = (p[order] * m / torch.arange(m, 0, -1)).cummin(dim=0).values
    return torch.empty_like(p).scatter_(0, order, scaled.clamp(max=1))


CORRECTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"holm": _holm, "bh": _benjamini_hochberg})


def adjusted(p_values: Tensor, correction: str) -> Tensor:
    """P-values ``[cell]`` corrected for the number of cells.

    ``"holm"`` keeps down the chance of any false positive, ``"bh"`` (Benjamini-Hochberg) the share of them.
    Cells without a p-value (nan) are no tests.
    """
    if correction not in CORRECTIONS:
        raise EditError(f"there is no correction {correction!r}. {did_you_mean(correction, CORRECTIONS)}")
    found, tested = p_values.clone(), ~p_values.isnan()
    found[tested] = CORRECTIONS[correction](p_values[tested])
    return found
