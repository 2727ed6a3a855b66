"""What a search was asked for, and the circuit that scores of edges or nodes come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from mechinterp.core.ablation import Ablation
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.errors import GraphError
from mechinterp.graph import (
    Circuit,
    Edge,
    GraphShape,
    best_pairs,
    connected_edges,
    greedy_edges,
    threshold_edges,
    top_edges,
)
from mechinterp.graph.graph import edges_among
from mechinterp.graph.neurons import nodes_of, parse_neuron
from mechinterp.patching.compare import Direction, MetricLike
from mechinterp.tasks import Task

__all__ = ["SELECTIONS", "Search", "choose", "edge_places", "edge_scores", "node_scores"]

SELECTIONS: Mapping[str, Callable[..., Circuit]] = MappingProxyType(
    {"connected": connected_edges, "top": top_edges, "greedy": greedy_edges}
)
Unit = Literal["edge", "node", "neuron"]


@dataclass(frozen=True, eq=False)
class Search:
    """The question that `mechinterp.discover` was asked, as methods read it. Fields as its parameters."""

    model: Model
    task: Task
    unit: Unit = "edge"
    edges: int | None = None
    nodes: int | None = None
    threshold: float | None = None
    selection: str = "connected"
    signed: bool = False
    steps: int = 5
    ablation: Ablation | str = "resample"
    metric: MetricLike = None
    direction: Direction = "noise"
    seed: int | None = None
    positions: bool = False
    memory: int | str | None = None
    progress: bool = False

    @property
    def shape(self) -> GraphShape:
        return GraphShape.of(self.model)

    @property
    def wanted(self) -> int:
        """How many edges are asked for, where no threshold is."""
        return min(200, self.shape.n_edges) if self.edges is None else self.edges

    @property
    def over(self) -> tuple[Literal["span"]] | None:
        """What scores of edges are split by."""
        return ("span",) if self.positions else None

    @property
    def what(self) -> dict[str, Any]:
        """What estimates and exact effects are told alike."""
        names = ("ablation", "metric", "direction", "memory", "progress")
        return {name: getattr(self, name) for name in names}


def edge_scores(effects: Effects) -> dict[Edge, float]:
    """The score of every edge from ``mi.attribute(..., unit="edge")``."""
    values = effects.values
    return {edge: float(values[i]) for edge, i in edge_places(effects).items()}


def edge_places(effects: Effects) -> dict[Edge, int]:
    """Where each edge is among effects over edges."""
    if not isinstance(effects, Effects):
        raise GraphError(f"the scores are a {type(effects).__name__}; edges come from mi.attribute(model, task, unit='edge')")
    if effects.axes != ("edge",):
        raise GraphError(f"these effects are over {effects.axes}; edges come from mi.attribute(model, task, unit='edge')")
    return {Edge(*label): i for i, label in enumerate(effects.coords["edge"])}  # type: ignore[misc]


def node_scores(effects: Effects) -> dict[str, float]:
    """The score of every node, or neuron, from ``mi.attribute(..., unit="node")``, or ``"neuron"``."""
    if effects.axes != ("node",):
        raise GraphError(f"these effects are over {effects.axes}; nodes come from mi.attribute(model, task, unit='node')")
    return {str(node): value for node, value in effects.as_dict().items()}


def choose(search: Search, effects: Effects, provenance: Mapping[str, Any]) -> Circuit:
    """The circuit of the best edges, or of all edges among the best nodes or neurons."""
    if search.unit != "edge":
        return _of_nodes(search, node_scores(effects), provenance)
    if search.positions:
        return _of_pairs(search, effects, provenance)
    scores = edge_scores(effects)
    if search.threshold is not None:
        return threshold_edges(search.shape, scores, search.threshold, signed=search.signed, provenance=provenance)
    return SELECTIONS[search.selection](search.shape, scores, search.wanted, signed=search.signed, provenance=provenance)


def _of_pairs(search: Search, effects: Effects, provenance: Mapping[str, Any]) -> Circuit:
    # A span without a token in any prompt carries nothing, and is no choice.
    filled = search.task.spans.filled
    columns = [effects.coords["span"].index(span) for span in filled]
    rows = effects.values[:, columns].tolist()
    scores = {Edge(*edge): dict(zip(filled, row, strict=True)) for edge, row in zip(effects.coords["edge"], rows, strict=True)}  # type: ignore[misc]
    return best_pairs(
        search.shape,
        scores,
        n=search.edges,
        threshold=search.threshold,
        rule=search.selection,  # type: ignore[arg-type]
        signed=search.signed,
        provenance={**provenance, "spans": list(filled)},
    )


def _of_nodes(search: Search, scores: Mapping[str, float], provenance: Mapping[str, Any]) -> Circuit:
    size: Callable[[float], float] = float if search.signed else abs
    ranked = sorted((node for node in scores if node != "embed"), key=lambda node: -size(scores[node]))
    said: dict[str, Any] = {"rule": "edges among nodes", "signed": search.signed}
    if search.threshold is not None:
        taken = [node for node in ranked if size(scores[node]) >= search.threshold]
        said["threshold"] = float(search.threshold)
    elif search.nodes is not None:
        taken = ranked[: search.nodes]
        said["n_nodes"] = search.nodes
    else:
        # Edges among nodes only grow with the nodes, so bisection is right.
        low, high = 0, len(ranked)
        while low < high:
            middle = (low + high + 1) // 2
            if len(edges_among(search.shape, nodes_of(ranked[:middle]))) <= search.wanted:
                low = middle
            else:
                high = middle - 1
        taken = ranked[:low]
        said["n"] = search.wanted
    said |= {"nodes": taken, "node_scores": {node: scores[node] for node in taken}}
    edges = dict.fromkeys(edges_among(search.shape, nodes_of(taken)))
    neurons: dict[str, dict[int, float | None]] = {}
    for name in taken:
        if (found := parse_neuron(name)) is not None:
            neurons.setdefault(found[0], {})[found[1]] = scores[name]
    return Circuit(search.shape, edges, {**provenance, "selection": said}, neurons=neurons)
