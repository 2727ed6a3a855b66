"""Hooks that are ordered, scoped and checked. The only file that attaches any.

What a `HookRegistry` promises:

* after it is left, also by an exception, the model has exactly the hooks that it had before, and the
  caller's own hooks fired in the meantime;
* every edit and capture fires exactly once per forward pass, or an `InertError` says which did not;
* nothing is broadcast, and two replacements of the same numbers are an error;
* it acts only in the thread (and task) that entered it, so two threads may use one model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import combinations
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp.core.edits import Call, Edit
from mechinterp.core.model import Model
from mechinterp.core.places import Place
from mechinterp.core.select import Selection, resolve_position, select
from mechinterp.core.sites import Site
from mechinterp.errors import EditError, InertError, SelectorError

__all__ = ["HookRegistry", "active_registries", "block_calls", "foreign_hooks"]

# Hooks are global to all threads, so each one asks whether its registry is active *here*.
_ACTIVE: ContextVar[tuple[int, ...]] = ContextVar("mechinterp_active_registries", default=())


@dataclass
class _Step:
    """One thing to do at one place."""

    place: Place
    act: Callable[[Tensor, dict[str, Tensor]], Tensor | None]
    label: str
    priority: int
    fired: int = 0


@dataclass
class _Claim:
    """Which numbers an absolute edit sets."""

    site: Site
    rows: tuple[int, int] | None
    edit: Edit


@dataclass(eq=False)
class HookRegistry:
    """Which edits and captures act on the forward passes inside the ``with`` block?

    Parameters
    ----------
    model
        The model to act on.
    positions
        Named positions, a name to ``[batch]`` positions (``task.positions``), for selectors such as ``"L5.H1.z[S2]"``.
    partial
        Modules of the model are called alone inside the ``with`` block, each once, and not the model itself.

    Raises
    ------
    EditError
        At the forward pass: a value of the wrong shape, dtype or device, or conflicting replacements.
    InertError
        On leaving: something did not fire exactly once per forward pass.

    Notes
    -----
    `mechinterp.run` is the short way for one forward pass. Cost: nothing but the edits themselves; only the
    hook points that are needed get a hook.

    Examples
    --------
    >>> import mechinterp as mi
    >>> model = mi.load("toy:induction")
    >>> registry = mi.HookRegistry(model)
    >>> registry.add(mi.Zero("L1.H0.z"))
    >>> registry.add("L0.resid_post", lambda value, site: value * 1.1)
    >>> with registry:
    ...     logits = model(mi.tasks.induction(model.cfg.d_vocab, n=2, length=4, seed=0).clean)
    """

    model: Model
    positions: Mapping[str, Tensor] = field(default_factory=dict)
    partial: bool = False
    _steps: list[_Step] = field(default_factory=list, repr=False)
    _claims: dict[Site, list[_Claim]] = field(default_factory=dict, repr=False)
    _forwards: int = field(default=0, repr=False)
    _scopes: list[Any] = field(default_factory=list, repr=False)

    # -- declaring -----------------------------------------------------------------------------

    def add(
        self,
        edit: Edit | str | Site | Selection,
        function: Callable[[Tensor, Site], Tensor | None] | None = None,
        *,
        rows: tuple[int, int] | None = None,
        priority: int = 0,
    ) -> None:
        """Add an edit, or ``function(value, site)`` at a selector.

        Raises
        ------
        SelectorError, SiteError
            The selector names nothing on this model, or a site that cannot be edited on it.
        EditError
            A selector without a function; or an edit together with what only a function takes.
        """
        if isinstance(edit, Edit):
            if function is not None or rows is not None or priority:
                raise EditError(
                    f"{edit!r} brings its own function, rows and priority; give rows= and priority= to the edit itself"
                )
        else:
            if function is None:
                raise EditError(f"{edit!r} says where but not what; pass a function, or an edit such as mi.Zero({str(edit)!r})")
            edit = Call(edit, function, rows=rows, priority=priority)
        for site in select(edit.at, self.model.cfg):
            self._add_edit(edit, site)

    def _add_edit(self, edit: Edit, site: Site) -> None:
        place = self.model.place(site)
        if edit.absolute:
            self._claims.setdefault(site.whole, []).append(_Claim(site, edit.rows, edit))

        def act(hooked: Tensor, kept: dict[str, Tensor]) -> Tensor:
            old = place.read(hooked, kept)
            index = self._index(site, edit.rows, old)
            part = old[index]
            new_part = edit.apply(part, site)
            _check_written(part, new_part, f"{edit!r} at {site}")
            new = old.clone()
            new[index] = new_part
            return place.write(hooked, old, new, kept)

        self._steps.append(_Step(place, act, f"{edit!r} at {site}", edit.priority))

    def capture(self, selection: Selection, into: dict[Site, Tensor], *, grad: bool = False) -> None:
        """Keep the (edited) value of each selected activation in ``into``, whole, keyed by ``site.whole``."""
        for whole in dict.fromkeys(site.whole for site in selection):
            place = self.model.place(whole)

            def act(hooked: Tensor, kept: dict[str, Tensor], place: Place = place, whole: Site = whole) -> Tensor | None:
                value = place.read(hooked, kept)
                if value.ndim != len(whole.kind.axes):
                    raise InertError(f"{whole} has shape {list(value.shape)} where the axes are {' '.join(whole.kind.axes)}")
                into[whole] = value if grad else value.detach()
                # A view that the model does not go on with would have no gradient.
                return place.write(hooked, value, value, kept) if grad and not place.needs else None

            # After all edits, so that what is kept is what the model went on with.
            self._steps.append(_Step(place, act, f"capture of {whole}", sys.maxsize))

    def transform(self, site: Site, act: Callable[[Tensor], Tensor], *, priority: int = 0) -> None:
        """Rewrite one whole activation: ``act(value) -> value``, gradients included. For methods, not for notebooks."""
        place = self.model.place(site)

        def rewrite(hooked: Tensor, kept: dict[str, Tensor]) -> Tensor:
            old = place.read(hooked, kept)
            new = act(old)
            _check_written(old, new, f"transform of {site}")
            return place.write(hooked, old, new, kept)

        self._steps.append(_Step(place, rewrite, f"transform of {site}", priority))

    def _index(self, site: Site, rows: tuple[int, int] | None, value: Tensor) -> tuple[Any, ...]:
        """Where the part that ``site`` names lies in the whole value."""
        axes = site.kind.axes
        batch = value.shape[0]
        if rows is not None and not 0 <= rows[0] < rows[1] <= batch:
            raise EditError(f"rows {rows} at {site} do not lie in a batch of {batch} prompts; write (first, stop)")
        chosen: Any = slice(None) if rows is None else slice(*rows)
        index: list[Any] = [chosen] + [slice(None)] * (len(axes) - 1)
        if site.head is not None:
            index[axes.index(site.kind.head_axis or "")] = site.head
        if site.neuron is not None:
            index[site.kind.neuron_axis or -1] = site.neuron
        if site.pos is not None:
            axis = site.kind.pos_axis
            if axis is None:
                raise SelectorError(f"{site} has no position axis")
            pos = resolve_position(site.pos, value.shape[axis], self.positions, site)
            if isinstance(pos, str):
                every = torch.arange(batch, device=value.device)
                index[0] = every[chosen]
                index[axis] = self._named(pos, batch, site).to(value.device)[chosen]
            else:
                index[axis] = pos
        return tuple(index)

    def _named(self, name: str, batch: int, site: Site) -> Tensor:
        where = self.positions[name]
        if batch % where.shape[0]:
            raise SelectorError(f"{site}: position {name!r} is given for {where.shape[0]} prompts, the batch has {batch}")
        return where.repeat(batch // where.shape[0])

    # -- acting --------------------------------------------------------------------------------

    def __enter__(self) -> HookRegistry:
        if self._scopes:
            # Its hooks would be there twice, and every edit would act twice.
            raise EditError("this registry is already attached; make another HookRegistry for a second with block or thread")
        scope = self._attached()
        scope.__enter__()
        self._scopes.append(scope)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._scopes.pop().__exit__(kind, error, trace)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        self._check_claims()
        handles: list[Any] = []
        kept: dict[tuple[int, str], Tensor] = {}
        me = id(self)
        self._forwards = int(self.partial)
        for step in self._steps:
            step.fired = 0

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            if me in _ACTIVE.get():
                self._forwards += 1
                kept.clear()

        try:
            handles.append(self.model.hf.register_forward_pre_hook(begin, with_kwargs=True))
            for point, steps, keeps in self._by_point():
                handles.append(point.register_forward_hook(self._hook(steps, keeps, kept)))
            token = _ACTIVE.set((*_ACTIVE.get(), me))
            try:
                yield
            finally:
                _ACTIVE.reset(token)
        finally:
            for handle in handles:
                handle.remove()
            kept.clear()
        self._check_fired()

    def _by_point(self) -> Iterator[tuple[nn.Module, list[_Step], bool]]:
        """Each hook point with its steps in order, and whether its tensor is kept for another place."""
        points: dict[int, nn.Module] = {}
        steps: dict[int, list[_Step]] = {}
        needed: set[int] = set()
        for step in sorted(self._steps, key=lambda each: (each.place.stage, each.priority)):
            points[id(step.place.point)] = step.place.point
            steps.setdefault(id(step.place.point), []).append(step)
            for _, point in step.place.needs:
                points[id(point)] = point
                needed.add(id(point))
        for key, point in points.items():
            yield point, steps.get(key, []), key in needed

    def _hook(self, steps: list[_Step], keeps: bool, kept: dict[Any, Tensor]) -> Callable[..., Any]:
        me = id(self)

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if me not in _ACTIVE.get():
                return None
            is_output = module is self.model.hf and hasattr(output, "logits")
            tensor = output.logits if is_output else output
            # One for each site, shared by its steps: a place may note there what it wrote.
            noted: dict[Site, dict[str, Tensor]] = {}
            for step in steps:
                step.fired += 1
                names = {name: kept[id(point)] for name, point in step.place.needs}
                result = step.act(tensor, noted.setdefault(step.place.site, names))
                tensor = tensor if result is None else result
            if keeps:
                kept[id(module)] = tensor
            if is_output:
                output.logits = tensor
                return output
            return tensor

        return hook

    def _check_claims(self) -> None:
        for claims in self._claims.values():
            for one, other in combinations(claims, 2):
                if one.edit.priority == other.edit.priority and _overlap(one, other):
                    raise EditError(
                        f"{one.edit!r} and {other.edit!r} both set {one.site}; "
                        "drop one, give them different rows, or say which comes last with priority="
                    )

    def _check_fired(self) -> None:
        if not self._steps:
            return
        if self._forwards == 0:
            raise InertError("no forward pass ran while the hooks were attached; call model(tokens) inside the with block")
        for step in self._steps:
            if step.fired != self._forwards:
                raise InertError(
                    f"{step.label} fired {step.fired} times in {self._forwards} forward passes of {self.model.name} "
                    f"({self.model.cfg.architecture}); this site does not act as its name says there. See model.audit"
                )


@contextmanager
def block_calls(model: Model) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments with which the model calls each block, in order, during the forward pass inside."""
    calls: list[dict[str, Any]] = [{} for _ in range(model.cfg.n_layers)]
    me = object()
    token = _ACTIVE.set((*_ACTIVE.get(), id(me)))
    handles = []

    def note(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if id(me) in _ACTIVE.get():
                calls[layer] = dict(kwargs)

        return hook

    try:
        for layer in range(model.cfg.n_layers):
            handles.append(model.block(layer).register_forward_pre_hook(note(layer), with_kwargs=True))
        yield calls
    finally:
        _ACTIVE.reset(token)
        for handle in handles:
            handle.remove()


def active_registries() -> int:
    """How many registries act on forward passes of this thread (and task) now."""
    return len(_ACTIVE.get())


def foreign_hooks(model: Model) -> int:
    """How many hooks sit on the model that are neither ours nor transformer_lens's own."""
    found = 0
    for module in model.hf.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            found += sum(1 for hook in hooks.values() if not _is_house(hook))
    return found


def _is_house(hook: Callable[..., Any]) -> bool:
    """transformer_lens and transformers leave some hooks of their own; ours may be there for another thread."""
    name = getattr(hook, "__qualname__", "")
    return name.startswith(("BlockBridge.", "HookRegistry.", "block_calls.", "install_output_capuring_hook"))


def _check_written(old: Tensor, new: Any, label: str) -> None:
    """Raise `EditError` unless a new value fits the old one: assignment would broadcast and convert it silently."""
    if not isinstance(new, Tensor):
        raise EditError(f"{label} gave {type(new).__name__}, not a tensor of shape {list(old.shape)}")
    if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
        raise EditError(
            f"{label} gave {new.dtype} of shape {list(new.shape)} on {new.device}; the activation there is {old.dtype} "
            f"of shape {list(old.shape)} on {old.device}"
        )


def _overlap(one: _Claim, other: _Claim) -> bool:
    """Whether two claims on one activation share numbers. Positions from either end may be the same: then yes."""
    if one.rows and other.rows and (one.rows[1] <= other.rows[0] or other.rows[1] <= one.rows[0]):
        return False
    for name in ("head", "neuron"):
        first, second = getattr(one.site, name), getattr(other.site, name)
        if first is not None and second is not None and first != second:
            return False
    first, second = one.site.pos, other.site.pos
    comparable = isinstance(first, int) and isinstance(second, int) and (first < 0) == (second < 0)
    same_kind = comparable or (isinstance(first, str) and isinstance(second, str))
    return not (same_kind and first != second)
