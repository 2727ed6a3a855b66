"""The checks of a task: each takes what the caller gave, and returns what is kept or says what is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import TaskError


def as_ids(values: Any, what: str) -> Tensor:
    """`values` as a new int64 tensor."""
    try:
        tensor = values.detach() if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError) as error:
        raise TaskError(f"{what} cannot be read as a tensor of token ids ({error}): rows must be equally long.") from None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TaskError(f"{what} has dtype {tensor.dtype}: it holds integers.")
    # A copy, so that the caller's later edits do not reach the task.
    return tensor.to(torch.int64, copy=True)


def check_prompts(clean: Tensor, corrupt: Tensor) -> None:
    """Refuse prompts that are not two [batch pos] tensors of ids of the same shape."""
    for what, tokens in (("clean", clean), ("corrupt", corrupt)):
        if tokens.ndim != 2:
            raise TaskError(f"{what} has shape {list(tokens.shape)}: it holds token ids [batch pos], one row per prompt.")
        if (tokens < 0).any():
            row = int((tokens < 0).any(dim=1).nonzero()[0, 0])
            raise TaskError(f"{what} of pair {row} has a negative token id: pad with any valid id and say so in mask=.")
    if clean.shape != corrupt.shape:
        raise TaskError(
            f"clean has shape {list(clean.shape)} and corrupt {list(corrupt.shape)}: the two are aligned "
            "token by token, so each pair needs as many tokens on both sides."
        )
    if clean.numel() == 0:
        raise TaskError(f"clean has shape {list(clean.shape)}: a task has at least one pair of at least one token.")


def as_mask(values: Any, clean: Tensor) -> Tensor:
    """Booleans of the prompts' shape, True first and then False in every row."""
    mask: Tensor = torch.as_tensor(values).detach().clone()
    if mask.shape != clean.shape or mask.dtype != torch.bool:
        raise TaskError(
            f"mask has shape {list(mask.shape)} and dtype {mask.dtype}: it holds booleans of the prompts' "
            f"shape {list(clean.shape)}, True for real tokens."
        )
    wrong = (mask[:, 1:] & ~mask[:, :-1]).any(dim=1) | ~mask[:, 0]
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise TaskError(
            f"mask of pair {row} has padding before a real token, or no real token: pad on the right "
            "(tokenizer.padding_side = 'right')."
        )
    return mask


def count_real(clean: Tensor, mask: Tensor | None) -> Tensor:
    """[batch] number of real tokens of each prompt."""
    if mask is None:
        return torch.full((len(clean),), clean.shape[1], device=clean.device)
    return mask.sum(dim=1)


def as_answers(values: Any, what: str, n: int) -> Tensor:
    """Answer ids as [batch answer], rows of lists padded with -1."""
    if not isinstance(values, Tensor) and any(isinstance(row, (list, tuple)) for row in values):
        rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in values]
        widest = max(len(row) for row in rows)
        values = [row + [-1] * (widest - len(row)) for row in rows]
    ids = as_ids(values, what)
    if ids.ndim == 1:
        ids = ids[:, None]
    if ids.ndim != 2 or len(ids) != n:
        raise TaskError(f"{what} has shape {list(ids.shape)} for {n} pairs: it holds token ids [batch] or [batch answer].")
    if (ids < -1).any():
        raise TaskError(f"{what} has a token id below -1: ids count from 0, and -1 is padding.")
    none = (ids < 0).all(dim=1)
    if none.any():
        row = int(none.nonzero()[0, 0])
        raise TaskError(f"pair {row} has no {what} answer: every pair needs at least one.")
    ordered = ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row, column = twice.nonzero()[0].tolist()
        raise TaskError(f"{what} answers of pair {row} have token {int(ordered[row, column])} twice: name each once.")
    return ids


def check_devices(*tensors: Tensor) -> None:
    """Refuse tensors that are not all in one place."""
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise TaskError(
            f"the tensors are on different devices ({', '.join(devices)}): make the task on one, and move it "
            "with task.to(device)."
        )


def check_disjoint(right: Tensor, wrong: Tensor) -> None:
    """Refuse a token that is both right and wrong for the same pair."""
    both = (right[:, :, None] == wrong[:, None, :]) & (right[:, :, None] >= 0)
    if both.any():
        row, column, _ = both.nonzero()[0].tolist()
        raise TaskError(
            f"token {int(right[row, column])} is both a right and a wrong answer of pair {row}: the two sets must not overlap."
        )


def as_positions(values: Any, what: str, lengths: Tensor) -> Tensor:
    """Positions [batch], negative ones counted from the end of each prompt."""
    where = as_ids(values, what).to(lengths.device)
    if where.ndim == 0:
        where = where.expand(len(lengths)).clone()
    if where.shape != lengths.shape:
        raise TaskError(f"{what} has shape {list(where.shape)} for {len(lengths)} pairs: it holds one position per pair.")
    resolved = torch.where(where < 0, where + lengths, where)
    outside = (resolved < 0) | (resolved >= lengths)
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise TaskError(
            f"{what} of pair {row} is {int(where[row])}, and its prompt has {int(lengths[row])} tokens: "
            f"positions go from 0 to {int(lengths[row]) - 1}."
        )
    return resolved


def as_rows(rows: Any, n: int) -> list[int]:
    """Any index as a list of row numbers."""
    if isinstance(rows, slice):
        chosen = list(range(n))[rows]
    else:
        index = torch.as_tensor(rows if not isinstance(rows, range) else list(rows))
        if index.numel() == 0:
            chosen = []
        elif index.dtype == torch.bool:
            if index.shape != (n,):
                raise TaskError(f"a boolean index of shape {list(index.shape)} does not fit {n} pairs.")
            chosen = index.nonzero()[:, 0].tolist()
        elif index.is_floating_point() or index.ndim > 1:
            raise TaskError(
                f"an index of shape {list(index.shape)} and dtype {index.dtype} chooses no pairs: use a "
                "number, a slice, or a list of numbers or booleans."
            )
        else:
            chosen = [int(row) for row in index.reshape(-1).tolist()]
    for row in chosen:
        if not -n <= row < n:
            raise TaskError(f"there is no pair {row}: the task has {n}, from 0 to {n - 1}.")
    if not chosen:
        raise TaskError(f"the index chooses none of the {n} pairs: a task has at least one.")
    return [row % n for row in chosen]
