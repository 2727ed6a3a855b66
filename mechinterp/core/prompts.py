"""What can be run: token ids, texts, or a task; of one length, or padded on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mechinterp.core.model import Model
from mechinterp.core.tokens import TokenPositions
from mechinterp.errors import ModelError, TaskError

__all__ = ["Batch", "Prompts", "Runnable", "batch_of", "tokens_of"]


@runtime_checkable
class Prompts(Protocol):
    """What the core needs of a task: its clean tokens and named positions; ``lengths`` where it has them."""

    @property
    def clean(self) -> Tensor: ...
    @property
    def positions(self) -> Mapping[str, Tensor]: ...


# Token ids [batch pos] or [pos], a task, a text, the ids of one prompt, or rows of any lengths: ids or texts.
Runnable = Tensor | Prompts | str | Sequence[int] | Sequence[Tensor | Sequence[int] | str]


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts as rows of one length.

    Parameters
    ----------
    tokens
        ``[batch pos]``; behind a shorter prompt its last token is repeated, which no real position ever sees.
    positions
        Named positions, ``[batch]`` each.
    lengths
        ``[batch]`` real tokens of each row; ``None`` where no row is padded.
    """

    tokens: Tensor
    positions: Mapping[str, Tensor]
    lengths: Tensor | None

    def named(self, model: Model) -> TokenPositions:
        """The named positions, and those of tokens by their text."""
        return TokenPositions(model, self.tokens, self.positions, self.lengths)

    def __getitem__(self, rows: slice) -> Batch:
        lengths = None if self.lengths is None else self.lengths[rows]
        return replace(
            self,
            tokens=self.tokens[rows],
            positions={name: where[rows] for name, where in self.positions.items()},
            lengths=lengths,
        )


def tokens_of(prompts: Tensor | Prompts) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Tokens ``[batch pos]`` and named positions of a tensor or a task (its clean prompts)."""
    if isinstance(prompts, Tensor):
        return (prompts.unsqueeze(0) if prompts.ndim == 1 else prompts), {}
    return prompts.clean, prompts.positions


def batch_of(model: Model, prompts: Runnable, mask: Tensor | None = None) -> Batch:
    """The prompts as one tensor, padded on the right where they differ in length.

    Raises
    ------
    TaskError
        A prompt without tokens, or a mask of another shape, of padding that is not on the right, or beside a task.
    ModelError
        Texts, and the model has no tokenizer.
    """
    if isinstance(prompts, Tensor | Prompts):
        tokens, positions = tokens_of(prompts)
        if not tokens.numel():
            raise TaskError(f"tokens of shape {list(tokens.shape)} hold no prompt with a token in it")
        if mask is not None and isinstance(prompts, Prompts):
            raise TaskError("a task brings its own mask; leave out mask=, or pass task.clean with it")
        lengths = getattr(prompts, "lengths", None) if mask is None else _lengths(tokens, mask)
        if lengths is None or bool((lengths == tokens.shape[1]).all()):
            return Batch(tokens, positions, None)
        return Batch(tokens, positions, lengths)
    if mask is not None:
        raise TaskError("a list of prompts is padded here; pass mask= with a tensor of tokens that you padded yourself")
    listed: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if listed and all(isinstance(each, int) for each in listed):
        listed = [listed]
    rows = [_ids(model, row) for row in listed]
    if not rows or not all(len(row) for row in rows):
        which = next((i for i, row in enumerate(rows) if not len(row)), None)
        raise TaskError("there are no prompts" if which is None else f"prompt {which} has no tokens; leave it out")
    longest = max(len(row) for row in rows)
    tokens = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return Batch(tokens, {}, None if bool((lengths == longest).all()) else lengths)


def _ids(model: Model, row: Tensor | Sequence[int] | str) -> Tensor:
    if isinstance(row, str):
        return model.tokens(row)[0].cpu()
    ids = torch.as_tensor(row if isinstance(row, Tensor) else list(row)).cpu()
    if ids.numel() == 0:
        return ids.reshape(0).long()
    if ids.ndim != 1 or ids.is_floating_point():
        raise ModelError(
            f"a prompt in a list is {ids.dtype} of shape {list(ids.shape)}, not whole numbers [pos]; pass lists of token ids, "
            "or one tensor [batch pos] for all"
        )
    return ids.long()


def _lengths(tokens: Tensor, mask: Tensor) -> Tensor:
    """``[batch]`` real tokens of each row."""
    if mask.shape != tokens.shape:
        raise TaskError(f"the mask has shape {list(mask.shape)}, the tokens {list(tokens.shape)}; give True for each real token")
    real = mask.bool().cpu()
    lengths = real.sum(dim=1)
    wrong = (real != (torch.arange(real.shape[1]) < lengths[:, None])).any(dim=1) | (lengths == 0)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise TaskError(
            f"prompt {row} has real tokens at positions {real[row].nonzero().flatten().tolist()}: padding belongs on the right, "
            "so that positions count from the first token; pass a list of prompts, and they are padded"
        )
    return lengths
