"""What can be done to an activation: small frozen values that print themselves and travel as JSON.

========  =========================================================================
Replace   put another value there: a patch from another run, a constant, a counterfactual
Add       steer: add a vector
Scale     turn a component up or down
Zero      the crudest knock-out; the value zero is usually off the model's distribution
Project   remove a direction or subspace, or keep nothing else
Call      any function of the value; the only one that cannot be written to a file
========  =========================================================================

Edits say *where* with a selector, optionally for some rows of the batch only. Those at the same place are
applied by ``priority``, then in the order given. Two replacements of the same numbers are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import EditError, did_you_mean

__all__ = ["Add", "Call", "Edit", "Project", "Replace", "Scale", "Zero", "edit_from_json"]

Where = str | Site | Selection


@dataclass(frozen=True, kw_only=True)
class _Scope:
    """Fields that every edit has."""

    rows: tuple[int, int] | None = None
    priority: int = 0


@dataclass(frozen=True)
class Edit(_Scope):
    """Base of all edits: ``at`` says where, ``rows=(first, stop)`` which prompts, ``priority`` when.

    A subclass gives `apply`, which sees the selected part ``[rows ...]`` and returns its new value.
    """

    at: Where
    # Two edits that set a value outright cannot both hold.
    absolute: ClassVar[bool] = False

    def apply(self, value: Tensor, site: Site) -> Tensor:
        """The new value of this part of the activation."""
        raise EditError(f"{type(self).__name__} does not say what to do; use one of its subclasses, such as Zero")

    def to_json(self) -> dict[str, Any]:
        """Plain data that `edit_from_json` reads back."""
        data: dict[str, Any] = {"edit": type(self).__name__}
        for each in fields(self):
            content = getattr(self, each.name)
            if isinstance(content, Tensor):
                content = {"tensor": content.tolist(), "dtype": str(content.dtype).removeprefix("torch.")}
            elif isinstance(content, Selection):
                content = " | ".join(str(site) for site in content)
            elif isinstance(content, Site):
                content = str(content)
            data[each.name] = content
        return data

    def __repr__(self) -> str:
        shown = [str(self.at) if isinstance(self.at, Site) else repr(self.at)]
        for each in fields(self):
            content = getattr(self, each.name)
            if isinstance(content, Tensor):
                content = f"<{list(content.shape)}>"
            elif isinstance(content, Mapping):
                content = f"<{len(content)} values>"
            elif each.name == "at" or content == each.default:
                continue
            shown.append(f"{each.name}={content}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _fitting(value: Tensor, given: Tensor, site: Site, edit: Edit) -> Tensor:
    """The tensor that an edit brings, or an error that says what would fit: nothing is broadcast silently."""
    if given.shape != value.shape:
        raise EditError(
            f"{type(edit).__name__} at {site}: the value has shape {list(given.shape)}, but the activation there has "
            f"{list(value.shape)}; expand it explicitly if one value is meant for all"
        )
    if given.dtype != value.dtype or given.device != value.device:
        raise EditError(
            f"{type(edit).__name__} at {site}: the value is {given.dtype} on {given.device}, the activation "
            f"{value.dtype} on {value.device}; convert it with .to(model.device, model.dtype)"
        )
    return given


def _vector(value: Tensor, given: Tensor, site: Site, edit: Edit) -> Tensor:
    """A direction ``[d]`` for the last axis, the one kind of value that is meant for all rows and positions."""
    # Of a single neuron the last axis left is the position, and a vector along it is no direction.
    if given.ndim == 1 and site.neuron is None and value.ndim and given.shape[0] == value.shape[-1]:
        return _fitting(value, given.expand_as(value), site, edit)
    return _fitting(value, given, site, edit)


@dataclass(frozen=True, repr=False)
class Replace(Edit):
    """Put ``value`` there. A tensor of exactly the selected shape ``[rows ...]``, or a mapping from site to tensor."""

    value: Tensor | Mapping[Site, Tensor]
    absolute: ClassVar[bool] = True

    def apply(self, value: Tensor, site: Site) -> Tensor:
        if isinstance(self.value, Tensor):
            return _fitting(value, self.value, site, self)
        try:
            given = self.value[site]
        except KeyError:
            raise EditError(f"Replace at {site}: no value was given for it. {did_you_mean(site, self.value)}") from None
        return _fitting(value, given, site, self)

    def to_json(self) -> dict[str, Any]:
        if not isinstance(self.value, Tensor):
            raise EditError("Replace with a mapping of values is not written to JSON; write one Replace per site")
        return super().to_json()


@dataclass(frozen=True, repr=False)
class Add(Edit):
    """Add ``scale * value``: a vector ``[d]`` for every row and position, or a tensor of exactly the selected shape."""

    value: Tensor
    scale: float = 1.0

    def apply(self, value: Tensor, site: Site) -> Tensor:
        return value + self.scale * _vector(value, self.value, site, self)


@dataclass(frozen=True, repr=False)
class Scale(Edit):
    """Multiply by ``factor``."""

    factor: float

    def apply(self, value: Tensor, site: Site) -> Tensor:
        return value * self.factor


@dataclass(frozen=True, repr=False)
class Zero(Edit):
    """Set to zero."""

    absolute: ClassVar[bool] = True

    def apply(self, value: Tensor, site: Site) -> Tensor:
        return torch.zeros_like(value)


@dataclass(frozen=True, repr=False)
class Project(Edit):
    """Remove the span of ``directions`` ``[d]`` or ``[n d]`` (default), or with ``onto=True`` keep nothing else."""

    directions: Tensor
    onto: bool = False

    def apply(self, value: Tensor, site: Site) -> Tensor:
        rows = self.directions.unsqueeze(0) if self.directions.ndim == 1 else self.directions
        rows = rows.to(value.device, torch.promote_types(value.dtype, torch.float32))
        if rows.ndim != 2 or rows.shape[-1] != value.shape[-1] or site.neuron is not None:
            raise EditError(
                f"Project at {site}: the directions have shape {list(self.directions.shape)}, not [d] or [n d] with the "
                f"activation's last axis, d = {site.kind.axes[-1]}{'' if site.neuron is None else ' (one neuron is not enough)'}"
            )
        # An orthonormal basis of the span: directions need be neither unit length nor perpendicular, nor independent.
        _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
        independent = sizes > sizes[0] * max(rows.shape) * torch.finfo(rows.dtype).eps
        if not independent.any():
            raise EditError(f"Project at {site}: the directions are all zero, so they span nothing")
        basis = basis[independent].T.to(value.dtype)
        along = (value @ basis) @ basis.T
        return along if self.onto else value - along


@dataclass(frozen=True, repr=False)
class Call(Edit):
    """Apply any function ``function(value, site) -> new value``, or one that changes its argument in place and returns nothing.

    Cannot be serialised.
    """

    function: Callable[[Tensor, Site], Tensor | None]

    def apply(self, value: Tensor, site: Site) -> Tensor:
        # A function that works in place must not reach tensors that somebody keeps.
        own = value.clone()
        result: object = self.function(own, site)
        if result is None:
            return own
        if not isinstance(result, Tensor):
            raise EditError(f"Call at {site}: the function gave {type(result).__name__}, not a tensor")
        return _fitting(value, result, site, self)

    def to_json(self) -> dict[str, Any]:
        raise EditError("Call holds a Python function and cannot be written to a file; use one of the named edits")


_EDITS: dict[str, type[Edit]] = {cls.__name__: cls for cls in (Replace, Add, Scale, Zero, Project)}


def edit_from_json(data: Mapping[str, Any]) -> Edit:
    """The edit that `Edit.to_json` wrote.

    Raises
    ------
    EditError
        No such edit, or not its fields.

    Examples
    --------
    >>> edit_from_json(Scale("L3.mlp_out", 0.5).to_json())
    Scale('L3.mlp_out', factor=0.5)
    """
    content = dict(data)
    name = content.pop("edit", None)
    if name not in _EDITS:
        raise EditError(f"there is no edit {name!r} that can be read from JSON. {did_you_mean(name, _EDITS)}")
    known = {each.name: each for each in fields(_EDITS[name])}
    for key, entry in content.items():
        if key not in known:
            raise EditError(f"{name} has no field {key!r}. {did_you_mean(key, known)}")
        if isinstance(entry, Mapping) and "tensor" in entry:
            content[key] = torch.tensor(entry["tensor"], dtype=_dtype(entry.get("dtype")))
        elif key == "rows" and entry is not None:
            content[key] = tuple(entry)
    missing = [key for key, each in known.items() if each.default is MISSING and key not in content]
    if missing:
        raise EditError(f"{name} needs {', '.join(missing)}; there is only {', '.join(content) or 'nothing'}")
    return _EDITS[name](**content)


def _dtype(name: object) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise EditError(f"there is no dtype {name!r}; write one of torch's, such as 'float32'")
    return found
