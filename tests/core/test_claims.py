"""Which edits set the same numbers, against a grid on which each is marked."""

from __future__ import annotations

import random
import sys
from itertools import combinations
from typing import Any

import pytest

import mechinterp as mi
from mechinterp.core.claims import Claim, conflict
from mechinterp.core.sites import Site


@pytest.mark.parametrize("seed", range(20))
def test_conflicts_are_those_that_a_grid_of_numbers_shows(seed: int) -> None:
    """Random claims on a small activation, against marking every number that each of them sets."""
    draw = random.Random(seed)
    claims: list[Claim] = []
    marked: list[set[Any]] = []
    for _ in range(draw.randint(2, 6)):
        head, pos, neuron = (draw.choice([None, *range(6)]) for _ in range(3))
        first = draw.randrange(5)
        rows = range(first, draw.randint(first + 1, 5))
        place = tuple(draw.choice([None, *range(6)]) for _ in rows) if draw.random() < 0.3 else pos
        edit = mi.Zero("L0.z", priority=draw.randrange(2))
        claims.append(Claim(Site("z", 0, head, pos, neuron), rows, place, edit))
        places = place if isinstance(place, tuple) else [range(6) if place is None else place] * len(rows)
        marked.append(
            {
                (edit.priority, row, h, p, n)
                for row, at in zip(rows, places, strict=True)
                for h in ([head] if head is not None else range(6))
                for p in (at if isinstance(at, range) else [] if at is None else [at])
                for n in ([neuron] if neuron is not None else range(6))
            }
        )
    wanted = {(i, j) for i, j in combinations(range(len(claims)), 2) if marked[i] & marked[j]}
    found = conflict(claims)
    assert (found is None) == (not wanted)
    assert found is None or (claims.index(found[0]), claims.index(found[1])) in wanted


def test_ten_thousand_edits_are_compared_in_no_time() -> None:
    """Counted, not timed: how often two claims are looked at side by side grows as their number does."""
    counts = []
    for n in (1000, 10_000):
        claims = [
            Claim(Site("z", 0, i % 4, i // 4 % 7), range(i // 28, i // 28 + 1), i // 4 % 7, mi.Zero("L0.z")) for i in range(n)
        ]
        calls = 0

        def count(frame: Any, event: str, arg: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            assert conflict(claims) is None
        finally:
            sys.setprofile(None)
        counts.append(calls)
    assert counts[1] < 15 * counts[0]
