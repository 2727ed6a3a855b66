"""One forward pass with edits and captures: tokens in, `Run` out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mechinterp.core.arguments import check_model
from mechinterp.core.edits import Edit
from mechinterp.core.hooks import HookRegistry
from mechinterp.core.model import Model
from mechinterp.core.select import Selection, resolve_position, select
from mechinterp.core.sites import Site
from mechinterp.errors import SelectorError, SiteError, did_you_mean

__all__ = ["Cache", "Prompts", "Run", "run", "tokens_of"]


@runtime_checkable
class Prompts(Protocol):
    """What the core needs of a task: its clean tokens and named positions."""

    @property
    def clean(self) -> Tensor: ...
    @property
    def positions(self) -> Mapping[str, Tensor]: ...


def tokens_of(prompts: Tensor | Prompts) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Tokens ``[batch pos]`` and named positions of a tensor or a task (its clean prompts)."""
    if isinstance(prompts, Tensor):
        return (prompts.unsqueeze(0) if prompts.ndim == 1 else prompts), {}
    return prompts.clean, prompts.positions


@dataclass(frozen=True, eq=False)
class Cache(Mapping[Site, Tensor]):
    """The activations that a run kept.

    Indexed by `Site` or by its name (``cache["L9.H6.z[-1]"]``); iterating gives the sites that were asked for.
    Each activation is stored once, whole; a head or position of it is a view.
    """

    model: Model
    selection: Selection
    whole: Mapping[Site, Tensor]
    positions: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, key: Site | str) -> Tensor:
        sites = select(key, self.model.cfg).sites
        if len(sites) != 1:
            raise SiteError(f"{key!r} names {len(sites)} activations; ask for one, or loop over the cache")
        site = sites[0]
        try:
            value = self.whole[site.whole]
        except KeyError:
            kept = [str(each) for each in self.whole]
            raise SiteError(
                f"{site} was not captured. {did_you_mean(site, kept)} Ask for it with capture={str(site)!r}"
            ) from None
        if site == site.whole:
            # Itself and not a view of it, which no gradient would reach.
            return value
        axes = site.kind.axes
        index: list[Any] = [slice(None)] * len(axes)
        if site.head is not None:
            index[axes.index(site.kind.head_axis or "")] = site.head
        if site.neuron is not None:
            index[-1] = site.neuron
        if site.pos is not None:
            axis = site.kind.pos_axis
            if axis is None:
                raise SiteError(f"{site} has no position axis")
            pos = resolve_position(site.pos, value.shape[axis], self.positions, site)
            if isinstance(pos, str):
                index[0] = torch.arange(value.shape[0], device=value.device)
                index[axis] = self.positions[pos].to(value.device)
            else:
                index[axis] = pos
        return value[tuple(index)]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.selection)

    def __len__(self) -> int:
        return len(self.selection)

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.whole.values())

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (str(site), " ".join(site.kind.axes), " x ".join(str(size) for size in tensor.shape))
            for site, tensor in self.whole.items()
        ]

    def __repr__(self) -> str:
        lines = [f"Cache: {len(self.whole)} activations, {self.bytes / 2**20:.1f} MiB"]
        lines += [f"  {name:<16} {axes:<24} {shape}" for name, axes, shape in self._rows()[:12]]
        if len(self.whole) > 12:
            lines.append(f"  ... {len(self.whole) - 12} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows()[:40])
        more = f"<p>... {len(self.whole) - 40} more</p>" if len(self.whole) > 40 else ""
        head = f"<b>Cache</b>: {len(self.whole)} activations, {self.bytes / 2**20:.1f} MiB"
        return f"{head}<table><tr><th>site</th><th>axes</th><th>shape</th></tr>{body}</table>{more}"


@dataclass(frozen=True, eq=False)
class Run:
    """What one forward pass gave.

    Parameters
    ----------
    logits
        ``[batch pos vocab]``, or ``[batch len(keep) vocab]``.
    cache
        The captured activations.
    tokens
        What was run.
    edits
        What was changed on the way.
    """

    logits: Tensor
    cache: Cache
    tokens: Tensor
    edits: tuple[Edit, ...]

    def __getitem__(self, key: Site | str) -> Tensor:
        return self.cache[key]

    def __repr__(self) -> str:
        batch, pos = self.tokens.shape
        edits = f", {len(self.edits)} edits" if self.edits else ""
        return f"Run: {batch} prompts of {pos} tokens{edits}, {len(self.cache.whole)} activations captured"


def run(
    model: Model,
    prompts: Tensor | Prompts,
    *,
    edits: Edit | Iterable[Edit] = (),
    capture: str | Site | Selection | None = None,
    keep: Iterable[int] | None = None,
    grad: bool = False,
) -> Run:
    """What does the model compute on these prompts, with these edits?

    Parameters
    ----------
    model
        From `mechinterp.load`.
    prompts
        Tokens ``[batch pos]``, or a task (its clean prompts and named positions).
    edits
        One, or several: applied by priority, then in this order.
    capture
        A selector of activations to keep.
    keep
        Positions to unembed (default: all). The site ``logits`` cannot be edited or captured then.
    grad
        Keep the graph, so that ``torch.autograd.grad(metric, run[site])`` works. Off by default. For whole activations
        only (a head is a view, which the model does not go on with), and not for sites that are computed beside the
        model's own path (``pos_embed resid_mid head_out q_in k_in v_in``): torch says that they were not used.

    Returns
    -------
    Run
        ``.logits``, ``.cache``, and ``run["L5.H1.z"]``.

    Raises
    ------
    SelectorError, SiteError, EditError, InertError
        As `HookRegistry`.

    Notes
    -----
    Cost: one forward pass.

    Examples
    --------
    >>> import mechinterp as mi
    >>> model = mi.load("toy:induction")
    >>> out = mi.run(model, mi.tasks.induction(model.cfg.d_vocab, n=2, length=4, seed=0), capture="L*.H0.z")
    >>> [str(site) for site in out.cache]
    ['L0.H0.z', 'L1.H0.z']
    """
    check_model(model, prompts)
    tokens, positions = tokens_of(prompts)
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    kept: dict[Site, Tensor] = {}
    selection = Selection(()) if capture is None else select(capture, model.cfg)
    registry = HookRegistry(model, positions)
    for edit in edits:
        registry.add(edit)
    if keep is not None:
        touched = [site for edit in edits for site in select(edit.at, model.cfg)]
        for site in (*touched, *selection):
            if site.name == "logits":
                # Position 3 of the prompt would be another row of what is left.
                raise SelectorError(
                    f"with keep= the logits have other positions than the prompts; leave out keep= or {str(site)!r}"
                )
    registry.capture(selection, kept, grad=grad)
    with torch.set_grad_enabled(grad), registry:
        logits = model(tokens, keep=keep)
    return Run(logits, Cache(model, selection, kept, positions), tokens, edits)
