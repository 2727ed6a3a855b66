"""What is asked about prompts: at which positions, and of which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.model import Model
from mechinterp.core.prompts import Batch
from mechinterp.errors import SelectorError, TaskError, did_you_mean

__all__ = ["Pos", "Targets", "Where", "answers_of", "as_targets", "where_of"]

Pos = int | str | Sequence[int | str] | None
# Token ids [batch] or [batch k], or the texts of tokens, which are asked of every prompt.
Targets = Tensor | Sequence[int] | Sequence[str] | str | None


@dataclass(frozen=True, eq=False)
class Where:
    """Positions of each prompt.

    ``index`` is ``[batch n]``, ``real`` says which of them are no padding, and ``labels`` are the ``n`` names.
    """

    index: Tensor
    real: Tensor
    labels: tuple[int | str, ...]

    def gather(self, value: Tensor, rows: slice = slice(None)) -> Tensor:
        """``[batch pos ...]`` of these rows to ``[batch n ...]``."""
        index = self.index[rows].to(value.device)
        return value[torch.arange(len(index), device=value.device)[:, None], index]


def where_of(model: Model, given: Batch, pos: Pos) -> Where:
    """The positions that are meant: all where ``pos`` is ``None``, padding marked.

    Raises
    ------
    SelectorError
        A prompt has no such position, or there is none of that name.
    """
    batch, width = given.tokens.shape
    lengths = torch.full((batch,), width) if given.lengths is None else given.lengths.cpu()
    if pos is None:
        index = torch.arange(width).expand(batch, -1)
        return Where(index, index < lengths[:, None], tuple(range(width)))
    named, columns = given.named(model), []
    listed = [pos] if isinstance(pos, int | str) else list(pos)
    if not listed:
        raise SelectorError("pos=[] asks for no position; leave it out for all of them")
    for each in listed:
        if isinstance(each, str):
            if each not in named:
                raise SelectorError(f"there is no position named {each!r}. {did_you_mean(each, named)}")
            columns.append(named[each].cpu())
            continue
        short = (lengths < (each + 1 if each >= 0 else -each)).nonzero().flatten().tolist()
        if short:
            raise SelectorError(f"pos={each}: prompt {short[0]} has {int(lengths[short[0]])} tokens, and no position {each}")
        columns.append(torch.full_like(lengths, each) if each >= 0 else lengths + each)
    index = torch.stack(columns, dim=1)
    return Where(index, torch.ones_like(index, dtype=torch.bool), tuple(listed))


def answers_of(prompts: Any) -> tuple[Tensor, Tensor] | None:
    """Right and wrong answers ``[batch k]`` of a task, rows padded with -1; ``None`` of mere tokens."""
    if isinstance(prompts, Tensor) or not all(hasattr(prompts, name) for name in ("right", "wrong", "answer_pos")):
        return None
    return prompts.right.cpu(), prompts.wrong.cpu()


def as_targets(model: Model, targets: Targets, batch: int, what: str = "targets") -> Tensor | None:
    """Token ids ``[batch k]``, rows padded with -1.

    Raises
    ------
    TaskError
        A text that is no single token, ids that this model does not have, or not one row for each prompt.
    """
    if targets is None:
        return None
    listed = [targets] if isinstance(targets, str) else targets
    if isinstance(listed, Sequence) and listed and all(isinstance(each, str) for each in listed):
        ids = torch.tensor([_token(model, str(each), what) for each in listed]).expand(batch, -1)
    else:
        try:
            ids = torch.as_tensor(listed).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise TaskError(
                f"{what}={targets!r}: give token ids [batch] or [batch k] (-1 fills rows that have fewer), or texts of tokens, "
                "not both"
            ) from None
        if ids.is_floating_point() or ids.ndim not in (1, 2) or len(ids) != batch or not ids.numel():
            raise TaskError(
                f"{what} of shape {list(ids.shape)} for {batch} prompts: give token ids [batch] or [batch k], or the texts of "
                "tokens that are asked of every prompt"
            )
        ids = ids.reshape(batch, -1).long()
    if int(ids.max()) >= model.cfg.d_vocab or int(ids.min()) < -1 or bool((ids.max(dim=1).values < 0).any()):
        raise TaskError(
            f"{what} reach from {int(ids.min())} to {int(ids.max())}, but {model.name} knows the tokens 0 to "
            f"{model.cfg.d_vocab - 1} (and -1 fills rows that have fewer)"
        )
    return ids


def _token(model: Model, text: str, what: str) -> int:
    if model.tokenizer is None:
        raise TaskError(f"{model.name} has no tokenizer, so {what} cannot be texts: give token ids [batch] or [batch k]")
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        parts = ", ".join(repr(model.tokenizer.decode([each])) for each in ids)
        raise TaskError(f"{what}: {text!r} is {len(ids)} tokens ({parts}); name one of them (most words need a space in front)")
    return int(ids[0])
