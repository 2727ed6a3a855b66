"""Which positions of the prompts a forward pass computes, and where in its tensors they lie.

A plain forward pass computes all positions at once, and rows of unequal length are padded on the right. A generation with a
cache of keys and values computes the prompt first, then one token at a time, and rows are padded on the left, so that all
go on at the same place of the tensors. Edits know nothing of this: they see one *span* at a time (a whole pass, the prompt,
one generated token), in which position 0 is the first token of each row and the padding is on the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mechinterp.core.select import resolve_position
from mechinterp.core.sites import Site
from mechinterp.errors import SelectorError

__all__ = ["SCOPES", "Place", "Scope", "Span", "aligned", "part_of"]

# One index for all rows; one for each, ``None`` where it lies elsewhere; or nowhere here at all.
Place = int | tuple[int | None, ...] | None
Scope = Literal["all", "prompt", "generated"]
SCOPES: tuple[Scope, ...] = ("all", "prompt", "generated")


@dataclass(frozen=True, eq=False)
class Span:
    """Positions that are edited together.

    Parameters
    ----------
    lengths
        How many real tokens the prompt of each row has; ``None`` where none is padded.
    width
        Positions of the padded prompts.
    token
        ``None`` for the prompt; j for the j-th generated token.
    alive
        Of a generated token: for each row, whether it belongs to the text (a row that has ended is computed along).
    generating
        Positions may lie in another span. In a plain pass one that is not there is an error.
    """

    lengths: tuple[int, ...] | None
    width: int
    token: int | None = None
    alive: tuple[bool, ...] | None = None
    generating: bool = False

    @property
    def longest(self) -> int:
        """Real tokens of the longest prompt."""
        return self.width if self.lengths is None else max(self.lengths)

    def within(self, scope: Scope) -> bool:
        return scope == "all" or (scope == "prompt") == (self.token is None)

    def cut(self, site: Site, offset: int) -> tuple[slice, ...]:
        """Where this span lies in a value whose positions begin at ``offset`` of the tensors."""
        if not self.generating:
            return ()
        axis = site.kind.pos_axis
        first, stop = (0, self.width) if self.token is None else (self.width + self.token, self.width + self.token + 1)
        index = [slice(None)] * len(site.kind.axes)
        if axis is not None:
            index[axis] = slice(first - offset, stop - offset)
        if "k_pos" in site.kind.axes:
            index[site.kind.axes.index("k_pos")] = slice(0, stop)
        return tuple(index)

    def turn(self, value: Tensor, site: Site, *, back: bool = False) -> Tensor:
        """The value with every row's first token at position 0 (or back again); itself where no row is padded on the left."""
        if not self.generating or self.lengths is None:
            return value
        shifts = torch.tensor([self.width - length for length in self.lengths], device=value.device)
        for axis, name in enumerate(site.kind.axes):
            if (name in ("pos", "q_pos") and self.token is None) or name == "k_pos":
                value = aligned(value, axis, -shifts if back else shifts)
        return value

    def locate(self, chosen: range, pos: int | str, named: Mapping[str, Tensor], site: Site) -> Place:
        """Where a position lies in this span, in the chosen rows.

        Raises
        ------
        SelectorError
            There is no such position in one of the prompts.
        """
        if isinstance(pos, int) and self.lengths is None:
            place = pos if self.generating and pos >= 0 else int(resolve_position(pos, self.width, (), site))
            if not self.generating:
                return place
            if self.token is None:
                return place if place < self.width else None
            if place != self.width + self.token:
                return None
            found = [place] * len(chosen)
        elif isinstance(pos, int):
            found = [self._absolute(row, pos, site) for row in chosen]
        else:
            resolve_position(pos, self.width, named, site)
            places = named[pos].tolist()
            found = [places[row % len(places)] for row in chosen]
        here = tuple(self._here(row, place) for row, place in zip(chosen, found, strict=True))
        if all(place is None for place in here):
            return None
        return here[0] if len(set(here)) == 1 else here

    def _absolute(self, row: int, pos: int, site: Site) -> int:
        length = self._length(row)
        if -pos > length or (pos >= length and not self.generating):
            raise SelectorError(
                f"{site}: there is no position {pos} in prompt {row}, which has {length} tokens; leave the prompt out with "
                "rows=, or give each prompt its own position by a name"
            )
        return pos % length if pos < 0 else pos

    def _here(self, row: int, place: int) -> int | None:
        """The index in this span of one row's position, which is counted from its first token."""
        if not self.generating:
            return place
        if self.token is None:
            return place if place < self._length(row) else None
        alive = self.alive is None or self.alive[row]
        return 0 if alive and place == self._length(row) + self.token else None

    def _length(self, row: int) -> int:
        # Prompts may be packed behind each other, several times, as rows of one pass.
        return self.width if self.lengths is None else self.lengths[row % len(self.lengths)]


def part_of(site: Site, rows: slice, place: Place, device: torch.device) -> tuple[tuple[Any, ...], Tensor | None]:
    """The index of the part that a site names, and where its rows differ, which of them it is meant for."""
    axes = site.kind.axes
    index: list[Any] = [rows] + [slice(None)] * (len(axes) - 1)
    if site.head is not None:
        index[axes.index(site.kind.head_axis or "")] = site.head
    if site.neuron is not None:
        index[site.kind.neuron_axis or -1] = site.neuron
    if site.pos is None:
        return tuple(index), None
    axis = site.kind.pos_axis
    if axis is None:
        raise SelectorError(f"{site} has no position axis")
    if not isinstance(place, tuple):
        index[axis] = place
        return tuple(index), None
    index[0] = torch.arange(rows.start, rows.stop, device=device)
    index[axis] = torch.tensor([each or 0 for each in place], device=device)
    if None not in place:
        return tuple(index), None
    return tuple(index), torch.tensor([each is not None for each in place], device=device)


def aligned(value: Tensor, axis: int, shifts: Tensor) -> Tensor:
    """Every row moved along an axis by its own shift, towards the front and around the end."""
    size = value.shape[axis]
    order = (torch.arange(size, device=value.device) + shifts[:, None]) % size
    shape = [1] * value.ndim
    shape[0], shape[axis] = len(shifts), size
    return value.gather(axis, order.reshape(shape).expand(value.shape))
