"""The two runs that every method compares, measured once: who receives, who is the other, what is one unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from mechinterp.core.ablation import Ablation, as_ablation
from mechinterp.core.answers import answer_logits
from mechinterp.core.edits import Edit
from mechinterp.core.effects import versions
from mechinterp.core.hooks import HookRegistry
from mechinterp.core.model import Model
from mechinterp.core.plan import Cell, Plan, plan_cells, sweep
from mechinterp.core.replay import Recording, record, why_not_exact
from mechinterp.core.run import Cache
from mechinterp.core.select import Selection, select
from mechinterp.core.sites import Site
from mechinterp.errors import MetricError
from mechinterp.tasks import Metric, Task, resolve_metric

__all__ = ["Comparison", "Direction", "MetricLike", "Tape", "ablated_values", "compare_runs", "growing", "plan_runs", "unit_of"]

Direction = Literal["denoise", "noise"]
MetricLike = str | Metric | Callable[[Tensor, Task], Tensor] | None


@dataclass(frozen=True, eq=False)
class Tape:
    """The receiving run with its graph: a leaf added at each site, and the answer logits. Good for one backward pass."""

    leaves: Mapping[Site, Tensor]
    logits: Tensor


@dataclass(frozen=True, eq=False)
class Comparison:
    """Clean and corrupt run of a task on a model, with the activations that were asked for.

    ``receiver`` is the run that is changed, ``other`` the one that values come from:
    ``"denoise"`` moves clean values into the corrupt run, ``"noise"`` corrupt values into the clean run.

    The corrupt run is that of the corrupt prompts, or of the clean prompts with the values of ``corruption`` put in.
    """

    model: Model
    task: Task
    metric: Metric
    direction: Direction
    clean: Cache
    corrupt: Cache
    clean_logits: Tensor
    corrupt_logits: Tensor
    corruption: tuple[tuple[Site, Tensor], ...] = ()
    ablation: str = "resample"
    recording: Recording | None = None
    tape: Tape | None = None

    @property
    def tokens(self) -> Tensor:
        """Tokens of the receiving run, ``[batch pos]``."""
        return self.task.corrupt if self.direction == "denoise" and not self.corruption else self.task.clean

    @property
    def base(self) -> tuple[tuple[Site, Tensor], ...]:
        """What is put into the receiving run beside its tokens."""
        return self.corruption if self.direction == "denoise" else ()

    @property
    def start(self) -> int:
        """The first position that has to be computed: the two runs can differ there, or an answer is read before they do."""
        if self.corruption or self.ablation != "resample":
            return 0
        return min(int(self.task.first_difference.min()), int(self.task.answer_pos.min()))

    @property
    def receiver(self) -> Cache:
        return self.corrupt if self.direction == "denoise" else self.clean

    @property
    def other(self) -> Cache:
        return self.clean if self.direction == "denoise" else self.corrupt

    def measure(self, logits: Tensor) -> Tensor:
        """The metric per example ``[batch]`` of answer logits ``[batch vocab]``."""
        return self.metric(logits, self.task, self.clean_logits if self.metric.needs_reference else None)

    @cached_property
    def _answers(self) -> tuple[Task, Tensor]:
        return self.task.answers()

    @property
    def vocabulary(self) -> Tensor | None:
        """The tokens whose logits the metric reads; ``None`` for all."""
        return self._answers[1] if self.metric.answers_only else None

    def measure_cells(self, logits: Tensor) -> Tensor:
        """The metric ``[cell batch]`` of answer logits ``[cell batch vocab]``, of the tokens of `vocabulary`."""
        if not self.metric.answers_only:
            return torch.stack([self.measure(each) for each in logits])
        cells, batch = logits.shape[:2]
        task = self._answers[0]
        return self.metric(logits.flatten(0, 1), task[list(range(batch)) * cells]).reshape(cells, batch)

    def plan(self, cells: Sequence[Sequence[Site]], memory: int | str | None) -> Plan:
        """How counterfactual runs that change these sites of the receiving run will be computed."""
        return plan_runs(self.model, self.task, cells, start=self.start, metric=self.metric, memory=memory)

    def sweep(
        self, plan: Plan, cells: Sequence[Cell], *, label: str = "patching", progress: bool = False
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Which of the cells, and their metric ``[cell batch]``, as they are measured. Cells that change nothing are left out."""
        results = sweep(
            plan,
            self.model,
            self.tokens,
            cells,
            read=self.task.answer_pos,
            vocabulary=self.vocabulary,
            positions=self.task.positions,
            base=self.base,
            recording=self.recording,
            label=label,
            progress=progress,
        )
        for members, logits in results:
            yield members, self.measure_cells(logits)

    @property
    def baseline(self) -> dict[str, float]:
        """Mean metric of the two runs."""
        return {
            "clean": float(self.measure(self.clean_logits).mean()),
            "corrupt": float(self.measure(self.corrupt_logits).mean()),
        }

    def received(self) -> Tensor:
        """The metric of the receiving run, ``[batch]``."""
        return self.measure(self.corrupt_logits if self.direction == "denoise" else self.clean_logits)

    def unit(self, normalize: bool) -> float:
        """What one unit of an effect is worth, see `unit_of`; 1 without ``normalize``."""
        return unit_of(self.baseline, self.direction, metric=self.metric, task=self.task) if normalize else 1.0

    def provenance(self, **more: Any) -> dict[str, Any]:
        """What results record of where they come from."""
        return {
            "model": self.model.name,
            "task": self.task.name,
            "prompts": len(self.task),
            "metric": self.metric.name,
            "direction": self.direction,
            "ablation": self.ablation,
            **more,
            "task_provenance": dict(self.task.provenance),
            "versions": versions(),
        }


