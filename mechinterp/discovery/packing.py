"""Many circuits as rows of one forward pass, from runs that are made once and serve every later circuit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from mechinterp.core.ablation import Ablation
from mechinterp.core.answers import answer_logits
from mechinterp.core.hooks import HookRegistry
from mechinterp.core.model import Model
from mechinterp.core.plan import budget_of, rows_per_forward
from mechinterp.core.replay import replay_within
from mechinterp.core.run import Cache
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.graph import Circuit
from mechinterp.patching.compare import Comparison, MetricLike, compare_runs
from mechinterp.patching.readers import EMBED, Layout, ReaderGroup, layout_of
from mechinterp.tasks import Spans, Task

__all__ = ["Pack", "Packing", "outside_at", "outside_of"]


@dataclass(frozen=True, eq=False)
class Packing:
    """How many prompts and circuits go into one pass, and the packs of prompts.

    Parameters
    ----------
    rows
        Prompts of a pack.
    at_once
        Circuits in one pass.
    """

    model: Model
    task: Task
    ablation: Ablation
    metric: MetricLike
    rows: int
    at_once: int
    source: Callable[[slice], Cache] | None

    @classmethod
    def of(cls, model: Model, task: Task, ablation: Ablation, metric: MetricLike, memory: int | str | None) -> Packing:
        """Within a budget of memory."""
        layout, length = layout_of(model), task.clean.shape[1]
        paired = ablation.kind == "resample"
        source = None if paired else ablation.source(model, task, every_writer(layout))
        differing = max(1, length - int(task.first_difference.min())) if paired else length
        per_row = 4 * differing * model.cfg.d_model * (len(layout.writers) + 3 * len(layout.groups[0].readers) + 8)
        room = budget_of(model, memory, at_most=1 << 28)
        fit = max(1, min(room // per_row, rows_per_forward(model, length, memory=room)))
        rows = min(fit, len(task))
        return cls(model, task, ablation, metric, rows, max(1, fit // rows), source)

    @property
    def parts(self) -> list[slice]:
        """Which prompts are packed together."""
        return [slice(first, min(first + self.rows, len(self.task))) for first in range(0, len(self.task), self.rows)]

    def pack(self, part: slice) -> Pack:
        """Clean and ablated runs of some prompts. Cost: 2 forward passes, and what the ablation costs."""
        layout = layout_of(self.model)
        streams = [Site("resid_pre", layer) for layer in range(layout.shape.n_layers)]
        runs = compare_runs(
            self.model, self.task[part], layout.written, metric=self.metric, direction="noise", cells=[EMBED, *streams]
        )
        if self.source is None:
            # Before the prompts first differ nothing differs anywhere, so nothing is ablated there.
            other, start = runs.corrupt, runs.start
        else:
            other, start = self.source(part), 0
        return Pack(runs, layout, _written(other, layout, start), start)


@dataclass(frozen=True, eq=False)
class Pack:
    """The two runs of some prompts, and what every writer writes where it is ablated.

    Parameters
    ----------
    ablated
        ``[batch writer (pos d_model)]``, from position ``start``.
    """

    runs: Comparison
    layout: Layout
    ablated: Tensor
    start: int

    @cached_property
    def clean_gap(self) -> Tensor:
        """``[batch writer (pos d_model)]``: what is ablated minus what the clean run writes."""
        return self.ablated - _written(self.runs.clean, self.layout, self.start)

    def measure(self, answers: Tensor) -> Tensor:
        """The metric ``[circuit batch]`` of answer logits ``[circuit batch vocab]``."""
        return torch.stack([self.runs.measure(each) for each in answers])

    def answers(self, outside: Tensor, *, first: int = 0, grad: bool = False) -> Tensor:
        """Answer logits ``[circuit batch vocab]`` of several circuits as rows of one forward pass.

        Parameters
        ----------
        outside
            ``[circuit reader writer]``: how much of an edge is ablated, 1 for an edge outside of the circuit.
        first
            No reader of an earlier layer has anything ablated, so the pass may start there.
        grad
            Whether the answers are differentiable with respect to ``outside``.
        """
        return _Pass(self, outside, first, grad).run()

    def answers_at(self, outside: Tensor, index: Tensor) -> Tensor:
        """The same where edges are ablated at some spans alone.

        Parameters
        ----------
        outside
            ``[circuit span reader writer]``
        index
            ``[batch pos]``: the span of each token.
        """
        return _SpanPass(self, outside, index[:, self.start :]).run()


def every_writer(layout: Layout) -> Selection:
    """Every writer as a site of its own."""
    heads = range(layout.shape.n_heads)
    split = [[replace(site, head=i) for i in heads] if site.name == "z" else [site] for site in layout.written]
    return Selection(tuple(site for sites in split for site in sites))


def outside_of(circuit: Circuit, layout: Layout) -> Tensor:
    """``[reader writer]``: 1 where the edge exists and is not in the circuit."""
    mask = torch.zeros(len(layout.readers), len(layout.writers))
    for group in layout.groups:
        mask[group.readers.start : group.readers.stop, : group.n_writers] = 1.0
    writers = {name: i for i, name in enumerate(layout.writers)}
    readers = {reader: i for i, reader in enumerate(layout.readers)}
    mask[[readers[edge.dst, edge.port] for edge in circuit.edges], [writers[edge.src] for edge in circuit.edges]] = 0.0
    return mask


def outside_at(circuit: Circuit, layout: Layout, spans: Spans) -> Tensor:
    """``[span reader writer]``: 1 where the edge exists and is not in the circuit at this span.

    Raises
    ------
    TaskError
        A span of the circuit that the prompts do not have.
    """
    mask = outside_of(circuit, layout).expand(len(spans.names), -1, -1).clone()
    writers = {name: i for i, name in enumerate(layout.writers)}
    readers = {reader: i for i, reader in enumerate(layout.readers)}
    for edge, kept in circuit.spans.items():
        cut = torch.ones(len(spans.names))
        cut[[spans.place(name) for name in kept]] = 0.0
        mask[:, readers[edge.dst, edge.port], writers[edge.src]] = cut
    return mask


def _written(cache: Cache, layout: Layout, start: int) -> Tensor:
    """``[batch writer (pos d_model)]``: what each writer writes in one run, from position ``start``."""

    def heads(layer: int) -> Tensor:
        return torch.einsum("bphd,hdm->bphm", cache[Site("z", layer)][:, start:], cache.model.projection(layer, "o").weight)

    return layout.stacked(lambda site: cache[site][:, start:], heads)


def _index(columns: Sequence[int]) -> slice | list[int]:
    """A slice where these numbers follow each other, so that nothing is copied."""
    if columns and columns[-1] - columns[0] == len(columns) - 1:
        return slice(columns[0], columns[-1] + 1)
    return list(columns)


@dataclass(frozen=True)
class _Heard:
    """How what some readers miss is summed: over the edges that are cut, or as everything less the edges that are kept.

    Parameters
    ----------
    columns
        The writers that are summed over, in order.
    kept
        Whether ``columns`` are those of the edges that are kept.
    """

    columns: tuple[int, ...]
    kept: bool


class _Pass:
    """One forward pass of several circuits as rows. The registry's functions see positions from ``start`` of the recording.

    ``missing`` is ablated_u - current_u, filled in as the pass reaches each writer that a sum needs.
    """

    def __init__(self, pack: Pack, outside: Tensor, first: int, grad: bool) -> None:
        self.pack, self.outside, self.grad = pack, outside, grad
        self.model, self.layout, self.n = pack.runs.model, pack.layout, len(outside)
        # A replay has no gradients.
        self.recording = None if grad else pack.runs.recording
        # Sums before a norm that heads pass together are needed of every layer.
        self.first = 0 if self.recording is None or self.model.cfg.post_norm else first
        self.start = pack.start
        if self.recording is not None:
            # Positions before `start` are not computed at all: there every circuit is the clean run.
            self.recording = self.recording.since(pack.start if self.model.replay_prefix else 0)
            self.start = 0 if self.model.replay_prefix else pack.start
        # q, k and v of a layer read the same writers: what all of them miss is one matrix product, made by the first.
        self.together: dict[ReaderGroup, list[ReaderGroup]] = {}
        for group in self.layout.groups:
            same = [other for other in self.layout.groups if other.port != "in" and other.layer == group.layer]
            if self._cut(group).any():
                self.together[group] = [group] if group.port == "in" else same
        self.heard = {tuple(groups): self._heard(groups) for groups in self.together.values()}
        # What is written before the first layer is the same in every row.
        self.n_fixed = self.layout.head_writers(self.first).start if self.first else 0
        needed = sorted({u for heard in self.heard.values() for u in heard.columns if u >= self.n_fixed})
        self.slot = {u: i for i, u in enumerate(needed)}
        ablated = pack.ablated
        self.missing = ablated.new_empty(self.n, len(ablated), 0 if grad else len(needed), ablated.shape[-1])
        self.noted: list[Tensor] = []
        # All that is missing of the writers so far, and what is written since then: (number of writers, sum).
        self.totals = any(heard.kept for heard in self.heard.values())
        self.total = pack.clean_gap[:, : self.n_fixed].sum(dim=1)[None] if self.totals and self.n_fixed else ablated.new_zeros(())
        self.pending: list[tuple[int, Tensor]] = []
        # What heads sum to before a norm that they pass together, of each layer.
        self.summed: dict[int, Tensor] = {}
        self.streams: dict[int, Tensor] = {}
        self.moved: dict[int, Tensor] = {}

    def _cut(self, group: ReaderGroup) -> Tensor:
        """``[circuit reader]``: whether a reader hears anything that is ablated."""
        return self.outside[:, group.readers.start : group.readers.stop, : group.n_writers].any(dim=-1)

    def _weights(self, groups: Sequence[ReaderGroup]) -> Tensor:
        """``[circuit reader writer]``"""
        return self.outside[:, groups[0].readers.start : groups[-1].readers.stop, : groups[0].n_writers]

    def _heard(self, groups: Sequence[ReaderGroup]) -> _Heard:
        """The shorter of both sums, where it is much shorter: some writers have to be copied out, all of them need not."""
        weights = self._weights(groups).detach()
        everything = _Heard(tuple(range(weights.shape[-1])), kept=False)
        if self.grad:
            # A gate that is 0 has a gradient as well.
            return everything
        cut = tuple((weights != 0).any(dim=1).any(dim=0).nonzero()[:, 0].tolist())
        if 2 * len(cut) < weights.shape[-1] or self.model.cfg.post_norm:
            return _Heard(cut, kept=False)
        rest = weights != 1
        if groups[0].port != "in":
            # Heads that no edge is cut from keep their own bits, whatever is said here.
            rest = rest & (weights != 0).any(dim=-1, keepdim=True)
        kept = tuple(rest.any(dim=1).any(dim=0).nonzero()[:, 0].tolist())
        return _Heard(kept, kept=True) if 2 * len(kept) < weights.shape[-1] else everything

    def run(self) -> Tensor:
        model, task, layout, first = self.model, self.pack.runs.task, self.layout, self.first
        registry = HookRegistry(model, partial=self.recording is not None)
        if not first:
            registry.transform(EMBED, self._note_stream(0), priority=1)
        for layer in range(first, layout.shape.n_layers):
            registry.transform(Site("resid_pre", layer), self._keep_stream(layer))
            registry.transform(Site("z", layer), self._note_heads(layer))
            if not layout.shape.attn_only:
                registry.transform(Site("mlp_out", layer), self._note_stream(layout.mlp_writer(layer)))
        for group in self.together:
            if group.port == "in":
                registry.transform(group.site, self._read(group))
            else:
                registry.transform(Site(group.port, group.layer), self._read_heads(group))
        if self.recording is not None:
            return replay_within(self.recording, registry, self.n, task.answer_pos, first=first)
        with torch.set_grad_enabled(self.grad), registry:
            logits = answer_logits(model, task.clean.repeat(self.n, 1), task.answer_pos.repeat(self.n))
        return rearrange(logits, "(n b) v -> n b v", n=self.n)

    # --- what writers write

    def _note(self, writers: Sequence[int], value: Tensor) -> None:
        """Keep what is missing of these writers, which write ``value`` ``[(n b) pos writer d_model]``."""
        gap = self.pack.ablated[:, _index(writers)] - rearrange(value, "(n b) p w m -> n b w (p m)", n=self.n)
        if self.grad:
            # Writing into one tensor would change what the backward pass still needs.
            self.noted.append(gap)
        else:
            self.missing[:, :, _index([self.slot[u] for u in writers])] = gap

    def _note_total(self, writers: slice, value: Tensor) -> None:
        """Keep what is missing of these writers together, which write ``value`` ``[(n b) pos d_model]``."""
        ablated = self.pack.ablated[:, writers].sum(dim=1)
        self.pending.append((writers.stop, ablated - rearrange(value, "(n b) p m -> n b (p m)", n=self.n)))

    def _keep_stream(self, layer: int) -> Callable[[Tensor], Tensor]:
        def act(value: Tensor) -> Tensor:
            self.streams.clear()
            self.streams[layer] = value[:, self.start :]
            return value

        return act

    def _note_stream(self, writer: int) -> Callable[[Tensor], Tensor]:
        def act(value: Tensor) -> Tensor:
            if self.grad or writer in self.slot:
                self._note([writer], value[:, self.start :].unsqueeze(2))
            if self.totals:
                self._note_total(slice(writer, writer + 1), value[:, self.start :])
            return value

        return act

    def _note_heads(self, layer: int) -> Callable[[Tensor], Tensor]:
        weight = self.model.projection(layer, "o").weight
        writers = self.layout.head_writers(layer)
        wanted = [u for u in range(writers.start, writers.stop) if self.grad or u in self.slot]
        heads = _index([u - writers.start for u in wanted])

        def act(value: Tensor) -> Tensor:
            z = value[:, self.start :]
            if wanted:
                self._note(wanted, torch.einsum("bphd,hdm->bphm", z[:, :, heads], weight[heads]))
            if self.totals:
                self._note_total(writers, torch.einsum("bphd,hdm->bpm", z, weight))
            if self.model.cfg.post_norm:
                self.summed[layer] = rearrange(self.model.attention_sums(layer, z), "(n b) p m -> n b 1 p m", n=self.n)
            return value

        return act

    # --- what readers read

    def _sum(self, weights: Tensor, columns: Sequence[int]) -> Tensor:
        """The sum over some writers of weight times what is missing: ``[n b reader (p m)]``."""
        late = [u for u in columns if u >= self.n_fixed]
        if self.grad:
            late_gap = torch.cat(self.noted, dim=2)[:, :, _index(late)]
        else:
            late_gap = self.missing[:, :, _index([self.slot[u] for u in late])]
        found = self._product(weights[..., _index(late)], late_gap)
        if len(late) < len(columns):
            early = _index([u for u in columns if u < self.n_fixed])
            found = found + self._product(weights[..., early], self.pack.clean_gap[:, early])
        return found

    def _product(self, weights: Tensor, gap: Tensor) -> Tensor:
        """``[n b reader (p m)]`` of weights ``[n 1 reader writer]`` and what is missing, ``[n b writer (p m)]``."""
        return torch.matmul(weights, gap)

    def _everything(self, n_writers: int) -> Tensor:
        """What is missing of all writers before a reader: ``[n b (p m)]``. Readers ask in the order of the forward pass."""
        while self.pending and self.pending[0][0] <= n_writers:
            self.total = self.total + self.pending.pop(0)[1]
        return self.total

    def _missed(self, groups: Sequence[ReaderGroup]) -> Tensor:
        """What the readers of these groups hear more, or less, than the stream holds: ``[(n b) pos reader d_model]``."""
        heard = self.heard[tuple(groups)]
        width = self.model.cfg.d_model
        weights = self._weights(groups)[:, None].to(self.pack.ablated.dtype)
        if heard.kept:
            everything = self._everything(groups[0].n_writers).unsqueeze(2)
            found = (
                everything - self._sum(1 - weights, heard.columns)
                if heard.columns
                else everything.expand(self.n, -1, weights.shape[-2], -1)
            )
            return rearrange(found, "n b r (p m) -> (n b) p r m", m=width)
        if not self.model.cfg.post_norm:
            return rearrange(self._sum(weights, heard.columns), "n b r (p m) -> (n b) p r m", m=width)
        # Heads are summed and normed together: what a reader misses is the difference of two normed sums.
        through_norms = weights.new_zeros(())
        direct = list(heard.columns)
        for layer, current in self.summed.items():
            heads = self.layout.head_writers(layer)
            cut = [u for u in heard.columns if heads.start <= u < heads.stop]
            if heads.stop <= groups[0].n_writers and cut:
                moved = rearrange(self._sum(weights, cut), "n b r (p m) -> n b r p m", m=width)
                through_norms = (
                    through_norms
                    + self.model.attention_passes(layer, current + moved)
                    - self.model.attention_passes(layer, current)
                )
                direct = [u for u in direct if u not in cut]
        found = through_norms
        if direct:
            found = found + rearrange(self._sum(weights, direct), "n b r (p m) -> n b r p m", m=width)
        return rearrange(found, "n b r p m -> (n b) p r m")

    def _read(self, group: ReaderGroup) -> Callable[[Tensor], Tensor]:
        def act(value: Tensor) -> Tensor:
            new = value.clone()
            new[:, self.start :] += self._missed([group]).squeeze(2)
            return new

        return act

    def _read_heads(self, group: ReaderGroup) -> Callable[[Tensor], Tensor]:
        together, layer, start = self.together[group], group.layer, self.start
        offset = group.readers.start - together[0].readers.start
        touched = self._cut(group).repeat_interleave(len(self.pack.ablated), dim=0)[:, None, :, None]

        def act(value: Tensor) -> Tensor:
            if layer not in self.moved:
                self.moved.clear()
                self.moved[layer] = self._missed(together)
            # Each head's own projection of what it reads: the stream is not split by head before.
            stream = self.streams[layer].unsqueeze(2) + self.moved[layer][:, :, offset : offset + len(group.readers)]
            projection = self.model.projection(layer, group.port)
            new = torch.einsum("bphm,hmd->bphd", self.model.norm("attn", layer)(stream), projection.weight)
            new = new if projection.bias is None else new + projection.bias
            # Heads that no edge is cut from keep their own bits.
            new = new.where(touched, value[:, start:])
            return new if not start else torch.cat([value[:, :start], new], dim=1)

        return act


def _chosen(marked: Tensor) -> tuple[int, ...]:
    """The writers marked for any circuit, span and reader, ``[circuit span reader writer]``."""
    return tuple(marked.flatten(0, 2).any(dim=0).nonzero()[:, 0].tolist())


class _SpanPass(_Pass):
    """The same where ``outside`` is ``[circuit span reader writer]``: each position has the weights of its span."""

    def __init__(self, pack: Pack, outside: Tensor, index: Tensor) -> None:
        # Padding has no span and is given the last one's weights: no answer hears it.
        self.index = index
        super().__init__(pack, outside, first=0, grad=False)

    def _cut(self, group: ReaderGroup) -> Tensor:
        return self._weights([group]).any(dim=-1).any(dim=1)

    def _weights(self, groups: Sequence[ReaderGroup]) -> Tensor:
        return self.outside[:, :, groups[0].readers.start : groups[-1].readers.stop, : groups[0].n_writers]

    def _heard(self, groups: Sequence[ReaderGroup]) -> _Heard:
        weights = self._weights(groups)
        cut, n_writers = _chosen(weights != 0), weights.shape[-1]
        if 2 * len(cut) < n_writers or self.model.cfg.post_norm:
            return _Heard(cut, kept=False)
        rest = weights != 1
        if groups[0].port != "in":
            # Heads that no edge is cut from at any span keep their own bits.
            rest = rest & (weights != 0).any(dim=-1, keepdim=True).any(dim=1, keepdim=True)
        kept = _chosen(rest)
        return _Heard(kept, kept=True) if 2 * len(kept) < n_writers else _Heard(tuple(range(n_writers)), kept=False)

    def _product(self, weights: Tensor, gap: Tensor) -> Tensor:
        here = weights[:, 0, self.index]
        gap = rearrange(gap, "... b w (p m) -> ... b p w m", m=self.model.cfg.d_model)
        return rearrange(torch.matmul(here, gap), "n b p r m -> n b r (p m)")
