"""Running a circuit: every edge outside it carries the ablated value, in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.ablation import Ablation, as_ablation
from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.model import Model
from mechinterp.core.plan import progress_bar
from mechinterp.discovery.packing import Packing, kept_neurons, outside_at, outside_of
from mechinterp.errors import GraphError
from mechinterp.graph import Circuit, GraphShape, check_circuit
from mechinterp.patching.compare import MetricLike
from mechinterp.patching.neurons import check_neurons
from mechinterp.patching.readers import layout_of
from mechinterp.tasks import Metric, Task, accuracy, resolve_metric

__all__ = ["CircuitRuns", "check_fits", "run_circuits"]


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
    empty
        ``[batch]``: the metric with everything ablated (the empty circuit). Under "resample" that is ``corrupt``; under other
        ablations it is not, and faithfulness is measured from here.
    ablation
        What edges outside of the circuits carry: ``str`` of the `Ablation`.
    also
        ``[circuit batch]`` for the name of each further metric that was asked for.
    """

    metric: str
    clean: Tensor
    corrupt: Tensor
    circuits: Tensor
    accuracy: Tensor
    empty: Tensor
    ablation: str = "resample"
    also: Mapping[str, Tensor] = field(default_factory=dict)

    def provenance(self, model: Model, task: Task) -> dict[str, Any]:
        """What results that are made of these runs record of where they come from."""
        return {
            "model": model.name,
            "task": task.name,
            "prompts": len(task),
            "metric": self.metric,
            "ablation": self.ablation,
        }

    def __repr__(self) -> str:
        means = ", ".join(f"{value:.3f}" for value in self.circuits.mean(dim=1)[:8].tolist())
        nothing = (
            "" if self.ablation == "resample" else f"; {self.ablation} ablation of everything {float(self.empty.mean()):.3f}"
        )
        return (
            f"CircuitRuns: {self.metric}, clean {float(self.clean.mean()):.3f}, corrupt {float(self.corrupt.mean()):.3f}, "
            f"{len(self.circuits)} circuits {means}{nothing}"
        )


def check_fits(circuit: Circuit, model: Model) -> None:
    """Refuse what is no circuit of this model.

    Raises
    ------
    GraphError
        It has another shape, or neurons that the model does not have.
    """
    check_circuit(circuit)
    shape = GraphShape.of(model)
    if circuit.shape != shape:
        raise GraphError(f"{circuit!r} is a circuit of shape {circuit.shape}, but {model.name} has {shape}")
    for mlp, neurons in circuit.neurons.items():
        check_neurons(model, mlp, neurons)