def plan_runs(
    model: Model, task: Task, cells: Sequence[Sequence[Site]], *, start: int, metric: Metric, memory: int | str | None
) -> Plan:
    """How counterfactual runs that change these sites from position ``start`` on will be computed."""
    batch, length = task.clean.shape
    vocabulary = task.answers()[1] if metric.answers_only else None
    return plan_cells(model, batch, length, cells, start=start, read=task.answer_pos, vocabulary=vocabulary, memory=memory)


def unit_of(baseline: Mapping[str, float], direction: Direction, *, metric: Metric, task: Task) -> float:
    """The mean metric of the other run minus the receiving run's: one unit of a normalised effect.

    One number for all prompts, a ratio of means. A ratio for each prompt would be ruled by the prompts on which clean
    and corrupt happen to be close.
    """
    clean, corrupt = baseline["clean"], baseline["corrupt"]
    gap = clean - corrupt if direction == "denoise" else corrupt - clean
    if abs(gap) < 1e-6:
        raise MetricError(
            f"{metric.name} is {clean:.4g} on the clean and {corrupt:.4g} on the corrupt prompts of task {task.name!r}: "
            "there is no difference to explain. Use other corrupt prompts, another metric, or normalize=False"
        )
    return gap


def compare_runs(
    model: Model,
    task: Task,
    selection: Selection,
    *,
    metric: MetricLike = None,
    direction: Direction = "denoise",
    corruption: Sequence[Edit] = (),
    ablated: tuple[str, Cache] | None = None,
    cells: Iterable[Site] = (),
    taped: Selection | None = None,
) -> Comparison:
    """Run both prompts of a task once and keep the selected activations. Cost: 2 forward passes.

    With ``taped`` the receiving run is made with a graph, for the gradients at these whole sites.

    ``cells`` are sites that will be changed in the receiving run: what replays of that need is kept too, where they are exact.

    With ``ablated``, the name of an ablation and its values, these stand in place of the corrupt run's activations; see
    `ablated_values`. The corrupt run's logits stay what one unit is measured by.

    With ``corruption`` the corrupt run is that of the clean prompts with these edits. What they made of their sites is
    kept, so that every later run gets the very same values, however its rows are packed.
    """
    from transformers import DynamicCache

    if direction not in ("denoise", "noise"):
        raise MetricError(
            f"direction={direction!r}: write 'denoise' (clean activations into the corrupt run) "
            "or 'noise' (corrupt activations into the clean run)"
        )
    task = task.to(model.device)
    corrupted = Selection(tuple(dict.fromkeys(site.whole for edit in corruption for site in select(edit.at, model.cfg))))
    caches, answers = [], []
    recording = tape = None
    replayed = [site for site in cells if site.kind.per_layer]
    if replayed and why_not_exact(model):
        replayed = []
    for tokens, edits, receives in (
        (task.clean, (), direction == "noise"),
        (task.clean if corruption else task.corrupt, corruption, direction == "denoise"),
    ):
        kept: dict[Site, Tensor] = {}
        registry = HookRegistry(model, task.positions)
        for edit in edits:
            registry.add(edit)
        registry.capture(selection | corrupted if edits else selection, kept)
        if receives and taped is not None:
            leaves: dict[Site, Tensor] = {}
            for site in taped:
                registry.transform(site, growing(leaves, site))
            with torch.enable_grad(), registry:
                logits = answer_logits(model, tokens, task.answer_pos)
            tape = Tape(leaves, logits)
            answers.append(logits.detach())
        elif receives and replayed:
            recording = record(registry, tokens, replayed, task.answer_pos)
            answers.append(recording.logits)
        else:
            with torch.no_grad(), registry:
                # With a cache as well where the other run has one: the same prompts give the same bits.
                answers.append(answer_logits(model, tokens, task.answer_pos, cache=DynamicCache() if replayed else None))
        caches.append(Cache(model, selection, kept, task.positions))
    return Comparison(
        model=model,
        task=task,
        metric=resolve_metric(metric, task),
        direction=direction,
        clean=caches[0],
        corrupt=caches[1] if ablated is None else ablated[1],
        clean_logits=answers[0],
        corrupt_logits=answers[1],
        corruption=tuple((site, kept[site]) for site in corrupted),
        ablation="resample" if ablated is None else ablated[0],
        recording=recording,
        tape=tape,
    )


def growing(leaves: dict[Site, Tensor], site: Site) -> Callable[[Tensor], Tensor]:
    """Adds a fresh leaf at a site, which sees what flows through the site and not around it (no skip connection)."""

    def act(value: Tensor) -> Tensor:
        leaves[site] = torch.zeros_like(value, requires_grad=True)
        return value + leaves[site]

    return act


def ablated_values(
    ablation: Ablation | str, model: Model, task: Task, selection: Selection, direction: Direction
) -> Callable[[slice], tuple[str, Cache] | None]:
    """For some rows of the task, what `compare_runs` takes as ``ablated``: nothing under "resample", which is the corrupt run.

    Raises
    ------
    MetricError
        The direction is not "noise": only into the clean run can ablated values be put.
    """
    ablation = as_ablation(ablation, seed=None)
    if ablation.kind == "resample":
        return lambda rows: None
    if direction != "noise":
        raise MetricError(
            f"the values of the ablation {ablation.kind!r} are put into the clean run, so direction={direction!r} means nothing; "
            "write direction='noise'"
        )
    source = ablation.source(model, task.to(model.device), selection)
    return lambda rows: (str(ablation), source(rows))
