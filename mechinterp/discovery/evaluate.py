"""How good a circuit is: faithfulness on held-out prompts, with its interval, against circuits drawn by chance."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from mechinterp.core.ablation import Ablation, as_ablation
from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.core.resampling import draws
from mechinterp.discovery.faithfulness import check_difference, faithfulness, interval_of, mean_of_ratios
from mechinterp.discovery.further import look_further, told
from mechinterp.discovery.running import check_fits, run_circuits
from mechinterp.errors import MetricError
from mechinterp.graph import Circuit, check_circuit, check_everywhere, random_pairs
from mechinterp.graph.certificate import VERSION
from mechinterp.graph.nodes import counted
from mechinterp.patching.compare import MetricLike
from mechinterp.tasks import Task

__all__ = ["Report", "evaluate"]


# Below this an interval over prompts is shown with a warning.
_FEWEST = 5


@dataclass(frozen=True)
class Report:
    """How good a circuit is, in numbers. Made by `evaluate`.

    Faithfulness is (m(circuit) - m(empty)) / (m(clean) - m(empty)), a ratio of means over prompts, unclamped: below 0 and
    above 1 mean something (a circuit without the parts that work against the answer is above 1). ``empty`` is the metric with
    everything ablated: under "resample" the corrupt run's, under another ``ablation`` its own.

    ``random_faithfulness`` holds one number for each random circuit of equal size; ``random_interval`` is ``None`` where
    there are none. ``beats_random`` counts those whose faithfulness the circuit's exceeds by more than a thousandth.
    ``caveats`` are sentences on what these prompts cannot tell. ``kl`` is the mean KL of the circuit's answers from the model's.
    ``pairs`` counts the connected pairs of edge and span of a circuit that has spans, ``neurons`` the neurons that the connected
    MLPs of a circuit with neurons keep; None of others.
    ``further`` holds what ``thorough=True`` adds, ``task_provenance`` how the prompts can be made again.
    """

    task: str
    model: str
    metric: str
    prompts: int
    clean: float
    corrupt: float
    circuit: float
    faithfulness: float
    faithfulness_interval: tuple[float, float]
    mean_of_ratios: float
    random_faithfulness: tuple[float, ...]
    random_interval: tuple[float, float] | None
    beats_random: int
    model_accuracy: float
    circuit_accuracy: float
    edges: int
    connected: int
    all_edges: int
    nodes: int
    ablation: str
    seed: int
    forwards: int
    seconds: float
    empty: float
    confidence: float = 0.95
    caveats: tuple[str, ...] = ()
    kl: float | None = None
    resamples: int = 2000
    further: Mapping[str, Any] = field(default_factory=dict)
    pairs: int | None = None
    neurons: int | None = None
    task_provenance: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `Circuit.with_report` keeps it and `Circuit.certificate` reads it."""
        return dict(json.loads(json.dumps(asdict(self), default=str)))

    def __repr__(self) -> str:
        low, high = self.faithfulness_interval
        nothing = "" if self.ablation == "resample" else f", everything ablated {self.empty:.3f}"
        # Without a minus before zero, where rounding leaves less than nothing.
        away = "" if self.kl is None else f"; KL from the model {max(self.kl, 0.0):.3f}"
        return "\n".join(
            [
                f"Report: {self.task} on {self.model}, {self.prompts} prompts, {self.ablation} ablation",
                f"  {self.metric}: clean {self.clean:.3f}, corrupt {self.corrupt:.3f}{nothing}, circuit {self.circuit:.3f}",
                f"  faithfulness {self.faithfulness:.3f} ({self.confidence:.0%} interval {low:.3f} to {high:.3f}); "
                f"mean of ratios {self.mean_of_ratios:.3f}",
                f"  {self._chance()}",
                f"  accuracy: model {self.model_accuracy:.3f}, circuit {self.circuit_accuracy:.3f}{away}",
                f"  {self.size}",
                f"  {self.forwards} forward passes over the prompts, {self.seconds:.1f} s",
                *(f"  {line}" for line in told(self.further)),
                *(f"  caution: {caveat}" for caveat in self.caveats),
            ]
        )

    def _chance(self) -> str:
        n = len(self.random_faithfulness)
        if self.random_interval is None:
            return "no random circuits beside it"
        low, high = self.random_interval
        mean = f"mean {self.random_mean:.3f} ({low:.3f} to {high:.3f})"
        return f"{counted(n, 'random circuit')} of equal size: {mean}; beaten {self.beats_random}"

    @property
    def size(self) -> str:
        """How large the circuit is, in words."""
        pairs = "" if self.pairs is None else f"; {self.pairs} connected pairs of edge and span"
        neurons = "" if self.neurons is None else f"; {self.neurons} neurons in the place of whole MLPs"
        return f"{self.edges} edges, {self.connected} connected, of {self.all_edges}; {self.nodes} nodes{pairs}{neurons}"

    @property
    def random_mean(self) -> float:
        """Of the random circuits' faithfulness, to three decimals: what rounds to nothing has no sign. 0 where there are none."""
        return round(sum(self.random_faithfulness) / max(1, len(self.random_faithfulness)), 3) + 0.0

    def _repr_html_(self) -> str:
        # Imported here because it reads reports.
        from mechinterp.discovery.shown import html_of

        return html_of(self)


