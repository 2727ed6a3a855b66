"""Many circuits as rows of one forward pass, from runs that are made once and serve every later circuit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from mechinterp.core.ablation import Ablation
from mechinterp.core.model import Model
from mechinterp.core.plan import budget_of, rows_per_forward
from mechinterp.core.run import Cache
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.discovery.passes import Pass, SpanPass
from mechinterp.graph import Circuit
from mechinterp.patching.compare import Comparison, MetricLike, compare_runs
from mechinterp.patching.readers import EMBED, Layout, layout_of
from mechinterp.tasks import Spans, Task

__all__ = ["Pack", "Packing", "kept_neurons", "outside_at", "outside_of"]


@dataclass(frozen=True, eq=False)
class Packing:
    """How many prompts and circuits go into one pass, and the packs of prompts.

    Parameters
    ----------
    rows
        Prompts of a pack.
    at_once
        Circuits in one pass.
    neurons
        The layers of whose MLPs some circuit leaves neurons out.
    """

    model: Model
    task: Task
    ablation: Ablation
    metric: MetricLike
    rows: int
    at_once: int
    source: Callable[[slice], Cache] | None
    neurons: Sequence[int] = ()

    @classmethod
    def of(
        cls,
        model: Model,
        task: Task,
        ablation: Ablation,
        metric: MetricLike,
        memory: int | str | None,
        neurons: Sequence[int] = (),
    ) -> Packing:
        """Within a budget of memory."""
        layout, length = layout_of(model), task.clean.shape[1]
        paired = ablation.kind == "resample"
        source = None if paired else ablation.source(model, task, every_writer(layout) | _sites(neurons))
        differing = max(1, length - int(task.first_difference.min())) if paired else length
        width = model.cfg.d_model * (len(layout.writers) + 3 * len(layout.groups[0].readers) + 8)
        per_row = 4 * differing * (width + len(neurons) * model.cfg.d_mlp)
        room = budget_of(model, memory, at_most=1 << 28)
        fit = max(1, min(room // per_row, rows_per_forward(model, length, memory=room)))
        rows = min(fit, len(task))
        return cls(model, task, ablation, metric, rows, max(1, fit // rows), source, tuple(neurons))

    @property
    def parts(self) -> list[slice]:
        """Which prompts are packed together."""
        return [slice(first, min(first + self.rows, len(self.task))) for first in range(0, len(self.task), self.rows)]

    def pack(self, part: slice) -> Pack:
        """Clean and ablated runs of some prompts. Cost: 2 forward passes, and what the ablation costs."""
        layout = layout_of(self.model)
        streams = [Site("resid_pre", layer) for layer in range(layout.shape.n_layers)]
        kept = layout.written | _sites(self.neurons)
        runs = compare_runs(self.model, self.task[part], kept, metric=self.metric, direction="noise", cells=[EMBED, *streams])
        if self.source is None:
            # Before the prompts first differ nothing differs anywhere, so nothing is ablated there.
            other, start = runs.corrupt, runs.start
        else:
            other, start = self.source(part), 0
        neurons = {layer: other[Site("mlp_post", layer)][:, start:] for layer in self.neurons}
        return Pack(runs, layout, _written(other, layout, start), start, neurons)


@dataclass(frozen=True, eq=False)
class Pack:
    """The two runs of some prompts, and what every writer writes where it is ablated.

    Parameters
    ----------
    ablated
        ``[batch writer (pos d_model)]``, from position ``start``.
    neurons
        What ablated neurons are, ``[batch pos neuron]`` from there on, of each layer that leaves some out.
    """

    runs: Comparison
    layout: Layout
    ablated: Tensor
    start: int
    neurons: Mapping[int, Tensor] = field(default_factory=dict)

    @cached_property
    def clean_gap(self) -> Tensor:
        """``[batch writer (pos d_model)]``: what is ablated minus what the clean run writes."""
        return self.ablated - _written(self.runs.clean, self.layout, self.start)

    @cached_property
    def silent(self) -> dict[int, Tensor]:
        """``[batch pos d_model]`` for each number of writers: what is read where all edges from these are ablated, with biases.

        Added up from what they are ablated to, and not taken from a stream that held something else: under zero ablation what
        is left by rounding would be all that a norm without a bias has to scale up.
        """
        model, layout = self.runs.model, self.layout
        stream = self._of(0)
        found = {1: stream}
        for layer in range(layout.shape.n_layers):
            stream = stream + model.attention_passes(layer, self.head_sum(layer))
            found[layout.head_writers(layer).stop] = stream
            if not layout.shape.attn_only:
                stream = stream + self._of(layout.mlp_writer(layer))
                found[layout.mlp_writer(layer) + 1] = stream
        return found

    def head_sum(self, layer: int) -> Tensor:
        """``[batch pos d_model]``: what the ablated heads of a layer sum to with the bias, before a norm that they may pass."""
        total = self._of(self.layout.head_writers(layer)).sum(dim=1)
        bias = getattr(self.runs.model.block(layer).attn.o.original_component, "bias", None)
        return total if bias is None else total + bias.detach()

    def _of(self, writers: int | slice) -> Tensor:
        return rearrange(self.ablated[:, writers], "... (p m) -> ... p m", m=self.runs.model.cfg.d_model)

    def measure(self, answers: Tensor) -> Tensor:
        """The metric ``[circuit batch]`` of answer logits ``[circuit batch vocab]``."""
        return torch.stack([self.runs.measure(each) for each in answers])

    def answers(self, outside: Tensor, *, first: int = 0, grad: bool = False, kept: Mapping[int, Tensor] | None = None) -> Tensor:
        """Answer logits ``[circuit batch vocab]`` of several circuits as rows of one forward pass.

        Parameters
        ----------
        outside
            ``[circuit reader writer]``: how much of an edge is ablated, 1 for an edge outside of the circuit.
        first
            No reader of an earlier layer has anything ablated, so the pass may start there.
        grad
            Whether the answers are differentiable with respect to ``outside``.
        kept
            Which neurons each circuit keeps, ``[circuit neuron]``, of the layers of which one leaves some out.
        """
        return Pass(self, outside, first, grad, kept).run()

    def answers_at(self, outside: Tensor, index: Tensor, *, kept: Mapping[int, Tensor] | None = None) -> Tensor:
        """The same where edges are ablated at some spans alone.

        Parameters
        ----------
        outside
            ``[circuit span reader writer]``
        index
            ``[batch pos]``: the span of each token.
        kept
            As in `answers`.
        """
        return SpanPass(self, outside, index[:, self.start :], kept).run()


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
    readers = [layout.reader_at[edge.dst, edge.port] for edge in circuit.edges]
    mask[readers, [layout.writer_at[edge.src] for edge in circuit.edges]] = 0.0
    return mask


def outside_at(circuit: Circuit, layout: Layout, spans: Spans) -> Tensor:
    """``[span reader writer]``: 1 where the edge exists and is not in the circuit at this span.

    Raises
    ------
    TaskError
        A span of the circuit that the prompts do not have.
    """
    mask = outside_of(circuit, layout).expand(len(spans.names), -1, -1).clone()
    for edge, kept in circuit.spans.items():
        cut = torch.ones(len(spans.names))
        cut[[spans.place(name) for name in kept]] = 0.0
        mask[:, layout.reader_at[edge.dst, edge.port], layout.writer_at[edge.src]] = cut
    return mask


def kept_neurons(circuits: Sequence[Circuit], model: Model) -> dict[int, Tensor]:
    """``[circuit neuron]``, which neurons each circuit keeps, of the layers of which one leaves some out."""
    kept: dict[int, Tensor] = {}
    for row, circuit in enumerate(circuits):
        for mlp, neurons in circuit.neurons.items():
            layer = circuit.shape.parse(mlp).layer or 0
            own = kept.setdefault(layer, torch.ones(len(circuits), model.cfg.d_mlp, dtype=torch.bool, device=model.device))[row]
            own[:] = False
            own[list(neurons)] = True
    return dict(sorted(kept.items()))


def _sites(layers: Sequence[int]) -> Selection:
    return Selection(tuple(Site("mlp_post", layer) for layer in layers))


def _written(cache: Cache, layout: Layout, start: int) -> Tensor:
    """``[batch writer (pos d_model)]``: what each writer writes in one run, from position ``start``."""

    def heads(layer: int) -> Tensor:
        return torch.einsum("bphd,hdm->bphm", cache[Site("z", layer)][:, start:], cache.model.projection(layer, "o").weight)

    return layout.stacked(lambda site: cache[site][:, start:], heads)
