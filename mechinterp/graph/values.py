"""What circuits are made of, checked: edges, scores, spans, and plain values that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mechinterp.errors import GraphError
from mechinterp.graph.nodes import Edge

__all__ = ["as_edge", "as_score", "as_spans", "plain_mapping", "total"]


def as_edge(edge: object) -> Edge:
    """An `Edge` from an edge, its printed text, or a (src, dst, port) tuple."""
    if isinstance(edge, Edge):
        return edge
    if isinstance(edge, str):
        return Edge.parse(edge)
    if isinstance(edge, tuple) and len(edge) == 3 and all(isinstance(part, str) for part in edge):
        return Edge(*edge)
    raise GraphError(f"{edge!r} is not an edge. Give Edge(src, dst, port), or a text such as 'a0.h1->a3.h2<k>'.")


def as_score(edge: Edge | str, score: object) -> float | None:
    """A finite Python float, or None."""
    if score is None:
        return None
    try:
        number = float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise GraphError(f"The score of {edge} is {score!r}. Give a finite number, or None for no score.") from error
    if not math.isfinite(number):
        raise GraphError(f"The score of {edge} is {number}. Give a finite number, or None for no score.")
    return number


def as_spans(spans: object, scores: Mapping[Edge, float | None]) -> dict[Edge, Mapping[str, float | None]]:
    """The spans of edges with a score or None for each, in the order of the edges."""
    if not isinstance(spans, Mapping):
        raise GraphError(f"spans is a {type(spans).__name__}. Give a mapping of edges to the names of their spans.")
    given: dict[Edge, Mapping[str, float | None]] = {}
    for key, names in spans.items():
        edge = as_edge(key)
        if edge not in scores:
            raise GraphError(f"There are spans of {edge}, which is not in the circuit. Give it a score too, or None.")
        if not isinstance(names, Mapping) or not names:
            raise GraphError(f"The spans of {edge} are {names!r}. Give each name of task.spans a score or None, or leave it out.")
        checked = {name: as_score(edge, score) for name, score in names.items() if is_name(name, f"spans of {edge}")}
        given[edge] = MappingProxyType(checked)
    return {edge: given[edge] for edge in scores if edge in given}


def total(scores: Iterable[float | None], otherwise: float | None) -> float | None:
    """The sum of those that there are."""
    known = [score for score in scores if score is not None]
    return sum(known) if known else otherwise


def plain_mapping(mapping: object, name: str) -> dict[str, Any]:
    """A deep copy of plain JSON values, so that what is saved is what is loaded again."""
    if not isinstance(mapping, Mapping):
        raise GraphError(f"{name} is a {type(mapping).__name__}. Give a mapping of names to values.")
    return {key: plain_value(value, f"{name}[{key!r}]") for key, value in mapping.items() if is_name(key, name)}


def plain_value(value: Any, place: str) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise GraphError(f"{place} is {value}, which JSON cannot hold. Leave it out, or say None.")
        return float(value)
    if isinstance(value, Mapping):
        return {k: plain_value(v, f"{place}[{k!r}]") for k, v in value.items() if is_name(k, place)}
    if isinstance(value, list | tuple):
        return [plain_value(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    raise GraphError(
        f"{place} is a {type(value).__name__}, which JSON cannot hold. "
        "Give numbers, texts, lists and mappings (of a tensor, its .item() or .tolist())."
    )


def is_name(key: object, place: str) -> bool:
    if not isinstance(key, str):
        raise GraphError(f"{place} has the key {key!r}. JSON has only texts as keys.")
    return True
