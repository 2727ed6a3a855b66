"""Statistics of activations over reference prompts, padding excluded: means, and the unit of noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mechinterp.core.model import Model
from mechinterp.core.plan import rows_per_forward
from mechinterp.core.run import Cache, Prompts, run, tokens_of
from mechinterp.core.select import Selection, select
from mechinterp.core.sites import Site
from mechinterp.errors import EditError

__all__ = ["Pairs", "along", "deviation", "mask_of", "means_over", "position_axis", "record", "wholes"]


@runtime_checkable
class Pairs(Prompts, Protocol):
    """What ablations need of a task, beside clean tokens and named positions."""

    @property
    def corrupt(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def answer_pos(self) -> Tensor: ...


def mask_of(prompts: Tensor | Pairs) -> Tensor:
    """``[batch pos]``, True for real tokens."""
    mask = None if isinstance(prompts, Tensor) else prompts.mask
    return torch.ones_like(tokens_of(prompts)[0], dtype=torch.bool) if mask is None else mask


def wholes(selection: Selection) -> list[Site]:
    """The whole activations that the sites are parts of, each once."""
    return list(dict.fromkeys(site.whole for site in selection))


def record(model: Model, tokens: Tensor, selection: Selection) -> Mapping[Site, Tensor]:
    """The whole activations of one run. Cost: one forward pass."""
    keep = None if any(site.name == "logits" for site in selection) else (0,)
    return run(model, tokens, capture=Selection(tuple(wholes(selection))), keep=keep).cache.whole


def position_axis(site: Site) -> int:
    """Which axis of a whole activation positions are on."""
    axis = site.kind.pos_axis
    if axis is None:
        raise EditError(f"{site} has no positions, so it has no mean over them")
    return axis


def along(by_position: Tensor, site: Site) -> Tensor:
    """``[batch pos]`` in a shape that broadcasts over the whole activation of a site."""
    axis, ndim = position_axis(site), len(site.kind.axes)
    batch, length = by_position.shape
    return by_position.reshape(batch, *[1] * (axis - 1), length, *[1] * (ndim - axis - 1))


def means_over(model: Model, reference: Tensor | Pairs, selection: Selection, *, pooled: bool) -> dict[Site, Tensor]:
    """Of each whole activation the mean over real tokens: ``[1 1 ...]`` pooled, else ``[1 pos ...]``.

    Every head, neuron and coordinate has its own. Summed in float32 at least. A position at which no prompt has a token has
    mean 0. Cost: one forward pass.
    """
    tokens, mask = tokens_of(reference)[0], mask_of(reference).to(model.device)
    for whole in wholes(selection):
        if pooled and "k_pos" in whole.kind.axes:
            raise EditError(f"the mean of {whole} over all positions means nothing, as each position sees others; use 'mean-pos'")
    totals: dict[Site, Tensor] = {}
    at_once = rows_per_forward(model, tokens.shape[1])
    for first in range(0, len(tokens), at_once):
        part = slice(first, first + at_once)
        for whole, value in record(model, tokens[part], selection).items():
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            # Multiplied by a mask, scores of minus infinity would give what is no number.
            total = wide.where(along(mask[part], whole), 0.0).sum(dim=0, keepdim=True)
            totals[whole] = totals.get(whole, 0.0) + (total.sum(dim=position_axis(whole), keepdim=True) if pooled else total)
    found = {}
    for whole, total in totals.items():
        count = mask.sum() if pooled else along(mask.sum(dim=0, keepdim=True).clamp(min=1), whole)
        found[whole] = (total / count).to(model.dtype)
    return found


def deviation(model: Model, prompts: Tensor | Pairs, at: str | Site | Selection) -> float:
    """How far do the numbers of an activation lie apart? The unit in which noise is given.

    The standard deviation of all its numbers together, sqrt(mean((a - mean(a))^2)), over all prompts and real tokens.

    Parameters
    ----------
    model, prompts
        What to run: tokens, or a task (its clean prompts).
    at
        Whole positions of one or several activations, whose numbers are pooled.

    Raises
    ------
    EditError
        A site at one position.

    Notes
    -----
    Cost: one forward pass.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> noise = mi.Noise("embed[target]", 3 * mi.deviation(toy.model, toy.task, "embed"), seed=0)
    """
    tokens, positions = tokens_of(prompts)
    selection, mask = select(at, model.cfg), mask_of(prompts).to(model.device)
    whole = record(model, tokens, selection)
    cache, numbers = Cache(model, selection, whole, positions), []
    for site in selection:
        if site.pos is not None:
            raise EditError(f"the deviation of {site} is taken over all positions; leave out [{site.pos}]")
        real = Cache(model, selection, {site.whole: along(mask, site).expand_as(whole[site.whole])})
        numbers.append(cache[site][real[site]].double())
    return float(torch.cat(numbers).std(correction=0))
