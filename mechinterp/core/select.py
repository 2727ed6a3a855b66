"""Patterns parsed once into sets of sites: ``"L0-5.H*.z"``, ``"L9.H6.z[-1]"``, ``"L*.mlp_out | embed"``.

Grammar
-------
``pattern``  one or more terms joined by ``|``
``term``     ``[Llayers.][Hheads.|KVheads.][Nneurons.]name[positions]``
``indices``  ``*`` (all), ``3``, ``-1`` (from the end), ``0-5`` (both included), ``1,3,5-7``
``positions``  inside brackets: ``3``, ``-1``, ``0-5``, ``1,3,5-7``, ``2:5`` (end excluded), the name of a position of the task,
or the text of a token in quotes: ``L5.resid_post['Mary']`` is where that token stands in each prompt (with or without a space
in front; ``' Mary'`` only with). It has to be there once; ``'Mary'#0`` is the first of several, ``'Mary'#-1`` the last.

Omitting a head, neuron or position means the whole axis in one site; ``*`` means each one separately
(not for positions: how many there are depends on the prompts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast, runtime_checkable

from mechinterp.core.names import refuse_hook_name
from mechinterp.core.sites import KINDS, Site, SiteKind
from mechinterp.errors import SelectorError, SiteError, did_you_mean

__all__ = ["Selection", "is_token_text", "select"]

_TERM = re.compile(
    r"""^\s*
    (?:L(?P<layer>[^.\[\]]+)\.)?
    (?:(?P<axis>H|KV)(?P<head>[^.\[\]A-Za-z]+)\.)?
    (?:N(?P<neuron>[^.\[\]A-Za-z]+)\.)?
    (?P<name>[A-Za-z_]\w*)
    (?:\[(?P<pos>[^\[\]]+)\])?
    \s*$""",
    re.VERBOSE,
)
_INTEGER = re.compile(r"-?\d+")
_RANGE = re.compile(r"(\d+)-(\d+)")
# Quoted texts may hold any sign of the grammar, so they are put aside before it is read.
_QUOTED = re.compile(r"""'[^']+'|"[^"]+\"""")
_ASIDE = re.compile(r"\0(\d+)\0(#-?\d+)?")


