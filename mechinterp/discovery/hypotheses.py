"""Is the circuit as good as the model, is the rest worth nothing, is every edge needed? Three tests of hypotheses."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.ablation import Ablation, as_ablation
from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.model import Model
from mechinterp.core.resampling import adjusted
from mechinterp.core.testing import HSICTest, SignTest, binomial, hsic_test, sign_test
from mechinterp.discovery.removals import drawn_edges, knocked_out
from mechinterp.discovery.running import CircuitRuns, run_circuits
from mechinterp.errors import GraphError, MetricError
from mechinterp.graph import Circuit, Edge, check_circuit, check_everywhere
from mechinterp.graph.inflate import inflate
from mechinterp.patching.compare import MetricLike
from mechinterp.tasks import Task

__all__ = ["HypothesisTests", "check_hypotheses"]


@dataclass(frozen=True, eq=False)
class HypothesisTests:
    """Three null hypotheses that hold for an ideal circuit, and how the prompts speak against them. Made by `check_hypotheses`.

    Parameters
    ----------
    equivalence
        Circuit minus model, prompt by prompt. A small ``p_differ`` speaks against the circuit, a small ``p_same`` for it.
    independence
        Of the rest of the model (everything but the circuit) and the whole model. A small p says that the rest still knows what
        the model does.
    edges, changes, beaten
        The edges whose need was tested: the mean absolute change of the metric without each, ``[edge]``, and how many random
        edges of inflated circuits change less.
    edge_p, edge_adjusted
        ``[edge]``: small says that the edge does no more than a random edge would. Corrected for the number of edges.
    inflated
        ``[circuit]``: the change without a random edge of a randomly inflated circuit.
    level
        Below it a corrected p rejects.
    correction
        For the number of edges, and for the three tests.
    """

    equivalence: SignTest
    independence: HSICTest
    edges: tuple[Edge, ...]
    changes: Tensor
    beaten: Tensor
    edge_p: Tensor
    edge_adjusted: Tensor
    inflated: Tensor
    level: float
    correction: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def p_values(self) -> dict[str, float]:
        """One for each hypothesis, corrected for there being three; that of minimality is the least of its edges'."""
        raw = [self.equivalence.p_differ, self.independence.p, float(self.edge_adjusted.min())]
        names = ("equivalence", "independence", "minimality")
        return dict(zip(names, adjusted(torch.tensor(raw, dtype=torch.float64), self.correction).tolist(), strict=True))

    @property
    def rejected(self) -> tuple[str, ...]:
        """The hypotheses that the prompts speak against, at the level."""
        return tuple(name for name, p in self.p_values.items() if p < self.level)

    @property
    def needless(self) -> tuple[Edge, ...]:
        """Edges that do less than a random edge of an inflated circuit, at the level."""
        return tuple(edge for edge, p in zip(self.edges, self.edge_adjusted.tolist(), strict=True) if p < self.level)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        said = {
            "p_values": self.p_values,
            "rejected": list(self.rejected),
            "level": self.level,
            "correction": self.correction,
            "equivalence": self.equivalence._asdict(),
            "independence": self.independence._asdict(),
            "needless": [str(edge) for edge in self.needless],
            "edges": [str(edge) for edge in self.edges],
            "changes": self.changes.tolist(),
            "edge_p": self.edge_adjusted.tolist(),
            **self.provenance,
        }
        return dict(json.loads(json.dumps(said)))

    def __repr__(self) -> str:
        def verdict(name: str) -> str:
            return f"p {self.p_values[name]:.3g}, {'REJECTED' if name in self.rejected else 'not rejected'}"

        signs, origin = self.equivalence, self.provenance
        shown = "is shown" if signs.p_same < self.level else "is not shown"
        tied = f", {signs.ties} ties" if signs.ties else ""
        return "\n".join(
            [
                f"HypothesisTests: {origin['task']} on {origin['model']}, {origin['prompts']} prompts, "
                f"{origin['ablation']} ablation; level {self.level}, {self.correction} correction",
                f"  equivalence: {verdict('equivalence')} (circuit above the model on {signs.wins} prompts, below on "
                f"{signs.losses}{tied}; that it is within {signs.margin} of even {shown}, p {signs.p_same:.3g})",
                f"  independence: {verdict('independence')} (HSIC {self.independence.statistic:.3g} of the rest and the model)",
                f"  minimality: {verdict('minimality')} ({len(self.needless)} of {len(self.edges)} edges do no more "
                "than random ones)",
            ]
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def check_hypotheses(
    circuit: Circuit,
    model: Model,
    task: Task,
    *,
    seed: int,
    epsilon: float = 0.1,
    quantile: float = 0.9,
    inflated: int = 30,
    sample: int | None = None,
    permutations: int = 1000,
    correction: str = "holm",
    level: float = 0.05,
    ablation: Ablation | str = "resample",
    metric: MetricLike = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> HypothesisTests:
    """Do the prompts speak against this circuit being the mechanism?

    With s the metric on one prompt, C the circuit, M the model, M - C everything but the circuit:

    - equivalence: abs(P(s(C) > s(M)) - 1/2) <= epsilon, by a sign test (ties within rounding are left out);
    - independence: s(M - C) and s(M) are independent, by permuting HSIC;
    - minimality: for every edge e of C, P(delta(e, C) > delta(r, C + path)) >= quantile, where the random path goes from the
      embedding to the logits, r is one of its new edges, and delta(e, C) = mean over prompts of abs(s(C) - s(C - e)). By the
      binomial distribution, corrected for the number of edges.

    An ideal circuit keeps all three. Not being rejected is no proof: few prompts reject little. Under ``"resample"`` the rest
    answers the corrupt prompt, and how well may depend on the pair: where right and wrong trade places it is the mirror image of
    the model. Test independence under an ablation that does not know the pair, such as ``"zero"`` or ``"mean"``.

    Parameters
    ----------
    circuit, model, task
        As in `mechinterp.evaluate`; on prompts that did not find the circuit.
    seed
        Of the random paths, permutations, the sample of edges, and what the ablation draws.
    epsilon, quantile
        How uneven is still equivalent; more than which share of random edges every edge has to beat.
    inflated
        How many random paths.
    sample
        Test so many edges, drawn by chance, instead of all.
    permutations
        Of the test of independence.
    correction
        ``"holm"`` or ``"bh"``, see `mechinterp.Effects.p_values`.
    level
        Below this a corrected p rejects.
    ablation, metric, memory, progress
        As in `mechinterp.run_circuits`.

    Returns
    -------
    HypothesisTests
        Prints itself; ``.rejected``, ``.needless``, ``.p_values``.

    Raises
    ------
    GraphError
        The circuit has no connected edge, or every edge.
    MetricError
        Fewer than 2 prompts; a quantile outside of (0, 1); no inflated circuits.

    Notes
    -----
    Cost: 4 forward passes over the prompts, 2 for each inflated circuit, one for each edge tested.

    References
    ----------
    Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs" (2410.13032). Their code puts the mean difference of
    scores where the sign test has the share of wins, and does not correct for the number of edges; this follows the paper.
    Kernels are as wide as the median distance within each variable.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> tests = mi.check_hypotheses(toy.truth["zero"], toy.model, toy.task, ablation="zero", seed=0)
    >>> tests.rejected
    ()
    """
    check_circuit(circuit)
    check_everywhere(circuit, "mi.check_hypotheses")
    check_model_and_task(model, task)
    edges = drawn_edges(circuit, sample, seed=seed)
    if not edges:
        raise GraphError(f"{circuit!r} has no connected edge, so there is nothing to test")
    if len(task) < 2:
        raise MetricError("hypotheses are tested over prompts, and the task has 1; give at least 2, better 50")
    if not 0 < quantile < 1 or inflated < 1:
        raise MetricError(f"quantile={quantile}, inflated={inflated}: give a share between 0 and 1, and at least one circuit")
    ablation = as_ablation(ablation, seed=seed)
    options: dict[str, Any] = {"ablation": ablation, "metric": metric, "memory": memory, "progress": progress}
    outs = knocked_out(circuit, edges, model, task, **options)
    others = run_circuits(model, task, other_circuits(circuit, inflated, seed=seed), **options)
    levels: dict[str, Any] = {"epsilon": epsilon, "quantile": quantile, "correction": correction, "level": level}
    return hypotheses_of(outs, others, edges, model, task, seed=seed, permutations=permutations, **levels)


def other_circuits(circuit: Circuit, inflated: int, *, seed: int) -> list[Circuit]:
    """Everything but the circuit; then each inflated circuit, with and without an edge of its random path."""
    generator = random.Random(seed)
    rows = [Circuit.full(circuit.shape) - circuit]
    for i in range(inflated):
        more, new = inflate(circuit, seed=seed + i)
        rows += [more, more - Circuit.from_edges(circuit.shape, [generator.choice(new)])]
    return rows


def hypotheses_of(
    outs: CircuitRuns,
    others: CircuitRuns,
    edges: Sequence[Edge],
    model: Model,
    task: Task,
    *,
    seed: int,
    epsilon: float = 0.1,
    quantile: float = 0.9,
    permutations: int = 1000,
    correction: str = "holm",
    level: float = 0.05,
) -> HypothesisTests:
    """What `check_hypotheses` gives, from the runs of `knocked_out` and those of `other_circuits`."""
    inflated = len(others.circuits) // 2
    eps = torch.finfo(model.dtype).eps
    rounding = 100 * eps * max(1.0, float(outs.clean.abs().max()))
    changes = (outs.circuits[0] - outs.circuits[1:]).abs().mean(dim=1)
    chance = (others.circuits[1::2] - others.circuits[2::2]).abs().mean(dim=1)
    beaten = (changes[:, None] > chance[None, :] + rounding).sum(dim=1)
    below = binomial(inflated, quantile).cumsum(dim=0)
    edge_p = below[beaten].clamp(max=1)
    return HypothesisTests(
        equivalence=sign_test(outs.circuits[0] - outs.clean, margin=epsilon, rounding=rounding),
        independence=hsic_test(others.circuits[0], outs.clean, seed=seed, permutations=permutations, rounding=rounding),
        edges=tuple(edges),
        changes=changes,
        beaten=beaten,
        edge_p=edge_p,
        edge_adjusted=adjusted(edge_p, correction),
        inflated=chance,
        level=level,
        correction=correction,
        provenance={
            **outs.provenance(model, task),
            "quantile": quantile,
            "inflated": inflated,
            "permutations": permutations,
            "seed": seed,
            "forwards": 2 + 1 + len(edges) + 2 + len(others.circuits) + 2 * (outs.ablation != "resample"),
        },
    )