def evaluate(
    circuit: Circuit,
    model: Model,
    task: Task,
    *,
    seed: int,
    ablation: Ablation | str = "resample",
    random_circuits: int = 5,
    resamples: int = 2000,
    confidence: float = 0.95,
    thorough: bool = False,
    thorough_prompts: int = 16,
    scores: Effects | None = None,
    metric: MetricLike = None,
    progress: bool = False,
) -> Report:
    """Does the circuit do what the model does, and would any circuit of its size?

    Parameters
    ----------
    circuit, model
        What to judge, on what.
    task
        Prompts that were *not* used to find the circuit: the second part of ``task.split(seed=...)``.
    seed
        Of the random circuits and the bootstrap; and of the prompts that ``ablation="resample-shuffled"`` draws.
    ablation
        What edges outside of the circuit carry: an `Ablation` or its name, see `mechinterp.run_circuits`. A circuit is judged
        by the ablation that it was found with: under zeros or means, edges that carry the same in every prompt count too.
    random_circuits
        How many random circuits with the same number of connected edges, of kinds in about the same shares, to run beside it;
        of a circuit with spans also at as many pairs of edge and span. Beside a circuit with neurons, circuits of as many heads,
        and as many MLPs with as many neurons each, all drawn by chance, and all edges among them (`random_neurons`).
    resamples, confidence
        Bootstrap over prompts for the interval of faithfulness.
    thorough, thorough_prompts
        Also test completeness, minimality, other ablations and the hypotheses of an ideal circuit, as `mechinterp.completeness`,
        `mechinterp.minimality`, `mechinterp.compare_ablations` and `mechinterp.check_hypotheses` do with at most 50 edges, and
        how well the model does without the circuit. Of the prompts only the first so many are taken, since that is dear.
    scores
        Of all edges, on the prompts that found the circuit, as `mechinterp.attribute` gives them. ``thorough`` then adds the
        curve over all sizes (`mechinterp.size_curve`), and how much the circuit hangs on its prompts (`mechinterp.stability`).
    metric, progress
        As in `mechinterp.patch`.

    Returns
    -------
    Report
        Prints itself; ``to_json()``.

    Raises
    ------
    MetricError
        Ablating everything (under "resample": the corrupt prompts) gives the same metric as the clean prompts, so that
        faithfulness is undefined; ``thorough_prompts`` below 1; ``scores`` without ``thorough``.
    GraphError
        ``thorough`` of a circuit with spans or neurons; a neuron that the model does not have.

    Notes
    -----
    Cost: 3 forward passes over the prompts, and one for each random circuit; with another ablation than "resample" one more,
    and what the ablation costs. ``thorough`` adds some 200.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> report = mi.evaluate(toy.truth["resample"], toy.model, toy.task, seed=0)
    >>> round(report.faithfulness, 2)
    1.0
    """
    check_circuit(circuit)
    check_model_and_task(model, task)
    check_fits(circuit, model)
    if thorough_prompts < 1:
        raise MetricError(f"thorough_prompts={thorough_prompts}: give a number of prompts from 1 on; 16 are usual")
    if scores is not None and not thorough:
        raise MetricError("scores= are for the size curve and stability, which a thorough judgement has: pass thorough=True too")
    if thorough:
        check_everywhere(circuit, "thorough=True")
    started = time.perf_counter()
    width = model.cfg.d_mlp
    rivals = [random_pairs(circuit, seed=seed + i, d_mlp=width) for i in range(random_circuits)] if circuit.n_connected else []
    ablation = as_ablation(ablation, seed=seed)
    outs = run_circuits(model, task, [circuit, *rivals], ablation=ablation, metric=metric, also=("kl",), progress=progress)
    check_difference(outs, task)
    values = faithfulness(outs.circuits, outs.clean, outs.empty)
    ratios = (outs.circuits[0] - outs.empty) / (outs.clean - outs.empty)
    rows = draws(len(task), resamples=resamples, seed=seed)
    spread = faithfulness(outs.circuits[:, rows], outs.clean[rows], outs.empty[rows])
    interval = interval_of(spread[0], confidence)
    options: dict[str, Any] = {"ablation": ablation, "metric": metric, "progress": progress}
    few = task[:thorough_prompts] if thorough else task
    further, more = look_further(circuit, model, few, seed=seed, scores=scores, **options) if thorough else ({}, 0)
    return Report(
        task=task.name,
        model=model.name,
        metric=outs.metric,
        prompts=len(task),
        clean=float(outs.clean.mean()),
        corrupt=float(outs.corrupt.mean()),
        circuit=float(outs.circuits[0].mean()),
        faithfulness=float(values[0]),
        faithfulness_interval=interval,
        mean_of_ratios=mean_of_ratios(outs.circuits[0], outs.clean, outs.empty),
        random_faithfulness=tuple(values[1:].tolist()),
        random_interval=interval_of(spread[1:].flatten(), confidence) if rivals else None,
        # Two that carry nothing do not carry quite the same.
        beats_random=int((values[0] > values[1:] + 1e-3).sum()),
        model_accuracy=float(outs.accuracy[-1].mean()),
        circuit_accuracy=float(outs.accuracy[0].mean()),
        edges=len(circuit),
        connected=circuit.n_connected,
        all_edges=circuit.shape.n_edges,
        nodes=len(circuit.connected().nodes),
        ablation=outs.ablation,
        seed=seed,
        forwards=3 + len(rivals) + (outs.ablation != "resample") + more,
        seconds=round(time.perf_counter() - started, 1),
        empty=float(outs.empty.mean()),
        confidence=confidence,
        caveats=(*_overlap(circuit, task), *_caveats(outs.clean - outs.empty, ratios), *_nothing(circuit, interval)),
        kl=float(outs.also["kl"][0].mean()) if "kl" in outs.also else None,
        resamples=resamples,
        further=further,
        pairs=circuit.connected().n_pairs if circuit.spans else None,
        neurons=circuit.connected().n_neurons if circuit.neurons else None,
        task_provenance=dict(task.provenance),
    )