@runtime_checkable
class Sized(Protocol):
    """What a selector needs to know of a model."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def d_head(self) -> int: ...
    @property
    def d_mlp(self) -> int: ...


@runtime_checkable
class Configured(Protocol):
    """A loaded model, which has such a shape."""

    @property
    def cfg(self) -> Any: ...


@runtime_checkable
class Named(Protocol):
    """The same of a plain module, whose user has named its activations."""

    @property
    def n_layers(self) -> int: ...
    @property
    def kinds(self) -> Mapping[str, SiteKind]: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...


@dataclass(frozen=True)
class _Words:
    """Which names there are, and how many of each; hashable, so that a pattern is read once."""

    n_layers: int
    # Sizes of the axes, for the kinds that all transformers have; or of each own kind, with its shape.
    sizes: tuple[tuple[str, int], ...] = ()
    own: tuple[tuple[SiteKind, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, cfg: Sized | Named) -> _Words:
        kinds = getattr(cfg, "kinds", None)
        if kinds is not None:
            shapes = cast("Named", cfg).shapes
            return cls(cfg.n_layers, own=tuple((kind, shapes[name]) for name, kind in kinds.items()))
        cfg = cast("Sized", cfg)
        sizes = {"head": cfg.n_heads, "kv_head": cfg.n_kv_heads}
        sizes |= {"d_model": cfg.d_model, "d_head": cfg.d_head, "d_mlp": cfg.d_mlp}
        return cls(int(cfg.n_layers), tuple((axis, int(size)) for axis, size in sizes.items()))

    def kind(self, name: str) -> SiteKind:
        kinds = {kind.name: kind for kind, _ in self.own} if self.own else KINDS
        try:
            return kinds[name]
        except KeyError:
            raise SiteError(f"there is no site {name!r}. {did_you_mean(name, kinds)}") from None

    def size(self, kind: SiteKind, axis: int) -> int:
        """How many indices there are along an axis of this kind."""
        for own, shape in self.own:
            if own == kind:
                return shape[axis]
        return dict(self.sizes)[kind.axes[axis]]


@dataclass(frozen=True)
class Selection:
    """An ordered set of sites, with set algebra.

    Examples
    --------
    >>> both = Selection((Site("mlp_out", 0), Site("mlp_out", 1)))
    >>> both - Selection((Site("mlp_out", 1),))
    Selection(L0.mlp_out)
    """

    sites: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def __or__(self, other: Selection) -> Selection:
        return Selection(tuple(dict.fromkeys(self.sites + other.sites)))

    def __and__(self, other: Selection) -> Selection:
        return Selection(tuple(site for site in self.sites if site in set(other.sites)))

    def __sub__(self, other: Selection) -> Selection:
        return Selection(tuple(site for site in self.sites if site not in set(other.sites)))

    def __repr__(self) -> str:
        shown = ", ".join(str(site) for site in self.sites[:6])
        return f"Selection({shown}{f', ... {len(self)} sites' if len(self) > 6 else ''})"


def select(pattern: str | Site | Iterable[Site | str] | Selection, cfg: Sized | Named | Configured) -> Selection:
    """Which activations does this pattern name, on a model of this shape?

    Parameters
    ----------
    pattern
        A pattern (see the module's grammar), a `Site`, a `Selection`, or several of them.
    cfg
        The model, or its shape: ``model.cfg``.

    Raises
    ------
    SelectorError
        The pattern cannot be read, names a layer, head or neuron that the model does not have, or nothing.
    SiteError
        The activation's name is unknown.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> cfg = SimpleNamespace(n_layers=12, n_heads=12, n_kv_heads=12, d_model=768, d_head=64, d_mlp=3072)
    >>> select("L9,10.H6.z[-1]", cfg)
    Selection(L9.H6.z[-1], L10.H6.z[-1])
    >>> len(select("L*.H*.z | L*.mlp_out", cfg))
    156
    """
    # Asked often, and isinstance of a protocol takes longer than all the rest.
    cfg = cast("Sized | Named", getattr(cfg, "cfg", cfg))
    if isinstance(pattern, Selection):
        if not pattern.sites:
            raise SelectorError("an empty selection selects nothing; was it an intersection or a difference?")
        return Selection(tuple(dict.fromkeys(_checked(site, cfg) for site in pattern)))
    if isinstance(pattern, Site):
        return Selection((_checked(pattern, cfg),))
    if isinstance(pattern, str):
        for term in pattern.split("|"):
            refuse_hook_name(term)
        return _parse(pattern, _Words.of(cfg))
    found = Selection(())
    for part in pattern:
        found = found | select(part, cfg)
    if not found.sites:
        raise SelectorError("an empty list selects nothing; name at least one site, such as 'L*.resid_post'")
    return found


def _checked(site: Site, cfg: Any) -> Site:
    return _one(site, _Words.of(cfg))


@lru_cache(maxsize=4096)
def _one(site: Site, words: _Words) -> Site:
    sites = _parse(str(site), words).sites
    if len(sites) != 1:
        raise SelectorError(
            f"{site!r} holds {site.pos!r}, which names {len(sites)} positions; a Site has one, a pattern may have many"
        )
    return sites[0]


@lru_cache(maxsize=1024)
def _parse(pattern: str, words: _Words) -> Selection:
    aside: list[str] = []

    def put_aside(match: re.Match[str]) -> str:
        aside.append(match[0])
        return f"\0{len(aside) - 1}\0"

    sites: dict[Site, None] = {}
    for term in _QUOTED.sub(put_aside, pattern).split("|"):
        match = _TERM.match(term)
        shown = re.sub(r"\0(\d+)\0", lambda number: aside[int(number[1])], term).strip()
        if match is None:
            raise SelectorError(f"cannot read {shown!r} in {pattern!r}; write it like 'L0-5.H*.z', 'L9.H6.z[-1]' or 'L*.mlp_out'")
        sites.update(dict.fromkeys(_expand(match, shown, words, aside)))
    return Selection(tuple(sites))


def _expand(match: re.Match[str], term: str, words: _Words, aside: list[str]) -> Iterator[Site]:
    try:
        kind = words.kind(match["name"])
    except SiteError as error:
        raise SiteError(f"in {term!r}: {error}") from None
    if kind.per_layer and match["layer"] is None:
        raise SelectorError(f"{term!r} needs a layer: write 'L*.{term}' for all, or 'L0.{term}' for the first")
    if not kind.per_layer and match["layer"] is not None:
        raise SelectorError(f"{kind.name!r} has no layers: write {kind.name!r}, not {term!r}")
    layers = _indices(match["layer"], words.n_layers, "layer", term) if kind.per_layer else [None]
    heads = [None] if match["head"] is None else _heads(match, kind, term, words)
    neurons: list[int | None] = [None]
    if match["neuron"] is not None:
        if kind.neuron_axis is None:
            raise SelectorError(f"{kind.name!r} has no neurons in {term!r}; use 'mlp_post' or 'mlp_pre'")
        what = "channel" if kind.axes[kind.neuron_axis] == "channel" else "neuron"
        neurons = list(_indices(match["neuron"], words.size(kind, kind.neuron_axis), what, term))
    if match["pos"] is not None and kind.pos_axis is None:
        raise SelectorError(f"{kind.name!r} has no positions in {term!r}: its axes are {' '.join(kind.axes)}")
    for layer in layers:
        for head in heads:
            for neuron in neurons:
                for pos in _positions(match["pos"], term, aside):
                    yield Site(kind.name, layer, head, pos, neuron, kind if words.own else None)


def _heads(match: re.Match[str], kind: SiteKind, term: str, words: _Words) -> list[int | None]:
    wanted = {"head": "H", "kv_head": "KV"}.get(kind.head_axis or "")
    kinds = [own for own, _ in words.own] or list(KINDS.values())
    if wanted is None:
        per_head = [other.name for other in kinds if other.head_axis]
        raise SelectorError(
            f"{kind.name!r} is not split by head in {term!r}; per head there are: {', '.join(per_head) or 'none'}"
        )
    size = words.size(kind, kind.axes.index(kind.head_axis or ""))
    counts = dict(words.sizes)
    # Without grouped queries a KV head and a head are the same thing, and people write H.
    if match["axis"] != wanted and counts.get("head") != counts.get("kv_head"):
        raise SelectorError(
            f"{kind.name!r} has {size} {'KV heads' if wanted == 'KV' else 'query heads'} on this model: "
            f"write {wanted}0 to {wanted}{size - 1}, not {match['axis']}{match['head']}"
        )
    return list(_indices(match["head"], size, "head" if wanted == "H" else "KV head", term))


def _indices(text: str, size: int, what: str, term: str) -> list[int]:
    if text.strip() == "*":
        return list(range(size))
    found: list[int] = []
    for part in (piece.strip() for piece in text.split(",")):
        if bounds := _RANGE.fullmatch(part):
            first, last = int(bounds[1]), int(bounds[2])
            if first > last:
                raise SelectorError(f"the range {part} in {term!r} is empty; write the smaller {what} first")
            found.extend(range(first, last + 1))
        elif _INTEGER.fullmatch(part):
            found.append(int(part))
        else:
            raise SelectorError(f"cannot read {part!r} as a {what} in {term!r}; write *, 3, -1, 0-5 or 1,3")
    resolved = []
    for index in found:
        if not -size <= index < size:
            raise SelectorError(f"there is no {what} {index} in {term!r}: this model has {what}s 0 to {size - 1}")
        resolved.append(index % size)
    return resolved


def _positions(text: str | None, term: str, aside: list[str]) -> list[int | str | None]:
    if text is None:
        return [None]
    found: list[int | str | None] = []
    for part in (piece.strip() for piece in text.split(",")):
        if _INTEGER.fullmatch(part):
            found.append(int(part))
        elif quoted := _ASIDE.fullmatch(part):
            inner = aside[int(quoted[1])][1:-1]
            # One way to write it, so that equal sites are equal.
            found.append((f"'{inner}'" if "'" not in inner else f'"{inner}"') + (quoted[2] or ""))
        elif bounds := re.fullmatch(r"(\d+)(?::|-)(\d+)", part):
            # 2:5 excludes its end, as in Python; 2-4 includes it, as everywhere else in a pattern.
            last = int(bounds[2]) + (":" not in part)
            if int(bounds[1]) >= last:
                raise SelectorError(f"the range {part} in {term!r} is empty; write the smaller position first")
            found.extend(range(int(bounds[1]), last))
        elif part and not {":", "*", "\0"} & set(part) and not is_token_text(part):
            found.append(part)
        else:
            part = re.sub(r"\0(\d+)\0", lambda number: aside[int(number[1])], part)
            raise SelectorError(f"cannot read position {part!r} in {term!r}; write -1, 3, 2:5, 1,3 or a named position")
    return found


def is_token_text(pos: str) -> bool:
    """Whether a position is given by the text of its token, in quotes."""
    return pos[:1] in ("'", '"')


def resolve_position(pos: int | str, length: int, named: Iterable[str], site: Site) -> int | str:
    """A position that exists in rows of this length, negative ones counted from the end."""
    if isinstance(pos, str):
        if pos not in named:
            if is_token_text(pos):
                raise SelectorError(
                    f"{site}: where the token {pos} stands is known only where the tokens are; use mi.run, or give a "
                    "HookRegistry positions=mi.token_positions(model, tokens)"
                )
            raise SelectorError(f"{site}: there is no position named {pos!r}. {did_you_mean(pos, named)}")
        return pos
    if not -length <= pos < length:
        raise SelectorError(f"{site}: there is no position {pos}; the prompts have positions 0 to {length - 1}")
    return pos % length
