"""Spans: the prompts of a task cut into parts that mean the same in each of them, whatever their lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp.errors import TaskError

__all__ = ["Spans", "spans_of"]

_OF_IOI = ". Prompts of ioi are made in one order with order='ABBA' (on the command line --option order=ABBA)"


@dataclass(frozen=True, eq=False, repr=False)
class Spans:
    """Which part of its prompt is each token in? Made by ``task.spans``.

    Each named token is a span of its own, and so is what lies between two neighbouring names (``"S1..S2"``), before the first
    (``"..S1"``) and after the last (``"end.."``). Names that stand for one token in every prompt share a span, ``"S1+1=verb"``.
    Without names each position is a span, ``"0"``, ``"1"``, ..., of prompts of equal length.

    Parameters
    ----------
    names
        Of all spans in the order of the text, those without a token too: halves of a task have the same.
    index
        ``[batch pos]``: which of the names each token belongs to; -1 for padding.

    References
    ----------
    Haklay et al. 2025 (2502.04577), whose schemas of spans are written by hand or by a language model.

    Examples
    --------
    >>> from mechinterp.tasks import Task
    >>> pairs = {"clean": [[0, 5, 6, 7], [0, 5, 7, 0]], "corrupt": [[0, 4, 6, 7], [0, 4, 7, 0]], "right": [1, 1], "wrong": [2, 2]}
    >>> mask = [[True] * 4, [True] * 3 + [False]]
    >>> task = Task("mine", **pairs, mask=mask, positions={"subject": 1, "end": -1})
    >>> task.spans
    Spans: ..subject (1 token), subject, subject..end (0 to 1 tokens), end
    >>> task.spans.index.tolist()
    [[0, 1, 2, 3], [0, 1, 3, -1]]
    """

    names: tuple[str, ...]
    index: Tensor

    @property
    def sizes(self) -> Tensor:
        """``[batch span]``: how many tokens of each prompt are in each span."""
        return self.onehot.sum(dim=1)

    @property
    def onehot(self) -> Tensor:
        """``[batch pos span]``: whether the token is in the span."""
        return self.index.unsqueeze(-1) == torch.arange(len(self.names), device=self.index.device)

    @property
    def filled(self) -> tuple[str, ...]:
        """The spans that have a token in some prompt."""
        return tuple(name for name, size in zip(self.names, self.sizes.sum(dim=0).tolist(), strict=True) if size)

    def place(self, name: str) -> int:
        """Where a span is among the names.

        Raises
        ------
        TaskError
            There is no such span.
        """
        if name not in self.names:
            raise TaskError(f"the prompts have no span {name!r}; there are {', '.join(map(repr, self.names))}")
        return self.names.index(name)

    def __repr__(self) -> str:
        sizes = self.sizes
        told = []
        for name, low, high in zip(self.names, sizes.amin(dim=0).tolist(), sizes.amax(dim=0).tolist(), strict=True):
            if ".." not in name:
                told.append(name)
            elif high:
                count = f"{low}" if low == high else f"{low} to {high}"
                told.append(f"{name} ({count} token{'' if high == low == 1 else 's'})")
        return f"Spans: {', '.join(told)}"


def spans_of(name: str, lengths: Tensor, width: int, positions: Mapping[str, Tensor]) -> Spans:
    """The spans of prompts of these lengths ``[batch]``, cut at positions ``[batch]``.

    Raises
    ------
    TaskError
        The names do not come in one order; or there are none, and prompts of unequal length.
    """
    columns = torch.arange(width, device=lengths.device).expand(len(lengths), -1)
    if not positions:
        if (lengths != lengths[0]).any():
            raise TaskError(
                f"task {name!r} names no positions and its prompts have {int(lengths.min())} to {int(lengths.max())} tokens, "
                "so that their tokens have no common spans; name some: "
                "dataclasses.replace(task, positions={'end': task.answer_pos})"
            )
        return Spans(tuple(map(str, range(width))), columns.where(columns < lengths[:, None], -1))
    ordered = sorted(positions, key=lambda each: int(positions[each][0]))
    groups: list[list[str]] = []
    for each in ordered:
        if groups:
            last = groups[-1][-1]
            here, before = positions[each], positions[last]
            same = int(here[0]) == int(before[0])
            broken = (here != before) if same else (here <= before)
            if broken.any():
                row = int(broken.int().argmax())
                found = [f"pair {i} {last} at {int(before[i])}, {each} at {int(here[i])}" for i in (0, row)]
                raise TaskError(
                    f"the names of task {name!r} come in different orders, so that its prompts have no common spans: in "
                    f"{' and in '.join(found)}. Take the pairs of one order, "
                    f"task[task.positions[{last!r}] {'==' if same else '<'} task.positions[{each!r}]], or leave a name out: "
                    "dataclasses.replace(task, positions={...})" + (_OF_IOI if name == "ioi" else "")
                )
            if same:
                groups[-1].append(each)
                continue
        groups.append([each])
    joined = ["=".join(group) for group in groups]
    names = [f"..{joined[0]}"]
    for one, two in zip(joined, [*joined[1:], ""], strict=True):
        names += [one, f"{one}..{two}"]
    named = torch.stack([positions[group[0]] for group in groups], dim=1).to(lengths.device)
    # Each name is passed twice: on reaching its token, and on leaving it.
    index = (columns[..., None] >= named[:, None]).sum(-1) + (columns[..., None] > named[:, None]).sum(-1)
    return Spans(tuple(names), index.where(columns < lengths[:, None], -1))
