"""Measuring a sample of the edges that were scored: how far can the estimate be trusted?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.discovery.agreement import Agreement
from mechinterp.discovery.discover import edge_places, edge_scores
from mechinterp.errors import GraphError, MetricError
from mechinterp.graph import Circuit, Edge, GraphShape, check_everywhere, edges_called, scored_edges
from mechinterp.graph.nodes import counted
from mechinterp.patching.compare import Direction, MetricLike
from mechinterp.patching.edges import edge_effects
from mechinterp.tasks import METRICS, Metric, Task, resolve_metric

__all__ = ["compare_to_exact", "metric_of", "scores_of"]


def compare_to_exact(
    scores: Effects | Circuit,
    model: Model,
    task: Task,
    *,
    seed: int,
    sample: int | None = 200,
    edges: str | Circuit | Iterable[Edge | tuple[str, str, str]] | None = None,
    exact: Effects | None = None,
    top: Sequence[int] = (10, 100),
    metric: MetricLike = None,
    direction: Direction | None = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> Agreement:
    """How far do estimated edge scores agree with exact edge effects?

    Some of the edges are measured by `mechinterp.edge_effects`, and beside each stands its estimate.

    Parameters
    ----------
    scores
        ``mi.attribute(model, task, unit="edge")``, any `Effects` over edges, or a `Circuit` with scores.
    model, task
        What the scores are of. Other prompts than those of the estimate tell how far it carries over.
    seed
        Of the sample.
    sample
        How many edges to measure; ``None`` for all. The first half are those of largest |estimate|. The other edges, by
        |estimate|, are cut into as many strata of equal size as there are edges left to draw, and one is drawn from each.
    edges
        Measure these instead of a sample: edges, a circuit, or patterns as for `mechinterp.edge_effects`.
    exact
        Exact effects that there are already, of `mechinterp.edge_effects` on the same prompts: nothing is run. With them,
        ``edges`` and the sample are taken from the edges that they have.
    top
        The k whose overlap is told. Those that are not below the number of edges compared are left out.
    metric, direction
        By default those of the scores, and where they do not say, the task's metric and ``"noise"``. Effects are normalised
        where the scores are.
    memory, progress
        As in `mechinterp.edge_effects`.

    Returns
    -------
    Agreement
        Correlations, signs, overlap, error by magnitude, and which edges are saturated or cancelling.

    Raises
    ------
    GraphError
        The scores are not over edges, are missing, or have edges that this model's graph does not have.
    MetricError
        ``sample`` or ``top`` below 1; or the scores are of a metric of your own, which has to be given again; or the effects in
        ``exact`` are of another metric, direction or number of prompts, or normalised where the scores are not.

    Notes
    -----
    Cost: that of `mechinterp.edge_effects` on the edges measured. Half of the sample was chosen for large estimates, so no
    number here is that of all edges: it is harder on what matters, and blind to large effects that the draw misses.

    References
    ----------
    Syed et al. 2023 (2310.10348) and Hanna et al. 2024 (2403.17806) compare whole circuits; Kramar et al. 2024 (2403.00745)
    name saturation and cancellation as the two ways in which gradients fail.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> scores = mi.attribute(toy.model, toy.task, unit="edge", steps=5)
    >>> agreement = mi.compare_to_exact(scores, toy.model, toy.task, sample=40, seed=0)
    >>> agreement.sign_agreement
    1.0
    """
    check_model_and_task(model, task)
    for what, number in [("sample", sample), *(("top", k) for k in top)]:
        if number is not None and number < 1:
            raise MetricError(f"{what}={number}: give a number of edges from 1 on" + ", or None for all" * (what == "sample"))
    known = scores_of(scores)
    foreign = set(known) - set(scored_edges(GraphShape.of(model)))
    origin = scores.provenance
    if foreign:
        raise GraphError(
            f"{min(map(str, foreign))} has a score, and the graph of {model.name} has no such edge: these are scores of another "
            f"model{_named(origin)}"
        )
    rule = metric_of(origin, metric, task)
    said: Direction = direction or origin.get("direction", "noise")
    normalized = bool(origin.get("normalized", True))
    if exact is not None:
        place = _places(exact, {"metric": rule.name, "direction": said, "normalized": normalized, "prompts": len(task)})
        there = {edge: score for edge, score in known.items() if edge in place}
    else:
        there = known
    measured, chosen = _drawn(there, sample, seed) if edges is None else _asked(there, edges)
    if exact is None:
        exact = edge_effects(
            model, task, measured, metric=rule, direction=said, normalize=normalized, memory=memory, progress=progress
        )
    else:
        wanted = set(measured)
        rows = [i for edge, i in place.items() if edge in wanted]
        labels = tuple(exact.coords["edge"][i] for i in rows)
        exact = replace(exact, coords={"edge": labels}, per_example=exact.per_example[rows])
    ordered = tuple(Edge(*edge) for edge in exact.coords["edge"])  # type: ignore[misc]
    parts = None
    if isinstance(scores, Effects):
        place = edge_places(scores)
        parts = scores.per_example[[place[edge] for edge in ordered]].float().cpu()
    clean, corrupt = exact.baseline["clean"], exact.baseline["corrupt"]
    unit = abs(clean - corrupt) if normalized else 1.0
    return Agreement(
        edges=ordered,
        estimate=torch.tensor([known[edge] for edge in ordered]),
        exact=exact,
        chosen=chosen,
        scored=len(known),
        top=tuple(k for k in top if k < len(ordered)),
        rounding=100 * torch.finfo(model.dtype).eps * max(1.0, abs(clean), abs(corrupt)) / unit,
        parts=parts,
        provenance={key: exact.provenance[key] for key in ("model", "task", "prompts", "metric", "direction", "forwards")}
        | {"estimator": origin.get("estimator", origin.get("method", "scores")), "seed": seed, "scores": dict(origin)},
    )


def _places(exact: Effects, wanted: Mapping[str, Any]) -> dict[Edge, int]:
    """Where each edge is among exact effects, which have to be of what the scores are of."""
    for name, value in wanted.items():
        if exact.provenance.get(name) != value:
            raise MetricError(
                f"exact= was measured with {name} {exact.provenance.get(name)!r}, and the comparison needs {value!r}; "
                "measure again with mi.edge_effects, or leave exact= out"
            )
    return edge_places(exact)


def scores_of(scores: Effects | Circuit) -> dict[Edge, float]:
    """The score of each edge that has one."""
    if isinstance(scores, Effects):
        known = edge_scores(scores)
    else:
        check_everywhere(scores, "A ranking of edges")
        known = {edge: score for edge, score in scores.scores.items() if score is not None}
        if not known:
            raise GraphError(f"{scores!r} has no scores to compare; mi.discover and mi.attribute(unit='edge') give them")
    undefined = [edge for edge, score in known.items() if not math.isfinite(score)]
    if undefined:
        raise GraphError(f"the score of {undefined[0]} is {known[undefined[0]]}; scores have to be finite numbers")
    return known


def _named(origin: Mapping[str, Any]) -> str:
    return f" ({origin['model']})" if origin.get("model") else ""


def metric_of(origin: Mapping[str, Any], metric: MetricLike, task: Task) -> Metric:
    """The metric asked for, or else the one that the scores are of."""
    rule, name = resolve_metric(metric, task), origin.get("metric")
    if metric is not None or name in (None, rule.name):
        return rule
    if name not in METRICS:
        raise MetricError(f"the scores are of the metric {name!r}, which has no name here: pass it as metric=")
    return resolve_metric(name, task)


def _asked(known: Mapping[Edge, float], edges: str | Circuit | Iterable[Edge | tuple[str, str, str]]) -> tuple[list[Edge], str]:
    """The edges given by the caller, all of which must have a score."""
    if isinstance(edges, str):
        found, idle = edges_called(edges, known)
        if idle:
            example = str(next(iter(known)))
            raise GraphError(
                f"no edge with a score is called {idle[0]!r}; edges are written like {example!r}, with * for any part"
            )
    else:
        found = [Edge(*edge) for edge in edges]
        lacking = [edge for edge in found if edge not in known]
        if lacking or not found:
            what = f"{lacking[0]} has no score" if lacking else "no edges were given"
            raise GraphError(f"{what}; {counted(len(known), 'edge')} have one, such as {next(iter(known))}")
    return found, f"{counted(len(set(found)), 'edge')} that were asked for"


def _drawn(known: Mapping[Edge, float], sample: int | None, seed: int) -> tuple[list[Edge], str]:
    """Half of the sample from the top, the other half one from each of as many equal strata of the rest."""
    ordered = sorted(known, key=lambda edge: -abs(known[edge]))
    if sample is None or sample >= len(ordered):
        return ordered, "all of them"
    first = (sample + 1) // 2
    rest, n = ordered[first:], sample - first
    generator = torch.Generator().manual_seed(seed)
    bounds = [len(rest) * i // max(1, n) for i in range(n + 1)]
    drawn = [rest[int(torch.randint(a, b, (1,), generator=generator))] for a, b in pairwise(bounds)]
    others = f", and {n} of the rest, one from each of {n} strata by |estimate| (seed {seed})" if n else ""
    return ordered[:first] + drawn, f"the {first} of largest |estimate|{others}"
