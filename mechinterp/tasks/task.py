"""Task: pairs of prompts, their answers, and where to look."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.errors import TaskError
from mechinterp.shapes import Mask, Positions, Tokens
from mechinterp.tasks.checks import (
    as_answers,
    as_ids,
    as_mask,
    as_positions,
    as_rows,
    check_devices,
    check_disjoint,
    check_prompts,
    count_real,
)
from mechinterp.tasks.metrics import check_metric_name
from mechinterp.tasks.spans import Spans, spans_of
from mechinterp.tasks.words import Tokenizer

if TYPE_CHECKING:
    import pandas

__all__ = ["Task"]

# [batch answer]; right and wrong may have different numbers of answers.
Answers = Int[Tensor, "batch _"]
# Numbers in any form; what is in them is checked by hand, for the better message.
Ids = Tensor | Sequence[Any]


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Task:
    """Which behaviour is explained? Pairs of prompts that differ in what the answer depends on.

    ``clean`` is the prompt with the right answer, ``corrupt`` the counterfactual, aligned with it token by
    token. Everything is checked on construction; lists are taken as well as tensors. The tensors are copied,
    so that nothing that happens to yours later changes the task.

    Parameters
    ----------
    name
        A short name, for results and files.
    clean, corrupt
        [batch pos] token ids, a BOS token included where the model wants one.
    right, wrong
        [batch] or [batch answer] token ids; rows of different length are padded with -1. No token may be both
        right and wrong in one row.
    answer_pos
        [batch] position whose logits predict the answer, or one number for all; negative ones count from the
        end of each prompt. Default: the last real token.
    mask
        [batch pos], True for real tokens, shared by clean and corrupt. Padding is on the right. None: no
        padding.
    positions
        Named positions, [batch] each: ``{"S1": ..., "end": ...}``; negative ones count from the end.
    metric
        Name of the metric used when none is given: see `mechinterp.tasks.METRICS`.
    provenance
        How the task was made (generator, seed, tokenizer, ...): plain values, written into results.
    texts
        The clean prompts as text, for reading.
    strings
        The text of each token id that occurs, for labels.

    Raises
    ------
    TaskError
        When shapes, ids, answers, padding or positions do not fit; the message names the pair.

    Examples
    --------
    >>> task = Task(
    ...     name="mine",
    ...     clean=[[0, 5, 7], [0, 6, 7]],
    ...     corrupt=[[0, 6, 7], [0, 5, 7]],
    ...     right=[1, 2],
    ...     wrong=[2, 1],
    ... )
    >>> task
    Task mine: 2 pairs of 3 tokens, differ at 1 position, metric logit_diff
    >>> task.answer_pos
    tensor([2, 2])
    >>> task[0]
    Task mine: 1 pair of 3 tokens, differ at 1 position, metric logit_diff
    """

    name: str
    clean: Tokens
    corrupt: Tokens
    right: Answers
    wrong: Answers
    answer_pos: Positions
    mask: Mask | None
    positions: Mapping[str, Positions]
    metric: str
    provenance: Mapping[str, object]
    texts: tuple[str, ...] | None
    strings: Mapping[int, str] | None

    # Written by hand, since what may be passed is wider than what is kept.
    def __init__(
        self,
        name: str,
        clean: Ids,
        corrupt: Ids,
        right: Ids,
        wrong: Ids,
        answer_pos: Ids | int | None = None,
        mask: Ids | None = None,
        positions: Mapping[str, Ids | int] = MappingProxyType({}),
        metric: str = "logit_diff",
        provenance: Mapping[str, object] = MappingProxyType({}),
        texts: Sequence[str] | None = None,
        strings: Mapping[int, str] | None = None,
    ) -> None:
        clean, corrupt = as_ids(clean, "clean"), as_ids(corrupt, "corrupt")
        check_prompts(clean, corrupt)
        mask = None if mask is None else as_mask(mask, clean)
        lengths = count_real(clean, mask)
        right, wrong = as_answers(right, "right", len(clean)), as_answers(wrong, "wrong", len(clean))
        check_devices(clean, corrupt, right, wrong, *(() if mask is None else (mask,)))
        check_disjoint(right, wrong)
        if texts is not None and len(texts) != len(clean):
            raise TaskError(f"there are {len(clean)} pairs and {len(texts)} texts: pass one text per pair.")
        kept = {
            "name": name,
            "clean": clean,
            "corrupt": corrupt,
            "right": right,
            "wrong": wrong,
            "answer_pos": as_positions(-1 if answer_pos is None else answer_pos, "answer_pos", lengths),
            "mask": mask,
            "positions": {key: as_positions(where, f"position {key!r}", lengths) for key, where in positions.items()},
            "metric": check_metric_name(metric),
            "provenance": dict(provenance),
            "texts": None if texts is None else tuple(texts),
            "strings": None if strings is None else dict(strings),
        }
        for key, value in kept.items():
            object.__setattr__(self, key, value)

    @classmethod
    def from_jsonl(
        cls,
        path: str | PathLike[str],
        tokenizer: Tokenizer,
        *,
        name: str | None = None,
        metric: str = "logit_diff",
        bos: bool = True,
    ) -> Task:
        """A task from your own pairs, one JSON object a line: see `mechinterp.tasks.read_pairs`."""
        from mechinterp.tasks.pairs import read_pairs

        return read_pairs(path, tokenizer, name=name, metric=metric, bos=bos)

    # -- size and parts ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.clean)

    def __iter__(self) -> Iterator[Task]:
        return (self[row] for row in range(len(self)))

    def answers(self) -> tuple[Task, Tensor]:
        """The same task over a vocabulary of its answers alone, and the token ids ``[vocab]`` that this vocabulary is.

        With logits of these tokens only, metrics that read no others give the same numbers.

        Examples
        --------
        >>> task = Task(name="one", clean=[[0, 1]], corrupt=[[0, 2]], right=[70], wrong=[50])
        >>> narrow, ids = task.answers()
        >>> ids.tolist(), narrow.right.tolist(), narrow.wrong.tolist()
        ([50, 70], [[1]], [[0]])
        """
        both = torch.cat([self.right.flatten(), self.wrong.flatten()])
        ids = torch.unique(both[both >= 0])

        def renumbered(answers: Tensor) -> Tensor:
            return torch.searchsorted(ids, answers).where(answers >= 0, -1)

        return replace(self, right=renumbered(self.right), wrong=renumbered(self.wrong)), ids

    def __getitem__(self, rows: int | slice | Ids) -> Task:
        """The task of some of the pairs, in the order asked for; a pair may be taken more than once.

        Parameters
        ----------
        rows
            A number, a slice, or a list or tensor of numbers or of booleans.

        Raises
        ------
        TaskError
            When no pair is left, or there is no such pair.
        """
        chosen = as_rows(rows, len(self))
        where = torch.tensor(chosen, device=self.clean.device)
        return replace(
            self,
            clean=self.clean[where],
            corrupt=self.corrupt[where],
            right=self.right[where],
            wrong=self.wrong[where],
            answer_pos=self.answer_pos[where],
            mask=None if self.mask is None else self.mask[where],
            positions={name: position[where] for name, position in self.positions.items()},
            texts=None if self.texts is None else tuple(self.texts[row] for row in chosen),
        )

    def split(self, held_out: float = 0.5, *, seed: int) -> tuple[Task, Task]:
        """Two tasks: the pairs to find a circuit on, and the held-out pairs to judge it on.

        The same clean prompt is never on both sides, however often it occurs.

        Parameters
        ----------
        held_out
            Share of the pairs to hold out, between 0 and 1.
        seed
            Decides which pairs; recorded in the provenance of both.

        Returns
        -------
        tuple of Task
            (found_on, held_out), each in the original order.

        Raises
        ------
        TaskError
            When a side would be empty.

        Examples
        --------
        >>> task = Task(name="t", clean=[[0], [1], [2]], corrupt=[[3]] * 3, right=[1] * 3, wrong=[2] * 3)
        >>> found_on, held_out = task.split(1 / 3, seed=0)
        >>> len(found_on), len(held_out)
        (2, 1)
        """
        if not 0 < held_out < 1:
            raise TaskError(f"held_out is the share of pairs to hold out, between 0 and 1, not {held_out}.")
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, tokens in enumerate(self.clean.tolist()):
            groups.setdefault(tuple(tokens), []).append(row)
        if len(groups) < 2:
            raise TaskError(
                f"task {self.name!r} has one distinct clean prompt in {len(self)} pairs, and a circuit is "
                "not judged on the prompt that found it: give at least 2 different prompts."
            )
        shuffled = list(groups.values())
        random.Random(seed).shuffle(shuffled)
        wanted = max(1, round(len(self) * held_out))
        out: list[int] = list(shuffled[0])
        for group in shuffled[1:-1]:
            if len(out) >= wanted:
                break
            out += group
        kept = sorted(set(range(len(self))) - set(out))
        found_on, judged_on = self[kept], self[sorted(out)]
        provenance = {"split_seed": seed, "split_held_out": held_out}
        return (
            replace(found_on, provenance={**self.provenance, **provenance, "split": "found_on"}),
            replace(judged_on, provenance={**self.provenance, **provenance, "split": "held_out"}),
        )

    def sample(self, n: int, *, seed: int) -> Task:
        """So many of the pairs, drawn without replacement, in the original order; the provenance says it.

        Raises
        ------
        TaskError
            When there are not so many.

        Examples
        --------
        >>> task = Task(name="t", clean=[[0], [1], [2]], corrupt=[[3]] * 3, right=[1] * 3, wrong=[2] * 3)
        >>> len(task.sample(2, seed=0))
        2
        """
        if not 1 <= n <= len(self):
            raise TaskError(f"{n} pairs were asked of task {self.name!r}, which has {len(self)}: ask for 1 to {len(self)}.")
        drawn = self[sorted(random.Random(seed).sample(range(len(self)), n))]
        return replace(drawn, provenance={**self.provenance, "sample": n, "sample_seed": seed})

    def to(self, device: torch.device | str) -> Task:
        """The same task with its tensors on `device`."""
        return replace(
            self,
            clean=self.clean.to(device),
            corrupt=self.corrupt.to(device),
            right=self.right.to(device),
            wrong=self.wrong.to(device),
            answer_pos=self.answer_pos.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            positions={name: position.to(device) for name, position in self.positions.items()},
        )

    def swap(self) -> Task:
        """The same pairs seen from the other side: clean and corrupt, right and wrong exchanged.

        Only meaningful where the corrupt prompt's answer *is* ``wrong`` (for `ioi`, ``corruption="swap"``).
        Named positions stay; texts are of the old clean prompts and are dropped.
        """
        return replace(
            self,
            clean=self.corrupt,
            corrupt=self.clean,
            right=self.wrong,
            wrong=self.right,
            texts=None,
            provenance={**self.provenance, "swapped": not self.provenance.get("swapped", False)},
        )

    # -- what follows from the tokens -------------------------------------------------------------------

    @property
    def lengths(self) -> Positions:
        """[batch] number of real tokens of each prompt."""
        return count_real(self.clean, self.mask)

    @property
    def differs(self) -> Mask:
        """[batch pos] True where clean and corrupt have different tokens, padding excluded."""
        different = self.clean != self.corrupt
        return different if self.mask is None else different & self.mask

    @property
    def first_difference(self) -> Positions:
        """[batch] first position where clean and corrupt differ; the number of positions where they never do.

        Nothing before it can differ between the two runs of a causal model.
        """
        differs = self.differs
        never = torch.full_like(self.answer_pos, differs.shape[1])
        return torch.where(differs.any(dim=1), differs.int().argmax(dim=1), never)

    @property
    def spans(self) -> Spans:
        """The prompts cut at their named positions: see `mechinterp.tasks.Spans`.

        Raises
        ------
        TaskError
            The names come in different orders in different pairs.
        """
        return spans_of(self.name, self.lengths, self.clean.shape[1], self.positions)

    @property
    def token_strings(self) -> tuple[tuple[str, ...], ...] | None:
        """The clean prompts token by token, padding left out; None when the task has no `strings`."""
        return self._spell(self.clean)

    @property
    def corrupt_token_strings(self) -> tuple[tuple[str, ...], ...] | None:
        """The corrupt prompts token by token, padding left out; None when the task has no `strings`."""
        return self._spell(self.corrupt)

    def string(self, token: int) -> str:
        """The text of a token id, or the id in angle brackets when the task does not know it."""
        return (self.strings or {}).get(token, f"<{token}>")

    def _spell(self, tokens: Tensor) -> tuple[tuple[str, ...], ...] | None:
        if self.strings is None:
            return None
        rows = zip(tokens.tolist(), self.lengths.tolist(), strict=True)
        return tuple(tuple(self.string(token) for token in row[:length]) for row, length in rows)

    # -- showing itself ---------------------------------------------------------------------------------

    def __repr__(self) -> str:
        n = len(self)
        return (
            f"Task {self.name}: {n} pair{'' if n == 1 else 's'} of {_span(self.lengths, 'token')}, differ "
            f"at {_span(self.differs.sum(dim=1), 'position')}, metric {self.metric}"
        )

    def _repr_html_(self) -> str:
        from mechinterp.tasks.show import task_html

        return task_html(self)

    def to_frame(self) -> pandas.DataFrame:
        """A `pandas.DataFrame` with one row per pair: prompts, answers and named positions."""
        from mechinterp.tasks.show import task_frame

        return task_frame(self)


def _span(counts: Tensor, noun: str) -> str:
    """'17 tokens', or '12 to 17 tokens' where rows differ."""
    low, high = int(counts.min()), int(counts.max())
    number = f"{low}" if low == high else f"{low} to {high}"
    return f"{number} {noun}{'' if low == high == 1 else 's'}"
