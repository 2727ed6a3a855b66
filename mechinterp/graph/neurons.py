"""Which neurons of its MLPs a circuit keeps: their names, checked; and what two circuits share of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

from mechinterp.errors import GraphError
from mechinterp.graph.nodes import Edge, GraphShape, node_name, parse_node
from mechinterp.graph.values import as_score

__all__ = [
    "as_neurons",
    "check_same_neurons",
    "neuron_name",
    "nodes_of",
    "of_both",
    "of_either",
    "parse_neuron",
    "touched",
]

_NEURON = re.compile(r"m(?P<layer>\d+)\.n(?P<neuron>\d+)|L(?P<at>\d+)\.N(?P<index>\d+)\.mlp_post", re.ASCII | re.IGNORECASE)

Neurons = Mapping[str, Mapping[int, float | None]]
Key = TypeVar("Key")
Part = TypeVar("Part")


def neuron_name(mlp: str, neuron: int) -> str:
    """The name of a neuron: "m3.n12"."""
    return f"{mlp}.n{neuron}"


def parse_neuron(name: str) -> tuple[str, int] | None:
    """The MLP and the index of a neuron, also where it is written as a site is; None of another name.

    Examples
    --------
    >>> parse_neuron("m3.n12"), parse_neuron("L3.N12.mlp_post"), parse_neuron("a0.h1")
    (('m3', 12), ('m3', 12), None)
    """
    match = _NEURON.fullmatch(name)
    if match is None:
        return None
    layer, neuron = (match["layer"], match["neuron"]) if match["layer"] else (match["at"], match["index"])
    return f"m{int(layer)}", int(neuron)


def nodes_of(names: Iterable[str]) -> set[str]:
    """The nodes that these nodes and neurons are, or are parts of."""
    return {name if (found := parse_neuron(name)) is None else found[0] for name in names}


def as_neurons(neurons: object, shape: GraphShape, touched: Collection[str]) -> dict[str, Mapping[int, float | None]]:
    """The neurons of MLPs with a score or None for each, in the order of computation; also from their names alone."""
    given: dict[str, dict[int, float | None]] = {}
    if isinstance(neurons, Mapping):
        for name, kept in neurons.items():
            mlp = node_name(name) if isinstance(name, str) else str(name)
            if shape.parse(mlp).kind != "mlp":
                raise GraphError(f"There are neurons of {mlp}, and only MLPs have neurons. Name MLPs, such as m0.")
            if not isinstance(kept, Mapping):
                raise GraphError(
                    f"The neurons of {mlp} are {kept!r}. Give each index a score or None, such as dict.fromkeys([12, 40])."
                )
            into = given.setdefault(mlp, {})
            for neuron in sorted(kept, key=lambda each: _index(mlp, each)):
                into[int(neuron)] = as_score(neuron_name(mlp, neuron), kept[neuron])
    elif isinstance(neurons, Iterable) and not isinstance(neurons, str):
        for name in neurons:
            found = parse_neuron(name) if isinstance(name, str) else None
            if found is None:
                raise GraphError(f"{name!r} is not the name of a neuron. Neurons are written m3.n12 or L3.N12.mlp_post.")
            shape.parse(found[0])
            given.setdefault(found[0], {})[found[1]] = None
        given = {mlp: dict(sorted(kept.items())) for mlp, kept in given.items()}
    else:
        raise GraphError(f"neurons is a {type(neurons).__name__}. Give a mapping of MLPs to their neurons, or names like m3.n12.")
    for mlp in given:
        if mlp not in touched:
            raise GraphError(f"There are neurons of {mlp}, which no edge of the circuit has. Add edges of it, or leave it out.")
    ordered = sorted(given, key=lambda mlp: parse_node(mlp).layer or 0)
    return {mlp: MappingProxyType(given[mlp]) for mlp in ordered}


def _index(mlp: str, neuron: object) -> int:
    if not isinstance(neuron, int) or isinstance(neuron, bool) or neuron < 0:
        raise GraphError(f"{neuron!r} is not a neuron of {mlp}. Neurons are whole numbers from 0 on.")
    return neuron


def touched(neurons: Neurons, edges: Iterable[Edge]) -> dict[str, Mapping[int, float | None]]:
    """Those of the MLPs that an edge begins or ends at."""
    ends = {end for edge in edges for end in edge[:2]} if neurons else ()
    return {mlp: kept for mlp, kept in neurons.items() if mlp in ends}


def check_same_neurons(left: Neurons, right: Neurons, shared: Collection[str], *, only_left: bool) -> None:
    """Refuse MLPs of two circuits that cannot be compared; or ``only_left``, of which the left one has neurons of its own."""
    for mlp in sorted({*left, *right} & set(shared)):
        mine, theirs = left.get(mlp), right.get(mlp)
        if only_left and theirs is not None and (mine is None or not mine.keys() <= theirs.keys()):
            raise GraphError(
                f"Both circuits have edges of {mlp}, and the left one neurons of it that the right one lacks: what is left of "
                "these edges is no edge of a circuit. Compare the edges alone: circuit.with_neurons({})."
            )
        if not only_left and (mine is None or theirs is None):
            raise GraphError(
                f"{mlp} is whole in one of these circuits and keeps some neurons in the other, and how many there are is not "
                "known here. Compare the edges alone: circuit.with_neurons({})."
            )


# --- what two circuits share of the spans of edges, and of the neurons of MLPs; what is not in a mapping has all of its parts


def of_either(
    left: Mapping[Key, Mapping[Part, float | None]],
    right: Mapping[Key, Mapping[Part, float | None]],
    in_left: Collection[Key],
    in_right: Collection[Key],
) -> dict[Key, Mapping[Part, float | None]]:
    """The parts of either, with the left one's scores; nothing of what has all of them in one of the two."""
    return {
        key: {**right.get(key, {}), **left.get(key, {})}
        for key in {**left, **right}
        if (key in left or key not in in_left) and (key in right or key not in in_right)
    }


def of_both(
    left: Mapping[Key, Mapping[Part, float | None]], right: Mapping[Key, Mapping[Part, float | None]], shared: Iterable[Key]
) -> dict[Key, Mapping[Part, float | None]]:
    """The parts of both, with the left one's scores; nothing of what has all of them in both."""
    found: dict[Key, Mapping[Part, float | None]] = {}
    for key in shared:
        mine, theirs = left.get(key), right.get(key)
        if mine is not None:
            found[key] = mine if theirs is None else {part: mine[part] for part in mine if part in theirs}
        elif theirs is not None:
            found[key] = dict.fromkeys(theirs)
    return found
