"""The table of methods: each one a plain function from what was asked to scores, or to a circuit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from mechinterp.core.effects import Effects
from mechinterp.core.select import Selection
from mechinterp.discovery.acdc import acdc_of_size
from mechinterp.discovery.choosing import Search, Unit
from mechinterp.discovery.masking import learn_mask
from mechinterp.discovery.screening import screen_and_verify
from mechinterp.graph import Circuit
from mechinterp.patching.activation import patch
from mechinterp.patching.attribution import attribute
from mechinterp.patching.edges import edge_effects
from mechinterp.patching.flow import flow
from mechinterp.patching.gradients import path_points
from mechinterp.patching.neurons import neurons_of
from mechinterp.patching.scores import nodes_of

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """One way to find a circuit.

    Parameters
    ----------
    about
        What it does and what it costs, in one line.
    find
        Gives `Effects` over edges, nodes or neurons, from which edges are chosen, or the circuit itself.
    points
        Where on the path between the runs it takes gradients, given ``steps``; ``None`` where it takes none.
    units
        What it can score.
    noise_only
        Whether it knows no other direction than ``"noise"``.
    drawn
        Whether it draws numbers and so needs a seed.
    spans
        Whether it can score edges at each span of the prompts.
    """

    about: str
    find: Callable[[Search], Effects | Circuit]
    points: Callable[[int], tuple[float, ...]] | None = None
    units: tuple[Unit, ...] = ("edge", "node", "neuron")
    noise_only: bool = False
    drawn: bool = False
    spans: bool = False


def eap(search: Search) -> Effects:
    """The gradient at the receiving run."""
    return attribute(search.model, search.task, unit=search.unit, steps=0, over=search.over, **search.what)


def eap_ig(search: Search) -> Effects:
    """The mean of gradients on the line between the two embeddings."""
    return attribute(search.model, search.task, unit=search.unit, steps=search.steps, over=search.over, **search.what)


def clean_corrupt(search: Search) -> Effects:
    """The mean of the gradients at the two runs."""
    return attribute(search.model, search.task, unit=search.unit, steps=(0.0, 1.0), over=search.over, **search.what)


def eap_ig_activations(search: Search) -> Effects:
    """The mean of gradients on one line for each group of writers."""
    options = {"steps": search.steps, "over": search.over, **search.what}
    return attribute(search.model, search.task, unit=search.unit, path="activations", **options)


def relp(search: Search) -> Effects:
    """The rules of relevance propagation in the place of the gradient."""
    return attribute(search.model, search.task, unit=search.unit, rules="relp", over=search.over, **search.what)


def atp_star(search: Search) -> Effects:
    """Attention computed exactly, and gradients of which none cancels across a layer."""
    return attribute(search.model, search.task, unit=search.unit, rules="atp-star", **search.what)


def flow_routes(search: Search) -> Effects:
    """Shares of what is read."""
    return flow(search.model, search.task, memory=search.memory, progress=search.progress)


def exact(search: Search) -> Effects:
    """Each edge, node or neuron changed alone and measured."""
    if search.unit == "edge":
        return edge_effects(search.model, search.task, over=search.over or (), **search.what)
    grid = neurons_of(search.model) if search.unit == "neuron" else nodes_of(search.model)
    sites = Selection(tuple(site for cell in grid.cells for site in cell))
    # Without axes of their own the sites are listed as they come.
    found = patch(search.model, search.task, sites, **search.what)
    order = {site: i for i, site in enumerate(found.coords["site"])}
    rows = [order[str(site)] for site in sites]
    return replace(found, axes=grid.axes, coords=grid.coords, per_example=found.per_example[rows])


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "eap": Method(
            "attribution patching: the gradient at the receiving run; 2 forwards and 1 backward",
            eap,
            lambda steps: path_points(0),
            spans=True,
        ),
        "eap-ig": Method(
            "the same with integrated gradients over the input embeddings; steps forwards and backwards",
            eap_ig,
            path_points,
            spans=True,
        ),
        "clean-corrupt": Method(
            "the mean of the gradients at the two runs; 2 forwards and backwards",
            clean_corrupt,
            lambda steps: path_points((0.0, 1.0)),
            spans=True,
        ),
        "eap-ig-activations": Method(
            "the mean of gradients on a line for each layer's heads, each MLP and the embedding; steps passes for each of them",
            eap_ig_activations,
            path_points,
            spans=True,
        ),
        "relp": Method(
            "a backward pass with fixed norms, patterns and non-linearities (no queries, no keys); 3 forwards and 1 backward",
            relp,
            lambda steps: path_points(0),
            spans=True,
        ),
        "atp-star": Method(
            "AtP*: attention exact for changed queries and keys, and no cancelling across layers (scores without a sign of their "
            "own); 3 forwards, a backward for each layer, and of edges two rows of attention for each writer and later layer",
            atp_star,
            lambda steps: path_points(0),
        ),
        "flow": Method(
            "information-flow routes: the share of each writer in what a reader reads; 1 forward, no counterfactual, no metric",
            flow_routes,
            units=("edge",),
            noise_only=True,
        ),
        "mask": Method(
            "hard-concrete gates on all edges, trained to a target size; 100 forwards and backwards, needs a seed",
            learn_mask,
            # The loss is the distance to the clean run's metric, so that a metric at its minimum there has a gradient too.
            lambda steps: (0.5,),
            ("edge",),
            noise_only=True,
            drawn=True,
        ),
        "exact": Method("every edge (node, neuron) changed alone and measured; less than half a forward each", exact, spans=True),
        "acdc": Method(
            "removes edges one after another, from the logits back, where the metric moves by less than the threshold",
            acdc_of_size,
            units=("edge",),
            noise_only=True,
        ),
        "screen-verify": Method(
            "estimates all by eap-ig and measures the best exactly, until what is left is estimated too low to matter",
            screen_and_verify,
            path_points,
            ("edge",),
        ),
    }
)
