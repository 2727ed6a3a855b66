"""Edits that depend on which row of the batch a value is in: exchange, resample, disturb."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mechinterp.core.edit import Edit, Number
from mechinterp.core.sites import Site
from mechinterp.errors import EditError

__all__ = ["Noise", "Resample", "Swap", "shuffled"]


def shuffled(n: int, *, seed: int) -> Tensor:
    """A random permutation of n rows, one cycle through all of them, so that none stays where it is.

    Examples
    --------
    >>> order = shuffled(5, seed=0)
    >>> sorted(order.tolist()), bool((order == torch.arange(5)).any())
    ([0, 1, 2, 3, 4], False)
    """
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    order = torch.empty_like(drawn)
    order[drawn] = drawn.roll(-1)
    return order


@dataclass(frozen=True, eq=False, repr=False)
class Swap(Edit):
    """Exchange the values of two rows, for each of ``pairs``; without pairs, of row i and row i + n/2.

    An interchange intervention on both sides at once. Rows are counted from the first of ``rows``; both values are those
    from before the exchange.

    Examples
    --------
    >>> Swap("L0.z", pairs=((0, 2),)).apply(torch.tensor([[1.0], [2.0], [3.0]]), Site("z", 0)).flatten().tolist()
    [3.0, 2.0, 1.0]
    """

    pairs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        taken = [row for pair in self.pairs for row in pair]
        if len(set(taken)) != len(taken) or any(row < 0 for row in taken):
            raise EditError(f"Swap: the pairs {self.pairs} name a row twice or a negative one; each row has one partner at most")

    def apply(self, value: Tensor, site: Site) -> Tensor:
        n = len(value)
        if not self.pairs and n % 2:
            raise EditError(f"Swap at {site}: {n} rows have no two halves; give an even batch, or pairs=((0, 1), ...)")
        pairs = self.pairs or tuple((row, row + n // 2) for row in range(n // 2))
        order = torch.arange(n, device=value.device)
        for one, other in pairs:
            if max(one, other) >= n:
                raise EditError(f"Swap at {site}: there is no row {max(one, other)}; the batch has rows 0 to {n - 1}")
            order[one], order[other] = other, one
        return value[order]


@dataclass(frozen=True, eq=False, repr=False)
class Resample(Edit):
    """Put the value of another row of the batch there, drawn once for all sites: `shuffled` of the rows by ``seed``.

    Rows are taken position by position, so they should be of equal length; for padded prompts, or the values of other
    prompts, see ``mi.Ablation("resample-shuffled", seed=...)``.

    References
    ----------
    Chan et al. 2022, causal scrubbing.
    """

    seed: int = field(kw_only=True)
    absolute: ClassVar[bool] = True

    def apply(self, value: Tensor, site: Site) -> Tensor:
        if len(value) < 2:
            raise EditError(f"Resample at {site}: there is {len(value)} row, so no other one to take the value from")
        return value[shuffled(len(value), seed=self.seed).to(value.device)]


@dataclass(frozen=True, eq=False, repr=False)
class Noise(Edit):
    """Add draws from N(0, sigma^2); `mechinterp.deviation` gives the unit of a site, as in ``sigma=3 * deviation(...)``.

    A row's draw depends on the seed, the site and the row's number alone: rows are counted from ``first_row``, beginning
    with the first of ``rows``. So prompts that are packed as rows, run in parts, or padded on the right get the same noise.
    Drawn in float32 on the CPU, whatever the model computes in.

    References
    ----------
    Meng et al. 2022 (2202.05262): token embeddings of the subject, with three standard deviations.
    """

    sigma: Number
    seed: int = field(kw_only=True)
    first_row: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not self.sigma >= 0:
            raise EditError(f"Noise: sigma is a standard deviation, 0 or more, not {self.sigma}")

    def apply(self, value: Tensor, site: Site) -> Tensor:
        rows = [self._draw(self.first_row + row, site, value[0]) for row in range(len(value))]
        return value + self.sigma * torch.stack(rows).to(value.device, value.dtype)

    def _draw(self, row: int, site: Site, like: Tensor) -> Tensor:
        key = hashlib.sha256(f"{self.seed} {site} {row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        # torch draws normal numbers in blocks of 16, and the last block anew where it is not full: whole blocks alone
        # begin alike for every length.
        blocks = max(1, -(-like.numel() // 16))
        return torch.randn(16 * blocks, generator=generator)[: like.numel()].reshape(like.shape)
