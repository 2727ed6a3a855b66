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
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from types import FunctionType, MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp.core.claims import Claim, conflict
from mechinterp.core.edits import Call, Edit
from mechinterp.core.model import Model
from mechinterp.core.places import Place
from mechinterp.core.select import Selection, select
from mechinterp.core.sites import Site
from mechinterp.core.spans import SCOPES, Scope, Span, part_of
from mechinterp.errors import EditError, InertError, SelectorError, did_you_mean

__all__ = ["HookRegistry", "active_registries", "block_calls", "foreign_hooks"]

# Hooks are global to all threads, so each one asks whether its registry is active *here*.
_ACTIVE: ContextVar[tuple[int, ...]] = ContextVar("mechinterp_active_registries", default=())
_NUMBERS = count()
# A generator that holds a registry may be closed in another context than it began in, and only this one is told then.
_ATTACHED: set[int] = set()


def _begin(number: int) -> None:
    _ATTACHED.add(number)
    _ACTIVE.set((*_ACTIVE.get(), number))


def _end(number: int) -> None:
    _ATTACHED.discard(number)
    _ACTIVE.set(tuple(each for each in _ACTIVE.get() if each != number))


@dataclass
class _Step:
    """One thing to do at one place."""

    place: Place
    act: Callable[[Tensor, dict[str, Tensor]], Tensor | None]
    label: str
    priority: int
    fired: int = 0
    # How often it changed something: while generating, the positions of an edit come in one pass of many.
    acted: int = 0


@dataclass(frozen=True, eq=False)
class _Claim:
    """An edit that sets numbers outright, of which no other may set the same."""

    site: Site
    edit: Edit
    scope: Scope


