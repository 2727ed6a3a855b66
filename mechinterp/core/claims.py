"""Which edits set the same numbers?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

from mechinterp.core.sites import Site
from mechinterp.core.spans import Place

__all__ = ["Claim", "conflict"]


@dataclass(frozen=True, eq=False)
class Claim:
    """What one absolute edit sets of one activation: the part that ``site`` names, in these rows, at this place of a span."""

    site: Site
    rows: range
    place: Place
    edit: Any


# Head, position and neuron (``None``: all of them), first and last row but one, and whose it is.
_Box = tuple[tuple[int | None, ...], int, int, int]


def conflict(claims: Sequence[Claim]) -> tuple[Claim, Claim] | None:
    """Two claims on the same numbers that have the same priority, or ``None``.

    Cost: n log n for n claims, not n squared.
    """
    by_priority: dict[int, list[int]] = {}
    for i, claim in enumerate(claims):
        by_priority.setdefault(claim.edit.priority, []).append(i)
    for members in by_priority.values():
        if len(members) > 1 and (found := _overlap([box for i in members for box in _boxes(claims[i], i)])):
            return claims[min(found)], claims[max(found)]
    return None


def _boxes(claim: Claim, owner: int) -> Iterator[_Box]:
    site, rows = claim.site, claim.rows
    if not isinstance(claim.place, tuple):
        yield (site.head, claim.place, site.neuron), rows.start, rows.stop, owner
        return
    for row, place in zip(rows, claim.place, strict=True):
        if place is not None:
            yield (site.head, place, site.neuron), row, row + 1, owner


def _overlap(boxes: Sequence[_Box]) -> tuple[int, int] | None:
    """The owners of two boxes that share numbers."""
    # Those that leave the same coordinates open can be compared by what they have in common: a key.
    kinds: dict[tuple[bool, ...], list[_Box]] = {}
    for box in boxes:
        kinds.setdefault(tuple(at is None for at in box[0]), []).append(box)
    for one, other in combinations_with_replacement(kinds, 2):
        shared = [i for i, (first, second) in enumerate(zip(one, other, strict=True)) if not (first or second)]
        keyed: dict[tuple[int | None, ...], list[tuple[int, int, int, int]]] = {}
        for side, kind in enumerate((one,) if one == other else (one, other)):
            for at, start, stop, owner in kinds[kind]:
                keyed.setdefault(tuple(at[i] for i in shared), []).append((start, stop, side, owner))
        for spans in keyed.values():
            if found := _crossing(spans, sides=1 if one == other else 2):
                return found
    return None


def _crossing(spans: list[tuple[int, int, int, int]], *, sides: int) -> tuple[int, int] | None:
    """The owners of two row ranges that overlap, of different sides where there are two."""
    # How far the ranges of each side reach so far, and whose.
    reach: list[tuple[int, int]] = [(-1, -1)] * sides
    for start, stop, side, owner in sorted(spans):
        stop_before, owner_before = reach[-1 - side]
        if start < stop_before:
            return owner_before, owner
        reach[side] = max(reach[side], (stop, owner))
    return None
