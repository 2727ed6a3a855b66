"""What can be done to an activation: small frozen values that print themselves and travel as JSON.

========  =========================================================================
Replace   put another value there: a patch from another run, a constant, a counterfactual
Freeze    hold activations at the values of a recorded run
Mean      put one value there for all rows: the mean over a reference
Zero      the crudest knock-out; the value zero is usually off the model's distribution
Resample  put the value of another row there
Swap      exchange the values of two rows
Add       steer: add a vector
Noise     disturb: add draws from a normal distribution
Scale     turn a component up or down
Clamp     keep values between two bounds
Project   remove a direction or subspace, or keep nothing else
Call      any function of the value; the only one that cannot be written to a file
========  =========================================================================

Edits say *where* with a selector, optionally for some rows of the batch only. Those at the same place are
applied by ``priority``, then in the order given. Two replacements of the same numbers are an error.
Where the values of an ablation come from is said by `mechinterp.Ablation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mechinterp.core.edit import Edit, Number, fitting
from mechinterp.core.rows import Noise, Resample, Swap
from mechinterp.core.select import select
from mechinterp.core.sites import Site
from mechinterp.errors import EditError, did_you_mean

__all__ = [
    "Add",
    "Call",
    "Clamp",
    "Edit",
    "Freeze",
    "Mean",
    "Noise",
    "Project",
    "Replace",
    "Resample",
    "Scale",
    "Swap",
    "Zero",
    "edit_from_json",
]


def _vector(value: Tensor, given: Tensor, site: Site, edit: Edit) -> Tensor:
    """A direction ``[d]`` for the last axis, the one kind of value that is meant for all rows and positions."""
    # Of a single neuron the last axis left is the position, and a vector along it is no direction.
    if given.ndim == 1 and site.neuron is None and value.ndim and given.shape[0] == value.shape[-1]:
        return fitting(value, given.expand_as(value), site, edit)
    return fitting(value, given, site, edit)


def _given(values: Tensor | Mapping[Site, Tensor], site: Site, edit: Edit) -> Tensor:
    """The value for one site."""
    if isinstance(values, Tensor):
        return values
    try:
        return values[site]
    except KeyError:
        raise EditError(f"{type(edit).__name__} at {site}: no value was given for it. {did_you_mean(site, values)}") from None


@dataclass(frozen=True, eq=False, repr=False)
class Replace(Edit):
    """Put ``value`` there. A tensor of exactly the selected shape ``[rows ...]``, or a mapping from site to tensor."""

    value: Tensor | Mapping[Site, Tensor]
    absolute: ClassVar[bool] = True

    def apply(self, value: Tensor, site: Site) -> Tensor:
        return fitting(value, _given(self.value, site, self), site, self)


@dataclass(frozen=True, eq=False, repr=False)
class Freeze(Edit):
    """Hold activations at the values that they had in a recorded run, bit for bit: ``Freeze("L*.attn_out", run.cache)``.

    Row i gets the recorded row i; with ``rows=(first, stop)`` it may hold the whole batch or those rows alone. Of a
    `Cache` any part of what was captured can be frozen (a head of ``L5.z``); of another mapping, the sites in it.
    """

    values: Mapping[Site, Tensor]
    absolute: ClassVar[bool] = True

    def apply(self, value: Tensor, site: Site) -> Tensor:
        given = _given(self.values, site, self)
        if self.rows is not None and len(given) != len(value):
            given = given[slice(*self.rows)]
        return fitting(value, given, site, self)


@dataclass(frozen=True, eq=False, repr=False)
class Mean(Edit):
    """Put one value there for all rows: the mean over a reference, which ``mi.Ablation("mean").edit(...)`` computes.

    ``value``, or the one for each site, has the shape of the selected part without rows; it may also leave out the position
    (pooled), or have 1 in place of both: ``[d]``, ``[pos d]`` or ``[1 1 d]`` at ``L5.mlp_out``.
    """

    value: Tensor | Mapping[Site, Tensor]
    absolute: ClassVar[bool] = True

    def apply(self, value: Tensor, site: Site) -> Tensor:
        given = _given(self.value, site, self)
        full = given.reshape((1,) * (value.ndim - given.ndim) + given.shape)
        spread = {0}
        axis = site.kind.pos_axis
        if site.pos is None and axis is not None:
            head = site.kind.axes.index(site.kind.head_axis) if site.head is not None and site.kind.head_axis else axis
            spread.add(axis - (head < axis))
        sizes = zip(full.shape, value.shape, strict=False)
        if full.ndim == value.ndim and all(have in (size, 1 if i in spread else size) for i, (have, size) in enumerate(sizes)):
            full = full.expand_as(value)
        return fitting(value, full if full.shape == value.shape else given, site, self)


@dataclass(frozen=True, eq=False, repr=False)
class Add(Edit):
    """Add ``scale * value``: a vector ``[d]`` for every row and position, or a tensor of exactly the selected shape."""

    value: Tensor
    scale: Number = 1.0

    def apply(self, value: Tensor, site: Site) -> Tensor:
        return value + self.scale * _vector(value, self.value, site, self)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Edit):
    """Multiply by ``factor``."""

    factor: Number

    def apply(self, value: Tensor, site: Site) -> Tensor:
        return value * self.factor


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Edit):
    """Set to zero."""

    absolute: ClassVar[bool] = True

    def apply(self, value: Tensor, site: Site) -> Tensor:
        return torch.zeros_like(value)


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Edit):
    """Keep every number between ``low`` and ``high``; one of them may be left out."""

    low: Number | None = None
    high: Number | None = None

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise EditError("Clamp has no bounds; give low=, high= or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise EditError(f"Clamp: nothing is between low={self.low} and high={self.high}")

    def apply(self, value: Tensor, site: Site) -> Tensor:
        return value.clamp(self.low, self.high)


@dataclass(frozen=True, eq=False, repr=False)
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


@dataclass(frozen=True, eq=False, repr=False)
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
        return fitting(value, result, site, self)

    def to_json(self) -> dict[str, Any]:
        raise EditError("Call holds a Python function and cannot be written to a file; use one of the named edits")


_EDITS: dict[str, type[Edit]] = {
    cls.__name__: cls for cls in (Replace, Freeze, Mean, Zero, Resample, Swap, Add, Noise, Scale, Clamp, Project)
}
# The name of one site says all of it; no model's sizes are needed to read it.
_ANY = SimpleNamespace(**dict.fromkeys(("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp"), 1 << 30))


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
        content[key] = _read(entry)
    missing = [key for key, each in known.items() if each.default is MISSING and key not in content]
    if missing:
        raise EditError(f"{name} needs {', '.join(missing)}; there is only {', '.join(content) or 'nothing'}")
    return _EDITS[name](**content)


def _read(entry: Any) -> Any:
    if isinstance(entry, Mapping) and "tensor" in entry:
        return torch.tensor(entry["tensor"], dtype=_dtype(entry.get("dtype")))
    if isinstance(entry, Mapping) and "sites" in entry:
        return {select(site, _ANY).sites[0]: _read(value) for site, value in entry["sites"].items()}
    return tuple(_read(each) for each in entry) if isinstance(entry, list) else entry


def _dtype(name: object) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise EditError(f"there is no dtype {name!r}; write one of torch's, such as 'float32'")
    return found
