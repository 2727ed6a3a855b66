"""Gradients of the metric at activations, averaged along a path between two runs. The one path integrator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.answers import answer_logits
from mechinterp.core.hooks import HookRegistry
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import MetricError
from mechinterp.patching.compare import Comparison, Direction, growing
from mechinterp.patching.readers import EMBED
from mechinterp.tasks import Metric

__all__ = ["check_gradient", "gradients", "path_points"]


def path_points(steps: int | Sequence[int | float]) -> tuple[float, ...]:
    """Where on the line from the receiving run (0) to the other run (1) gradients are taken.

    ``steps=0`` is plain attribution patching: the gradient at the receiving run. ``steps=m`` takes the midpoints
    of m equal parts, which converge faster than either end. A sequence gives the points themselves, each of equal
    weight: ``(0.0, 1.0)`` is the mean of the gradients at both ends.

    Examples
    --------
    >>> path_points(0), path_points(2)
    ((0.0,), (0.25, 0.75))
    """
    if not isinstance(steps, int):
        points = tuple(float(point) for point in steps)
        if not points or not all(0.0 <= point <= 1.0 for point in points):
            raise MetricError(f"points {points}: give at least one, each from 0 (receiving run) to 1 (other run)")
        return points
    if steps < 0:
        raise MetricError(f"steps={steps}: give 0 for the gradient at the receiving run, or the number of points of the path")
    return (0.0,) if steps == 0 else tuple((i + 0.5) / steps for i in range(steps))


def check_gradient(metric: Metric, direction: Direction, points: Sequence[float]) -> None:
    """Refuse metrics whose gradient says nothing at these points."""
    if not metric.differentiable:
        raise MetricError(
            f"{metric.name!r} has a zero gradient almost everywhere, so estimates of it are all zero; "
            "use metric='logit_diff', or measure it exactly with mi.patch"
        )
    if metric.needs_reference and direction == "noise" and not any(points):
        raise MetricError(
            f"{metric.name!r} is at its minimum in the clean run, where its gradient is zero: "
            "use steps=5, direction='denoise' or another metric"
        )


def gradients(
    runs: Comparison,
    sites: Selection,
    points: Sequence[float],
    *,
    capture: Selection | None = None,
    at: Site = EMBED,
    also: Callable[[HookRegistry], None] | None = None,
    drops: Sequence[int | None] = (None,),
) -> Iterator[tuple[dict[Site, Tensor], dict[Site, Tensor]]]:
    """For each point of the path: dm/d(site) for whole sites, and the values of the captured ones.

    The path is the line between the two runs' values of the whole site ``at``; all after it is recomputed. The metric
    is summed over the batch, so each example has its own gradient whatever the batch is. The leaves that gradients are taken
    at leave the ``.grad`` of the caller's parameters alone. ``also`` adds to what acts on the passes.

    With ``drops`` each forward pass serves a backward pass for each of them: in that of a layer nothing flows back through what
    its attention and its MLP add to the stream; in that of ``None`` everything does.

    At point 0 a comparison that was made with a tape of these sites needs no pass of its own.
    """
    closed: list[int | None] = [None]
    for point in points:
        leaves: dict[Site, Tensor] = {}
        values: dict[Site, Tensor] = {}
        # On the line of a later site its value is given, also at its end: nothing flows back through it.
        given = point != 0.0 or at != EMBED
        plain = also is None and tuple(drops) == (None,)
        if not given and runs.tape is not None and plain and set(sites) == set(runs.tape.leaves):
            leaves, logits = dict(runs.tape.leaves), runs.tape.logits
            values = {site: runs.receiver[site] for site in capture or ()}
        else:
            registry = HookRegistry(runs.model)
            if given:
                line = torch.lerp(runs.receiver[at], runs.other[at], point)

                def interpolate(value: Tensor, line: Tensor = line) -> Tensor:
                    return line

                registry.transform(at, interpolate, priority=-1)
            if also is not None:
                also(registry)
            for site in sites:
                registry.transform(site, growing(leaves, site))
            if tuple(drops) != (None,):
                _add_gates(registry, closed)
            if capture is not None:
                registry.capture(capture, values)
            with torch.enable_grad(), registry:
                logits = answer_logits(runs.model, runs.tokens, runs.task.answer_pos)
        with torch.enable_grad():
            total = runs.measure(logits).sum()
        ordered = list(leaves)
        for i, drop in enumerate(drops):
            closed[0] = drop
            # What the metric does not depend on has a gradient of zero.
            found = torch.autograd.grad(
                total, [leaves[site] for site in ordered], allow_unused=True, retain_graph=i + 1 < len(drops)
            )
            filled = [torch.zeros_like(leaves[site]) if each is None else each for site, each in zip(ordered, found, strict=True)]
            yield dict(zip(ordered, filled, strict=True)), values


def _add_gates(registry: HookRegistry, closed: Sequence[int | None]) -> None:
    """Stop the gradient behind what a layer adds to the stream, while ``closed`` names that layer."""

    def gate(layer: int) -> Callable[[Tensor], Tensor]:
        def act(value: Tensor) -> Tensor:
            passed: Tensor = _Gate.apply(value, layer, closed)  # type: ignore[no-untyped-call]
            return passed

        return act

    for layer in range(registry.model.cfg.n_layers):
        for name in ("attn_out",) if registry.model.cfg.attn_only else ("attn_out", "mlp_out"):
            # Behind the leaves, so that what is added itself gets no gradient either, as all else in that layer.
            registry.transform(Site(name, layer), gate(layer), priority=1)


class _Gate(torch.autograd.Function):
    """The value as it is; backwards nothing while ``closed`` names the layer."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, layer: int, closed: Sequence[int | None]) -> Tensor:
        ctx.layer, ctx.closed = layer, closed
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * float(ctx.closed[0] != ctx.layer), None, None
