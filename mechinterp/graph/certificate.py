"""What a circuit's file claims: its numbers, and how to come by them again. Plain data, no model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from mechinterp.errors import FileFormatError

__all__ = ["CLAIMS", "VERSION", "Certificate"]

VERSION: Final = 2  # of the report within a circuit's file; 1 did not say how the prompts were made

CLAIMS: Final = (
    "prompts",
    "clean",
    "corrupt",
    "empty",
    "circuit",
    "faithfulness",
    "faithfulness_interval",
    "mean_of_ratios",
    "model_accuracy",
    "circuit_accuracy",
    "kl",
    "edges",
    "connected",
    "all_edges",
    "nodes",
    "neurons",
    "random_faithfulness",
    "random_interval",
    "beats_random",
    "further",
)
NEEDED: Final = ("task", "model", "metric", "prompts", "seed", "ablation", "faithfulness")


@dataclass(frozen=True, repr=False)
class Certificate:
    """How far to believe a circuit, as its file says: `mechinterp.graph.Circuit.certificate`.

    Parameters
    ----------
    model, task, metric, ablation
        What it was judged on, and how.
    claims
        The numbers, by their names in the report of `mechinterp.evaluate`.
    seed, confidence, resamples, random_circuits
        What drew prompts for the interval and circuits for comparison.
    prompts
        How the prompts were made that judged it: generator, number, seed, split.
    command
        What made the file; empty where nobody said.
    caveats
        What these prompts cannot tell.
    version
        Of the report.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> truth = toy.truth["resample"]
    >>> report = mi.evaluate(truth, toy.model, toy.task, seed=0, random_circuits=2)
    >>> certificate = truth.with_report(report).certificate
    >>> certificate.claims["connected"], certificate.prompts["generator"]
    (5, 'toys')
    """

    model: str
    task: str
    metric: str
    ablation: str
    claims: Mapping[str, Any]
    seed: int
    confidence: float = 0.95
    resamples: int = 2000
    random_circuits: int = 0
    prompts: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    version: int = VERSION

    @classmethod
    def read(cls, report: Mapping[str, Any], provenance: Mapping[str, Any]) -> Certificate | None:
        """From a circuit's report and provenance; None where there is no evaluation in it."""
        if any(key not in report for key in NEEDED):
            return None
        version = report.get("version", 1)
        if not isinstance(version, int) or version > VERSION:
            raise FileFormatError(
                f"the circuit's report is of version {version!r}; this mechinterp reads versions 1 to {VERSION}. "
                "Upgrade mechinterp."
            )
        made = dict(report.get("task_provenance", {}))
        found = provenance.get("task_provenance", {})
        if not made and found.get("split") == "found_on":
            # Version 1 judged on the half that had not found it, and did not say so.
            made = {**found, "split": "held_out"}
        return cls(
            model=report["model"],
            task=report["task"],
            metric=report["metric"],
            ablation=report["ablation"],
            claims=MappingProxyType({name: report[name] for name in CLAIMS if report.get(name) not in (None, {})}),
            seed=report["seed"],
            confidence=report.get("confidence", 0.95),
            resamples=report.get("resamples", 2000),
            random_circuits=len(report.get("random_faithfulness", ())),
            prompts=MappingProxyType(made),
            command=tuple(report.get("command", ())),
            caveats=tuple(report.get("caveats", ())),
            version=version,
        )

    def __repr__(self) -> str:
        claims = self.claims
        low, high = claims.get("faithfulness_interval", (float("nan"),) * 2)
        lines = [
            f"Certificate: {self.task} on {self.model}, {claims['prompts']} prompts, {self.ablation} ablation, {self.metric}",
            f"  faithfulness {claims['faithfulness']:.3f} ({self.confidence:.0%} interval {low:.3f} to {high:.3f})"
            + (f", {claims['beats_random']} of {self.random_circuits} random circuits beaten" if self.random_circuits else ""),
        ]
        if self.command:
            lines.append(f"  made by: {shlex.join(self.command)}")
        return "\n".join([*lines, *(f"  caution: {caveat}" for caveat in self.caveats)])
