"""Attention: who looks where, how much of that counts, and how it adds up over layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from einops import einsum
from torch import Tensor

from mechinterp.core.answers import answer_logits
from mechinterp.core.arguments import check_model, check_model_and_task
from mechinterp.core.hooks import HookRegistry
from mechinterp.core.model import Model
from mechinterp.core.plan import rows_per_forward
from mechinterp.core.prompts import Batch, Runnable, batch_of
from mechinterp.core.run import run
from mechinterp.core.select import Selection, select
from mechinterp.core.sites import Site
from mechinterp.errors import MetricError, SelectorError, TaskError, did_you_mean
from mechinterp.lens.neurons import spelled
from mechinterp.lens.seen import Attention
from mechinterp.tasks import Metric, Task, resolve_metric

__all__ = ["attention", "attention_flow", "attention_rollout"]

Weigh = Literal["pattern", "value", "gradient"]
WEIGHS = {"pattern": "attention", "value": "attention times length of the value", "gradient": "attention times gradient"}
# Capacities as whole numbers: with floats the flow might never end.
_UNITS = 1 << 40


def attention(
    model: Model,
    prompts: Runnable,
    heads: str | Site | Selection = "L*.H*.pattern",
    *,
    weigh: Weigh = "pattern",
    metric: str | Metric | Callable[[Tensor, Task], Tensor] | None = None,
    average: bool = False,
) -> Attention:
    """Where does each head look, and does it matter?

    Parameters
    ----------
    model, prompts
        As for `mechinterp.run`. ``"gradient"`` needs a `Task`, whose clean prompts are run.
    heads
        Which: ``"L9.H6.pattern"``, ``"L5.H*.pattern | L6.H1.pattern"``.
    weigh
        - ``"pattern"``: the attention a itself.
        - ``"value"``: ``|a v W_O|``, the length of what is moved (Kobayashi et al. 2020): attention to a token whose value is
          nothing does nothing.
        - ``"gradient"``: ``a * dm/da``, about how much the metric would lose without it, with its sign.
    metric
        For ``"gradient"``; default: the task's own.
    average
        The mean over prompts at each position (real tokens only) in place of one picture for each prompt.

    Returns
    -------
    Attention
        ``[batch head q_pos k_pos]``; ``found["L9.H6"]`` is one head; it draws itself.

    Raises
    ------
    SelectorError
        What is named is no heads of ``pattern``.
    TaskError, MetricError
        A gradient without a task, or of a metric that has none; a metric where there is no gradient.

    Notes
    -----
    Cost: one forward pass up to the last layer that is named; with ``"gradient"`` one forward and one backward pass.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> seen = mi.attention(toy.model, toy.task, "L*.H*.pattern")
    >>> seen["L1.H5"].shape
    torch.Size([32, 13, 13])
    >>> looks = mi.attention(toy.model, toy.task, "L1.H*.pattern", weigh="gradient").strongest(1)
    >>> looks[0][0]
    'L1.H5'

    References
    ----------
    Kobayashi et al. 2020 (2004.10102); Barkan et al. 2021 for attention times gradient.
    """
    check_model(model, prompts)
    if weigh not in WEIGHS:
        raise SelectorError(f"there is no way to weigh attention by {weigh!r}. {did_you_mean(weigh, WEIGHS)}")
    if metric is not None and weigh != "gradient":
        raise MetricError(f"metric= says whose gradient is meant; give it with weigh='gradient', not {weigh!r}")
    sites = select(_spelled(heads) if isinstance(heads, str) else heads, model.cfg).sites
    for site in sites:
        if site.name != "pattern" or site.pos is not None:
            raise SelectorError(f"{site} is not the attention of a head; write 'L9.H6.pattern' or 'L9.H*.pattern'")
    # A site without a head means all heads of its layer.
    named = [(site.layer or 0, head) for site in sites for head in _heads(model, site)]
    given = batch_of(model, prompts)
    about: dict[str, object] = {"model": model.name, "weigh": weigh}
    at_once, found = rows_per_forward(model, given.tokens.shape[1]), []
    if weigh == "gradient":
        task = _checked_task(model, prompts)
        chosen = resolve_metric(metric, task)
        if not chosen.differentiable or chosen.needs_reference:
            raise MetricError(f"{chosen.name!r} has no gradient to weigh attention by; use metric='logit_diff'")
        about["metric"] = chosen.name
        for first in range(0, len(task), at_once):
            found.append(_by_gradient(model, task[first : first + at_once], named, chosen))
    else:
        for first in range(0, len(given.tokens), at_once):
            found.append(_looked(model, given[first : first + at_once], named, by_value=weigh == "value"))
    names = tuple(f"L{layer}.H{head}" for layer, head in named)
    return _result(model, given, WEIGHS[weigh], names, torch.cat(found), about, average=average)


def attention_rollout(model: Model, prompts: Runnable, *, residual: float = 0.5, average: bool = False) -> Attention:
    """How much of each input token is mixed into each position after every layer, if attention were all?

    rollout_l = A_l rollout_(l-1), where A_l is the mean over heads of the attention and the identity for the residual stream,
    ``(1 - residual) mean_h(a) + residual I``; rollout before the first layer is I.

    Parameters
    ----------
    model, prompts, average
        As for `attention`.
    residual
        The share of the stream that goes past attention, from 0 to 1.

    Returns
    -------
    Attention
        ``[batch layer q_pos k_pos]``, each row sums to 1; ``found["L3"]`` is up to layer 3.

    Raises
    ------
    SelectorError
        A share below 0 or above 1.

    Notes
    -----
    A picture of mixing, not of what matters: values, MLPs and what heads write are left out. Cost: one forward pass.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> mi.attention_rollout(toy.model, toy.task[:2])["L1"].shape
    torch.Size([2, 13, 13])

    References
    ----------
    Abnar & Zuidema 2020 (2005.00928).
    """
    check_model(model, prompts)
    given, mixed = _mixed(model, prompts, residual)
    rolled = [mixed[:, 0]]
    for layer in range(1, model.cfg.n_layers):
        rolled.append(mixed[:, layer] @ rolled[-1])
    names = tuple(f"L{layer}" for layer in range(model.cfg.n_layers))
    about = {"model": model.name, "residual": residual}
    return _result(model, given, "rollout of attention", names, torch.stack(rolled, dim=1), about, average=average)


def attention_flow(model: Model, prompts: Runnable, *, pos: int = -1, residual: float = 0.5, average: bool = False) -> Attention:
    """How much could flow from each input token to a position after the last layer, if attention were pipes?

    The maximum flow from a token to the position through a network with a node for each position and layer, and between
    neighbouring layers pipes as wide as the mixed attention of `attention_rollout`.

    Parameters
    ----------
    model, prompts, residual, average
        As for `attention_rollout`.
    pos
        Where it is read; negative ones count from the end of each prompt.

    Returns
    -------
    Attention
        ``[batch 1 1 k_pos]``: one row for each prompt.

    Raises
    ------
    SelectorError
        A prompt has no such position.

    Notes
    -----
    Cost: one forward pass, and for each prompt and token one flow through n_layers pos^2 / 2 pipes: meant for short prompts.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> flow = mi.attention_flow(toy.model, toy.task[:1])
    >>> [tuple(flow.values.shape), bool((flow.values <= 1 + 1e-6).all())]
    [(1, 1, 1, 13), True]

    References
    ----------
    Abnar & Zuidema 2020 (2005.00928).
    """
    import networkx as nx

    check_model(model, prompts)
    given, mixed = _mixed(model, prompts, residual)
    width = given.tokens.shape[1]
    lengths = [width] * len(given.tokens) if given.lengths is None else given.lengths.tolist()
    if not all(-length <= pos < length for length in lengths):
        raise SelectorError(f"pos={pos}: the shortest prompt has {min(lengths)} tokens")
    flows = torch.zeros(len(lengths), 1, 1, width)
    for row, length in enumerate(lengths):
        end = pos % length
        pipes = nx.DiGraph()
        for layer, weights in enumerate((mixed[row].double() * _UNITS).round().long().tolist()):
            for q in range(end + 1):
                pipes.add_edges_from(((layer, k), (layer + 1, q), {"capacity": weights[q][k]}) for k in range(q + 1))
        for k in range(end + 1):
            flow = nx.maximum_flow_value(pipes, (0, k), (model.cfg.n_layers, end))
            flows[row, 0, 0, k] = flow / _UNITS
    about = {"model": model.name, "residual": residual, "pos": pos}
    return _result(model, given, "flow of attention", ("flow",), flows, about, average=average, rows=(pos,))


def _checked_task(model: Model, prompts: object) -> Task:
    check_model_and_task(model, prompts)
    if not isinstance(prompts, Task):
        raise TaskError(f"weigh='gradient' reads a metric at the answers of an mi.Task, not of a {type(prompts).__name__}")
    return prompts


def _spelled(heads: str) -> str:
    """Heads may be named as on a diagram, ``a9.h6``, and without their site, ``L9.H6``."""
    terms = (re.fullmatch(r"[La]([^.]+)\.[Hh]([^.\[]+)", term.strip()) for term in heads.split("|"))
    return " | ".join(
        term if match is None else f"L{match[1]}.H{match[2]}.pattern" for term, match in zip(heads.split("|"), terms, strict=True)
    )


def _heads(model: Model, site: Site) -> range:
    return range(model.cfg.n_heads) if site.head is None else range(site.head, site.head + 1)


def _looked(model: Model, part: Batch, named: list[tuple[int, int]], *, by_value: bool) -> Tensor:
    """``[batch head q_pos k_pos]`` on the CPU, in float32."""
    layers = dict.fromkeys(layer for layer, _ in named)
    wanted = [Site(name, layer) for layer in layers for name in (("pattern", "v") if by_value else ("pattern",))]
    cache = run(model, part.tokens, capture=Selection(tuple(wanted)), logits=False).cache.whole
    found = []
    for layer, head in named:
        looked = cache[Site("pattern", layer)][:, head].float()
        if by_value:
            value = cache[Site("v", layer)][:, :, head // (model.cfg.n_heads // model.cfg.n_kv_heads)].float()
            moved = value @ model.projection(layer, "o").weight[head].float()
            looked = looked * moved.norm(dim=-1)[:, None, :]
        found.append(looked.cpu())
    return torch.stack(found, dim=1)


def _by_gradient(model: Model, task: Task, named: list[tuple[int, int]], metric: Metric) -> Tensor:
    leaves: dict[int, Tensor] = {}
    values: dict[Site, Tensor] = {}
    registry = HookRegistry(model)
    for layer in dict.fromkeys(layer for layer, _ in named):

        def grow(value: Tensor, layer: int = layer) -> Tensor:
            leaves[layer] = torch.zeros_like(value, requires_grad=True)
            return value + leaves[layer]

        registry.transform(Site("pattern", layer), grow)
        registry.capture(Selection((Site("pattern", layer),)), values)
    task = task.to(model.device)
    with torch.enable_grad():
        with registry:
            logits = answer_logits(model, task.clean, task.answer_pos)
        # Summed, so that each prompt has its own gradient.
        total = metric(logits, task, None).sum()
        slopes = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    looked = [(values[Site("pattern", layer)][:, head] * slopes[layer][:, head]).float().cpu() for layer, head in named]
    return torch.stack(looked, dim=1)


def _mixed(model: Model, prompts: Runnable, residual: float) -> tuple[Batch, Tensor]:
    """``[batch layer q_pos k_pos]``: the mean over heads, and the residual stream."""
    if not 0 <= residual <= 1:
        raise SelectorError(f"residual={residual}: give the share of the stream that goes past attention, from 0 to 1")
    given = batch_of(model, prompts)
    sites = Selection(tuple(Site("pattern", layer) for layer in range(model.cfg.n_layers)))
    at_once = rows_per_forward(model, given.tokens.shape[1])
    parts = []
    for first in range(0, len(given.tokens), at_once):
        cache = run(model, given.tokens[first : first + at_once], capture=sites, logits=False).cache.whole
        parts.append(torch.stack([cache[site].float().mean(dim=1).cpu() for site in sites], dim=1))
    looked = torch.cat(parts)
    return given, (1 - residual) * looked + residual * torch.eye(looked.shape[-1])


def _result(
    model: Model,
    given: Batch,
    quantity: str,
    names: tuple[str, ...],
    values: Tensor,
    about: Mapping[str, object],
    *,
    average: bool,
    rows: tuple[int, ...] | None = None,
) -> Attention:
    """With the texts of the tokens; what stands at padded positions is zero."""
    batch, width = given.tokens.shape
    lengths = torch.full((batch,), width) if given.lengths is None else given.lengths.cpu()
    real = (torch.arange(width) < lengths[:, None]).float()
    queries = real if rows is None else torch.ones(batch, len(rows))
    values = values * einsum(queries, real, "b q, b k -> b q k")[:, None]
    words = tuple(
        tuple(spelled(model, row[:length])) for row, length in zip(given.tokens.tolist(), lengths.tolist(), strict=True)
    )
    if average:
        # Each place is averaged over the prompts that are long enough to have it.
        count = einsum(queries, real, "b q, b k -> q k").clamp(min=1)
        values = values.sum(dim=0, keepdim=True) / count
        words = words if batch == 1 else (tuple(_shared(words, pos) for pos in range(width)),)
    about = {**about, "prompts": batch, "average": average}
    return Attention(quantity, names, values, words, rows, about)


def _shared(words: tuple[tuple[str, ...], ...], pos: int) -> str:
    """The token that all prompts have at a position, or the position."""
    there = {row[pos] for row in words if pos < len(row)}
    return there.pop() if len(there) == 1 else f"[{pos}]"
