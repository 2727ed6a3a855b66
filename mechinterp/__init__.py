"""Mechanistic interpretability built on hooks: patch activations, discover circuits, judge and draw them.

>>> import mechinterp as mi
>>> toy = mi.toys.induction()
>>> effects = mi.patch(toy.model, toy.task, "L*.H*.z")
>>> circuit = mi.discover(toy.model, toy.task, edges=12)

Names are loaded when they are first used, so that the import itself is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechinterp import tasks as tasks
    from mechinterp import toys as toys
    from mechinterp.core.ablation import Ablation as Ablation
    from mechinterp.core.audit import Audit as Audit
    from mechinterp.core.audit import audit as audit
    from mechinterp.core.edits import Add as Add
    from mechinterp.core.edits import Call as Call
    from mechinterp.core.edits import Clamp as Clamp
    from mechinterp.core.edits import Edit as Edit
    from mechinterp.core.edits import Freeze as Freeze
    from mechinterp.core.edits import Mean as Mean
    from mechinterp.core.edits import Noise as Noise
    from mechinterp.core.edits import Project as Project
    from mechinterp.core.edits import Replace as Replace
    from mechinterp.core.edits import Resample as Resample
    from mechinterp.core.edits import Scale as Scale
    from mechinterp.core.edits import Swap as Swap
    from mechinterp.core.edits import Zero as Zero
    from mechinterp.core.edits import edit_from_json as edit_from_json
    from mechinterp.core.effects import Effects as Effects
    from mechinterp.core.generate import Generation as Generation
    from mechinterp.core.generate import generate as generate
    from mechinterp.core.hooks import HookRegistry as HookRegistry
    from mechinterp.core.model import Model as Model
    from mechinterp.core.plan import Plan as Plan
    from mechinterp.core.reference import deviation as deviation
    from mechinterp.core.run import Cache as Cache
    from mechinterp.core.run import Run as Run
    from mechinterp.core.run import run as run
    from mechinterp.core.select import Selection as Selection
    from mechinterp.core.select import select as select
    from mechinterp.core.sites import Site as Site
    from mechinterp.core.tokens import token_positions as token_positions
    from mechinterp.discovery.ability import Ability as Ability
    from mechinterp.discovery.ability import check_task as check_task
    from mechinterp.discovery.ablated import AblationTable as AblationTable
    from mechinterp.discovery.ablated import compare_ablations as compare_ablations
    from mechinterp.discovery.acdc import acdc as acdc
    from mechinterp.discovery.agreement import Agreement as Agreement
    from mechinterp.discovery.curve import SizeCurve as SizeCurve
    from mechinterp.discovery.curve import size_curve as size_curve
    from mechinterp.discovery.describe import HeadStory as HeadStory
    from mechinterp.discovery.describe import describe as describe
    from mechinterp.discovery.discover import discover as discover
    from mechinterp.discovery.evaluate import Report as Report
    from mechinterp.discovery.evaluate import evaluate as evaluate
    from mechinterp.discovery.hypotheses import HypothesisTests as HypothesisTests
    from mechinterp.discovery.hypotheses import check_hypotheses as check_hypotheses
    from mechinterp.discovery.known import Recovery as Recovery
    from mechinterp.discovery.known import auroc as auroc
    from mechinterp.discovery.known import compare_to_known as compare_to_known
    from mechinterp.discovery.measuring import compare_to_exact as compare_to_exact
    from mechinterp.discovery.removals import Completeness as Completeness
    from mechinterp.discovery.removals import completeness as completeness
    from mechinterp.discovery.removals import minimality as minimality
    from mechinterp.discovery.running import CircuitRuns as CircuitRuns
    from mechinterp.discovery.running import run_circuits as run_circuits
    from mechinterp.discovery.stability import Stability as Stability
    from mechinterp.discovery.stability import stability as stability
    from mechinterp.errors import MechInterpError as MechInterpError
    from mechinterp.graph import Certificate as Certificate
    from mechinterp.graph import Circuit as Circuit
    from mechinterp.graph import Diagram as Diagram
    from mechinterp.graph import Edge as Edge
    from mechinterp.graph import GraphShape as GraphShape
    from mechinterp.graph import computation_graph as computation_graph
    from mechinterp.graph import draw as draw
    from mechinterp.graph import load_mib as load_mib
    from mechinterp.graph import random_edges as random_edges
    from mechinterp.graph import save_mib as save_mib
    from mechinterp.lens.attention import attention as attention
    from mechinterp.lens.attention import attention_flow as attention_flow
    from mechinterp.lens.attention import attention_rollout as attention_rollout
    from mechinterp.lens.direct import direct_logits as direct_logits
    from mechinterp.lens.fitting import fit_tuned_lens as fit_tuned_lens
    from mechinterp.lens.heads import HeadScores as HeadScores
    from mechinterp.lens.heads import head_scores as head_scores
    from mechinterp.lens.logit_lens import logit_lens as logit_lens
    from mechinterp.lens.memories import SubUpdates as SubUpdates
    from mechinterp.lens.memories import ValueVectors as ValueVectors
    from mechinterp.lens.memories import sub_updates as sub_updates
    from mechinterp.lens.memories import value_vectors as value_vectors
    from mechinterp.lens.neurons import TopTokens as TopTokens
    from mechinterp.lens.neurons import top_tokens as top_tokens
    from mechinterp.lens.seen import Attention as Attention
    from mechinterp.lens.tuned import TunedLens as TunedLens
    from mechinterp.lens.weights import composition as composition
    from mechinterp.lens.weights import copying_scores as copying_scores
    from mechinterp.lens.weights import ov_circuit as ov_circuit
    from mechinterp.lens.weights import qk_circuit as qk_circuit
    from mechinterp.patching.activation import patch as patch
    from mechinterp.patching.activation import plan as plan
    from mechinterp.patching.attribution import attribute as attribute
    from mechinterp.patching.edges import edge_effects as edge_effects
    from mechinterp.patching.edges import plan_edges as plan_edges
    from mechinterp.patching.paths import patch_paths as patch_paths
    from mechinterp.tasks import Metric as Metric
    from mechinterp.tasks import Task as Task
    from mechinterp.verifying import Verification as Verification
    from mechinterp.verifying import verify as verify
    from mechinterp.zoo import load as load

_HOMES = {
    "core.ablation": ("Ablation",),
    "core.audit": ("Audit", "audit"),
    "core.edits": (
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
    ),
    "core.effects": ("Effects",),
    "core.generate": ("Generation", "generate"),
    "core.hooks": ("HookRegistry",),
    "core.model": ("Model",),
    "core.plan": ("Plan",),
    "core.reference": ("deviation",),
    "core.run": ("Cache", "Run", "run"),
    "core.select": ("Selection", "select"),
    "core.sites": ("Site",),
    "core.tokens": ("token_positions",),
    "discovery.ability": ("Ability", "check_task"),
    "discovery.ablated": (
        "AblationTable",
        "compare_ablations",
    ),
    "discovery.acdc": ("acdc",),
    "discovery.agreement": ("Agreement",),
    "discovery.curve": (
        "SizeCurve",
        "size_curve",
    ),
    "discovery.describe": ("HeadStory", "describe"),
    "discovery.discover": ("discover",),
    "discovery.evaluate": ("Report", "evaluate"),
    "discovery.hypotheses": (
        "HypothesisTests",
        "check_hypotheses",
    ),
    "discovery.known": (
        "Recovery",
        "auroc",
        "compare_to_known",
    ),
    "discovery.measuring": ("compare_to_exact",),
    "discovery.removals": (
        "Completeness",
        "completeness",
        "minimality",
    ),
    "discovery.running": ("CircuitRuns", "run_circuits"),
    "discovery.stability": (
        "Stability",
        "stability",
    ),
    "errors": ("MechInterpError",),
    "graph": (
        "Certificate",
        "Circuit",
        "Diagram",
        "Edge",
        "GraphShape",
        "computation_graph",
        "draw",
        "load_mib",
        "random_edges",
        "save_mib",
    ),
    "lens.attention": ("attention", "attention_flow", "attention_rollout"),
    "lens.direct": ("direct_logits",),
    "lens.fitting": ("fit_tuned_lens",),
    "lens.heads": ("HeadScores", "head_scores"),
    "lens.logit_lens": ("logit_lens",),
    "lens.memories": ("SubUpdates", "ValueVectors", "sub_updates", "value_vectors"),
    "lens.neurons": ("TopTokens", "top_tokens"),
    "lens.seen": ("Attention",),
    "lens.tuned": ("TunedLens",),
    "lens.weights": ("composition", "copying_scores", "ov_circuit", "qk_circuit"),
    "patching.activation": ("patch", "plan"),
    "patching.attribution": ("attribute",),
    "patching.edges": ("edge_effects", "plan_edges"),
    "patching.paths": ("patch_paths",),
    "tasks": ("Metric", "Task"),
    "verifying": (
        "Verification",
        "verify",
    ),
    "zoo": ("load",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"

__all__ = sorted([*_HOME_OF, "tasks", "toys"])


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(f"mechinterp.{_HOME_OF[name]}"), name)
    elif name in ("tasks", "toys"):
        value = import_module(f"mechinterp.{name}")
    else:
        from mechinterp.errors import did_you_mean

        raise AttributeError(f"mechinterp has no {name!r}. {did_you_mean(name, __all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
