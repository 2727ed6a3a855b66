"""Numbers with named axes: what patching and attribution give."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp.core.picture import svg_of, white_blue
from mechinterp.core.resampling import adjusted, bootstrap_interval, sign_flip
from mechinterp.errors import EditError, MissingExtraError, missing_extra

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Effects", "versions"]

Label = int | str | tuple[str, ...]


def versions() -> dict[str, str]:
    """What results record of the libraries that made them."""
    return {name: _version(name) for name in ("torch", "transformers", "transformer-lens")}


# Reading them from disk takes longer than a forward pass of a small model.
_version = lru_cache(version)


@dataclass(frozen=True, eq=False)
class Effects:
    """A number for each cell of a sweep, and for each prompt.

    Parameters
    ----------
    quantity
        What the numbers are, in words.
    axes
        Names of the axes of ``values``, such as ``("layer", "head")``, ``("layer", "pos")``, ``("site",)`` or ``("edge",)``.
    coords
        For each axis the label of each index: numbers, or names; for edges the triple ``(src, dst, port)``.
    per_example
        ``[*axes, batch]``: one number for each cell and prompt. ``values`` is its mean over the prompts.
    baseline
        Mean metric of the runs that the numbers compare: ``clean`` and ``corrupt``.
    provenance
        Model, task, method, direction, metric, versions, cost in forward passes.
    """

    quantity: str
    axes: tuple[str, ...]
    coords: Mapping[str, tuple[Label, ...]]
    per_example: Tensor
    baseline: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [axis for axis in self.axes if axis not in self.coords]
        if missing:
            raise EditError(f"axis {missing[0]!r} has no labels; coords has {', '.join(self.coords) or 'none'}")
        sizes = [len(self.coords[axis]) for axis in self.axes]
        if list(self.per_example.shape[:-1]) != sizes:
            raise EditError(f"values of shape {list(self.per_example.shape)} do not fit axes {self.axes} of sizes {sizes}")

    @property
    def values(self) -> Tensor:
        """``[*axes]``: the mean over prompts, in float32."""
        return self.per_example.float().mean(dim=-1)

    @property
    def standard_error(self) -> Tensor:
        """``[*axes]``: of the mean over prompts; nan for a single prompt."""
        n = self.per_example.shape[-1]
        # torch gives nan as well, with a warning.
        return self.per_example.float().std(dim=-1) / n**0.5 if n > 1 else torch.full_like(self.values, torch.nan)

    def interval(self, confidence: float = 0.95, resamples: int = 2000, *, seed: int) -> tuple[Tensor, Tensor]:
        """``[*axes]`` lower and upper end of the mean over prompts: percentile bootstrap; nan for a single prompt.

        Of normalised effects the unit, one number for all prompts, is taken as known: the interval is that of the
        numerator. Few prompts make it too narrow (by about sqrt((n - 1) / n)).
        """
        flat = self.per_example.reshape(-1, self.per_example.shape[-1])
        low, high = bootstrap_interval(flat, confidence=confidence, resamples=resamples, seed=seed)
        return low.reshape(self.values.shape), high.reshape(self.values.shape)

    def p_values(self, *, seed: int, permutations: int = 10_000, correction: str | None = None) -> Tensor:
        """``[*axes]``: how often chance alone would move the mean as far from 0, by flipping signs of prompts.

        Exact up to 13 prompts (2^n patterns within ``permutations``), else of patterns drawn by ``seed``. The smallest that n
        prompts can give is 2^(1 - n). ``correction`` is for the number of cells: "holm" keeps the chance of any false cell
        below p, "bh" (Benjamini-Hochberg) the share of false ones among those taken.
        """
        found = sign_flip(self.per_example.reshape(-1, self.per_example.shape[-1]), permutations=permutations, seed=seed)
        return (adjusted(found, correction) if correction else found).reshape(self.values.shape)

    def __sub__(self, other: Effects) -> Effects:
        """Cell by cell, for instance an estimate minus the exact effect. Both must have the same axes, labels and prompts."""
        if self.per_example.shape[-1] != other.per_example.shape[-1]:
            raise EditError(
                f"cannot subtract effects on {other.per_example.shape[-1]} prompts from effects on {self.per_example.shape[-1]}"
            )
        if self.axes != other.axes or dict(self.coords) != dict(other.coords):
            raise EditError(f"cannot subtract effects over {other.axes} from effects over {self.axes} with other labels")
        # What both agree on (model, task, site, unit) holds for the difference too.
        shared = {key: value for key, value in self.provenance.items() if other.provenance.get(key) == value}
        return Effects(
            f"{self.quantity} minus {other.quantity}",
            self.axes,
            self.coords,
            self.per_example - other.per_example,
            self.baseline,
            shared | {"minuend": dict(self.provenance), "subtrahend": dict(other.provenance)},
        )

    def label(self, index: int) -> str:
        """The name of a cell by its flat index."""
        where = torch.unravel_index(torch.tensor(index), self.values.shape)
        parts = [self.coords[axis][int(i)] for axis, i in zip(self.axes, where, strict=True)]
        if self.axes in (("site",), ("node",), ("path",), ("sender",), ("receiver",)):
            return str(parts[0])
        if self.axes == ("sender", "receiver"):
            return f"{parts[0]} -> {parts[1]}"
        if self.axes[:1] == ("edge",):
            src, dst, port = parts[0] if isinstance(parts[0], tuple) else ("", "", "")
            at = "".join(f"[{part}]" for part in parts[1:])
            return f"{src}->{dst}" + (f"<{port}>" if port != "in" else "") + at
        short = {"layer": "L{}", "head": "H{}", "kv_head": "KV{}", "neuron": "N{}", "pos": "[{}]"}
        name = self.provenance.get("site", "")
        words = [short.get(axis, axis + " {}").format(part) for axis, part in zip(self.axes, parts, strict=True) if axis != "pos"]
        tail = [f"[{part}]" for axis, part in zip(self.axes, parts, strict=True) if axis == "pos"]
        return ".".join([*words, str(name)] if name else words) + "".join(tail)

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` cells of largest absolute value, strongest first."""
        flat = self.values.flatten()
        order = flat.abs().nan_to_num(-1.0).argsort(descending=True, stable=True)[:k]
        return [(self.label(int(i)), float(flat[i])) for i in order]

    def as_dict(self) -> dict[Label, float]:
        """Label to value, for effects with one axis (edges, nodes, sites)."""
        if len(self.axes) != 1:
            raise EditError(f"effects over {self.axes} have no single label per cell; use to_frame()")
        return dict(zip(self.coords[self.axes[0]], self.values.tolist(), strict=True))

    def to_frame(self, **columns: Tensor) -> pd.DataFrame:
        """A table: a column for each axis (``src dst port`` for edges), ``value`` and ``standard_error``.

        More numbers on the same axes become more columns: ``to_frame(p_value=effects.p_values(seed=0))``.

        Examples
        --------
        >>> effects = Effects("x", ("layer",), {"layer": (0, 1)}, torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]]))
        >>> low, high = effects.interval(seed=0)
        >>> effects.to_frame(low=low, high=high, p_value=effects.p_values(seed=0)).round(2)
           layer  value  standard_error  low  high  p_value
        0      0    2.0            0.58  1.0   3.0     0.25
        1      1    0.0            0.58 -1.0   1.0     1.00
        """
        try:
            import pandas as pd
        except ImportError:
            raise missing_extra("a table", "pandas", "frames") from None
        values, errors = self.values.flatten().tolist(), self.standard_error.flatten().tolist()
        if self.axes == ("edge",):
            frame = pd.DataFrame(list(self.coords["edge"]), columns=["src", "dst", "port"])
        else:
            index = pd.MultiIndex.from_product([self.coords[axis] for axis in self.axes], names=self.axes)
            frame = index.to_frame(index=False)
        more = {}
        for name, column in columns.items():
            if column.shape != self.values.shape or name in (*frame.columns, "value", "standard_error"):
                raise EditError(
                    f"column {name!r} of shape {list(column.shape)} cannot join a table of {', '.join(map(str, frame.columns))}, "
                    f"value, standard_error; give it another name, or a number for each cell, {list(self.values.shape)}"
                )
            more[name] = column.flatten().tolist()
        return frame.assign(value=values, standard_error=errors, **more)

    def plot(self) -> Figure:
        """A heat map (two axes) or the strongest cells as bars, as a matplotlib figure.

        Blue is positive and orange negative, symmetric about zero; both survive print and common colour blindness.
        """
        try:
            from matplotlib.figure import Figure as MplFigure
        except ImportError:
            raise missing_extra("a plot", "matplotlib", "draw") from None
        if len(self.axes) == 2:
            return self._heatmap(MplFigure)
        return self._bars(MplFigure)

    def _heatmap(self, figure_class: Any) -> Any:
        values = self.values.cpu()
        rows, columns = values.shape
        # Wide enough for the title above it.
        figure = figure_class(
            figsize=(max(4.4, min(9.0, 2.2 + 0.28 * columns)), min(8.0, 1.4 + 0.16 * rows)), layout="constrained"
        )
        axes = figure.add_subplot()
        largest = float(values.abs().nan_to_num(0).max()) or 1.0
        image = axes.imshow(
            values.numpy(), cmap=white_blue(signed=True), vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest"
        )
        for axis, setter, size in ((self.axes[0], axes.set_yticks, rows), (self.axes[1], axes.set_xticks, columns)):
            # Names are all said where there is room: unlike numbers, what is left out cannot be counted.
            named = any(isinstance(label, str) for label in self.coords[axis])
            step = max(1, -(-size // (60 if named else 16)))
            ticks = list(range(0, size, step))
            setter(ticks, [str(self.coords[axis][i]) for i in ticks], fontsize=6 if named and size > 30 else 8)
            if named and setter == axes.set_xticks:
                axes.tick_params(axis="x", labelrotation=90 if size > 8 else 30)
        axes.set_xlabel(self.axes[1])
        axes.set_ylabel(self.axes[0])
        axes.set_title(self._title(), fontsize=9)
        figure.colorbar(image, ax=axes, label=self._unit())
        return figure

    def _bars(self, figure_class: Any) -> Any:
        top = self.top(20)[::-1]
        figure = figure_class(figsize=(6.0, 0.9 + 0.22 * len(top)), layout="constrained")
        axes = figure.add_subplot()
        colours = ["#2166ac" if value >= 0 else "#d95f02" for _, value in top]
        axes.barh([name for name, _ in top], [value for _, value in top], color=colours)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlabel(self._unit())
        axes.set_title(self._title(), fontsize=9)
        axes.tick_params(axis="y", labelsize=8)
        return figure

    def _unit(self) -> str:
        return "normalised effect" if self.provenance.get("normalized", False) else str(self.provenance.get("metric", "effect"))

    def _title(self) -> str:
        task, model = self.provenance.get("task"), self.provenance.get("model")
        return textwrap.fill(self.quantity, 56) + (f"\n{task} on {model}, {self.per_example.shape[-1]} prompts" if task else "")

    def _repr_svg_(self) -> str | None:
        try:
            figure = self.plot()
        except MissingExtraError:
            return None
        return svg_of(figure)

    def _repr_html_(self) -> str | None:
        # The picture alone where there is one: viewers that prefer HTML, GitHub among them, drop SVG inside of it.
        if find_spec("matplotlib") is not None:
            return None
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{value:+.4f}</td></tr>" for name, value in self.top(20))
        return f"<pre>{escape(repr(self))}</pre><table>{rows}</table>"

    def __repr__(self) -> str:
        shape = " x ".join(_counted(len(self.coords[axis]), axis) for axis in self.axes)
        strongest = ", ".join(f"{name} {value:+.3f}" for name, value in self.top(3))
        return f"Effects: {self.quantity}; {shape}, {_counted(self.per_example.shape[-1], 'prompt')}; strongest {strongest}"


def _counted(n: int, noun: str) -> str:
    """A number and its noun; what ends in s, such as ``pos``, is its own plural."""
    return f"{n} {noun}" if n == 1 or noun.endswith("s") else f"{n} {noun}s"
