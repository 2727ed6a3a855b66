"""Gradient estimates of what patching measures: every node or every edge from a few forward and backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from mechinterp.core.ablation import Ablation
from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.core.plan import budget_of, progress_bar, rows_per_forward
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import MetricError, SelectorError
from mechinterp.patching.activation import grid_of
from mechinterp.patching.compare import Direction, MetricLike, ablated_values, compare_runs, unit_of
from mechinterp.patching.ends import own_ends
from mechinterp.patching.gradients import check_gradient, path_points
from mechinterp.patching.neurons import neurons_of
from mechinterp.patching.readers import EMBED, layout_of
from mechinterp.patching.relevance import check_relevance
from mechinterp.patching.scores import RULES, EdgeScores, SiteScores, nodes_of
from mechinterp.patching.star import check_dropping, check_fixing
from mechinterp.tasks import Spans, Task, resolve_metric

__all__ = ["attribute"]


def attribute(
    model: Model,
    task: Task,
    at: str | Site | Selection | None = None,
    *,
    unit: Literal["node", "neuron", "edge"] = "node",
    steps: int | Sequence[int | float] = 0,
    path: Literal["inputs", "activations"] = "inputs",
    rules: Literal["gradient", "relp", "qk-fix", "grad-drop", "atp-star"] = "gradient",
    over: Sequence[str] | None = None,
    ablation: Ablation | str = "resample",
    metric: MetricLike = None,
    direction: Direction = "noise",
    normalize: bool = True,
    memory: int | str | None = None,
    progress: bool = False,
) -> Effects:
    """About how much would patching each node, site or edge change the metric?

    For a writer u and a reader v, the edge's score is the sum over positions of (other_u - receiving_u) . dm/d in_v,
    where in_v is what v reads before its norm; a node's score uses the gradient at its output. It estimates what
    `mechinterp.patch` measures, with the same sign and scale.

    Parameters
    ----------
    model, task
        What to run.
    at
        Estimate the effects of these sites, on the axes that `mechinterp.patch` would give. Default: all nodes
        (embed, heads, MLPs).
    unit
        ``"node"``; ``"neuron"``: the embedding, heads and neurons (``m3.n12``, of ``mlp_post``) in the place of MLPs; or
        ``"edge"``: every edge of the computation graph; on grouped-query models keys and values are read by the KV head.
    steps
        0: gradient at the receiving run (attribution patching, EAP). m: integrated gradients over m midpoints of the
        line between the two prompts' token embeddings (EAP-IG inputs). A sequence: these points of that line.
    path
        ``"inputs"``: the line between the embeddings. ``"activations"``: one line for each group of writers (the embedding;
        the heads of a layer; an MLP), on which that group's output moves to the other run's and all after it is recomputed;
        the gradients at all readers are averaged over all points of all lines (EAP-IG activations).
    rules
        ``"gradient"``: of the model itself. ``"relp"``: of a backward pass in which the scales of norms and the attention
        patterns are constants, a non-linearity is its input times a constant, and a product with a gate gives half to each
        factor. Queries and keys get no score by it. ``"qk-fix"``: where queries or keys change (sites ``q`` and ``k``, edges into
        these ports) attention is computed exactly with the changed ones, all else in place, and its change is what is multiplied
        by the gradient, at z: a saturated softmax has no slope and yet moves. For an edge the norm is exact as well.
        ``"grad-drop"``: the mean of the absolute scores over backward passes, in each of which nothing flows back through one
        layer's attention and MLP, so that paths of opposite sign do not cancel; it is without a sign, and is given that of the
        mean plain score. ``"atp-star"``: both (AtP*). These three take the gradient at the receiving run alone (``steps=0``).
    over
        As in `mechinterp.patch`. Of edges ``("span",)``: the sum over the positions of each span of ``task.spans`` for itself.
    ablation, metric, direction, normalize, progress
        As in `mechinterp.patch`, but here the default direction is ``"noise"``, as in the literature on edges.
    memory
        Bytes that activations, differences and gradients may take; more prompts are handled in parts.

    Returns
    -------
    Effects
        Axis ``node`` or ``edge`` (and ``span``), or those of the selector, per example. The provenance holds
        ``completeness_error``: how far the embedding's score is from the whole difference between the runs (it goes to 0 with
        ``steps``); under "resample" only.

    Raises
    ------
    GraphError
        Neurons of a mixture of experts.
    MetricError
        The metric has no gradient, or (KL at the clean run) it vanishes there; a path with rules that have none.
    ModelError
        The rules do not cover this model.

    Notes
    -----
    Cost: 2 forward passes and 1 backward pass with ``steps=0``, else 2 forward passes and ``steps`` forward and backward
    passes; times the number of groups with ``path="activations"``. ``"grad-drop"`` takes 3 forward passes and a backward pass
    for each layer and one more; ``"qk-fix"`` 3 and 1, and for each layer a row through its attention for each writer before it
    (twice: queries and keys) or each cell; ``"atp-star"`` 3 and all of the latter. Scores do not depend on the batch size.

    References
    ----------
    Nanda 2023 (attribution patching); Syed et al. 2023 (2310.10348); Hanna et al. 2024 (2403.17806), who take other
    points of the same path; Rezaei Jafari et al. 2025 (2508.21258), RelP; Kramár et al. 2024 (2403.00745), AtP*, who give
    queries, keys and neurons as nodes. In a model of few layers GradDrop loses much: with two, all that acts through the other
    layer alone. Here the mean over dropped layers is over those in which a score is left: all but its own,
    and all of them for the embedding's node and for edges into the logits.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> mi.attribute(toy.model, toy.task, unit="edge", steps=5).axes
    ('edge',)
    """
    check_model_and_task(model, task)
    if unit not in ("node", "neuron", "edge"):
        raise MetricError(f"unit={unit!r}: write 'node', 'neuron' or 'edge'")
    if unit != "node" and at is not None:
        raise SelectorError(f"unit={unit!r} scores every {unit}; a selector goes with unit='node'")
    selector = at
    if at is not None:
        at, task = own_ends(model, at, task)
    points = path_points(steps)
    check_gradient(resolve_metric(metric, task), direction, points)
    if path not in ("inputs", "activations"):
        raise MetricError(f"path={path!r}: write 'inputs' or 'activations'")
    if rules not in RULES:
        raise MetricError(f"rules={rules!r}: write one of {', '.join(map(repr, RULES))}")
    rule = RULES[rules]
    spans = _spans(task, over, rules) if unit == "edge" and over is not None else None
    if (rule.fixes or rule.drops) and (points != (0.0,) or path != "inputs"):
        raise MetricError(
            f"rules={rules!r} takes the gradient at the receiving run: leave out steps= and path=, or use rules='gradient'"
        )
    if rule.relevance:
        check_relevance(model)
    if rule.fixes:
        check_fixing(model)
    if rule.drops:
        check_dropping(model)
    scorer: EdgeScores | SiteScores
    if unit == "edge":
        scorer = EdgeScores(model, rule, spans)
    elif at is not None:
        scorer = SiteScores(model, grid_of(model, at, task.clean.shape[1], over), rule)
    else:
        scorer = SiteScores(model, neurons_of(model) if unit == "neuron" else nodes_of(model), rule)
    lines = layout_of(model).written.sites if path == "activations" else (EMBED,)
    memory = budget_of(model, memory, at_most=2 << 30)
    parts = _parts(model, task, scorer.bytes_per_token, memory)
    wanted = scorer.wanted | Selection(tuple(lines))
    # The gradient at the receiving run is that of the run itself.
    taped = scorer.hooked if points == (0.0,) and lines == (EMBED,) and rules == "gradient" else None
    passes = len(points) * len(lines)
    n_forwards, n_backwards = 2 + (passes if taped is None else 0), passes * len(scorer.drops)
    ablated = ablated_values(ablation, model, task, wanted, direction)
    scores, clean, corrupt = [], [], []
    with progress_bar(len(parts) * (2 + passes * (1 + len(scorer.drops))), f"attribute {unit}s", show=progress) as bar:
        for rows in parts:
            runs = compare_runs(
                model,
                task[rows],
                wanted if taped is None else wanted | scorer.streams,
                metric=metric,
                direction=direction,
                ablated=ablated(rows),
                taped=taped,
                cells=scorer.replayed,
            )
            bar.update(2)
            scores.append(scorer.score(runs, points, lines, memory, bar))
            clean.append(runs.measure(runs.clean_logits))
            corrupt.append(runs.measure(runs.corrupt_logits))
    baseline = {"clean": float(torch.cat(clean).mean()), "corrupt": float(torch.cat(corrupt).mean())}
    scale = unit_of(baseline, direction, metric=runs.metric, task=task) if normalize else 1.0
    flat = torch.cat(scores, dim=-1) / scale
    # Magnitudes of every prompt, with one sign for all: their mean is that of magnitudes.
    sign = torch.where(flat[0].mean(dim=-1, keepdim=True) < 0, -1.0, 1.0)
    flat = sign * flat[1].abs() if rule.drops else flat[0]
    method = rule.name or ("EAP" if unit == "edge" else "attribution patching")
    if points != (0.0,):
        method += f"-IG inputs, {len(points)} {'midpoints' if isinstance(steps, int) else 'points'}"
        method = method.replace("inputs", path)
    what = f"{unit}s" if at is None else str(scorer.site or selector)
    provenance = runs.provenance(
        method=method,
        site=scorer.site,
        points=list(points),
        normalized=normalize,
        forwards=n_forwards,
        backwards=n_backwards,
    )
    if rule.drops:
        provenance["sign"] = "magnitudes over dropped layers, with the sign of the mean score without dropping"
    provenance["prompts"] = len(task)
    if at is None and runs.ablation == "resample" and path == "inputs" and rules == "gradient":
        gap = (baseline["clean"] - baseline["corrupt"]) * (1 if direction == "denoise" else -1)
        provenance["completeness_error"] = float(scorer.from_embed(flat).mean()) - gap / scale
    return Effects(
        quantity=f"{method}: patching {what} ({direction}), estimated",
        axes=scorer.axes,
        coords=scorer.coords,
        per_example=flat.reshape(*(len(scorer.coords[axis]) for axis in scorer.axes), -1),
        baseline=baseline,
        provenance=provenance,
    )


def _spans(task: Task, over: Sequence[str], rules: str) -> Spans | None:
    """The spans that scores of edges are split by."""
    over = (over,) if isinstance(over, str) else tuple(over)
    if over not in ((), ("span",)):
        raise SelectorError(f"over={over!r}: scores of edges can be split by ('span',), or not at all")
    if over and (RULES[rules].fixes or RULES[rules].drops):
        raise MetricError(f"rules={rules!r} has no scores for each position, so over=('span',) goes with 'gradient' or 'relp'")
    return task.spans if over else None


def _parts(model: Model, task: Task, bytes_per_token: int, memory: int) -> list[slice]:
    """The prompts in parts whose activations, kept for the backward pass, fit the budget."""
    length = task.clean.shape[1]
    kept = memory // max(1, rows_per_forward(model, length, memory=memory)) * model.cfg.n_layers
    rows = max(1, memory // (kept + bytes_per_token * length))
    return [slice(first, first + rows) for first in range(0, len(task), rows)]
