"""From a task to a circuit: score every edge, node or neuron, keep the best."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal

from mechinterp.core.ablation import Ablation
from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.discovery.choosing import SELECTIONS, Search, Unit, choose, edge_places, edge_scores
from mechinterp.discovery.methods import METHODS
from mechinterp.errors import GraphError, did_you_mean
from mechinterp.graph import Circuit
from mechinterp.graph.select import check_count, check_threshold
from mechinterp.patching.compare import Direction, MetricLike
from mechinterp.patching.gradients import check_gradient
from mechinterp.patching.neurons import neurons_of
from mechinterp.patching.scores import nodes_of
from mechinterp.tasks import METRICS, Metric, Task, resolve_metric

__all__ = [
    "METHODS",
    "SELECTIONS",
    "check_choices",
    "check_method",
    "discover",
    "edge_places",
    "edge_scores",
    "find",
    "score_again",
]


def check_choices(method: str, selection: str) -> None:
    """Refuse an unknown method or selection."""
    if method not in METHODS:
        raise GraphError(f"there is no method {method!r}. {did_you_mean(method, METHODS)}")
    if selection not in SELECTIONS:
        raise GraphError(f"there is no selection {selection!r}. {did_you_mean(selection, SELECTIONS)}")


def check_method(method: str, metric: Metric, *, steps: int = 5, direction: Direction = "noise") -> None:
    """Refuse a metric whose gradient says nothing to a method that takes gradients."""
    points = METHODS[method].points
    if points is not None:
        check_gradient(metric, direction, points(steps))


def _check(search: Search, method: str) -> None:
    """Refuse what cannot be searched, before anything runs."""
    check_choices(method, search.selection)
    if search.unit not in ("edge", "node", "neuron"):
        raise GraphError(f"unit={search.unit!r}: write 'edge', 'node' or 'neuron'")
    if search.unit not in METHODS[method].units:
        able = ", ".join(repr(name) for name, each in METHODS.items() if search.unit in each.units)
        raise GraphError(f"the method {method!r} works on edges alone; for unit={search.unit!r} there are {able}")
    if METHODS[method].drawn and search.seed is None:
        raise GraphError(f"the method {method!r} draws numbers; give it a seed, such as seed=0")
    if not METHODS[method].drawn and search.seed is not None:
        drawing = ", ".join(repr(name) for name, each in METHODS.items() if each.drawn)
        raise GraphError(
            f"the method {method!r} draws nothing, so that seed={search.seed} would change nothing; leave it out "
            f"(it goes with {drawing}; prompts have the seed of their task, an ablation its own: mi.Ablation(..., seed=...))"
        )
    if METHODS[method].noise_only and search.direction != "noise":
        raise GraphError(f"the method {method!r} starts from the clean run; leave out direction={search.direction!r}")
    if search.positions:
        _check_positions(search, method)
    check_method(method, resolve_metric(search.metric, search.task), steps=search.steps, direction=search.direction)
    sizes = {name: getattr(search, name) for name in ("edges", "nodes", "threshold") if getattr(search, name) is not None}
    if len(sizes) > 1:
        raise GraphError(
            f"{' and '.join(f'{name}={size}' for name, size in sizes.items())} are two ways to choose; give one of them"
        )
    if search.threshold is not None:
        check_threshold(search.threshold, signed=search.signed)
    if search.edges is not None and not search.positions:
        check_count(search.edges, search.shape.n_edges)
    if search.nodes is not None:
        if search.unit == "edge":
            raise GraphError(f"nodes={search.nodes} goes with unit='node' or 'neuron'; of edges, give edges= or threshold=")
        # All but the embedding.
        most = len((neurons_of if search.unit == "neuron" else nodes_of)(search.model).cells) - 1
        if isinstance(search.nodes, bool) or not 0 <= search.nodes <= most:
            kinds = "heads and MLPs" if search.unit == "node" else "heads and neurons"
            raise GraphError(f"nodes={search.nodes}: this model has {most} {kinds} to choose from; give 0 to {most}")


def _check_positions(search: Search, method: str) -> None:
    """Refuse what has no spans."""
    if search.unit != "edge":
        raise GraphError(
            f"positions=True chooses edges at spans of the prompts; leave out unit={search.unit!r}, or positions=True"
        )
    if not METHODS[method].spans:
        able = ", ".join(repr(name) for name, each in METHODS.items() if each.spans)
        raise GraphError(f"the method {method!r} scores edges at all positions together; for positions=True there are {able}")
    n = search.shape.n_edges * len(search.task.spans.filled)
    if search.edges is not None and (
        not isinstance(search.edges, int) or isinstance(search.edges, bool) or not 0 <= search.edges <= n
    ):
        raise GraphError(
            f"edges={search.edges}: with positions=True these are pairs of an edge and a span, of which there are {n}; "
            f"give 0 to {n}"
        )


def discover(
    model: Model,
    task: Task,
    *,
    method: str = "eap-ig",
    unit: Unit = "edge",
    edges: int | None = None,
    nodes: int | None = None,
    threshold: float | None = None,
    selection: Literal["connected", "top", "greedy"] = "connected",
    signed: bool = False,
    steps: int = 5,
    ablation: Ablation | str = "resample",
    metric: MetricLike = None,
    direction: Direction = "noise",
    seed: int | None = None,
    positions: bool = False,
    memory: int | str | None = None,
    progress: bool = False,
) -> Circuit:
    """Which circuit carries this behaviour?

    Parameters
    ----------
    model, task
        What to explain.
    method
        A key of `METHODS`, which says of each what it does and costs. Gradient estimates: ``"eap"``, ``"eap-ig"``,
        ``"eap-ig-activations"``, ``"clean-corrupt"``, ``"relp"``, ``"atp-star"``. Exact effects: ``"exact"``, or
        ``"screen-verify"``, which measures the best estimates. Removal one after another: ``"acdc"``. Gates learnt together:
        ``"mask"``. Shares of what is read, without another prompt: ``"flow"``. With ``"acdc"`` a threshold is that of
        `mechinterp.acdc`, ``selection`` means nothing, and of the circuits at several thresholds the one nearest to ``edges`` is
        taken, which may have more or fewer; with ``"mask"`` a score is the chance of an open gate, with ``"flow"``
        a share.
    unit
        ``"edge"``: edges are scored and chosen. ``"node"``: heads and MLPs are, and the circuit is all edges among those
        chosen, the embedding and the logits, without scores of their own. ``"neuron"``: heads and single neurons of MLPs are, in
        one ranking (by what changing z of the head, or ``mlp_post`` of the neuron, does), and the circuit is all edges among the
        heads, the MLPs of a neuron chosen, the embedding and the logits; its ``neurons`` are those chosen, with their scores.
    edges
        How many edges to keep (default 200); with ``unit="node"`` or ``"neuron"`` the best are taken while the edges among them
        are at most that many. Or
    nodes
        how many heads and MLPs to keep, with ``unit="node"``; or heads and neurons, with ``unit="neuron"``. Or
    threshold
        keep all whose score is at least this (normalised: 1 is the whole difference between clean and corrupt). Below 0 only
        with ``signed=True``, since no absolute value is.
    selection
        ``"connected"``: the best edges until that many lie on paths from the embedding to the logits.
        ``"top"``: the best edges, dangling ones included. ``"greedy"``: grown backwards from the logits.
    signed
        Rank by value: only edges that help the answer. Default: by absolute value, so that components that work
        against it are part of the circuit. A signed circuit without them often beats the whole model.
    steps
        Points of the path, where a method takes one.
    seed
        Of methods that draw (``"mask"``); to the others none is given.
    positions
        True: edges are scored and chosen at each span of the prompts for itself (``task.spans``: what the names in
        ``task.positions`` cut them into), and ``edges`` counts pairs of an edge and a span. A pair is connected when its edge
        lies on a path from the embedding to the logits through edges of the circuit, each at any span: attention moves between
        positions. Of an edge the position is that at which it is read, which is the one it is written at. For the estimates and
        ``"exact"``, which then takes a run for each pair.
    ablation, metric, direction, memory, progress
        As in `mechinterp.attribute`.

    Returns
    -------
    Circuit
        With the score of each edge, and in its provenance the task, method, selection, seed, versions and cost.
        ``provenance["selection"]`` says how edges were chosen: ``rule``, ``signed``, ``n`` (how many were asked for) or
        ``threshold``, and for ``"connected"`` how many of the best-ranked edges were ``taken`` until n of them connect; with
        ``unit="node"`` or ``"neuron"`` the ``nodes`` taken best first, and ``node_scores``. With
        ``positions=True`` the circuit has ``spans``, and ``provenance["spans"]`` names those that there were.

    Raises
    ------
    GraphError
        An unknown method, unit or selection; two ways to choose, or an impossible number; a unit, or positions, that the method
        cannot score, or neurons of a mixture of experts; no seed where numbers are drawn, or one where none are.
    TaskError
        ``positions=True`` where the names come in different orders: see `mechinterp.tasks.Spans`.
    MetricError
        A metric without a gradient. These are checked before anything runs.

    Notes
    -----
    Cost: of ``eap`` 2 forward passes and 1 backward pass, of ``eap-ig`` 2 and ``steps`` of both; `METHODS` says that of the
    others, and ``forwards`` in the provenance what it was. Judge the result on prompts that were not used to find it:
    ``found_on, held_out = task.split(seed=0)``, `mechinterp.evaluate`.

    References
    ----------
    Syed et al. 2023 (2310.10348); Hanna et al. 2024 (2403.17806); for the others see the functions that do them. Positions:
    Haklay et al. 2025 (2502.04577), whose edges between positions, inside of attention, are edges of heads here.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> circuit = mi.discover(toy.model, toy.task, edges=len(toy.truth["resample"]))
    >>> circuit.iou(toy.truth["resample"])
    1.0
    """
    check_model_and_task(model, task)
    search = Search(
        model=model,
        task=task,
        unit=unit,
        edges=edges,
        nodes=nodes,
        threshold=threshold,
        selection=selection,
        signed=signed,
        steps=steps,
        ablation=ablation,
        metric=metric,
        direction=direction,
        seed=seed,
        positions=positions,
        memory=memory,
        progress=progress,
    )
    return find(search, method)[0]


def find(search: Search, method: str) -> tuple[Circuit, Effects | None]:
    """What `discover` gives, and the scores of all edges or nodes where the method has them."""
    _check(search, method)
    started = time.perf_counter()
    found = METHODS[method].find(search)
    provenance: dict[str, Any] = dict(found.provenance)
    ablated = provenance["ablation"]
    provenance |= {
        "estimator": provenance["method"],
        "method": method,
        "ablation": "resample (the corrupt prompt of each pair)" if ablated == "resample" else ablated,
        "backwards": provenance.get("backwards", 0),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if isinstance(found, Circuit):
        return replace(found, provenance=provenance), None
    return choose(search, found, provenance | {"unit": search.unit, "baseline": dict(found.baseline)}), found


def score_again(circuit: Circuit, model: Model, task: Task, *, progress: bool = False) -> Effects | None:
    """The scores of all edges that a circuit was chosen by, as its provenance tells; None where it does not.

    Parameters
    ----------
    circuit
        From `discover`.
    model, task
        What it was found on.
    """
    origin = circuit.provenance
    method, metric = str(origin.get("method")), origin.get("metric")
    told = (
        not circuit.spans
        and not circuit.neurons
        and origin.get("unit") == "edge"
        and str(origin.get("ablation")).startswith("resample (")
        and metric in METRICS
    )
    if method not in METHODS or METHODS[method].points is None or METHODS[method].drawn or not told:
        return None
    steps, direction = max(1, len(origin.get("points", ()))), origin.get("direction", "noise")
    found = METHODS[method].find(
        Search(model=model, task=task, steps=steps, metric=metric, direction=direction, progress=progress)
    )
    return found if isinstance(found, Effects) else None
