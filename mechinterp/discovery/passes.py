"""One forward pass in which each row is a circuit: what its readers hear in the place of what they would."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from mechinterp.core.answers import answer_logits
from mechinterp.core.hooks import HookRegistry
from mechinterp.core.replay import replay_within
from mechinterp.core.sites import Site
from mechinterp.patching.readers import EMBED, ReaderGroup

if TYPE_CHECKING:
    from mechinterp.discovery.packing import Pack

__all__ = ["Pass", "SpanPass"]


def _index(columns: Sequence[int]) -> slice | list[int]:
    """A slice where these numbers follow each other, so that nothing is copied."""
    if columns and columns[-1] - columns[0] == len(columns) - 1:
        return slice(columns[0], columns[-1] + 1)
    return list(columns)


@dataclass(frozen=True)
class _Heard:
    """How what some readers read is summed: the stream and the edges that are cut, or silence and the edges that are kept.

    Parameters
    ----------
    columns
        The writers that are summed over, in order.
    kept
        Whether ``columns`` are those of the edges that are kept.
    """

    columns: tuple[int, ...]
    kept: bool


class Pass:
    """One forward pass of several circuits as rows. The registry's functions see positions from ``start`` of the recording.

    ``missing`` is ablated_u - current_u, filled in as the pass reaches each writer that a sum needs. ``kept`` holds of layers in
    which a row leaves neurons out which ones each keeps, ``[circuit neuron]``; such a pass starts at the first layer.
    """

    def __init__(self, pack: Pack, outside: Tensor, first: int, grad: bool, kept: Mapping[int, Tensor] | None = None) -> None:
        self.pack, self.outside, self.grad, self.kept = pack, outside, grad, kept or {}
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
        # What heads sum to before a norm that they pass together, of each layer.
        self.summed: dict[int, Tensor] = {}
        self.streams: dict[int, Tensor] = {}
        self.read: dict[int, Tensor] = {}

    def _cut(self, group: ReaderGroup) -> Tensor:
        """``[circuit reader]``: whether a reader hears anything that is ablated."""
        return self._touches(self._weights([group])).flatten(start_dim=1)

    def _touches(self, weights: Tensor) -> Tensor:
        """The same of any weights, with one writer."""
        return (weights != 0).any(dim=-1, keepdim=True)

    def _weights(self, groups: Sequence[ReaderGroup]) -> Tensor:
        """``[circuit reader writer]``"""
        return self.outside[:, groups[0].readers.start : groups[-1].readers.stop, : groups[0].n_writers]

    def _heard(self, groups: Sequence[ReaderGroup]) -> _Heard:
        """The shorter of both sums; over all writers where it is not much shorter, since some of them have to be copied out."""
        weights = self._weights(groups).detach()
        every = tuple(range(weights.shape[-1]))
        if self.grad:
            # A gate that is 0 has a gradient as well.
            return _Heard(every, kept=False)
        cut = _chosen(weights != 0)
        if 2 * len(cut) < len(every):
            return _Heard(cut, kept=False)
        rest = weights != 1
        if groups[0].port != "in":
            # Heads that no edge is cut from keep their own bits, whatever is said here.
            rest = rest & self._touches(weights)
        kept = _chosen(rest)
        return _Heard(kept if 2 * len(kept) < len(every) else every, kept=True)

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
        for layer in self.kept:
            registry.transform(Site("mlp_post", layer), self._ablate_neurons(layer))
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
            if self.model.cfg.post_norm:
                self.summed[layer] = rearrange(self.model.attention_sums(layer, z), "(n b) p m -> n b 1 p m", n=self.n)
            return value

        return act

    def _ablate_neurons(self, layer: int) -> Callable[[Tensor], Tensor]:
        kept = self.kept[layer][:, None, None]

        def act(value: Tensor) -> Tensor:
            neurons = rearrange(value[:, self.start :], "(n b) p d -> n b p d", n=self.n)
            new = torch.where(kept, neurons, self.pack.neurons[layer]).flatten(0, 1)
            return torch.cat([value[:, : self.start], new], dim=1) if self.start else new

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

    def _reads(self, groups: Sequence[ReaderGroup], stream: Tensor) -> Tensor:
        """What the readers of these groups read where the stream is ``[(n b) pos d_model]``: ``[(n b) pos reader d_model]``."""
        heard, model, n_writers = self.heard[tuple(groups)], self.model, groups[0].n_writers
        weights = self._weights(groups)[:, None].to(self.pack.ablated.dtype)
        if heard.kept:
            # What is missing of what is kept is there again.
            weights = weights - 1
            found = self.pack.silent[n_writers][None, :, None]
        else:
            found = rearrange(stream, "(n b) p m -> n b 1 p m", n=self.n)

        def summed(columns: Sequence[int]) -> Tensor:
            return rearrange(self._sum(weights, columns), "n b r (p m) -> n b r p m", m=model.cfg.d_model)

        direct = list(heard.columns)
        for layer in range(self.layout.shape.n_layers) if model.cfg.post_norm else ():
            # Heads are summed and normed together: what a reader misses is the difference of two normed sums.
            heads = self.layout.head_writers(layer)
            own = [u for u in heard.columns if heads.start <= u < heads.stop]
            if heads.stop <= n_writers and own:
                before = self.pack.head_sum(layer)[None, :, None] if heard.kept else self.summed[layer]
                moved = model.attention_passes(layer, before + summed(own))
                found = found + moved - model.attention_passes(layer, before)
                direct = [u for u in direct if u not in own]
        if direct:
            found = found + summed(direct)
        return rearrange(found.expand(self.n, -1, weights.shape[-2], -1, -1), "n b r p m -> (n b) p r m")

    def _touched(self, group: ReaderGroup) -> Tensor:
        """``[(n b) 1 reader]``: readers that no edge is cut from keep their own bits."""
        return self._cut(group).repeat_interleave(len(self.pack.ablated), dim=0).unsqueeze(1)

    def _read(self, group: ReaderGroup) -> Callable[[Tensor], Tensor]:
        def act(value: Tensor) -> Tensor:
            stream = value[:, self.start :]
            new = self._reads([group], stream).squeeze(2).where(self._touched(group), stream)
            return torch.cat([value[:, : self.start], new], dim=1) if self.start else new

        return act

    def _read_heads(self, group: ReaderGroup) -> Callable[[Tensor], Tensor]:
        together, layer, start = self.together[group], group.layer, self.start
        offset = group.readers.start - together[0].readers.start
        touched = self._touched(group).unsqueeze(-1)

        def act(value: Tensor) -> Tensor:
            if layer not in self.read:
                self.read.clear()
                self.read[layer] = self._reads(together, self.streams[layer])
            # Each head's own projection of what it reads: the stream is not split by head before.
            stream = self.read[layer][:, :, offset : offset + len(group.readers)]
            projection = self.model.projection(layer, group.port)
            new = torch.einsum("bphm,hmd->bphd", self.model.norm("attn", layer)(stream), projection.weight)
            new = new if projection.bias is None else new + projection.bias
            new = new.where(touched, value[:, start:])
            return new if not start else torch.cat([value[:, :start], new], dim=1)

        return act


def _chosen(marked: Tensor) -> tuple[int, ...]:
    """The writers marked for any circuit, span and reader, ``[circuit span reader writer]``."""
    return tuple(marked.flatten(end_dim=-2).any(dim=0).nonzero()[:, 0].tolist())


class SpanPass(Pass):
    """The same where ``outside`` is ``[circuit span reader writer]``: each position has the weights of its span."""

    def __init__(self, pack: Pack, outside: Tensor, index: Tensor, kept: Mapping[int, Tensor] | None = None) -> None:
        # Padding has no span and is given the last one's weights: no answer hears it.
        self.index = index
        super().__init__(pack, outside, first=0, grad=False, kept=kept)

    def _touches(self, weights: Tensor) -> Tensor:
        return super()._touches(weights).any(dim=1, keepdim=True)

    def _weights(self, groups: Sequence[ReaderGroup]) -> Tensor:
        return self.outside[:, :, groups[0].readers.start : groups[-1].readers.stop, : groups[0].n_writers]

    def _product(self, weights: Tensor, gap: Tensor) -> Tensor:
        here = weights[:, 0, self.index]
        gap = rearrange(gap, "... b w (p m) -> ... b p w m", m=self.model.cfg.d_model)
        return rearrange(torch.matmul(here, gap), "n b p r m -> n b r (p m)")
