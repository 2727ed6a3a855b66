"""Packs many counterfactual runs into few, short forward passes, and says the cost before it runs them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.edits import Replace
from mechinterp.core.hooks import HookRegistry
from mechinterp.core.model import Model
from mechinterp.core.replay import ENTRIES, Entry, record, replay, why_not_exact
from mechinterp.core.sites import Site

__all__ = ["Cell", "Plan", "answer_logits", "plan_cells", "progress_bar", "rows_per_forward", "sweep"]

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


@dataclass(frozen=True, eq=False)
class _Batch:
    """Cells that run together; ``start`` is their first changed position, or ``None`` for full forward passes."""

    cells: tuple[int, ...]
    start: int | None


@dataclass(frozen=True, eq=False)
class Plan:
    """Which forward passes will answer a sweep, and what they cost.

    Parameters
    ----------
    cells
        How many counterfactual runs are asked for.
    calls
        How many packed passes through (part of) the model.
    replayed
        How many cells are replayed from a recording instead of run in full.
    reason
        Why the others are not; empty where all are.
    flops
        Multiply-adds times two of all of it, counted from the shapes (matrix products only).
    flops_full
        The same for one full forward pass for each cell.
    """

    cells: int
    calls: int
    replayed: int
    reason: str
    flops: float
    flops_full: float
    batches: tuple[_Batch, ...] = field(repr=False)

    def __repr__(self) -> str:
        why = f"; {self.cells - self.replayed} run in full: {self.reason}" if self.reason else ""
        return (
            f"Plan: {self.cells} cells in {self.calls} packed passes, {self.flops / 1e12:.3g} TFLOP, "
            f"{self.flops / max(self.flops_full, 1.0):.2f} of one full forward pass for each cell{why}"
        )


def plan_cells(
    model: Model,
    batch: int,
    length: int,
    cells: Sequence[Sequence[Site]],
    *,
    start: int,
    read: Tensor,
    memory: int = _BUDGET,
) -> Plan:
    """How will these counterfactual runs be computed, and at what cost?

    Parameters
    ----------
    batch, length
        Of the receiving prompts.
    cells
        The sites that each run changes.
    start
        The first position at which any new value differs from the receiving run.
    read
        ``[batch]`` positions whose logits are wanted.
    memory
        Bytes of activations that one pass may hold.
    """
    reason = why_not_exact(model)
    last = int(read.min())
    grouped: dict[int | None, list[int]] = {}
    for i, cell in enumerate(cells):
        grouped.setdefault(None if reason else _first_change(cell, length, start, last), []).append(i)
    batches: list[_Batch] = []
    flops = 0.0
    for first, members in grouped.items():
        shown = length if first is None else length - first
        at_once = max(1, rows_per_forward(model, shown, memory=memory) // batch)
        members = sorted(members, key=lambda i: cells[i][0].layer or 0)
        for chunk in range(0, len(members), at_once):
            batches.append(_Batch(tuple(members[chunk : chunk + at_once]), first))
        if first is None:
            flops += len(members) * batch * _flops(model, length, 0, model.cfg.n_layers)
        else:
            flops += batch * _flops(model, length, 0, model.cfg.n_layers)
            flops += batch * sum(_entry_flops(model, cells[i][0], length, first) for i in members)
    unreached = len(grouped.get(None, []))
    if unreached and not reason:
        reason = "their sites are spread over layers, or change what attention computes"
    full = len(cells) * batch * _flops(model, length, 0, model.cfg.n_layers, unembedded=length)
    return Plan(len(cells), len(batches), len(cells) - unreached, reason if unreached else "", flops, full, tuple(batches))


def _first_change(cell: Sequence[Site], length: int, start: int, last: int) -> int | None:
    """Where a replay of this cell begins; ``None`` where it takes a full forward pass."""
    names = {site.name for site in cell}
    if len(names) != 1 or len({site.layer for site in cell}) != 1 or not names <= ENTRIES.keys():
        return None
    if any(isinstance(site.pos, str) for site in cell):
        return min(start, last)
    places = [start if site.pos is None else int(site.pos) % length for site in cell]
    return min(max(start, min(places)), last)


def _flops(model: Model, length: int, start: int, layers: int, unembedded: int = 1) -> float:
    """Of the matrix products of so many blocks at the positions from ``start`` of one prompt, and of the unembedding."""
    cfg, n = model.cfg, length - start
    attention = cfg.d_model * cfg.d_head * (2 * cfg.n_heads + 2 * cfg.n_kv_heads) * n
    attention += 2 * cfg.n_heads * cfg.d_head * n * length
    return 2.0 * (layers * (attention + _mlp_products(model) * n) + cfg.d_model * cfg.d_vocab * unembedded)


@functools.lru_cache(maxsize=8)
def _mlp_products(model: Model) -> int:
    """Weights of one MLP, each of which is one multiply-add for each token."""
    return sum(weight.numel() for weight in model.block(0).mlp.parameters() if weight.ndim == 2)


def _entry_flops(model: Model, site: Site, length: int, start: int) -> float:
    kind, layer = ENTRIES[site.name], site.layer or 0
    whole = model.cfg.n_layers - layer - (kind != "block")
    flops = _flops(model, length, start, whole)
    if kind == "tail" and not (model.cfg.parallel and site.name != "mlp_in"):
        flops += 2.0 * _mlp_products(model) * (length - start)
    if site.name == "z":
        flops += 2.0 * model.cfg.n_heads * model.cfg.d_head * model.cfg.d_model * (length - start)
    return flops


def sweep(
    plan: Plan,
    model: Model,
    tokens: Tensor,
    cells: Sequence[Cell],
    *,
    read: Tensor,
    positions: Mapping[str, Tensor] | None = None,
    label: str = "patching",
    progress: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """What does the model answer in each of the counterfactual runs of a plan?

    Yields
    ------
    (int, Tensor)
        The index of the cell and its logits ``[batch vocab]``; not in order.
    """
    names = sorted({site.name for cell in cells for site, _ in cell})
    recording = None
    with progress_bar(len(cells), label, show=progress) as bar:
        for part in plan.batches:
            if part.start is None:
                logits = _run_full(model, tokens, [cells[i] for i in part.cells], read, positions or {})
            else:
                if recording is None or recording.start != part.start:
                    recording = record(model, tokens, part.start, names, positions or {})
                entries = [Entry(cells[i][0][0].layer or 0, ENTRIES[cells[i][0][0].name], tuple(cells[i])) for i in part.cells]
                logits = replay(recording, entries, read)
            yield from zip(part.cells, logits, strict=True)
            bar.update(len(part.cells))


def _run_full(model: Model, tokens: Tensor, cells: Sequence[Cell], read: Tensor, positions: Mapping[str, Tensor]) -> Tensor:
    """Answer logits ``[cell batch vocab]``, one full forward pass for each, packed as rows of one call."""
    n, batch = len(cells), len(tokens)
    registry = HookRegistry(model, positions)
    for i, cell in enumerate(cells):
        for site, value in cell:
            registry.add(Replace(site, value, rows=(i * batch, (i + 1) * batch)))
    with torch.no_grad(), registry:
        logits = answer_logits(model, tokens.repeat(n, 1), read.repeat(n))
    return logits.reshape(n, batch, -1)
