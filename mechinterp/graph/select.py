"""From edge scores to circuits: which edges to keep.

Keeping the best-scored edges (`top_edges`) is the plainest rule, and it leaves dangling ones: edges into a
head that nothing reads, or out of a head that hears nothing. The number asked for is then not the number that
can work, so every rule here says both, and two of them choose differently: `greedy_edges` grows from the
logits backward, and `connected_edges` looks for a given number of *connected* edges. `random_edges` is the
baseline for all of them.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from mechinterp.errors import GraphError, did_you_mean
from mechinterp.graph.circuit import Circuit
from mechinterp.graph.connect import best_connected
from mechinterp.graph.graph import EdgeIndex, index_of
from mechinterp.graph.nodes import Edge, GraphShape, parse_node

__all__ = ["connected_edges", "greedy_edges", "random_edges", "threshold_edges", "top_edges"]

RANDOM_TRIES: Final = 32
RATE_TRIES: Final = 8  # to match the kinds, once the size is right
CLOSE: Final = 0.06  # this share of edges may be of another kind: each is counted where it lacks and where it is too many
MATCHES: Final = ("classes", "connected")


def top_edges(
    model: object,
    scores: Mapping[Edge, float],
    n: int,
    *,
    signed: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Circuit:
    """Which n edges have the largest scores?

    Parameters
    ----------
    model
        A loaded model, a config, or a `GraphShape`.
    scores
        A score per edge.
    n
        How many edges to keep; how many of them are connected is the result's `n_connected`.
    signed
        False: large by absolute value, so that edges that work *against* the answer are kept too. True: large
        by value.
    provenance
        Where the scores came from; the choice of edges is added to it as ``selection``.

    Returns
    -------
    Circuit
        With the scores of its edges. Ties go to the edge that comes first in `scored_edges`.

    Raises
    ------
    GraphError
        If there are fewer than n scores, a score is not finite, or an edge does not exist.

    Examples
    --------
    >>> shape = GraphShape(n_layers=1, n_heads=1)
    >>> scores = {Edge("embed", "logits", "in"): 0.1, Edge("m0", "logits", "in"): -3.0}
    >>> top_edges(shape, scores, 1).edges
    (Edge(src='m0', dst='logits', port='in'),)
    >>> top_edges(shape, scores, 1, signed=True).edges
    (Edge(src='embed', dst='logits', port='in'),)
    """
    index, ranked = rank(model, scores, signed)
    check_count(n, len(ranked))
    return chosen(index, ranked[:n], scores, provenance, rule="top", n=n, signed=signed)


def threshold_edges(
    model: object,
    scores: Mapping[Edge, float],
    threshold: float,
    *,
    signed: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Circuit:
    """Which edges score at least this much? Parameters as in `top_edges`; a threshold below 0 only with ``signed``.

    Examples
    --------
    >>> shape = GraphShape(n_layers=1, n_heads=1)
    >>> len(threshold_edges(shape, {Edge("m0", "logits", "in"): -3.0}, 0.5))
    1
    """
    check_threshold(threshold, signed=signed)
    index, ranked = rank(model, scores, signed)
    key = size_of(signed)
    keep = [i for i in ranked if key(scores[index.edges[i]]) >= threshold]
    return chosen(index, keep, scores, provenance, rule="threshold", threshold=float(threshold), signed=signed)


def greedy_edges(
    model: object,
    scores: Mapping[Edge, float],
    n: int,
    *,
    signed: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Circuit:
    """Which n edges does one get by growing from the logits backward, the best-scored edge first?

    An edge can be taken once its reader is in the circuit, so that every edge leads to the logits. It need
    not come from the embedding: a writer taken last has no inputs yet. Parameters and errors as in
    `top_edges`; the result has fewer than n edges only where the scores given do not reach further.

    References
    ----------
    .. [1] Hanna, Pezzelle, Belinkov, "Have Faith in Faithfulness", 2024, arXiv:2403.17806.
    """
    index, ranked = rank(model, scores, signed)
    check_count(n, len(ranked))
    return chosen(index, grown(index, ranked, n), scores, provenance, rule="greedy", n=n, signed=signed)


def grown(index: EdgeIndex, ranked: Sequence[int], n: int) -> list[int]:
    """The n edges that growing from the logits takes, of a ranking."""
    into: dict[int, list[tuple[int, int]]] = {}
    for place, i in enumerate(ranked):
        into.setdefault(index.dst[i], []).append((place, i))
    kv_of = {head: kv for kv, heads in index.heads_of.items() for head in heads}

    logits = len(index.shape.nodes) - 1
    present = {logits}
    frontier = list(into.get(logits, ()))
    heapq.heapify(frontier)
    taken: list[int] = []
    while frontier and len(taken) < n:
        _, best = heapq.heappop(frontier)
        taken.append(best)
        writer = index.src[best]
        for node in (writer, kv_of.get(writer)):
            if node is not None and node not in present:
                present.add(node)
                for candidate in into.get(node, ()):
                    heapq.heappush(frontier, candidate)
    return taken


def connected_edges(
    model: object,
    scores: Mapping[Edge, float],
    n: int,
    *,
    signed: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Circuit:
    """Which n *connected* edges does one get by keeping the best-scored edges, however many that takes?

    The best edges are taken until n of them are connected, and the unconnected ones are dropped. One edge can
    connect many others at a stroke; then the weakest are removed again, each with what hangs on it alone, so
    that a weak edge without which the strong ones would dangle is kept. The result's ``len()`` is n, or in
    small graphs a little more. If the scores given do not connect n edges, it is all that they connect.

    Parameters and errors as in `top_edges`; ``provenance["selection"]["taken"]`` says how far down the
    ranking it went.

    Notes
    -----
    O(edges log edges).
    """
    index, ranked = rank(model, scores, signed)
    check_count(n, len(ranked))
    k, keep = best_connected(index, ranked, n)
    return chosen(index, keep, scores, provenance, rule="connected", n=n, taken=k, signed=signed)


def random_edges(
    like: Circuit,
    *,
    seed: int,
    match: str = "classes",
) -> Circuit:
    """What would a circuit of this size be worth if its edges were chosen by chance?

    Edges are drawn without replacement until the connected part is as large as the connected part of `like`.

    Parameters
    ----------
    like
        The circuit to match.
    seed
        Of the random generator, which is the function's own.
    match
        ``"classes"``: edges are drawn so that the result has about the same proportions of (kind of writer,
        kind of reader, port) as the connected part of `like`. What dangles is dropped, and some kinds dangle
        more than others, so the rates are corrected from draw to draw: of 1000 edges on SmolLM2-135M about 3 %
        are of another kind, of 200 about 5 %. This is the harder baseline to beat: a circuit of MLP edges is
        compared with other MLP edges. ``"connected"``: every edge of the model is as likely as any other.

    Returns
    -------
    Circuit
        Connected edges without scores: `like.n_connected` of them, or as near as 32 draws came, in small
        graphs where that number is rare; ``len()`` of the result says how many.

    Raises
    ------
    GraphError
        If `match` is neither.

    Examples
    --------
    >>> shape = GraphShape(n_layers=4, n_heads=4)
    >>> like = Circuit.from_edges(shape, ["embed->a1.h0<v>", "a1.h0->a2.h3<k>", "a2.h3->logits"])
    >>> random_edges(like, seed=0).n_connected
    3
    """
    if match not in MATCHES:
        raise GraphError(f"match={match!r} is not a way to match a circuit. {did_you_mean(match, MATCHES)}")
    index = index_of(like.shape)
    wanted = like.n_connected
    provenance = {
        "method": "random",
        "selection": {"rule": "random", "match": match, "n": wanted, "seed": seed},
    }
    class_of = edge_class if match == "classes" else one_class
    per_class = Counter(class_of(edge) for edge in like.connected().edges)
    members: dict[tuple[str, ...], list[int]] = {}
    for i, edge in enumerate(index.edges):
        if per_class[class_of(edge)]:
            members.setdefault(class_of(edge), []).append(i)

    generator = random.Random(seed)
    best: list[int] = []
    least: tuple[float, float] = (math.inf, math.inf)
    rate = {name: float(count) for name, count in per_class.items()}
    for number in range(RANDOM_TRIES):
        # The r-th edge drawn of a class with rate c comes at time r / c: any prefix in time has the classes in
        # the proportions of the rates, and prefixes are what the search looks through.
        drawn = [
            ((rank_in_class + generator.random()) / rate[name], i)
            for name, group in members.items()
            for rank_in_class, i in enumerate(generator.sample(group, len(group)))
        ]
        _, keep = best_connected(index, [i for _, i in sorted(drawn)], wanted)
        got = Counter(class_of(index.edges[i]) for i in keep)
        missed = (abs(len(keep) - wanted), sum(abs(got[name] - per_class[name]) for name in per_class) / max(1, wanted))
        if missed < least:
            best, least = keep, missed
        if least[0] == 0 and (least[1] <= CLOSE or number + 1 >= RATE_TRIES):
            break
        # Some classes lose more of their edges than others when those that dangle are dropped.
        for name in rate:
            rate[name] *= ((per_class[name] + 1) / (got[name] + 1)) ** 0.7
    return Circuit(like.shape, dict.fromkeys(index.edges[i] for i in best), provenance)


def rank(model: object, scores: Mapping[Edge, float], signed: bool) -> tuple[EdgeIndex, list[int]]:
    """The positions of the scored edges, best first; ties in the order of `scored_edges`."""
    index = index_of(GraphShape.of(model))
    key = size_of(signed)
    keyed = []
    for i, (edge, score) in zip(index.positions(scores), scores.items(), strict=True):
        if score is None or not math.isfinite(score):
            raise GraphError(f"The score of {edge} is {score}. Edges are chosen by finite scores: leave it out.")
        keyed.append((-key(score), i))
    return index, [i for _, i in sorted(keyed)]


def size_of(signed: bool) -> Callable[[float], float]:
    return float if signed else abs


def check_count(n: int, available: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise GraphError(f"n={n!r} is not a number of edges. Give a whole number from 0 to {available}.")
    if n > available:
        have = "has" if available == 1 else "have"
        raise GraphError(f"{n} edges were asked for, and only {available} {have} a score. Ask for at most {available}.")


def check_threshold(threshold: float, *, signed: bool) -> None:
    if not math.isfinite(threshold):
        raise GraphError(f"threshold={threshold}: give a number, such as 0.01 of the difference to explain")
    if threshold < 0 and not signed:
        raise GraphError(
            f"threshold={threshold} is below every absolute score, so that all edges would be kept; give one from 0 on, or rank "
            "by value with signed=True"
        )


def edge_class(edge: Edge) -> tuple[str, ...]:
    return parse_node(edge.src).kind, parse_node(edge.dst).kind, edge.port


def one_class(edge: Edge) -> tuple[str, ...]:
    return ()


def chosen(
    index: EdgeIndex,
    positions: Sequence[int],
    scores: Mapping[Edge, float],
    provenance: Mapping[str, Any] | None,
    **selection: object,
) -> Circuit:
    edges = [index.edges[i] for i in positions]
    return Circuit(index.shape, {e: scores[e] for e in edges}, {**(provenance or {}), "selection": selection})
