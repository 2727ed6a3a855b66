"""The activations that a run kept: indexed by site, printed as a table, saved and read again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.model import Model
from mechinterp.core.select import Selection, select
from mechinterp.core.sites import Site
from mechinterp.core.spans import Span, part_of
from mechinterp.core.store import mapped_file, put_whole
from mechinterp.errors import FileFormatError, SelectorError, SiteError, did_you_mean

__all__ = ["Cache"]

_FORMAT, _VERSION, _INDEX = "mechinterp.cache", 1, "cache.json"


@dataclass(frozen=True, eq=False)
class Cache(Mapping[Site, Tensor]):
    """The activations that a run kept.

    Indexed by `Site` or by its name (``cache["L9.H6.z[-1]"]``); iterating gives the sites that were asked for.
    Each activation is stored once, whole; a head or position of it is a view.

    Parameters
    ----------
    model
        What it was captured from.
    selection
        What was asked for.
    whole
        The whole activations.
    positions
        Named positions, ``[batch]`` each.
    lengths
        ``[batch]`` real tokens of each prompt, or ``None`` where none is padded. What stands at padded positions means
        nothing: read ``[-1]`` or a named position, or leave them out of averages with `mask`.
    files
        The activations that lie in files, and are read from there when they are used.
    """

    model: Model
    selection: Selection
    whole: Mapping[Site, Tensor]
    positions: Mapping[str, Tensor] = field(default_factory=dict)
    lengths: Tensor | None = None
    files: Mapping[Site, Path] = field(default_factory=dict)
    # Who holds the folder of the files, if it goes with the cache.
    _home: object = field(default=None, repr=False)

    def __getitem__(self, key: Site | str) -> Tensor:
        sites = select(key, self.model.cfg).sites
        if len(sites) != 1:
            raise SiteError(f"{key!r} names {len(sites)} activations; ask for one, or loop over the cache")
        value = self._whole_of(sites[0])
        # Itself and not a view of it, which no gradient would reach.
        return value if sites[0] == sites[0].whole else value[self._part(sites[0], value)[0]]

    def replaced(self, values: Iterable[tuple[Site, Tensor]]) -> dict[Site, Tensor]:
        """Copies of the whole activations that these sites are parts of, with the new values in place."""
        found: dict[Site, Tensor] = {}
        for site, new in values:
            if site.whole not in found:
                found[site.whole] = self._whole_of(site).clone()
            value = found[site.whole]
            index, meant = self._part(site, value)
            value[index] = new if meant is None else torch.where(meant.reshape(-1, *[1] * (new.ndim - 1)), new, value[index])
        return found

    def _whole_of(self, site: Site) -> Tensor:
        try:
            return self.whole[site.whole]
        except KeyError:
            kept = [str(each) for each in self.whole]
            raise SiteError(
                f"{site} was not captured. {did_you_mean(site, kept)} Ask for it with capture={str(site)!r}"
            ) from None

    def _part(self, site: Site, value: Tensor) -> tuple[tuple[Any, ...], Tensor | None]:
        place = None
        if site.pos is not None:
            axis = site.kind.pos_axis
            if axis is None:
                raise SelectorError(f"{site} has no position axis")
            place = self._span(value.shape[axis]).locate(range(len(value)), site.pos, self.positions, site)
        return part_of(site, slice(0, len(value)), place, value.device)

    def _span(self, width: int) -> Span:
        return Span(None if self.lengths is None else tuple(self.lengths.tolist()), width)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.selection)

    def __len__(self) -> int:
        return len(self.selection)

    @property
    def bytes(self) -> int:
        """How large all of it is, in memory and on disk; what two sites share counts once for each."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.whole.values())

    @property
    def mask(self) -> Tensor | None:
        """``[batch pos]``: True at real tokens; ``None`` where none is padded. For averages over positions."""
        if self.lengths is None:
            return None
        width = max(value.shape[site.kind.pos_axis or 0] for site, value in self.whole.items())
        return torch.arange(width) < self.lengths.cpu()[:, None]

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as safetensors: one file if the path ends so, otherwise a folder with a file for each activation.

        The file or folder is there whole or not at all; one that `save` wrote before is replaced.

        Raises
        ------
        FileFormatError
            Something else is at that place.
        """
        target = Path(path)
        if target.suffix == ".safetensors":
            if target.is_dir():
                raise FileFormatError(f"{target} is a folder; save to a path without .safetensors, or to a file in it")
            layout = {str(site): (tuple(value.shape), value.dtype) for site, value in self.whole.items()}
            with put_whole(target) as part:
                for name, tensor in mapped_file(part, layout, {"mechinterp": json.dumps(self.describe())}).items():
                    tensor.copy_(self.whole[select(name, self.model.cfg).sites[0]].detach())
            return target
        if target.exists() and not (target / _INDEX).exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileFormatError(f"{target} is there already and is no cache of activations; choose another name")
        with put_whole(target) as part:
            part.mkdir(parents=True)
            for site, value in self.whole.items():
                layout = {"activation": (tuple(value.shape), value.dtype)}
                mapped_file(part / f"{site}.safetensors", layout)["activation"].copy_(value.detach())
            self.write_index(part)
        return target

    def write_index(self, folder: Path) -> None:
        """Say what the files in this folder are; without it they are not read."""
        with put_whole(folder / _INDEX) as part:
            part.write_text(json.dumps(self.describe(), indent=1), encoding="utf-8")

    def describe(self) -> dict[str, Any]:
        """Format, model, sites, positions and lengths, as plain data."""
        # Positions by the text of a token are looked up when asked for, and there will be no tokens to look at.
        names = dict.fromkeys([*self.positions, *(site.pos for site in self.selection if isinstance(site.pos, str))])
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model.name,
            "cfg": _shape(self.model),
            "selection": [str(site) for site in self.selection],
            "whole": [str(site) for site in self.whole],
            "positions": {name: self.positions[name].tolist() for name in names},
            "lengths": None if self.lengths is None else self.lengths.tolist(),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model) -> Cache:
        """What `save`, or ``mi.run(..., store=folder)``, wrote. Nothing is read before it is used.

        Raises
        ------
        FileFormatError
            It is not there, not a cache, of another version, interrupted, or of a model of another shape.
        """
        from safetensors import SafetensorError, safe_open

        source = Path(path)
        try:
            if source.is_dir():
                note = json.loads((source / _INDEX).read_text(encoding="utf-8"))
            else:
                with safe_open(source, framework="pt") as file:
                    note = json.loads((file.metadata() or {}).get("mechinterp", "null"))
        except (OSError, SafetensorError, ValueError) as error:
            raise FileFormatError(
                f"{source} holds no cache of activations ({type(error).__name__}: {error}); they are written by cache.save(path) "
                "or mi.run(..., store=folder), which ends with the file cache.json"
            ) from None
        if not isinstance(note, dict) or note.get("format") != _FORMAT:
            raise FileFormatError(f"{source} holds no cache of activations: it does not say that it is one")
        if note.get("version") != _VERSION:
            raise FileFormatError(f"{source} has version {note.get('version')} of the format, not {_VERSION}; capture anew")
        cfg = _shape(model)
        other = sorted(key for key, value in note["cfg"].items() if cfg.get(key) != value)
        if other:
            had, have = ({key: each.get(key) for key in other} for each in (note["cfg"], cfg))
            raise FileFormatError(f"{source} was captured from {note['model']} with {had}, but {model.name} has {have}")
        whole, files = {}, {}
        for name in note["whole"]:
            site = select(name, model.cfg).sites[0]
            files[site] = source / f"{site}.safetensors" if source.is_dir() else source
            with safe_open(files[site], framework="pt") as file:
                whole[site] = file.get_tensor("activation" if source.is_dir() else name)
        return cls(
            model,
            Selection(tuple(site for each in note["selection"] for site in select(each, model.cfg))),
            whole,
            {name: torch.tensor(where) for name, where in note["positions"].items()},
            None if note["lengths"] is None else torch.tensor(note["lengths"]),
            files,
        )

    # -- showing itself --------------------------------------------------------------------------

    def _size(self) -> str:
        stored = sum(self.whole[site].numel() * self.whole[site].element_size() for site in self.files)
        return f"{len(self.whole)} activations, {self.bytes / 2**20:.1f} MiB" + (
            f", {stored / 2**20:.1f} MiB of it on disk" if self.files else ""
        )

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (str(site), " ".join(site.kind.axes), " x ".join(str(size) for size in tensor.shape))
            for site, tensor in self.whole.items()
        ]

    def __repr__(self) -> str:
        lines = [f"Cache: {self._size()}"]
        lines += [f"  {name:<16} {axes:<24} {shape}" for name, axes, shape in self._rows()[:12]]
        if len(self.whole) > 12:
            lines.append(f"  ... {len(self.whole) - 12} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows()[:40])
        more = f"<p>... {len(self.whole) - 40} more</p>" if len(self.whole) > 40 else ""
        head = f"<b>Cache</b>: {self._size()}"
        return f"{head}<table><tr><th>site</th><th>axes</th><th>shape</th></tr>{body}</table>{more}"


def _shape(model: Model) -> dict[str, Any]:
    """What a model must have in common with the one that a cache is of, as JSON gives it back."""
    shape = {key: value for key, value in model.describe().items() if key not in ("name", "device", "dtype")}
    return json.loads(json.dumps(shape))
