"""The dearer questions about a circuit together, as a few numbers and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mechinterp.core.ablation import Ablation
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.discovery.curve import points_of, size_curve
from mechinterp.discovery.faithfulness import faithfulness
from mechinterp.discovery.hypotheses import hypotheses_of, other_circuits
from mechinterp.discovery.removals import completeness, drawn_edges, drops_of, knocked_out
from mechinterp.discovery.running import run_circuits
from mechinterp.discovery.stability import stability
from mechinterp.graph import Circuit
from mechinterp.graph.nodes import counted
from mechinterp.patching.compare import MetricLike
from mechinterp.tasks import Task

__all__ = ["look_further", "told"]

_SAMPLE, _INFLATED, _RESAMPLES = 50, 30, 50
_OTHERS = ("zero", "mean", "resample")
# A drop of faithfulness below this is none.
_NO_DROP = 1e-3
# Of the test that the circuit is as good as the model; that of `check_hypotheses`.
_LEVEL = 0.05


def look_further(
    circuit: Circuit,
    model: Model,
    task: Task,
    *,
    seed: int,
    ablation: Ablation,
    metric: MetricLike,
    scores: Effects | None = None,
    progress: bool = False,
) -> tuple[dict[str, Any], int]:
    """Completeness, minimality, other ablations and hypotheses in numbers; and how many forward passes it took.

    With the scores of all edges also the curve over sizes, and how much the circuit would change with other prompts.
    """
    options: dict[str, Any] = {"ablation": ablation, "metric": metric, "progress": progress}
    if not circuit.n_connected:
        return {}, 0
    whole = completeness(circuit, model, task, seed=seed, **options)
    # The edges that minimality and the test of it take away are the same, so they are run once.
    edges = drawn_edges(circuit, _SAMPLE, seed=seed)
    less = knocked_out(circuit, edges, model, task, **options)
    drops = drops_of(less, edges, model, task)
    found: dict[str, Any] = {
        "prompts": len(task),
        "completeness": {
            "nothing": whole.mean("nothing"),
            "random": whole.mean("random"),
            "worst": whole.worst.gap,
            "sets": len(whole.removals) - 1,
        },
        "minimality": {
            "edges": len(drops.values),
            "median": float(drops.values.median()),
            "least": float(drops.values.min()),
            "no_drop": int((drops.values < _NO_DROP).sum()),
        },
    }
    cost = int(whole.provenance["forwards"] + drops.provenance["forwards"])
    if len(circuit) < circuit.shape.n_edges and len(task) > 1:
        others = run_circuits(model, task, other_circuits(circuit, _INFLATED, seed=seed), **options)
        tests = hypotheses_of(less, others, edges, model, task, seed=seed)
        found["without"] = float(faithfulness(others.circuits[0], others.clean, others.empty))
        found["hypotheses"] = {
            "p": tests.p_values,
            "p_same": tests.equivalence.p_same,
            "rejected": list(tests.rejected),
            "needless": len(tests.needless),
            "edges": len(tests.edges),
        }
        cost += 2 + len(others.circuits) + (others.ablation != "resample")
    shares = {}
    for kind in _OTHERS:
        if kind != ablation.kind:
            outs = run_circuits(model, task, circuit, ablation=kind, metric=metric, progress=progress)
            cost += 3 + (kind != "resample")
            share = float(faithfulness(outs.circuits[0], outs.clean, outs.empty))
            # Without a difference there is no share of it.
            shares[kind] = share if abs(float((outs.clean - outs.empty).mean())) > 1e-6 else None
    found["ablations"] = shares
    if scores is not None:
        curve = size_curve(scores, model, task, **options)
        on_connected = curve.area("connected")
        found["curve"] = {
            "cpr": curve.cpr,
            "cmd": curve.cmd,
            "cpr_connected": on_connected[0],
            "cmd_connected": on_connected[1],
            "asked": list(curve.asked),
            "connected": list(curve.connected),
            "faithfulness": curve.faithfulness.tolist(),
        }
        cost += int(curve.provenance["forwards"])
        found |= _stability(circuit, model, scores, seed=seed)
    return found, cost


def _stability(circuit: Circuit, model: Model, scores: Effects, *, seed: int) -> dict[str, Any]:
    """How much circuits of resampled prompts agree, where the circuit was chosen by a number of edges."""
    said = circuit.provenance.get("selection", {})
    if "n" not in said or said.get("rule") not in ("connected", "top", "greedy") or scores.per_example.shape[-1] < 2:
        return {}
    again = stability(
        scores, model, seed=seed, edges=said["n"], selection=said["rule"], signed=said["signed"], resamples=_RESAMPLES
    )
    low, high = again.interval
    return {
        "stability": {
            "jaccard": again.mean,
            "low": low,
            "high": high,
            "core": len(again.core()),
            "edges": len(again.circuit),
            "resamples": _RESAMPLES,
            "prompts": scores.per_example.shape[-1],
        }
    }


def told(further: Mapping[str, Any]) -> Iterator[str]:
    """The same in sentences."""
    if "prompts" in further:
        yield f"what follows was asked on {further['prompts']} of the prompts"
    if "without" in further:
        yield f"everything but the circuit has faithfulness {further['without']:.3f}"
    if "completeness" in further:
        each = further["completeness"]
        yield (
            f"incompleteness {each['nothing']:.3f} with nothing removed, {each['random']:.3f} on random sets of nodes, "
            f"{each['worst']:.3f} at worst of {each['sets']} sets"
        )
    if "minimality" in further:
        each = further["minimality"]
        yield (
            f"minimality, {counted(each['edges'], 'edge')} removed one at a time: the median drop is {each['median']:.4f}; "
            f"{each['no_drop']} of them can go, each alone, without a drop"
        )
    if further.get("ablations"):
        shares = [f"{kind} {'undefined' if f is None else format(f, '.3f')}" for kind, f in further["ablations"].items()]
        yield f"faithfulness under other ablations: {', '.join(shares)}"
    if "hypotheses" in further:
        each = further["hypotheses"]
        tests = ", ".join(f"{name} p {p:.3g}" for name, p in each["p"].items())
        yield f"hypotheses of an ideal circuit: {tests}; rejected: {', '.join(each['rejected']) or 'none'}"
        # A large p is no evidence of a difference either: it says nothing.
        shown = "is shown" if each["p_same"] < _LEVEL else "is not shown"
        yield (
            f"{each['needless']} of {each['edges']} edges do no more than random ones; that the circuit does as well as the "
            f"model, within a margin, {shown} (p {each['p_same']:.3g})"
        )
    if "curve" in further:
        each = further["curve"]
        points = points_of(each["connected"], each["faithfulness"])
        yield (
            f"over all sizes CPR {each['cpr']:.3f}, CMD {each['cmd']:.3f} ({each['cpr_connected']:.3f}, "
            f"{each['cmd_connected']:.3f} over connected edges); faithfulness by connected edges {points}"
        )
    if "stability" in further:
        each = further["stability"]
        yield (
            f"chosen again from {each['prompts']} resampled prompts: Jaccard {each['jaccard']:.3f} ({each['low']:.3f} to "
            f"{each['high']:.3f}) over {each['resamples']} times; {each['core']} of {each['edges']} edges in 95% of them"
        )
