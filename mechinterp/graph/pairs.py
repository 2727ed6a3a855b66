"""From scores of edges at spans of the prompts to circuits whose edges carry at some spans alone; and random ones like them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from mechinterp.errors import GraphError, did_you_mean
from mechinterp.graph.circuit import Circuit
from mechinterp.graph.connect import best_connected
from mechinterp.graph.graph import edges_among, index_of
from mechinterp.graph.nodes import Edge, GraphShape
from mechinterp.graph.select import check_threshold, edge_class, grown, random_edges, size_of

__all__ = ["best_pairs", "random_neurons", "random_pairs"]

_RULES = ("connected", "top", "greedy")


def best_pairs(
    model: object,
    scores: Mapping[Edge, Mapping[str, float]],
    *,
    n: int | None = None,
    threshold: float | None = None,
    rule: Literal["connected", "top", "greedy"] = "connected",
    signed: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Circuit:
    """Which pairs of an edge and a span have the largest scores?

    A pair is connected when its edge lies on a path from embed to logits through edges of the circuit, each of them at any span:
    attention moves between positions, so that a path may change its span at every head.

    Parameters
    ----------
    model
        A loaded model, a config, or a `GraphShape`.
    scores
        A finite score for each edge and span.
    n, threshold
        How many pairs to keep, or all whose score is at least this.
    rule, signed, provenance
        As `connected_edges`, `top_edges` and `greedy_edges`, with pairs in the place of edges.

    Returns
    -------
    Circuit
        With the scores of its pairs; the score of an edge is their sum.

    Raises
    ------
    GraphError
        There are fewer than n pairs; an unknown rule; a threshold below 0 without ``signed``.

    Examples
    --------
    >>> shape = GraphShape(n_layers=1, n_heads=1)
    >>> scores = {Edge("embed", "m0", "in"): {"S": 0.1, "end": 2.0}, Edge("m0", "logits", "in"): {"S": 0.0, "end": -3.0}}
    >>> circuit = best_pairs(shape, scores, n=2)
    >>> circuit
    Circuit: 2 edges (2 connected) of 8, 2 pairs of edge and span, 3 nodes
    >>> dict(circuit.spans[Edge("m0", "logits", "in")])
    {'end': -3.0}
    """
    if rule not in _RULES:
        raise GraphError(f"There is no rule {rule!r}. {did_you_mean(rule, _RULES)}")
    index, size = index_of(GraphShape.of(model)), size_of(signed)
    edges = sorted(zip(index.positions(scores), scores.values(), strict=True), key=lambda each: each[0])
    pairs = [(i, span, score) for i, spans in edges for span, score in spans.items()]
    ranked = sorted(range(len(pairs)), key=lambda pair: (-size(pairs[pair][2]), pair))
    # The graph in which each pair is an edge of its own.
    parallel = replace(
        index,
        edges=(),
        position={},
        src=tuple(index.src[i] for i, _, _ in pairs),
        dst=tuple(index.dst[i] for i, _, _ in pairs),
    )
    said: dict[str, Any] = {"rule": rule, "signed": signed, "unit": "pairs of edge and span"}
    if threshold is not None:
        check_threshold(threshold, signed=signed)
        keep = [pair for pair in ranked if size(pairs[pair][2]) >= threshold]
        said |= {"rule": "threshold", "threshold": float(threshold)}
    else:
        n = min(200, len(pairs)) if n is None else n
        if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= len(pairs):
            raise GraphError(f"n={n!r} pairs of an edge and a span: {len(pairs)} have a score. Give 0 to {len(pairs)}.")
        said["n"] = n
        if rule == "connected":
            said["taken"], keep = best_connected(parallel, ranked, n)
        else:
            keep = ranked[:n] if rule == "top" else grown(parallel, ranked, n)
    spans: dict[Edge, dict[str, float]] = {}
    for pair in sorted(keep):
        i, span, score = pairs[pair]
        spans.setdefault(index.edges[i], {})[span] = score
    totals = {edge: sum(each.values()) for edge, each in spans.items()}
    return Circuit(index.shape, totals, {**(provenance or {}), "selection": said}, spans=spans)


def random_neurons(like: Circuit, *, seed: int, d_mlp: int) -> Circuit:
    """What would a circuit of so many heads and so many neurons be worth if they were chosen by chance?

    As many heads and MLPs as in the connected part of ``like`` are drawn, each as likely as any other of its kind. Every MLP
    takes the number of neurons of one of those of ``like`` (or all, as that one does), drawn from all of its own. The edges are
    all those among them; where ``like`` lacks some of its own, as large a share of them, drawn by chance.

    Parameters
    ----------
    like
        The circuit to match.
    seed
        Of the random generator, which is the function's own.
    d_mlp
        How many neurons an MLP has.

    Returns
    -------
    Circuit
        Without scores.

    Examples
    --------
    >>> shape = GraphShape(n_layers=4, n_heads=4)
    >>> like = Circuit.from_edges(shape, edges_among(shape, {"a1.h0", "m2"})).with_neurons(["m2.n3", "m2.n5"])
    >>> random_neurons(like, seed=0, d_mlp=8).n_neurons
    2
    """
    generator, live, shape = random.Random(seed), like.connected(), like.shape
    kinds = {kind: [name for name in live.nodes if shape.parse(name).kind == kind] for kind in ("head", "mlp")}
    drawn = {
        kind: generator.sample([name for name in shape.nodes if shape.parse(name).kind == kind], len(names))
        for kind, names in kinds.items()
    }
    counts = [len(live.neurons[mlp]) if mlp in live.neurons else None for mlp in kinds["mlp"]]
    neurons = {
        mlp: dict.fromkeys(sorted(generator.sample(range(d_mlp), n)))
        for mlp, n in zip(drawn["mlp"], counts, strict=True)
        if n is not None
    }
    edges = edges_among(shape, [*drawn["head"], *drawn["mlp"]])
    share = len(live) / max(1, len(edges_among(shape, live.nodes)))
    if share < 1:
        edges = tuple(generator.sample(edges, round(share * len(edges))))
    ends = {end for edge in edges for end in edge[:2]}
    provenance = {"method": "random", "selection": {"rule": "random", "match": "nodes and neurons", "seed": seed}}
    return Circuit(shape, dict.fromkeys(edges), provenance, neurons={mlp: n for mlp, n in neurons.items() if mlp in ends})


def random_pairs(like: Circuit, *, seed: int, d_mlp: int | None = None) -> Circuit:
    """What would a circuit of so many edges at so many spans be worth if the edges were chosen by chance?

    Edges as `random_edges` draws them; of a circuit with neurons as `random_neurons` does, which takes ``d_mlp``. Each takes the
    spans of one of the connected edges of ``like``, drawn by chance from those of its kind, so that there are as many pairs at
    each span, but for the few edges that are of another kind.
    """
    live = like.connected()
    if live.neurons and d_mlp is None:
        raise GraphError("this circuit keeps some neurons of MLPs; say how many there are to draw from: d_mlp=model.cfg.d_mlp")
    drawn = random_neurons(like, seed=seed, d_mlp=d_mlp or 0) if live.neurons else random_edges(like, seed=seed)
    if not live.spans:
        return drawn
    generator = random.Random(seed)
    waiting: dict[tuple[str, ...], list[Edge]] = {}
    for edge in generator.sample(live.edges, len(live)):
        waiting.setdefault(edge_class(edge), []).append(edge)
    # First those that find one of their kind, then the others take what is left.
    model_of = {edge: waiting[edge_class(edge)].pop() for edge in drawn if waiting.get(edge_class(edge))}
    left = [edge for edges in waiting.values() for edge in edges]
    for edge in drawn:
        if edge not in model_of:
            model_of[edge] = left.pop() if left else generator.choice(live.edges)
    spans = {edge: dict.fromkeys(live.spans[other]) for edge, other in model_of.items() if other in live.spans}
    return replace(drawn, spans=spans)