def run_circuits(
    model: Model,
    task: Task,
    circuits: Circuit | Sequence[Circuit],
    *,
    ablation: Ablation | str = "resample",
    metric: MetricLike = None,
    also: Sequence[str | Metric] = (),
    memory: int | str | None = None,
    progress: bool = False,
) -> CircuitRuns:
    """What is left of the behaviour when everything outside each circuit is ablated?

    Every reader v reads in_v = sum of the current writers + sum over edges (u, v) outside the circuit of
    (ablated_u - current_u), where current_u is what u writes *in this run*; the norm is recomputed on that. Where the heads'
    sum passes a norm before it is added (Gemma 2), v hears that norm of the sum with the ablated heads put in. The full graph
    gives the clean run under every ablation. The empty one gives everything ablated: under "resample" the corrupt run, else
    the logits of the sum of all writers' ablated values (and of what no node writes, such as attention biases).

    Of an edge that a circuit holds at some spans alone, v hears ablated_u at the positions of all others. The position is that at
    which v reads, which is the one that u writes at: attention moves between positions inside of a head, not on its edges.

    An MLP of which a circuit keeps some neurons computes them from what it reads, as ever. Then those left out are ablated at all
    positions: the vector that its output projection reads (``mlp_post``) has in these coordinates the ablated value of that
    vector (under "resample" the corrupt run's). What the MLP writes, current_u, is what the projection, its bias and a norm
    after it make of this; on its edges outside the circuit ablated_u is that of the whole MLP. An MLP that keeps all of its
    neurons is the MLP; one that keeps none writes ablated_u under "resample".

    Parameters
    ----------
    circuits
        Circuits of this model's graph, or one.
    ablation
        What u's edges outside the circuit carry: an `Ablation`, or the name of one that draws nothing. A writer is a head, an
        MLP or the embedding (token and position together); the neurons of a layer are ablated as one. Means and fits are taken
        over the whole task, or over the ablation's own ``reference``.
    metric
        As in `mechinterp.patch`.
    also
        Further metrics to read from the same passes, such as ``("kl",)``.
    memory
        Bytes for what the writers write; more circuits or prompts are run in parts.

    Returns
    -------
    CircuitRuns
        Per circuit and example.

    Raises
    ------
    GraphError
        A circuit of another model's shape, or no circuit at all; a neuron that the model does not have.
    TaskError
        A span of a circuit that the prompts do not have, or prompts that have no common spans: see `mechinterp.tasks.Spans`.
    EditError
        As `Ablation`.

    Notes
    -----
    Cost: 2 forward passes for the two runs, and one for each circuit, packed as rows of few calls; with another ablation than
    "resample", one more for the empty circuit, and what the ablation costs.

    An edge on no path from the embedding to the logits does nothing under "resample". Under other ablations it does: its
    writer hears ablated values, and answers them.

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
    check_model_and_task(model, task)
    circuits = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    layout, ablation = layout_of(model), as_ablation(ablation, seed=None)
    if not circuits:
        raise GraphError("no circuits were given; pass a list such as [circuit, mi.Circuit.full(model)]")
    for circuit in circuits:
        check_fits(circuit, model)
    further = [resolve_metric(each, task) for each in also]
    task = task.to(model.device)
    paired = ablation.kind == "resample"
    # Where other values come from than the corrupt run, what is left with everything ablated is a run of its own.
    wanted = [*circuits] if paired else [*circuits, Circuit.empty(layout.shape)]
    # Circuits with spans, or with neurons, are rows of passes of their own: the others need no weights for each position, and
    # nothing done to their neurons.
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i, circuit in enumerate(wanted):
        kinds.setdefault((bool(circuit.spans), bool(circuit.neurons)), []).append(i)
    spans = task.spans if any(by_span for by_span, _ in kinds) else None
    layers = tuple(kept_neurons(wanted, model))
    packing = Packing.of(model, task, ablation, metric, memory, layers)
    # Stacked once, for all parts of the prompts.
    passes: list[tuple[Tensor, Tensor | None, dict[int, Tensor]]] = []
    for (by_span, _), members in kinds.items():
        for first in range(0, len(members), packing.at_once):
            some = [wanted[i] for i in members[first : first + packing.at_once]]
            masks = [outside_at(each, layout, spans) if by_span and spans else outside_of(each, layout) for each in some]
            index = spans.index if by_span and spans else None
            passes.append((torch.stack(masks).to(model.device), index, kept_neurons(some, model)))
    order = [i for members in kinds.values() for i in members]
    back = torch.tensor(order, device=model.device).argsort()
    found: list[list[Tensor]] = []
    beside: list[list[Tensor]] = []
    with progress_bar(len(wanted) * len(task), "run circuits", show=progress) as bar:
        for rows in packing.parts:
            pack = packing.pack(rows)
            runs, part = pack.runs, pack.runs.task
            logits = []
            for outside, index, kept in passes:
                logits.append(
                    pack.answers(outside, kept=kept) if index is None else pack.answers_at(outside, index[rows], kept=kept)
                )
                bar.update(len(outside) * len(part))
            answers = torch.cat(logits)[back] if len(kinds) > 1 else torch.cat(logits)
            right = [accuracy(each, part) for each in (*answers[: len(circuits)], runs.clean_logits)]
            some_answers = answers[: len(circuits)]
            beside.append([torch.stack([each(row, part, runs.clean_logits) for row in some_answers]) for each in further])
            found.append(
                [
                    runs.measure(runs.clean_logits)[None],
                    runs.measure(runs.corrupt_logits)[None],
                    pack.measure(answers),
                    torch.stack(right),
                ]
            )
    clean, corrupt_metric, values, accurate = (torch.cat(each, dim=1).cpu() for each in zip(*found, strict=True))
    empty = corrupt_metric[0] if paired else values[-1]
    told = {each.name: torch.cat(some, dim=1).cpu() for each, some in zip(further, zip(*beside, strict=True), strict=True)}
    return CircuitRuns(
        runs.metric.name, clean[0], corrupt_metric[0], values[: len(circuits)], accurate, empty, str(ablation), told
    )
