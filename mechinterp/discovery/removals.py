"""What taking parts away says of a circuit: is it complete, and is every edge of it needed?"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from mechinterp.core.ablation import Ablation, as_ablation
from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.discovery.faithfulness import check_difference, faithfulness
from mechinterp.discovery.running import CircuitRuns, run_circuits
from mechinterp.errors import GraphError, did_you_mean
from mechinterp.graph import Circuit, Edge, check_circuit
from mechinterp.graph.nodes import counted
from mechinterp.patching.compare import MetricLike
from mechinterp.tasks import Task

__all__ = ["Completeness", "Removal", "completeness", "minimality"]

UNITS = ("edge", "node")
_SHOWN = 4


@dataclass(frozen=True)
class Removal:
    """One subset K: what is left of the behaviour without it, in the circuit and in the whole model.

    ``parts`` are names of edges or nodes; ``how`` is ``"nothing"``, ``"random"`` or ``"greedy"``; ``circuit`` is F(C minus K)
    and ``model`` F(M minus K), as shares of the whole difference.
    """

    parts: tuple[str, ...]
    how: str
    circuit: float
    model: float

    @property
    def gap(self) -> float:
        """abs(F(C minus K) - F(M minus K))."""
        return abs(self.circuit - self.model)


@dataclass(frozen=True)
class Completeness:
    """Does the model rely on anything that the circuit lacks? Made by `completeness`.

    If it does not, circuit and model lose the same when the same parts are taken from both.
    """

    removals: tuple[Removal, ...]
    unit: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> Removal:
        """The subset on which circuit and model differ most."""
        return max(self.removals, key=lambda removal: removal.gap)

    def mean(self, how: str = "random") -> float:
        """The mean gap over the subsets of one kind; nan where there are none."""
        gaps = [removal.gap for removal in self.removals if removal.how == how]
        return sum(gaps) / len(gaps) if gaps else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = [{"parts": list(r.parts), "how": r.how, "circuit": r.circuit, "model": r.model} for r in self.removals]
        return dict(json.loads(json.dumps({"unit": self.unit, "removals": rows, **self.provenance})))

    def __repr__(self) -> str:
        worst, n = self.worst, sum(removal.how == "random" for removal in self.removals)
        names = ", ".join(worst.parts[:_SHOWN]) + (", ..." if len(worst.parts) > _SHOWN else "")
        lines = [f"Completeness: incompleteness |F(C minus K) - F(M minus K)| over sets K of {self.unit}s of the circuit"]
        lines.append(
            f"  nothing removed {self.mean('nothing'):.3f}" + (f"; mean of {n} random sets {self.mean():.3f}" if n else "")
        )
        lines.append(
            f"  worst {worst.gap:.3f}: circuit {worst.circuit:.3f}, model {worst.model:.3f} without "
            f"{counted(len(worst.parts), self.unit)} ({worst.how}){': ' + names if names else ''}"
        )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def completeness(
    circuit: Circuit,
    model: Model,
    task: Task,
    *,
    seed: int,
    unit: Literal["edge", "node"] = "node",
    subsets: int = 10,
    share: float = 0.5,
    greedy: int = 1,
    steps: int = 5,
    candidates: int = 5,
    ablation: Ablation | str = "resample",
    metric: MetricLike = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> Completeness:
    """Does anything outside of the circuit do what its parts do?

    The incompleteness of a subset K of the circuit C is abs(F(C minus K) - F(M minus K)), where M is the whole model and F the
    share of the behaviour that is left: a backup outside of C shows where M does well without K and C does not.

    Parameters
    ----------
    circuit, model, task
        As in `mechinterp.evaluate`.
    seed
        Of the subsets, and of what the ablation draws.
    unit
        What is taken away: nodes with all their edges (heads, KV heads and MLPs; the embedding and the logits stay), or edges.
    subsets, share
        How many random subsets; each part is in one with this chance.
    greedy, steps, candidates
        How many greedy searches for a bad subset: in each step the one of so many parts drawn by chance joins K that makes the
        incompleteness largest.
    ablation, metric, memory, progress
        As in `mechinterp.run_circuits`.

    Raises
    ------
    GraphError
        A circuit without such parts; an unknown unit; a share outside of [0, 1].
    MetricError
        As `mechinterp.evaluate`.

    Notes
    -----
    Cost: 2 + 2 (1 + subsets) forward passes over the prompts, and for each greedy search (2 + 2 candidates) for each step; under
    another ablation than "resample" one more each time, with everything ablated.

    References
    ----------
    Wang et al. 2022 (2211.00593), section 4. Greedy searches there take the worst of several; here each is its own entry.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> found = mi.completeness(toy.truth["resample"], toy.model, toy.task, seed=0, subsets=4)
    >>> round(found.worst.gap, 3)
    0.0
    """
    check_circuit(circuit)
    check_model_and_task(model, task)
    if unit not in UNITS:
        raise GraphError(f"there is no unit {unit!r}. {did_you_mean(unit, UNITS)}")
    if not 0 <= share <= 1:
        raise GraphError(f"share={share}: give a number between 0 and 1, the chance of each part to be taken away")
    live = circuit.connected()
    parts = [str(edge) for edge in live] if unit == "edge" else [name for name in live.nodes if name not in ("embed", "logits")]
    if not parts:
        raise GraphError(f"{circuit!r} has no connected {unit} to take away")
    full, generator = Circuit.full(circuit.shape), random.Random(seed)
    ablation = as_ablation(ablation, seed=seed)
    n_runs = 0

    def measured(removed: Sequence[Sequence[str]], how: str) -> list[Removal]:
        nonlocal n_runs
        rows = [each for names in removed for each in (_without(circuit, names, unit), _without(full, names, unit))]
        outs = run_circuits(model, task, rows, ablation=ablation, metric=metric, memory=memory, progress=progress)
        check_difference(outs, task)
        n_runs += 2 + len(rows) + (outs.ablation != "resample")
        shares = faithfulness(outs.circuits, outs.clean, outs.empty).tolist()
        return [Removal(tuple(names), how, *shares[2 * i : 2 * i + 2]) for i, names in enumerate(removed)]

    drawn = [[name for name in parts if generator.random() < share] for _ in range(subsets)]
    nothing, *found = measured([[], *drawn], "random")
    removals = [Removal((), "nothing", nothing.circuit, nothing.model), *found]
    for _ in range(greedy):
        taken: list[str] = []
        best: Removal | None = None
        for _ in range(min(steps, len(parts))):
            rest = [name for name in parts if name not in taken]
            some = generator.sample(rest, min(candidates, len(rest)))
            step = max(measured([[*taken, name] for name in some], "greedy"), key=lambda removal: removal.gap)
            taken = list(step.parts)
            best = step if best is None or step.gap > best.gap else best
        if best is not None:
            removals.append(best)
    said = {"model": model.name, "task": task.name, "prompts": len(task), "ablation": str(ablation), "seed": seed}
    return Completeness(tuple(removals), unit, said | {"forwards": n_runs})


def minimality(
    circuit: Circuit,
    model: Model,
    task: Task,
    *,
    sample: int | None = None,
    seed: int | None = None,
    ablation: Ablation | str = "resample",
    metric: MetricLike = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> Effects:
    """Is every edge of the circuit needed? The drop of faithfulness from taking each away, alone.

    F(C) - F(C minus e), as a share of the difference between the model and everything ablated: near 0 the circuit does as well
    without the edge, below 0 better.

    Parameters
    ----------
    circuit, model, task
        As in `mechinterp.evaluate`. Edges that dangle are not measured.
    sample, seed
        Measure so many edges, drawn by ``seed``, instead of all.
    ablation, metric, memory, progress
        As in `mechinterp.run_circuits`.

    Returns
    -------
    Effects
        Over edges, with a number for each prompt: ``.top()``, ``.interval(seed=...)``, ``.p_values(...)``, ``.to_frame()``.

    Raises
    ------
    GraphError
        No connected edge; a sample without a seed.
    MetricError
        As `mechinterp.evaluate`.

    Notes
    -----
    Cost: 3 forward passes over the prompts and one for each edge, as rows of few calls.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> drops = mi.minimality(toy.truth["resample"], toy.model, toy.task)
    >>> bool((drops.values > 0.1).all())
    True
    """
    check_circuit(circuit)
    check_model_and_task(model, task)
    edges = drawn_edges(circuit, sample, seed=seed)
    if not edges:
        raise GraphError(f"{circuit!r} has no connected edge to take away")
    ablation = as_ablation(ablation, seed=seed)
    outs = knocked_out(circuit, edges, model, task, ablation=ablation, metric=metric, memory=memory, progress=progress)
    return drops_of(outs, edges, model, task)


def drawn_edges(circuit: Circuit, sample: int | None, *, seed: int | None) -> list[Edge]:
    """The connected edges, or so many of them drawn by chance, in their order."""
    edges = list(circuit.connected())
    if sample is None or sample >= len(edges):
        return edges
    if seed is None:
        raise GraphError(f"sample={sample} of {len(edges)} edges are drawn by chance: give a seed, minimality(..., seed=0)")
    place = {edge: i for i, edge in enumerate(edges)}
    return sorted(random.Random(seed).sample(edges, max(1, sample)), key=place.__getitem__)


def drops_of(outs: CircuitRuns, edges: Sequence[Edge], model: Model, task: Task) -> Effects:
    """What `minimality` gives, from the runs of `knocked_out`."""
    check_difference(outs, task)
    gap = (outs.clean - outs.empty).mean()
    return Effects(
        "drop of faithfulness without the edge",
        ("edge",),
        {"edge": tuple(tuple(edge) for edge in edges)},
        (outs.circuits[0] - outs.circuits[1:]) / gap,
        {"clean": float(outs.clean.mean()), "corrupt": float(outs.corrupt.mean())},
        {
            **outs.provenance(model, task),
            "normalized": True,
            "faithfulness": float(faithfulness(outs.circuits[0], outs.clean, outs.empty)),
            "forwards": 3 + len(edges) + (outs.ablation != "resample"),
        },
    )


def knocked_out(circuit: Circuit, edges: Sequence[Edge], model: Model, task: Task, **options: Any) -> CircuitRuns:
    """The circuit, and then without each of these edges, as rows of few forward passes."""
    less = [_without(circuit, [str(edge)], "edge") for edge in edges]
    return run_circuits(model, task, [circuit, *less], **options)


def _without(circuit: Circuit, names: Sequence[str], unit: str) -> Circuit:
    """The circuit without these edges, or without all edges of these nodes."""
    gone = set(names)
    if unit == "edge":
        kept = [edge for edge in circuit.edges if str(edge) not in gone]
    else:
        kept = [edge for edge in circuit.edges if edge.src not in gone and edge.dst not in gone]
    return circuit.only(kept)
