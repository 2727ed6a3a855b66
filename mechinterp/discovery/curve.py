"""Faithfulness over circuit size: the curve, its two areas (CPR and CMD), and its picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mechinterp.core.ablation import Ablation
from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.core.resampling import draws
from mechinterp.discovery.faithfulness import check_difference, faithfulness, interval_of, mean_of_ratios
from mechinterp.discovery.measuring import metric_of, scores_of
from mechinterp.discovery.running import run_circuits
from mechinterp.errors import GraphError, did_you_mean, missing_extra
from mechinterp.graph import Circuit, GraphShape, connected_edges, greedy_edges, top_edges
from mechinterp.patching.compare import MetricLike
from mechinterp.tasks import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MIB_FRACTIONS", "SizeCurve", "points_of", "size_curve"]

MIB_FRACTIONS: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of all edges at which the Mechanistic Interpretability Benchmark reads the curve."""

_RULES: Mapping[str, Callable[..., Circuit]] = {"top": top_edges, "greedy": greedy_edges, "connected": connected_edges}


@dataclass(frozen=True, eq=False)
class SizeCurve:
    """How much of the behaviour do circuits of growing size carry? Made by `size_curve`.

    Parameters
    ----------
    fractions
        ``[point]``: the share of all edges that was asked for at each point.
    asked, connected
        ``[point]``: edges asked for, and those of them on a path from the embedding to the logits, which are run.
    all_edges
        Of the whole graph.
    circuits, clean, empty
        The metric per prompt: ``[point batch]``, and ``[batch]`` of the whole model and with everything ablated.
    accuracy
        ``[point]``: the share of prompts on which the right answer beats the wrong one.
    provenance
        Model, task, metric, ablation, how edges were chosen, where the scores came from, cost.
    """

    fractions: tuple[float, ...]
    asked: tuple[int, ...]
    connected: tuple[int, ...]
    all_edges: int
    circuits: Tensor
    clean: Tensor
    empty: Tensor
    accuracy: tuple[float, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def faithfulness(self) -> Tensor:
        """``[point]``: ratio of means, unclamped."""
        return faithfulness(self.circuits, self.clean, self.empty)

    @property
    def mean_of_ratios(self) -> Tensor:
        """``[point]``: the mean over prompts of each one's own ratio, of those that have one."""
        return torch.tensor([mean_of_ratios(each, self.clean, self.empty) for each in self.circuits])

    def area(self, axis: Literal["asked", "connected"] = "asked") -> tuple[float, float]:
        """CPR and CMD: the areas under f and between f and 1 over the share of edges, by the trapezoid rule.

        Over ``"asked"``, from the first share that was asked for to the last: what MIB computes, which counts edges that
        dangle. Over ``"connected"`` shares are of the edges that are really run, and the curve begins at no edges, where f is 0.
        A curve that ends before the whole graph has the areas up to there: see `complete`.
        """
        values = self.faithfulness.double().tolist()
        if axis == "asked":
            return _trapezoid(self.fractions, values), _trapezoid(self.fractions, [abs(1 - f) for f in values])
        if axis != "connected":
            raise GraphError(f"there is no axis {axis!r} of sizes. {did_you_mean(axis, ('asked', 'connected'))}")
        ordered = sorted(zip([n / self.all_edges for n in self.connected], values, strict=True), key=lambda point: point[0])
        places, values = [0.0, *(x for x, _ in ordered)], [0.0, *(f for _, f in ordered)]
        return _trapezoid(places, values), _trapezoid(places, [abs(1 - f) for f in values])

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: the area under f; higher is better."""
        return self.area()[0]

    @property
    def cmd(self) -> float:
        """Circuit-model distance: the area between f and 1; 0 is best."""
        return self.area()[1]

    @property
    def complete(self) -> bool:
        """Whether the curve reaches the whole graph, without which areas of different curves cannot be compared."""
        return self.asked[-1] == self.all_edges

    def interval(self, *, seed: int, confidence: float = 0.95, resamples: int = 2000) -> tuple[Tensor, Tensor]:
        """``[point]`` lower and upper end of faithfulness: bootstrap over prompts."""
        rows = draws(len(self.clean), resamples=resamples, seed=seed)
        spread = faithfulness(self.circuits[:, rows], self.clean[rows], self.empty[rows])
        low, high = zip(*(interval_of(each, confidence) for each in spread), strict=True)
        return torch.tensor(low), torch.tensor(high)

    def to_json(self) -> dict[str, Any]:
        """Plain data: the points and the areas. ``None`` where a number is undefined."""
        on_connected = self.area("connected")
        said = {
            "fractions": list(self.fractions),
            "asked": list(self.asked),
            "connected": list(self.connected),
            "all_edges": self.all_edges,
            "faithfulness": [_plain(f) for f in self.faithfulness.tolist()],
            "mean_of_ratios": [_plain(f) for f in self.mean_of_ratios.tolist()],
            "accuracy": list(self.accuracy),
            "cpr": self.cpr,
            "cmd": self.cmd,
            "cpr_connected": on_connected[0],
            "cmd_connected": on_connected[1],
            "complete": self.complete,
            "provenance": dict(self.provenance),
        }
        return dict(json.loads(json.dumps(said, default=str)))

    def plot(self) -> Figure:
        """Faithfulness over connected edges, with its bootstrap interval; the lines at 1 and 0 are the model and nothing."""
        try:
            from matplotlib.figure import Figure as MplFigure
        except ImportError:
            raise missing_extra("a plot", "matplotlib", "draw") from None
        figure = MplFigure(figsize=(5.8, 3.8), layout="constrained")
        axes = figure.add_subplot()
        # No edge at all has no place on a logarithmic axis.
        shown = [i for i, n in enumerate(self.connected) if n]
        sizes, values = [self.connected[i] for i in shown], self.faithfulness.tolist()
        low, high = (ends.tolist() for ends in self.interval(seed=0))
        axes.fill_between(sizes, [low[i] for i in shown], [high[i] for i in shown], color="#2166ac", alpha=0.2, linewidth=0)
        axes.plot(sizes, [values[i] for i in shown], color="#2166ac", marker="o", markersize=4)
        for level in (0.0, 1.0):
            axes.axhline(level, color="#999999", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.set_xlabel(f"connected edges of {self.all_edges}")
        axes.set_ylabel("faithfulness")
        until = "" if self.complete else f", up to {self.fractions[-1]:.3g} of the edges"
        axes.set_title(f"{self._title()}\nCPR {self.cpr:.3f}, CMD {self.cmd:.3f}{until}", fontsize=9)
        return figure

    def _title(self) -> str:
        origin = self.provenance
        return f"{origin['task']} on {origin['model']}, {len(self.clean)} prompts, {origin['ablation']} ablation"

    def __repr__(self) -> str:
        on_connected = self.area("connected")
        until = "" if self.complete else f"; up to {self.fractions[-1]:.3g} of the edges, so not comparable with whole curves"
        points = points_of(self.connected, self.faithfulness.tolist())
        return "\n".join(
            [
                f"SizeCurve: {self._title()}",
                f"  CPR {self.cpr:.3f}, CMD {self.cmd:.3f} over edges asked for ({self.provenance['selection']}){until}",
                f"  CPR {on_connected[0]:.3f}, CMD {on_connected[1]:.3f} over connected edges",
                f"  faithfulness by connected edges of {self.all_edges}: {points}",
            ]
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{fraction:.3g}</td><td>{asked}</td><td>{connected}</td><td>{f:.3f}</td><td>{right:.3f}</td></tr>"
            for fraction, asked, connected, f, right in zip(
                self.fractions, self.asked, self.connected, self.faithfulness.tolist(), self.accuracy, strict=True
            )
        )
        head = "<tr><th>share</th><th>asked</th><th>connected</th><th>faithfulness</th><th>accuracy</th></tr>"
        return f"<pre>{escape(repr(self))}</pre><table>{head}{rows}</table>"


def size_curve(
    scores: Effects | Circuit,
    model: Model,
    task: Task,
    *,
    fractions: Sequence[float] | None = None,
    edges: Sequence[int] | None = None,
    selection: Literal["top", "greedy", "connected"] = "top",
    signed: bool = False,
    ablation: Ablation | str = "resample",
    metric: MetricLike = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> SizeCurve:
    """How faithful are circuits of every size that these scores give?

    f(k) = (m(circuit of k edges) - m(empty)) / (m(clean) - m(empty)); CPR is the integral of f, CMD that of abs(1 - f), over the
    share of edges k / edges, by the trapezoid rule.

    Parameters
    ----------
    scores
        ``mi.attribute(model, task, unit="edge")`` or any `Effects` over edges; or a `Circuit` with scores.
    model, task
        What to run. Prompts that did not make the scores tell how good these are.
    fractions
        Shares of all edges: int(share * edges) are taken. Default: `MIB_FRACTIONS`; of a circuit those that its edges reach,
        and all of its edges. Or
    edges
        numbers of edges.
    selection
        ``"top"``: the best-scored edges; those that dangle are dropped and still counted (as MIB does). ``"greedy"``: grown
        from the logits. ``"connected"``: the number asked for is that of connected edges.
    signed
        Rank by value instead of absolute value.
    ablation, metric, memory, progress
        As in `mechinterp.run_circuits`; the default metric is that of the scores.

    Returns
    -------
    SizeCurve
        Prints itself, ``.plot()``, ``.cpr``, ``.cmd``, ``.area("connected")``.

    Raises
    ------
    GraphError
        No scores; sizes that are not increasing, or beyond the edges that have a score; both ways of giving sizes.
    MetricError
        Nothing to be faithful to: the metric is the same with everything ablated.

    Notes
    -----
    Cost: 2 forward passes over the prompts and one for each size. The count of edges is that of this package's graph: MIB gives
    every query head its own keys and values, so that on grouped-query models its shares are of more edges.

    References
    ----------
    Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark" (2504.13151).

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> scores = mi.attribute(toy.model, toy.task, unit="edge", steps=5)
    >>> curve = mi.size_curve(scores, toy.model, toy.task, edges=[0, 5, 257])
    >>> curve.connected, [round(f, 2) for f in curve.faithfulness.tolist()]
    ((0, 5, 257), [0.0, 1.0, 1.0])
    """
    check_model_and_task(model, task)
    known, shape = scores_of(scores), GraphShape.of(model)
    if selection not in _RULES:
        raise GraphError(f"there is no selection {selection!r}. {did_you_mean(selection, _RULES)}")
    shares, sizes = _sizes(fractions, edges, len(known), shape.n_edges)
    rule = metric_of(scores.provenance, metric, task)
    chosen = [_RULES[selection](shape, known, n, signed=signed).connected() for n in sizes]
    outs = run_circuits(model, task, chosen, ablation=ablation, metric=rule, memory=memory, progress=progress)
    check_difference(outs, task)
    origin = scores.provenance
    return SizeCurve(
        fractions=shares,
        asked=sizes,
        connected=tuple(each.n_connected for each in chosen),
        all_edges=shape.n_edges,
        circuits=outs.circuits,
        clean=outs.clean,
        empty=outs.empty,
        accuracy=tuple(outs.accuracy[:-1].mean(dim=1).tolist()),
        provenance={
            **outs.provenance(model, task),
            "selection": selection + (", signed" if signed else ""),
            "estimator": origin.get("estimator", origin.get("method", "scores")),
            "scores": dict(origin),
            "task_provenance": dict(task.provenance),
            "forwards": 2 + len(sizes) + (outs.ablation != "resample"),
        },
    )


def _sizes(
    fractions: Sequence[float] | None, edges: Sequence[int] | None, scored: int, everything: int
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Shares of all edges, and numbers of edges."""
    if fractions is not None and edges is not None:
        raise GraphError("fractions= and edges= are two ways to give sizes; give one of them")
    if edges is not None:
        sizes = tuple(edges)
        shares = tuple(n / everything for n in sizes)
    else:
        shares = MIB_FRACTIONS if fractions is None else tuple(fractions)
        part = fractions is None and scored < everything
        if part:
            shares = tuple(share for share in shares if int(share * everything) < scored)
        sizes = tuple(int(share * everything) for share in shares)
        if part:
            shares, sizes = (*shares, scored / everything), (*sizes, scored)
    if not shares or list(shares) != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise GraphError(f"sizes {list(sizes)} of {everything} edges: give one or more, increasing, between none and all of them")
    if sizes[-1] > scored:
        raise GraphError(
            f"{sizes[-1]} edges were asked for, and only {scored} of {everything} have a score; ask for fewer, or give the "
            "scores of all edges: mi.attribute(model, task, unit='edge')"
        )
    return shares, sizes


def points_of(connected: Sequence[int], faithfulness: Sequence[float]) -> str:
    """Faithfulness at each number of connected edges, in a line; several shares may come to the same edges, above all to none."""
    return ", ".join(f"{n}: {f:.3f}" for n, f in dict(zip(connected, faithfulness, strict=True)).items())


def _trapezoid(places: Sequence[float], values: Sequence[float]) -> float:
    return sum((places[i + 1] - places[i]) * (values[i] + values[i + 1]) / 2 for i in range(len(places) - 1))


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