class _AllDone(BaseException):
    """Ends a forward pass of which nothing more is wanted; not an `Exception`, which a model's own code might catch."""


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
    lengths
        ``[batch]`` real tokens of each prompt, where they are padded on the right: ``[-1]`` is then the last real one.

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
    lengths: Tensor | None = None
    partial: bool = False
    _steps: list[_Step] = field(default_factory=list, repr=False)
    _claims: dict[Site, list[_Claim]] = field(default_factory=dict, repr=False)
    _forwards: int = field(default=0, repr=False)
    _scopes: list[Any] = field(default_factory=list, repr=False)
    # Of the next pass while generating: its spans, and which place of the sequence its tensors begin with.
    _spans: tuple[Span, ...] = field(default=(), repr=False)
    _offset: int = field(default=0, repr=False)
    _number: int = field(default=-1, repr=False)
    _may_stop: bool = field(default=False, repr=False)
    _waiting: int = field(default=0, repr=False)
    _checked: set[Any] = field(default_factory=set, repr=False)

    # -- declaring -----------------------------------------------------------------------------

    def add(
        self,
        edit: Edit | str | Site | Selection,
        function: Callable[[Tensor, Site], Tensor | None] | None = None,
        *,
        rows: tuple[int, int] | None = None,
        priority: int = 0,
        scope: Scope = "all",
    ) -> None:
        """Add an edit, or ``function(value, site)`` at a selector; ``scope`` is for `mechinterp.generate`.

        Raises
        ------
        SelectorError, SiteError
            The selector names nothing on this model, or a site that cannot be edited on it.
        EditError
            A selector without a function; or an edit together with what only a function takes.
        """
        if scope not in SCOPES:
            raise EditError(f"there is no scope {scope!r}. {did_you_mean(scope, SCOPES)}")
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
            self._add_edit(edit, site, scope)

    def _add_edit(self, edit: Edit, site: Site, scope: Scope) -> None:
        place = self.model.place(site)
        label = f"{edit!r} at {site}"
        if edit.absolute:
            self._claims.setdefault(site.whole, []).append(_Claim(site, edit, scope))

        def act(hooked: Tensor, kept: dict[str, Tensor]) -> Tensor:
            old = place.read(hooked, kept)
            new = old.clone()
            for span in self._now(old, site):
                if edit.absolute:
                    self._check_claims(site.whole, span, old.shape[0])
                if span.within(scope) and _edit_span(edit, site, span, old, new, self):
                    step.acted += 1
            return place.write(hooked, old, new, kept)

        step = _Step(place, act, label, edit.priority)
        self._steps.append(step)

    def capture(self, selection: Selection, into: MutableMapping[Site, Tensor], *, grad: bool = False) -> None:
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

    # -- positions -----------------------------------------------------------------------------

    def sees(self, spans: Iterable[Span], offset: int) -> None:
        """What the next forward pass computes, for methods that feed a prompt in parts."""
        self._spans, self._offset = tuple(spans), offset

    def _now(self, value: Tensor, site: Site) -> tuple[Span, ...]:
        """The spans of this forward pass."""
        if self._spans:
            return self._spans
        axis = site.kind.pos_axis
        width = 0 if axis is None else value.shape[axis]
        lengths = None if self.lengths is None else tuple(self.lengths.tolist())
        if lengths is not None and value.shape[0] % len(lengths):
            raise SelectorError(f"{site}: lengths are given for {len(lengths)} prompts, the batch has {value.shape[0]}")
        return (Span(lengths, width),)

    def _rows(self, site: Site, rows: tuple[int, int] | None, batch: int) -> slice:
        if rows is not None and not 0 <= rows[0] < rows[1] <= batch:
            raise EditError(f"rows {rows} at {site} do not lie in a batch of {batch} prompts; write (first, stop)")
        if isinstance(site.pos, str) and site.pos in self.positions and batch % len(self.positions[site.pos]):
            given = len(self.positions[site.pos])
            raise SelectorError(f"{site}: position {site.pos!r} is given for {given} prompts, the batch has {batch}")
        return slice(0, batch) if rows is None else slice(*rows)

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
        handles: list[Any] = []
        kept: dict[tuple[int, str], Tensor] = {}
        self._number = me = next(_NUMBERS)
        self._forwards = int(self.partial)
        self._checked.clear()
        for step in self._steps:
            step.fired = step.acted = 0
        # Hooks that others attached, and registries around this one, expect whole forward passes.
        wanted = self._may_stop and not active_registries() and not foreign_hooks(self.model)
        # Of a module that is called alone no beginning is seen.
        self._waiting = len(self._steps) if wanted and self.partial else -1

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            if me in _ACTIVE.get():
                self._forwards += 1
                self._waiting = len(self._steps) if wanted else -1
                kept.clear()

        try:
            if self._steps:
                handles.append(self.model.hf.register_forward_pre_hook(begin, with_kwargs=True))
            for point, steps, keeps in self._by_point():
                handles.append(point.register_forward_hook(self._hook(steps, keeps, kept)))
            _begin(me)
            try:
                yield
            finally:
                _end(me)
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
        me = self._number

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
            if self._waiting > 0 and steps:
                self._waiting -= len(steps)
                if not self._waiting:
                    raise _AllDone
            if keeps:
                kept[id(module)] = tensor
            if is_output:
                output.logits = tensor
                return output
            return tensor

        return hook

    def _check_claims(self, whole: Site, span: Span, batch: int) -> None:
        """Here and not on entering, since only now the positions are numbers: [4] and [-1] may be one of them."""
        seen = (whole, batch, span.width, span.token)
        if len(self._claims[whole]) < 2 or seen in self._checked:
            return
        self._checked.add(seen)
        claims = []
        for each in self._claims[whole]:
            rows = self._rows(each.site, each.edit.rows, batch)
            chosen = range(rows.start, rows.stop)
            place = None if each.site.pos is None else span.locate(chosen, each.site.pos, self.positions, each.site)
            if span.within(each.scope) and (each.site.pos is None or place is not None):
                claims.append(Claim(each.site, chosen, place, each.edit))
        if found := conflict(claims):
            one, other = found
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
            if self._spans and step.priority != sys.maxsize and not step.acted:
                last = self._spans[-1]
                raise InertError(
                    f"{step.label} was never reached: the longest prompt has {last.longest} tokens, and "
                    f"{0 if last.token is None else last.token + 1} generated ones were read by the model (the last one never is)"
                )

    @contextmanager
    def stopping_early(self) -> Iterator[None]:
        """Attached, and a forward pass inside ends as soon as every edit and capture has fired, without an answer."""
        self._may_stop = True
        try:
            with self, suppress(_AllDone):
                yield
        finally:
            self._may_stop = False


