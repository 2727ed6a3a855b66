"""A circuit with one path too many, drawn by chance: what edges that do not belong look like."""

from __future__ import annotations

import random

from mechinterp.errors import GraphError
from mechinterp.graph.circuit import Circuit
from mechinterp.graph.graph import EdgeIndex, index_of
from mechinterp.graph.nodes import Edge

__all__ = ["inflate"]


def inflate(circuit: Circuit, *, seed: int) -> tuple[Circuit, tuple[Edge, ...]]:
    """The circuit and a random path from the embedding to the logits; and which of its edges are new.

    The path walks from writer to reader, every edge out of a writer as likely as any other (from a KV head on to one of its query
    heads), and is drawn until at least one of its edges is not in the circuit.

    Raises
    ------
    GraphError
        The circuit has every edge.

    Examples
    --------
    >>> from mechinterp.graph import Circuit, GraphShape
    >>> more, new = inflate(Circuit.empty(GraphShape(n_layers=2, n_heads=2)), seed=0)
    >>> len(more) == len(new) == more.n_connected
    True
    """
    if len(circuit) == circuit.shape.n_edges:
        raise GraphError(f"{circuit!r} has every edge, so that no path can be added to it")
    index, generator = index_of(circuit.shape), random.Random(seed)
    out_of: dict[int, list[int]] = {}
    for i, writer in enumerate(index.src):
        out_of.setdefault(writer, []).append(i)
    while True:
        path = _walk(index, out_of, generator)
        new = tuple(edge for edge in path if edge not in circuit.scores)
        if new:
            more = {**circuit.scores, **dict.fromkeys(new)}
            return Circuit(circuit.shape, more, spans=circuit.spans, neurons=circuit.neurons), new


def _walk(index: EdgeIndex, out_of: dict[int, list[int]], generator: random.Random) -> list[Edge]:
    node, path = 0, []
    while node in out_of:
        step = generator.choice(out_of[node])
        path.append(index.edges[step])
        node = index.dst[step]
        if node in index.heads_of:
            node = generator.choice(index.heads_of[node])
    return path
