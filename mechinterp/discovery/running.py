"""Running a circuit: every edge outside it carries the ablated value, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from mechinterp.core.hooks import HookRegistry
from mechinterp.core.model import Model
from mechinterp.core.plan import answer_logits, progress_bar, rows_per_forward
from mechinterp.core.run import Cache
from mechinterp.core.sites import Site
from mechinterp.errors import GraphError
from mechinterp.graph import Circuit
from mechinterp.patching.compare import Comparison, MetricLike, compare_runs
from mechinterp.patching.gradients import EMBED
from mechinterp.patching.readers import Layout, ReaderGroup, layout_of
from mechinterp.tasks import Task

__all__ = ["CircuitRuns", "run_circuits"]

_BUDGET = 2 << 30


@dataclass(frozen=True, eq=False)
class CircuitRuns:
    """What the model answers when only the edges of a circuit carry clean values.

    Parameters
    ----------
    metric
        Name of the metric.
    clean, corrupt
        ``[batch]``: the metric of the whole model on clean and on corrupt prompts.
    circuits
        ``[circuit batch]``: the metric of each circuit.
    accuracy
        ``[circuit + 1 batch]``: whether the right answer beats the wrong one, for each circuit, and last for the whole model.
    """

    metric: str
    clean: Tensor
    corrupt: Tensor
    circuits: Tensor
    accuracy: Tensor

    def __repr__(self) -> str:
        means = ", ".join(f"{value:.3f}" for value in self.circuits.mean(dim=1)[:8].tolist())
        return (
            f"CircuitRuns: {self.metric}, clean {float(self.clean.mean()):.3f}, corrupt {float(self.corrupt.mean()):.3f}, "
            f"{len(self.circuits)} circuits {means}"
        )


def run_circuits(
    model: Model,
    task: Task,
    circuits: Sequence[Circuit],
    *,
    metric: MetricLike = None,
    memory: int = _BUDGET,
    progress: bool = False,
) -> CircuitRuns:
    """What is left of the behaviour when everything outside each circuit is ablated?

    Every reader v reads in_v = sum of the current writers + sum over edges (u, v) outside the circuit of
    (corrupt_u - current_u), where current_u is what u writes *in this run*; the norm is recomputed on that. The ablation
    is resampling from the corrupt prompts, pair by pair. The full graph gives the clean run, the empty one the corrupt run.

    Parameters
    ----------
    circuits
        Circuits of this model's graph.
    metric
        As in `mechinterp.patch`.
    memory
        Bytes for what the writers write; more circuits or prompts are run in parts.

    Returns
    -------
    CircuitRuns
        Per circuit and example.

    Raises
    ------
    GraphError
        A circuit of another model's shape, or no circuit at all.

    Notes
    -----
    Cost: 2 forward passes for the two runs, and one for each circuit, packed as rows of few calls.

    References
    ----------
    Conmy et al. 2023 (2304.14997); Hanna et al. 2024 (2403.17806).

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> outs = mi.run_circuits(toy.model, toy.task, [toy.truth["resample"], mi.Circuit.full(toy.model)])
    >>> outs.circuits.shape[0]
    2
    """
    layout = layout_of(model)
    if not circuits:
        raise GraphError("no circuits were given; pass a list such as [circuit, mi.Circuit.full(model)]")
    for circuit in circuits:
        if circuit.shape != layout.shape:
            raise GraphError(f"{circuit!r} is a circuit of shape {circuit.shape}, but {model.name} has {layout.shape}")
    outside = torch.stack([_outside(circuit, layout) for circuit in circuits]).to(model.device)
    length = task.clean.shape[1]
    differing = max(1, length - int(task.first_difference.min()))
    per_row = 4 * differing * model.cfg.d_model * (len(layout.writers) + 3 * len(layout.groups[0].readers) + 8)
    fit = max(1, min(memory // per_row, rows_per_forward(model, length)))
    rows = min(fit, len(task))
    at_once = max(1, fit // rows)
    found: list[list[Tensor]] = []
    with progress_bar(len(circuits) * len(task), "run circuits", show=progress) as bar:
        for first in range(0, len(task), rows):
            runs = compare_runs(model, task[first : first + rows], layout.written, metric=metric, direction="noise")
            # Before the prompts first differ nothing differs anywhere, so nothing is ablated there.
            start = int(runs.task.first_difference.min())
            corrupt = _written(runs.corrupt, layout, start)
            logits = []
            for chunk in range(0, len(circuits), at_once):
                part = outside[chunk : chunk + at_once]
                logits.append(_run_packed(runs, layout, part, corrupt, start))
                bar.update(len(part) * len(runs.task))
            answers = torch.cat(logits)
            right = [_accuracy(each, runs.task) for each in (*answers, runs.clean_logits)]
            found.append(
                [
                    runs.measure(runs.clean_logits)[None],
                    runs.measure(runs.corrupt_logits)[None],
                    torch.stack([runs.measure(each) for each in answers]),
                    torch.stack(right),
                ]
            )
    clean, corrupt_metric, values, accuracy = (torch.cat(each, dim=1).cpu() for each in zip(*found, strict=True))
    return CircuitRuns(runs.metric.name, clean[0], corrupt_metric[0], values, accuracy)


def _accuracy(logits: Tensor, task: Task) -> Tensor:
    from mechinterp.tasks import accuracy

    return accuracy(logits, task)


def _outside(circuit: Circuit, layout: Layout) -> Tensor:
    """``[reader writer]``: 1 where the edge exists and is not in the circuit."""
    inside = set(circuit.edges)
    mask = torch.zeros(len(layout.readers), len(layout.writers))
    cut = [i for i, edge in enumerate(layout.edges) if edge not in inside]
    mask[[layout.dst[i] for i in cut], [layout.src[i] for i in cut]] = 1.0
    return mask


def _written(cache: Cache, layout: Layout, start: int) -> Tensor:
    """``[batch writer (pos d_model)]``: what each writer writes in one run, from position ``start``."""
    model, first = cache.model, cache[EMBED][:, start:]
    batch, length, width = first.shape
    written = first.new_empty(batch, len(layout.writers), length * width)
    written[:, 0] = first.reshape(batch, -1)
    for layer in range(layout.shape.n_layers):
        weight = model.projection(layer, "o").weight
        heads = torch.einsum("bphd,hdm->bhpm", cache[Site("z", layer)][:, start:], weight)
        written[:, layout.head_writers(layer)] = rearrange(heads, "b h p m -> b h (p m)")
        if not layout.shape.attn_only:
            written[:, layout.mlp_writer(layer)] = cache[Site("mlp_out", layer)][:, start:].reshape(batch, -1)
    return written


def _run_packed(runs: Comparison, layout: Layout, outside: Tensor, corrupt: Tensor, start: int) -> Tensor:
    """Answer logits ``[circuit batch vocab]`` of several circuits as rows of one forward pass."""
    model, task, shape = runs.model, runs.task, layout.shape
    n = len(outside)
    width = model.cfg.d_model
    # corrupt_u - current_u, filled in as the forward pass reaches each writer.
    missing = corrupt.new_zeros(n, *corrupt.shape)
    registry = HookRegistry(model)

    def note(writers: slice, value: Tensor) -> None:
        missing[:, :, writers] = corrupt[:, writers] - rearrange(value, "(n b) p w m -> n b w (p m)", n=n)

    def note_stream(writer: int) -> Callable[[Tensor], Tensor]:
        def act(value: Tensor) -> Tensor:
            note(slice(writer, writer + 1), value[:, start:].unsqueeze(2))
            return value

        return act

    def note_heads(layer: int) -> Callable[[Tensor], Tensor]:
        weight = model.projection(layer, "o").weight

        def act(value: Tensor) -> Tensor:
            note(layout.head_writers(layer), torch.einsum("bphd,hdm->bphm", value[:, start:], weight))
            return value

        return act

    # q, k and v of a layer read the same writers: what all of them miss is one matrix product, made by the first.
    moved: dict[int, Tensor] = {}

    def miss(groups: list[ReaderGroup]) -> Tensor:
        first, last = groups[0].readers.start, groups[-1].readers.stop
        n_writers = groups[0].n_writers
        weights = outside[:, None, first:last, :n_writers].to(corrupt.dtype)
        return rearrange(torch.matmul(weights, missing[:, :, :n_writers]), "n b r (p m) -> (n b) p r m", m=width)

    def read(group: ReaderGroup, together: list[ReaderGroup]) -> Callable[[Tensor], Tensor]:
        cut = bool(outside[:, group.readers.start : group.readers.stop, : group.n_writers].any())
        offset = group.readers.start - together[0].readers.start

        def act(value: Tensor) -> Tensor:
            if not cut:
                return value
            if group is together[0] or together[0].readers.start not in moved:
                moved.clear()
                moved[together[0].readers.start] = miss(together)
            part = moved[together[0].readers.start][:, :, offset : offset + len(group.readers)]
            new = value.clone()
            new[:, start:] += part if value.ndim == 4 else part.squeeze(2)
            return new

        return act

    registry.transform(EMBED, note_stream(0), priority=1)
    for layer in range(shape.n_layers):
        registry.transform(Site("z", layer), note_heads(layer))
        if not shape.attn_only:
            registry.transform(Site("mlp_out", layer), note_stream(layout.mlp_writer(layer)))
    for group in layout.groups:
        together = [group]
        if group.port != "in":
            together = [other for other in layout.groups if other.port != "in" and other.layer == group.layer]
        registry.transform(group.site, read(group, together))
    with torch.no_grad(), registry:
        logits = answer_logits(model, task.clean.repeat(n, 1), task.answer_pos.repeat(n))
    return rearrange(logits, "(n b) v -> n b v", n=n)