@contextmanager
def block_calls(model: Model) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments with which the model calls each block, in order, during the forward pass inside."""
    calls: list[dict[str, Any]] = [{} for _ in range(model.cfg.n_layers)]
    me = next(_NUMBERS)
    _begin(me)
    handles = []

    def note(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if me in _ACTIVE.get():
                calls[layer] = dict(kwargs)

        return hook

    try:
        for layer in range(model.cfg.n_layers):
            handles.append(model.block(layer).register_forward_pre_hook(note(layer), with_kwargs=True))
        yield calls
    finally:
        _end(me)
        for handle in handles:
            handle.remove()


def active_registries() -> int:
    """How many registries act on forward passes of this thread (and task) now."""
    return sum(1 for number in _ACTIVE.get() if number in _ATTACHED)


def foreign_hooks(model: Model) -> int:
    """How many hooks sit on the model that are neither ours nor transformer_lens's own."""
    found = 0
    for module in model.hf.modules():
        # Asked before every sweep, of thousands of modules most of which have none.
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            if hooks:
                found += sum(1 for hook in hooks.values() if not _is_house(hook))
    return found


def _is_house(hook: Callable[..., Any]) -> bool:
    """transformer_lens and transformers leave some hooks of their own; ours may be there for another thread."""
    name = getattr(hook, "__qualname__", "")
    if name.startswith(("BlockBridge.", "HookRegistry.", "block_calls.", "install_output_capuring_hook")):
        return True
    # On OPT transformer_lens keeps tensors with hooks that it attaches as its users would.
    inner = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
    functions = [each for each in inner if isinstance(each, FunctionType | MethodType)]
    return any(str(each.__module__).startswith("transformer_lens.") for each in functions)


def _check_written(old: Tensor, new: Any, label: str) -> None:
    """Raise `EditError` unless a new value fits the old one: assignment would broadcast and convert it silently."""
    if not isinstance(new, Tensor):
        raise EditError(f"{label} gave {type(new).__name__}, not a tensor of shape {list(old.shape)}")
    if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
        raise EditError(
            f"{label} gave {new.dtype} of shape {list(new.shape)} on {new.device}; the activation there is {old.dtype} "
            f"of shape {list(old.shape)} on {old.device}"
        )


def _edit_span(edit: Edit, site: Site, span: Span, old: Tensor, new: Tensor, registry: HookRegistry) -> bool:
    """Write what an edit makes of ``old`` to ``new``, in one span; whether there was anything to do."""
    rows = registry._rows(site, edit.rows, old.shape[0])
    place = None
    if site.pos is not None:
        place = span.locate(range(rows.start, rows.stop), site.pos, registry.positions, site)
        if place is None:
            return False
    index, here = part_of(site, rows, place, old.device)
    cut = span.cut(site, registry._offset)
    source = span.turn(old[cut], site)
    part = source[index]
    try:
        changed = edit.apply(part, site)
    except EditError as error:
        if not span.generating or site.pos is not None:
            raise
        raise EditError(
            f"{error}. While generating, an edit sees the prompt as a whole and then one token at a time: bring a vector [d], "
            "say a position, or limit it with scope='prompt'"
        ) from None
    _check_written(part, changed, f"{edit!r} at {site}")
    if here is not None:
        changed = torch.where(here.reshape(-1, *[1] * (part.ndim - 1)), changed, part)
    if source.shape == old.shape and not span.generating:
        new[index] = changed
    else:
        turned = span.turn(new[cut], site).clone()
        turned[index] = changed
        new[cut] = span.turn(turned, site, back=True)
    return True
