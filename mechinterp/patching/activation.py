"""Activation patching: the exact effect of every site, one counterfactual run each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from mechinterp.core.effects import Effects, Label
from mechinterp.core.model import Model
from mechinterp.core.plan import plan_cells, sweep
from mechinterp.core.select import Selection, select
from mechinterp.core.sites import Site
from mechinterp.errors import SelectorError, did_you_mean
from mechinterp.patching.compare import Direction, MetricLike, compare_runs
from mechinterp.patching.ends import own_ends
from mechinterp.tasks import Task

__all__ = ["Grid", "grid_of", "patch"]

AXES = ("layer", "head", "kv_head", "pos", "neuron")


class Grid:
    """The cells of a sweep: which sites each one holds, and how the cells lie on named axes."""

    def __init__(self, axes: tuple[str, ...], coords: dict[str, tuple[Label, ...]], cells: list[tuple[Site, ...]], site: str):
        self.axes, self.coords, self.cells, self.site = axes, coords, cells, site

    def arrange(self, flat: Tensor) -> Tensor:
        """``[cell batch]`` to ``[*axes batch]``."""
        return flat.reshape(*(len(self.coords[axis]) for axis in self.axes), flat.shape[-1])


def grid_of(model: Model, at: str | Site | Selection, length: int, over: Sequence[str] | None) -> Grid:
    """Group the selected sites into cells.

    One cell for each combination of the axes in ``over``; axes of the selector that are not in it are patched
    together. Without ``over``, every site that the selector names apart is a cell.
    """
    sites = select(at, model.cfg).sites
    names = dict.fromkeys(site.name for site in sites)
    if over is not None:
        for axis in over:
            if axis not in AXES:
                raise SelectorError(f"cannot sweep over {axis!r}. {did_you_mean(axis, AXES)}")
        for axis in over:
            sites = tuple(each for site in sites for each in _split(site, axis, model, length))
    else:
        over = [axis for axis in AXES if any(_label(site, axis) is not None for site in sites)]
    over = tuple(axis for axis in AXES if axis in over)
    cells: dict[tuple[Label | None, ...], list[Site]] = {}
    for site in sites:
        cells.setdefault(tuple(_label(site, axis) for axis in over), []).append(site)
    coords = {axis: tuple(dict.fromkeys(key[i] for key in cells)) for i, axis in enumerate(over)}
    full = list(product(*coords.values()))
    if over and len(names) == 1 and set(full) == set(cells):
        return Grid(over, coords, [tuple(cells[key]) for key in full], next(iter(names)))  # type: ignore[arg-type]
    # Sites of several kinds, or with gaps, make no grid: they are listed.
    listed: dict[str, list[Site]] = {}
    for site in sites:
        kept = Site(site.name, *(getattr(site, field) if axis in over else None for field, axis in _fields(site)))
        listed.setdefault(str(kept), []).append(site)
    return Grid(("site",), {"site": tuple(listed)}, [tuple(group) for group in listed.values()], "")


def _fields(site: Site) -> list[tuple[str, str]]:
    return [("layer", "layer"), ("head", site.kind.head_axis or "head"), ("pos", "pos"), ("neuron", "neuron")]


def _label(site: Site, axis: str) -> Label | None:
    if axis in ("head", "kv_head"):
        return site.head if site.kind.head_axis == axis else None
    return getattr(site, axis)


def _split(site: Site, axis: str, model: Model, length: int) -> list[Site]:
    """The parts of a site along an axis, unless it names one part already."""
    if axis == "layer" or _label(site, axis) is not None:
        return [site]
    if axis == "pos":
        if site.kind.pos_axis is None:
            raise SelectorError(f"{site} has no positions to sweep over")
        return [site.at(pos) for pos in range(length)]
    if axis == "neuron":
        return [replace(site, neuron=i) for i in range(getattr(model.cfg, site.kind.axes[-1]))]
    if site.kind.head_axis != axis:
        raise SelectorError(f"{site} has no axis {axis!r}; its axes are {' '.join(site.kind.axes)}")
    return [replace(site, head=i) for i in range(model.cfg.n_heads if axis == "head" else model.cfg.n_kv_heads)]


def patch(
    model: Model,
    task: Task,
    at: str | Site | Selection,
    *,
    over: Sequence[str] | None = None,
    metric: MetricLike = None,
    direction: Direction = "denoise",
    normalize: bool = True,
    progress: bool = False,
) -> Effects:
    """Which activations carry the difference between the clean and the corrupt prompts?

    For each cell s, run the receiving prompt with a(s) := a_other(s). The effect is the mean over prompts of
    m(patched) - m(receiving), divided (``normalize``) by the mean of m(other) - m(receiving).

    Parameters
    ----------
    model, task
        What to run.
    at
        A selector: ``"L*.H*.z"`` for every head, ``"L*.resid_post"``, ``"L*.H*.z | L*.mlp_out"``.
    over
        Axes of the result, of ``layer head kv_head pos neuron``. Default: those that the selector names apart.
        ``over=("layer", "pos")`` adds positions; an axis left out is patched together.
    metric
        A name, a `Metric` or a function of (logits ``[batch vocab]`` at the answer position, task). Default: the task's.
    direction
        ``"denoise"``: clean values into the corrupt run (is it enough?). ``"noise"``: corrupt values into the clean
        run (is it needed?).
    normalize
        0 is the receiving run, 1 the other run. ``False`` gives the metric's own unit.
    progress
        Show a progress bar.

    Returns
    -------
    Effects
        One cell for each combination, per example.

    Raises
    ------
    SelectorError, SiteError
        The selector names nothing, or a site that this model does not have.
    MetricError
        Clean and corrupt prompts give the same metric, so that nothing can be normalised.

    Notes
    -----
    Cost: 2 forward passes for the two runs, and one for each cell, packed as rows of few calls.

    References
    ----------
    Vig et al. 2020 (2004.12265); Meng et al. 2022 (2202.05262); Zhang and Nanda 2023 (2309.16042).

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> effects = mi.patch(toy.model, toy.task, "L*.H*.z")
    >>> effects.axes
    ('layer', 'head')
    """
    selector, (at, task) = at, own_ends(model, at, task)
    length = task.clean.shape[1]
    grid = grid_of(model, at, length, over)
    everything = Selection(tuple(dict.fromkeys(site for cell in grid.cells for site in cell)))
    runs = compare_runs(model, task, everything, metric=metric, direction=direction)
    unit = runs.unit(normalize)
    cells = [[(site, runs.other[site]) for site in cell] for cell in grid.cells]
    received = runs.received()
    plan = plan_cells(
        model,
        len(task),
        length,
        grid.cells,
        start=int(runs.task.first_difference.min()),
        read=runs.task.answer_pos,
    )
    flat = torch.empty(len(cells), len(task))
    results = sweep(
        plan,
        model,
        runs.tokens,
        cells,
        read=runs.task.answer_pos,
        positions=runs.task.positions,
        label=f"patch {selector}",
        progress=progress,
    )
    for index, logits in results:
        flat[index] = ((runs.measure(logits) - received) / unit).float().cpu()
    what = grid.site or (str(selector) if len(str(selector)) <= 40 else f"{len(cells)} sites")
    return Effects(
        quantity=f"patching {what} ({direction})",
        axes=grid.axes,
        coords=grid.coords,
        per_example=grid.arrange(flat),
        baseline=runs.baseline,
        provenance=runs.provenance(
            method="activation patching",
            site=grid.site,
            at=str(selector),
            normalized=normalize,
            forwards=2 + len(cells),
            plan=repr(plan),
        ),
    )
