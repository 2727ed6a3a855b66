"""A report as a notebook shows it: a strip from nothing to the whole model, and the numbers as a table."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from mechinterp.core.picture import table_of
from mechinterp.discovery.further import told
from mechinterp.graph.nodes import counted

if TYPE_CHECKING:
    from mechinterp.discovery.evaluate import Report

__all__ = ["html_of"]

# The words below the ends need as much room to the right.
_WIDTH, _LEFT, _RIGHT = 480, 96, 36
_BLUE, _GREY = "#2166ac", "#767676"


def html_of(report: Report) -> str:
    """The report as one HTML element that loads nothing."""
    low, high = report.faithfulness_interval
    rows = [
        ("faithfulness", f"{report.faithfulness:.3f} ({report.confidence:.0%} interval {low:.3f} to {high:.3f})"),
        ("mean of ratios", f"{report.mean_of_ratios:.3f}"),
        *_chance(report),
        (report.metric, f"clean {report.clean:.3f}, corrupt {report.corrupt:.3f}, circuit {report.circuit:.3f}"),
        ("accuracy", f"model {report.model_accuracy:.3f}, circuit {report.circuit_accuracy:.3f}"),
        *([] if report.kl is None else [("KL from the model", f"{max(report.kl, 0.0):.3f} nats")]),
        ("size", report.size),
        (
            "ablation",
            report.ablation if report.ablation == "resample" else f"{report.ablation}; of everything {report.empty:.3f}",
        ),
        ("cost", f"{report.forwards} forward passes over the prompts, {report.seconds:.1f} s"),
    ]
    title = f"Report: {report.task} on {report.model}, {report.prompts} prompts"
    notes = [*told(report.further), *(f"caution: {caveat}" for caveat in report.caveats)]
    list_of = "".join(f"<li>{escape(each)}</li>" for each in notes)
    table = table_of(title, ("", ""), [(escape(name), escape(value)) for name, value in rows])
    foot = f'<ul style="color:#111;background:#fff;font:13px sans-serif;margin:4px 0">{list_of}</ul>' if notes else ""
    return f'<div style="background:#fff">{table}{_strip(report)}{foot}</div>'


def _chance(report: Report) -> Iterator[tuple[str, str]]:
    if report.random_interval is not None:
        n = len(report.random_faithfulness)
        # What rounds to nothing has no sign.
        low, high = (round(end, 3) + 0.0 for end in report.random_interval)
        yield (
            counted(n, "random circuit"),
            f"mean {report.random_mean:.3f} ({low:.3f} to {high:.3f}); beaten {report.beats_random} of {n}",
        )


def _strip(report: Report) -> str:
    """Where the circuit and the random ones lie between everything ablated (0) and the whole model (1)."""
    low, high = report.faithfulness_interval
    everything = [0.0, 1.0, report.faithfulness, low, high, *report.random_faithfulness]
    # A far outlier would make the rest one point: what is beyond is drawn at the edge, and the table has its number.
    least, most = max(-1.0, min(everything)), min(3.0, max(everything))

    def x(share: float) -> float:
        share = min(max(share, least), most)
        return round(_LEFT + 8 + (share - least) / (most - least) * (_WIDTH - _LEFT - _RIGHT - 16), 1)

    parts = [
        f'<line x1="{x(at)}" x2="{x(at)}" y1="14" y2="58" stroke="#999" stroke-dasharray="{dash}"/>'
        f'<text x="{x(at)}" y="72" text-anchor="middle">{word}</text>'
        for at, word, dash in ((0.0, "all ablated", "3 3"), (1.0, "whole model", "none"))
    ]
    parts.append(f'<text x="{_LEFT - 6}" y="28" text-anchor="end">circuit</text>')
    parts.append(f'<line x1="{x(low)}" x2="{x(high)}" y1="24" y2="24" stroke="{_BLUE}" stroke-width="3"/>')
    parts.append(f'<circle cx="{x(report.faithfulness)}" cy="24" r="5" fill="{_BLUE}"/>')
    if report.random_faithfulness:
        parts.append(f'<text x="{_LEFT - 6}" y="50" text-anchor="end">random</text>')
        parts += [
            f'<circle cx="{x(value)}" cy="46" r="4" fill="none" stroke="{_GREY}" stroke-width="1.5"/>'
            for value in report.random_faithfulness
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="80" viewBox="0 0 {_WIDTH} 80" role="img" '
        f'aria-label="faithfulness {report.faithfulness:.3f}" style="font:11px sans-serif;background:#fff" fill="#111">'
        f"{''.join(parts)}</svg>"
    )
