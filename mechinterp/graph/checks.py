"""What functions of circuits refuse: what is none, and what they do not know of one."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mechinterp.errors import GraphError
from mechinterp.graph.circuit import Circuit
from mechinterp.graph.nodes import counted

__all__ = ["check_circuit", "check_everywhere"]


def check_circuit(circuit: object, order: str = "the circuit comes first, then model and task") -> None:
    """Refuse what is not a `Circuit`, and say in which order the arguments come.

    Raises
    ------
    GraphError
        A file's name, several circuits by name, such as a toy's truths, or something else.
    """
    if isinstance(circuit, str | os.PathLike):
        raise GraphError(f"the name {os.fspath(circuit)!r} was given where a circuit belongs; load it: mi.Circuit.load(path)")
    if isinstance(circuit, Mapping) and circuit and all(isinstance(each, Circuit) for each in circuit.values()):
        chosen = "resample" if "resample" in circuit else next(iter(circuit))
        raise GraphError(
            f"several circuits ({', '.join(map(str, circuit))}) were given where one belongs; choose one: truth[{chosen!r}]"
        )
    if not isinstance(circuit, Circuit):
        raise GraphError(f"a {type(circuit).__name__} was given where a circuit belongs: {order}")


def check_everywhere(circuit: Circuit, what: str) -> None:
    """Refuse a circuit of which some edges carry at some spans alone, or some MLPs keep some neurons alone.

    Raises
    ------
    GraphError
        It has spans, or neurons.
    """
    if circuit.spans:
        raise GraphError(
            f"{what} knows edges at all positions alone, and {counted(len(circuit.spans), 'edge')} of this circuit "
            f"{'carries' if len(circuit.spans) == 1 else 'carry'} at some spans. For the bare edges: circuit.everywhere()."
        )
    if circuit.neurons:
        raise GraphError(
            f"{what} knows whole MLPs alone, and {counted(len(circuit.neurons), 'MLP')} of this circuit "
            f"{'keeps' if len(circuit.neurons) == 1 else 'keep'} some neurons. For the bare edges: circuit.with_neurons({{}})."
        )
