"""Scores and circuits beside a known circuit: AUROC, precision, recall, and which edges are missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mechinterp.core.effects import Effects
from mechinterp.discovery.measuring import scores_of
from mechinterp.errors import GraphError
from mechinterp.graph import Circuit, Edge, check_circuit, check_everywhere, scored_edges
from mechinterp.graph.nodes import counted

__all__ = ["Recovery", "auroc", "compare_to_known"]

_SHOWN = 5


def auroc(scores: Effects | Circuit | Mapping[Edge, float], truth: Circuit, *, signed: bool = False) -> float:
    """How well do scores rank the edges of a known circuit above all others?

    The chance that an edge of the truth, drawn at random, has a larger score than an edge outside of it, ties counting half:
    the area under the ROC curve. 1 is perfect, 0.5 is chance.

    Parameters
    ----------
    scores
        `Effects` over edges, a circuit with scores, or a mapping. **Edges without a score rank below all others, and tie with
        each other**: what a method left out is never counted as found.
    truth
        The known circuit; all edges of its graph are ranked.
    signed
        Rank by value instead of absolute value.

    Raises
    ------
    GraphError
        The truth is no circuit, or has no edge, or every edge; a score of an edge that its graph does not have.

    Examples
    --------
    >>> import mechinterp as mi
    >>> shape = mi.GraphShape(n_layers=1, n_heads=1, attn_only=True)
    >>> truth = mi.Circuit.from_edges(shape, ["embed->a0.h0<v>", "a0.h0->logits"])
    >>> scores = {"embed->a0.h0<v>": 0.5, "embed->logits": 0.2, "a0.h0->logits": -3.0}
    >>> mi.auroc({mi.Edge.parse(edge): score for edge, score in scores.items()}, truth)
    1.0
    """
    check_circuit(truth, "the scores come first, then the known circuit")
    if not isinstance(scores, Effects | Mapping):
        check_circuit(scores, "scores come first, mi.attribute(model, task, unit='edge'), then the known circuit")
    known = dict(scores) if isinstance(scores, Mapping) else scores_of(scores)
    everything = scored_edges(truth.shape)
    foreign = set(known) - set(everything)
    if foreign:
        raise GraphError(f"{min(map(str, foreign))} has a score, and the graph of the truth ({truth.shape}) has no such edge")
    check_everywhere(truth, "mi.auroc")
    if not 0 < len(truth) < len(everything):
        raise GraphError(
            f"the known circuit has {len(truth)} of {len(everything)} edges; a ranking is judged by some that belong and some "
            "that do not"
        )
    size = float if signed else abs
    # (there is a score, it): no score is less than any.
    value = {edge: (edge in known, size(known[edge]) if edge in known else 0.0) for edge in everything}
    ordered = sorted(everything, key=lambda edge: value[edge])
    total, at = 0.0, 0
    while at < len(ordered):
        end = at
        while end < len(ordered) and value[ordered[end]] == value[ordered[at]]:
            end += 1
        # Ranks from 1; equal ones share the mean of theirs.
        total += (at + 1 + end) / 2 * sum(edge in truth.scores for edge in ordered[at:end])
        at = end
    found, others = len(truth), len(everything) - len(truth)
    return (total - found * (found + 1) / 2) / (found * others)


@dataclass(frozen=True)
class Recovery:
    """How much of a known circuit was found? Made by `compare_to_known`.

    ``missed`` are edges of the truth that are not in the circuit, ``extra`` those of the circuit that are not in the truth.
    ``auroc`` ranks all edges of the graph by the circuit's scores, those without one below all; ``None`` where the circuit has
    no scores.
    """

    right: int
    missed: tuple[Edge, ...]
    extra: tuple[Edge, ...]
    auroc: float | None

    @property
    def precision(self) -> float:
        """The share of the circuit's edges that belong to the truth; 0.0 for an empty circuit."""
        return self.right / max(1, self.right + len(self.extra))

    @property
    def recall(self) -> float:
        """The share of the truth's edges that the circuit has."""
        return self.right / (self.right + len(self.missed))

    @property
    def iou(self) -> float:
        """Edges of both, over edges of either."""
        return self.right / (self.right + len(self.missed) + len(self.extra))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "right": self.right,
            "missed": [str(edge) for edge in self.missed],
            "extra": [str(edge) for edge in self.extra],
            "precision": self.precision,
            "recall": self.recall,
            "iou": self.iou,
            "auroc": self.auroc,
        }

    def __repr__(self) -> str:
        def some(edges: tuple[Edge, ...]) -> str:
            names = ", ".join(str(edge) for edge in edges[:_SHOWN]) + (", ..." if len(edges) > _SHOWN else "")
            return f" ({names})" if edges else ""

        ranked = "" if self.auroc is None else f", AUROC {self.auroc:.3f}"
        return (
            f"Recovery: precision {self.precision:.3f}, recall {self.recall:.3f}{ranked}; {counted(self.right, 'edge')} right, "
            f"{len(self.missed)} missed{some(self.missed)}, {len(self.extra)} extra{some(self.extra)}"
        )


def compare_to_known(circuit: Circuit, truth: Circuit) -> Recovery:
    """Which edges of a known circuit were found, which were not, and which are too many?

    An edge counts as right only if the circuit *has* it: one that the circuit's file or method left out is missed.

    Raises
    ------
    GraphError
        Scores instead of a circuit, circuits of different shapes, or an empty truth.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> mi.compare_to_known(mi.discover(toy.model, toy.task, edges=5), toy.truth["resample"])
    Recovery: precision 1.000, recall 1.000, AUROC 1.000; 5 edges right, 0 missed, 0 extra
    """
    _check_circuits(circuit, truth)
    if circuit.shape != truth.shape:
        raise GraphError(f"a circuit of {circuit.shape} cannot be compared with a known one of {truth.shape}")
    if not len(truth):
        raise GraphError("the known circuit has no edge, so there is nothing to find")
    for each in (circuit, truth):
        check_everywhere(each, "mi.compare_to_known")
    scores = {edge: score for edge, score in circuit.scores.items() if score is not None}
    return Recovery(
        right=sum(edge in circuit.scores for edge in truth),
        missed=tuple(edge for edge in truth if edge not in circuit.scores),
        extra=tuple(edge for edge in circuit if edge not in truth.scores),
        auroc=auroc(scores, truth) if scores and len(truth) < truth.shape.n_edges else None,
    )


def _check_circuits(found: object, truth: object) -> None:
    if isinstance(found, Effects):
        raise GraphError(
            "scores were given where a circuit belongs: choose edges first, mi.discover(model, task, edges=...), or rank all "
            "of them, mi.auroc(scores, truth)"
        )
    for each in (found, truth):
        check_circuit(each, "the circuit that was found comes first, then the known one")
