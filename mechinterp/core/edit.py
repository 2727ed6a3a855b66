"""What all edits have in common: frozen values that say where, print themselves, compare, and travel as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import EditError

__all__ = ["Edit", "Number", "Where", "fitting"]

Where = str | Site | Selection
# People write 2 where 2.0 is meant.
Number = float | int

_LARGEST = 1_000_000


@dataclass(frozen=True, kw_only=True)
class _Scope:
    """Fields that every edit has."""

    rows: tuple[int, int] | None = None
    priority: int = 0


@dataclass(frozen=True, eq=False)
class Edit(_Scope):
    """Base of all edits: ``at`` says where, ``rows=(first, stop)`` which prompts, ``priority`` when.

    A subclass gives `apply`, which sees the selected part ``[rows ...]`` and returns its new value. Two edits are equal
    if they are of one class and hold the same place (however it is written), settings and numbers.
    """

    at: Where
    # Two edits that set a value outright cannot both hold.
    absolute: ClassVar[bool] = False

    def apply(self, value: Tensor, site: Site) -> Tensor:
        """The new value of this part of the activation."""
        raise EditError(f"{type(self).__name__} does not say what to do; use one of its subclasses, such as Zero")

    def to_json(self) -> dict[str, Any]:
        """Plain data that `edit_from_json` reads back.

        Raises
        ------
        EditError
            It holds more than a million numbers, for which JSON is the wrong place.
        """
        held = sum(content.numel() for each in fields(self) for content in _tensors(getattr(self, each.name)))
        if held > _LARGEST:
            raise EditError(
                f"{type(self).__name__} holds {held} numbers, too many for JSON (at most {_LARGEST}); write its tensors with "
                "safetensors.torch.save_file and make the edit anew from what load_file gives"
            )
        return {"edit": type(self).__name__} | {each.name: _plain(getattr(self, each.name)) for each in fields(self)}

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, each.name), getattr(other, each.name)) for each in fields(self))

    def __hash__(self) -> int:
        # What they hold may be large; where they act is enough to tell most edits apart.
        return hash((type(self), _plain(self.at), self.rows, self.priority))

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


def fitting(value: Tensor, given: Tensor, site: Site, edit: Edit) -> Tensor:
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


def _tensors(content: object) -> list[Tensor]:
    if isinstance(content, Mapping):
        return list(content.values())
    return [content] if isinstance(content, Tensor) else []


def _plain(content: Any) -> Any:
    """As JSON has it."""
    if isinstance(content, Tensor):
        return {"tensor": content.tolist(), "dtype": str(content.dtype).removeprefix("torch.")}
    if isinstance(content, Selection):
        return " | ".join(str(site) for site in content)
    if isinstance(content, Site):
        return str(content)
    if isinstance(content, Mapping):
        return {"sites": {str(site): _plain(tensor) for site, tensor in content.items()}}
    return [_plain(each) for each in content] if isinstance(content, tuple) else content


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return set(one) == set(other) and all(_same(one[key], other[key]) for key in one)
    # A place is the same however it is written.
    return bool(_plain(one) == _plain(other))
