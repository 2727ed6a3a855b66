"""Detectors on patterns made by hand: the stated score, and p-values that are not too small where there is nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.prompts import Batch
from mechinterp.lens import looking

PROMPTS, SAID = 32, 12
WIDTH = 2 * SAID + 1


def prompts(*, again: bool) -> Batch:
    """A first token, other words or the same ones, and the words."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(2 * SAID, generator=generator) + 1 for _ in range(PROMPTS)])
    words, others = rows[:, :SAID], rows[:, SAID:]
    front = torch.zeros(PROMPTS, 1, dtype=torch.long)
    return Batch(torch.cat([front, words if again else others, words], dim=1), {}, None)


def pattern(back: int, *, share: float = 1.0, late: bool = False) -> Tensor:
    """A share of attention so many tokens back (``late``: in the second half alone), what is left on the first token."""
    found = torch.zeros(WIDTH, WIDTH)
    for q in range(WIDTH):
        k = q - back if q - back > 0 and (q > SAID or not late) else 0
        found[q, k] += share
        found[q, 0] += 1 - share
    return found


def test_patterns_by_hand_have_the_stated_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = {
        "induction": pattern(SAID - 1, late=True),
        "half": pattern(SAID - 1, share=0.5, late=True),
        "mute": pattern(SAID - 1, late=True),
        "duplicate": pattern(SAID, late=True),
        "previous": pattern(1, share=0.75),
        "two back": pattern(2),
        "sink": pattern(WIDTH),
    }
    names, rest = list(heads), pattern(WIDTH)
    speaking = torch.tensor([name in ("induction", "half") for name in names]).float()
    repeated, plain = prompts(again=True), prompts(again=False)

    def passes(model: Any, batch: Batch, places: Any) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
        # Heads that look for content find none where nothing is repeated.
        searching = ("induction", "half", "mute", "duplicate")
        seen = [rest if batch is plain and name in searching else each for name, each in heads.items()]
        copied = speaking[None, :, None].expand(PROMPTS, -1, WIDTH).clone()
        copied[:, :, 0] = 0.0
        yield slice(0, PROMPTS), 0, torch.stack(seen).expand(PROMPTS, -1, -1, -1), copied

    monkeypatch.setattr(looking, "_passes", passes)
    found = looking.look(mi.load("toy:induction"), plain, repeated, None).found()
    wanted = {
        "induction": {"induction": 1.0, "half": 0.5},
        "prefix_matching": {"induction": 1.0, "half": 0.5, "mute": 1.0},
        "duplicate_token": {"duplicate": 1.0},
        "previous_token": {"previous": 0.75},
        "positional": {"two back": 1.0},
    }
    for sort, expected in wanted.items():
        score, null, p = found[sort]
        for i, name in enumerate(names):
            assert float(score[0, i].mean()) == pytest.approx(expected.get(name, 0.0), abs=1e-6), (sort, name)
            # Sure of each that it is, and of no other.
            assert float(p[0, i]) == (2.0**-PROMPTS if name in expected else 1.0), (sort, name)
            assert float(null[0, i].mean()) < 1e-6 or name not in expected


def test_p_values_of_heads_that_look_anywhere_are_not_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred heads whose attention and copying have nothing to do with the tokens."""
    heads = 200
    generator = torch.Generator().manual_seed(1)
    causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()

    def passes(model: Any, batch: Batch, places: Any) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
        scores = 2 * torch.randn(PROMPTS, heads, WIDTH, WIDTH, generator=generator)
        copied = 2 * torch.rand(PROMPTS, heads, WIDTH, generator=generator) - 1
        copied[:, :, 0] = 0.0
        yield slice(0, PROMPTS), 0, scores.masked_fill(~causal, -torch.inf).softmax(-1), copied

    monkeypatch.setattr(looking, "_passes", passes)
    repeated, plain = prompts(again=True), prompts(again=False)
    for given in ((plain, repeated), (repeated, repeated)):
        for sort, (_, _, p) in looking.look(mi.load("toy:induction"), *given, None).found().items():
            for alpha in (0.01, 0.05, 0.2):
                # Three standard deviations of a share of so many heads.
                most = alpha + 3 * (alpha * (1 - alpha) / heads) ** 0.5
                assert float((p <= alpha).double().mean()) <= most, (sort, alpha)
