"""Estimated edge scores beside exact effects: correlations, signs, overlap, error by magnitude, and where estimates fail."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mechinterp.core.effects import Effects
from mechinterp.errors import MetricError, missing_extra
from mechinterp.graph import Edge
from mechinterp.graph.nodes import counted

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Agreement", "Magnitude"]

# An estimate below this share of what it estimates, or a mean below this share of its parts, has missed it.
_SMALL = 0.25
_SHOWN = 6


class Magnitude(NamedTuple):
    """Edges whose absolute exact effect lies in [low, high): how many, its mean, and the mean absolute error beside it."""

    low: float
    high: float
    n: int
    exact: float
    error: float
    ratio: float


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far do estimated edge scores agree with exact edge effects? Made by `compare_to_exact`.

    All numbers are about the edges compared, which are a sample of the graph with more large estimates than chance would give.

    Parameters
    ----------
    edges
        The edges compared, in the order of the graph.
    estimate
        ``[edge]``: their estimated effects.
    exact
        Their exact effects, per example.
    chosen
        How these edges were chosen, in words.
    scored
        How many edges have an estimate.
    top
        The k whose overlap is told, those below the number of edges compared; where fewer are beyond rounding, their number
        instead.
    rounding
        Exact effects up to this size may be nothing but rounding: 100 units in the last place of the larger of the clean and the
        corrupt metric (at least 1), in the units of the effects.
    parts
        ``[edge batch]``: the estimates per example; ``None`` for the scores of a circuit.
    provenance
        Model, task, metric, direction, seed, and where the scores came from.
    """

    edges: tuple[Edge, ...]
    estimate: Tensor
    exact: Effects
    chosen: str
    scored: int
    top: tuple[int, ...]
    rounding: float
    parts: Tensor | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> Tensor:
        """``[edge]``: the estimate minus the exact effect."""
        return self.estimate - self.exact.values

    @property
    def pearson(self) -> float:
        """Linear correlation of estimate and exact effect; nan where one of them is constant."""
        return _correlation(self.estimate, self.exact.values)

    @property
    def pearson_abs(self) -> float:
        """Linear correlation of absolute values."""
        return _correlation(self.estimate.abs(), self.exact.values.abs())

    @property
    def spearman(self) -> float:
        """Rank correlation; equal values share the mean of their ranks."""
        return _correlation(_ranks(self.estimate), _ranks(self.exact.values))

    @property
    def spearman_abs(self) -> float:
        """Rank correlation of absolute values: would the estimate choose the same edges?"""
        return _correlation(_ranks(self.estimate.abs()), _ranks(self.exact.values.abs()))

    @property
    def beyond_rounding(self) -> Tensor:
        """``[edge]``: the exact effect is larger than rounding."""
        return self.exact.values.abs() > self.rounding

    @property
    def mostly_rounding(self) -> bool:
        """Fewer than half of the edges compared have an exact effect beyond rounding: most ranks are those of noise."""
        return 2 * int(self.beyond_rounding.sum()) < len(self.edges)

    @property
    def sign_agreement(self) -> float:
        """The share of edges beyond rounding whose estimate has the sign of the exact effect; nan without such edges."""
        same = (self.estimate.sign() == self.exact.values.sign())[self.beyond_rounding]
        return float(same.float().mean())

    def overlap(self, k: int) -> float:
        """The share of the ``k`` edges of largest absolute exact effect that are among the ``k`` of largest absolute estimate.

        Among the edges compared, not among all edges of the graph. Where ``k`` is above the number of edges beyond rounding,
        the last of the ``k`` are chosen by noise.

        Raises
        ------
        MetricError
            ``k`` is not between 1 and the number of edges compared.
        """
        if not 1 <= k <= len(self.edges):
            raise MetricError(
                f"the overlap of the top {k} was asked for, and {counted(len(self.edges), 'edge')} were compared; "
                "choose a smaller k, or compare more: compare_to_exact(..., sample=...), sample=None for all"
            )
        estimated, exact = (_largest(values, k) for values in (self.estimate.abs(), self.exact.values.abs()))
        return len(estimated & exact) / k

    @cached_property
    def saturated(self) -> Tensor:
        """``[edge]``: the estimate is small where the exact effect is large.

        |estimate| < 0.25 |exact|, for an edge beyond rounding among the tenth (at least one) of the edges compared whose
        |exact| is largest. A gradient at one point is blind to what saturates there: look at these edges with exact runs.
        """
        exact = self.exact.values.abs()
        return (self.estimate.abs() < _SMALL * exact) & (exact > self.rounding) & _in_top_tenth(exact)

    @cached_property
    def cancelling(self) -> Tensor:
        """``[edge]``: the estimate is the sum of large parts of opposite sign.

        |mean over prompts of the estimate| < 0.25 times the mean over prompts of |estimate|, for an edge among the tenth (at
        least one) of the edges compared for which the latter is largest, and beyond rounding. None where there is one prompt,
        or where the scores are a circuit's, which has no parts.
        """
        if self.parts is None:
            return torch.zeros(len(self.edges), dtype=torch.bool)
        size = self.parts.abs().mean(dim=-1)
        return (self.parts.mean(dim=-1).abs() < _SMALL * size) & (size > self.rounding) & _in_top_tenth(size)

    @cached_property
    def by_magnitude(self) -> tuple[Magnitude, ...]:
        """Mean error by decade of the absolute exact effect, largest first; the last row is what may be rounding.

        ``ratio`` is mean |error| over mean |exact|: 0.1 says that estimates of this size are off by a tenth.
        """
        exact, error = self.exact.values.double().abs(), self.error.double().abs()
        lows = [self.rounding]
        while lows[-1] <= float(exact.max()):
            # 10^k from its decimal notation: the float next to 0.1 would put 0.1 into the bin below.
            lows.append(float(f"1e{math.floor(math.log10(lows[-1]) + 1e-9) + 1}"))
        rows = []
        for low, high in zip([0.0, *lows], lows, strict=False):
            # A float32 is compared as such: 0.1 is in the bin from 0.1.
            members = (exact.float() >= low) & (exact.float() < high)
            if members.any():
                mean, off = float(exact[members].mean()), float(error[members].mean())
                rows.append(Magnitude(low, high, int(members.sum()), mean, off, off / mean if mean else math.nan))
        return tuple(reversed(rows))

    def strongest(self, flags: Tensor) -> list[int]:
        """Indices of the flagged edges, those of largest |exact| first."""
        order = self.exact.values.abs().argsort(descending=True, stable=True)
        return [int(i) for i in order if flags[i]]

    def to_frame(self) -> pd.DataFrame:
        """A row for each edge: ``src dst port exact standard_error estimate error saturated cancelling``."""
        frame = self.exact.to_frame(
            estimate=self.estimate, error=self.error, saturated=self.saturated, cancelling=self.cancelling
        )
        return frame.rename(columns={"value": "exact"})

    def to_json(self) -> dict[str, Any]:
        """Plain data: the numbers, the table by magnitude, each edge with its values, the flagged ones. None is undefined."""
        said = {
            "chosen": self.chosen,
            "scored": self.scored,
            "compared": len(self.edges),
            "rounding": self.rounding,
            "spearman": self.spearman,
            "spearman_abs": self.spearman_abs,
            "pearson": self.pearson,
            "pearson_abs": self.pearson_abs,
            "sign_agreement": self.sign_agreement,
            "beyond_rounding": int(self.beyond_rounding.sum()),
            "overlap": {str(k): self.overlap(k) for k in self._told()},
            "by_magnitude": [row._asdict() for row in self.by_magnitude],
            "edges": [str(edge) for edge in self.edges],
            "estimate": self.estimate.tolist(),
            "exact": self.exact.values.tolist(),
            "standard_error": self.exact.standard_error.tolist(),
            "saturated": [str(self.edges[i]) for i in self.strongest(self.saturated)],
            "cancelling": [str(self.edges[i]) for i in self.strongest(self.cancelling)],
            "provenance": dict(self.provenance),
        }
        plain: dict[str, Any] = _without_nan(json.loads(json.dumps(said, default=str)))
        return plain

    def plot(self) -> Figure:
        """Estimate against exact effect, one dot for each edge; on the diagonal they agree. Flagged edges are marked and named.

        Both axes are linear up to about a hundredth of the largest value, and logarithmic beyond. The strongest and the most
        wrong of all are named too.
        """
        try:
            from matplotlib.figure import Figure as MplFigure
        except ImportError:
            raise missing_extra("a plot", "matplotlib", "draw") from None
        exact, estimate = self.exact.values.cpu(), self.estimate.cpu()
        largest = float(torch.cat([exact, estimate]).abs().max()) or 1.0
        figure = MplFigure(figsize=(5.6, 5.4), layout="constrained")
        axes = figure.add_subplot()
        for setter in (axes.set_xscale, axes.set_yscale):
            # A power of ten, or its tick would lie on that of 0.
            setter("symlog", linthresh=10.0 ** (round(math.log10(largest)) - 2))
        ends = [-2.5 * largest, 2.5 * largest]
        axes.plot(ends, ends, color="#999999", linewidth=0.8, zorder=0)
        axes.axhline(0, color="#cccccc", linewidth=0.6, zorder=0)
        axes.axvline(0, color="#cccccc", linewidth=0.6, zorder=0)
        axes.scatter(exact, estimate, s=14, color="#2166ac", alpha=0.6, linewidths=0)
        named = []
        for name, flags, marker in (("saturated", self.saturated, "s"), ("cancelling", self.cancelling, "D")):
            members = self.strongest(flags)
            if members:
                style: dict[str, Any] = {"marker": marker, "facecolors": "none", "edgecolors": "#d95f02", "linewidths": 1.3}
                axes.scatter(exact[members], estimate[members], s=52, label=f"{name} ({len(members)})", **style)
                named += members[:_SHOWN]
        for worst in (self.exact.values.abs(), self.error.abs()):
            named += worst.argsort(descending=True, stable=True)[: _SHOWN // 2].tolist()
        for turn, i in enumerate(dict.fromkeys(named)):
            # Towards the middle, and above or below in turns: edges of about the same effect lie on top of each other.
            left = float(exact[i]) > 0
            axes.annotate(
                str(self.edges[i]),
                (float(exact[i]), float(estimate[i])),
                xytext=(-7 if left else 7, 8 if turn % 2 else -11),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=7,
            )
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        axes.set_aspect("equal")
        normalised = bool(self.exact.provenance.get("normalized", False))
        unit = "normalised effect" if normalised else str(self.exact.provenance["metric"])
        axes.set_xlabel(f"exact: {unit}")
        axes.set_ylabel(f"estimate ({self.provenance['estimator']})")
        if named and axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", fontsize=8, frameon=False)
        # Ranks that are mostly noise are no headline.
        headline = f"Pearson {self.pearson:.2f}" if self.mostly_rounding else f"rank correlation {self.spearman:.2f}"
        axes.set_title(self._title() + f"\n{headline}, same sign {self.sign_agreement:.2f}", fontsize=9)
        return figure

    def _told(self) -> tuple[int, ...]:
        """The k that are told: of more edges than have an effect, the last are drawn by noise."""
        n = int(self.beyond_rounding.sum())
        return tuple(dict.fromkeys(min(k, n) for k in self.top)) if n else ()

    def _caution(self) -> list[str]:
        """Said where ranks are mostly those of rounding noise, which no estimate can or need match."""
        if not self.mostly_rounding:
            return []
        n = int(self.beyond_rounding.sum())
        have = "has" if n == 1 else "have"
        return [
            f"  caution: {n} of {counted(len(self.edges), 'edge')} {have} an exact effect beyond rounding; the others rank by "
            f"noise, so that the rank correlation, and the top k for any k above {n}, say little"
        ]

    def _title(self) -> str:
        origin = self.provenance
        return f"{len(self.edges)} of {counted(self.scored, 'edge')}, {origin['task']} on {origin['model']}"

    def _elsewhere(self) -> str:
        """Said where the scores are of another model or task than the exact effects, which may be a mistake."""
        scores = self.provenance.get("scores", {})
        names = [str(scores.get(key, self.provenance[key])) for key in ("task", "model")]
        same = names == [self.provenance["task"], self.provenance["model"]]
        return "" if same else f"; the scores are of {' on '.join(names)}"

    def __repr__(self) -> str:
        origin, beyond = self.provenance, int(self.beyond_rounding.sum())
        shared = ", ".join(f"top {k}: {self.overlap(k):.2f}" for k in self._told()) or "too few for a top"
        flagged = []
        for name, flags in (("saturated", self.saturated), ("cancelling", self.cancelling)):
            members = self.strongest(flags)
            first = (
                f" (first {self.edges[members[0]]}: estimate {float(self.estimate[members[0]]):+.3f}, "
                f"exact {float(self.exact.values[members[0]]):+.3f})"
                if members
                else ""
            )
            flagged.append(f"{len(members)} {name}{first}")
        return "\n".join(
            [
                f"Agreement: {self._title()}, {origin['metric']} ({origin['direction']}); {origin['estimator']} against exact",
                f"  compared: {self.chosen}{self._elsewhere()}",
                f"  rank correlation {self.spearman:.3f} (absolute {self.spearman_abs:.3f}), Pearson {self.pearson:.3f} "
                f"(absolute {self.pearson_abs:.3f})",
                *self._caution(),
                f"  same sign {self.sign_agreement:.3f} of {counted(beyond, 'edge')} beyond rounding; "
                f"overlap among those compared: {shared}",
                f"  {', '.join(flagged)}",
            ]
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{row.low:.1e} to {row.high:.1e}</td><td>{row.n}</td><td>{row.exact:.2e}</td><td>{row.error:.2e}</td>"
            f"<td>{row.ratio:.2f}</td></tr>"
            for row in self.by_magnitude
        )
        head = "<tr><th>|exact|</th><th>edges</th><th>mean |exact|</th><th>mean |error|</th><th>ratio</th></tr>"
        return f"<pre>{escape(repr(self))}</pre><table>{head}{rows}</table>"


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = (x.double() - x.double().mean() for x in (a, b))
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[which]


def _largest(values: Tensor, k: int) -> set[int]:
    return set(values.argsort(descending=True, stable=True)[:k].tolist())


def _in_top_tenth(values: Tensor) -> Tensor:
    return values >= values.sort(descending=True).values[-(-len(values) // 10) - 1]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
