"""Packs many counterfactual runs into few forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.edits import Replace
from mechinterp.core.hooks import HookRegistry
from mechinterp.core.model import Model
from mechinterp.core.sites import Site

__all__ = ["Cell", "answer_logits", "progress_bar", "rows_per_forward", "sweep"]

# One counterfactual run: the activations to put in, ``[batch ...]`` for each site.
Cell = Sequence[tuple[Site, Tensor]]

_BUDGET = 1 << 30


def progress_bar(total: int, label: str, *, show: bool) -> Any:
    """A tqdm bar, or one that does nothing."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=label, disable=not show, leave=False)


def rows_per_forward(model: Model, length: int, *, memory: int = _BUDGET) -> int:
    """How many prompts of this length one forward pass may hold within ``memory`` bytes of activations."""
    cfg = model.cfg
    per_token = 8 * cfg.d_model + 3 * cfg.d_mlp + 3 * cfg.n_heads * length
    per_row = 4 * (length * per_token + 2 * cfg.d_vocab)
    return max(1, memory // per_row)


def answer_logits(model: Model, tokens: Tensor, read: Tensor) -> Tensor:
    """Logits ``[batch vocab]`` at position ``read[i]`` of each row, unembedding no other position."""
    keep, where = torch.unique(read, return_inverse=True)
    logits = model(tokens, keep=keep.tolist())
    rows = torch.arange(len(tokens), device=logits.device)
    return logits[rows, where.to(logits.device)]


def sweep(
    model: Model,
    tokens: Tensor,
    cells: Sequence[Cell],
    *,
    read: Tensor,
    positions: Mapping[str, Tensor] | None = None,
    label: str = "patching",
    progress: bool = False,
    memory: int = _BUDGET,
) -> Iterator[tuple[int, Tensor]]:
    """What does the model answer in each of these counterfactual runs?

    Parameters
    ----------
    tokens
        ``[batch pos]``, the receiving prompts.
    cells
        The activations that each run puts in.
    read
        ``[batch]`` positions whose logits are wanted.
    positions
        Named positions, where sites use them.

    Yields
    ------
    (int, Tensor)
        The index of the cell and its logits ``[batch vocab]``.

    Notes
    -----
    Cells are packed as rows of one forward pass. Cost: one prompt through the model for each cell and prompt.
    """
    batch, length = tokens.shape
    at_once = max(1, rows_per_forward(model, length, memory=memory) // batch)
    with progress_bar(len(cells), label, show=progress) as bar:
        for first in range(0, len(cells), at_once):
            packed = cells[first : first + at_once]
            registry = HookRegistry(model, positions or {})
            for i, cell in enumerate(packed):
                for site, value in cell:
                    registry.add(Replace(site, value, rows=(i * batch, (i + 1) * batch)))
            n = len(packed)
            with torch.no_grad(), registry:
                logits = answer_logits(model, tokens.repeat(n, 1), read.repeat(n))
            for i, part in enumerate(logits.split(batch)):
                yield first + i, part
            bar.update(n)
