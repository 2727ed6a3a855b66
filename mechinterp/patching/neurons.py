"""The neurons of a model as parts of its graph: coordinates of what the output projections of its MLPs read."""

from __future__ import annotations

from collections.abc import Iterable

from mechinterp.core.model import Model
from mechinterp.core.sites import Site
from mechinterp.errors import GraphError
from mechinterp.graph.neurons import neuron_name
from mechinterp.graph.nodes import parse_node
from mechinterp.patching.activation import Grid
from mechinterp.patching.scores import nodes_of

__all__ = ["check_neurons", "neurons_of"]


def check_neurons(model: Model, mlp: str, neurons: Iterable[int] = ()) -> None:
    """Refuse neurons that an MLP does not have.

    Raises
    ------
    GraphError
        It is a mixture of experts, or an index is out of range.
    """
    if getattr(model.block(parse_node(mlp).layer or 0).mlp, "out", None) is None:
        raise GraphError(
            f"{mlp} of {model.name} ({model.cfg.architecture}) is a mixture of experts, which has no one set of neurons; take "
            "its experts as one: unit='node', circuit.with_neurons({})"
        )
    last = model.cfg.d_mlp - 1
    if (most := max(neurons, default=0)) > last:
        raise GraphError(f"there is no neuron {neuron_name(mlp, most)}: the MLPs of {model.name} have neurons 0 to {last}")


def neurons_of(model: Model) -> Grid:
    """The embedding, every head, and every neuron as one cell.

    Raises
    ------
    GraphError
        A mixture of experts.
    """
    nodes = nodes_of(model)
    cells: dict[str, tuple[Site, ...]] = {}
    for name, cell in zip(nodes.coords["node"], nodes.cells, strict=True):
        if cell[0].name != "mlp_out":
            cells[str(name)] = cell
            continue
        check_neurons(model, str(name))
        sites = (Site("mlp_post", cell[0].layer, neuron=i) for i in range(model.cfg.d_mlp))
        cells |= {neuron_name(str(name), site.neuron or 0): (site,) for site in sites}
    return Grid(("node",), {"node": tuple(cells)}, list(cells.values()), "")