def _overlap(circuit: Circuit, task: Task) -> Iterator[str]:
    """Whether the circuit was found on these prompts, as far as the two provenances tell."""
    origin = dict(circuit.provenance.get("task_provenance") or {})
    here = json.loads(json.dumps(dict(task.provenance), default=str))
    parts = ("split", "split_seed", "split_held_out", "sample", "sample_seed")
    source, own = ({key: value for key, value in made.items() if key not in parts} for made in (origin, here))
    if source and source == own and (origin == here or "split" not in origin or "split" not in here):
        yield "the circuit was found on some or all of these prompts, which flatters it; judge it on held-out ones: task.split"


def _nothing(circuit: Circuit, interval: tuple[float, float]) -> Iterator[str]:
    """Whether the circuit carries no more than everything ablated, as far as these prompts tell; and what may be done."""
    low, high = interval
    if not circuit.n_connected:
        if len(circuit):
            yield "no edge lies on a path from the embedding to the logits: this is as good as the empty circuit"
    elif low <= 0:
        what = "cannot be told from everything ablated" if high >= 0 else "is worse than everything ablated"
        blocked = "an MLP that everything passes may keep too few neurons: leave it out of circuit.neurons, to keep it whole; or "
        yield f"the circuit {what}: {blocked if circuit.neurons else ''}keep more, or try another method"


def _caveats(gaps: Tensor, ratios: Tensor) -> Iterator[str]:
    """What these prompts cannot tell: from each one's difference between the whole model and everything ablated."""
    n = len(gaps)
    if n < _FEWEST:
        yield f"the interval is over {n} prompt{'s' * (n != 1)}, which is too few to mean much"
    error = float(gaps.float().std()) / n**0.5 if n > 1 else 0.0
    if abs(float(gaps.mean())) < 2 * error:
        yield (
            f"the model and everything ablated differ by {float(gaps.mean()):.3f}, less than twice its standard error "
            f"({error:.3f}): faithfulness divides by that"
        )
    undefined = int((~ratios.isfinite()).sum())
    if undefined:
        yield f"the mean of ratios leaves out {undefined} of {n} prompts, on which there is no difference to divide by"
