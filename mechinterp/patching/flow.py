"""Information-flow routes: how much of what a reader reads does each writer make up? One forward pass, no counterfactual."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.core.plan import budget_of, progress_bar
from mechinterp.core.reference import mask_of
from mechinterp.core.run import Cache, run
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import ModelError
from mechinterp.patching.norms import linear_norm
from mechinterp.patching.readers import Layout, ReaderGroup, layout_of
from mechinterp.tasks import Task

__all__ = ["flow"]


def flow(model: Model, task: Task, *, memory: int | str | None = None, progress: bool = False) -> Effects:
    """How much of each reader's input is each writer's part?

    At each position, with x what the reader reads and u what the writer wrote, the proximity is
    max(0, |x|_1 - |x - u|_1), and the share is the proximity over the sum of those of all writers that the reader hears. The
    score of an edge is the mean share over the real positions of the clean prompt. Where the heads' sum passes a norm before it
    is added (Gemma 2), u of a head is its part of what comes out, at the scale that the norm gives the sum.

    Shares say what is large and points the same way, not what matters for an answer: no other prompt and no metric is
    involved. All heads of a layer read the same stream, so their edges from one writer have the same score.

    Parameters
    ----------
    model, task
        What to run: the clean prompts of the task.
    memory, progress
        As in `mechinterp.attribute`.

    Returns
    -------
    Effects
        Axis ``edge``, per example, from 0 to 1; the edges into one reader sum to 1 (or are all 0).

    Notes
    -----
    Cost: 1 forward pass.

    Raises
    ------
    ModelError
        Such a norm that is neither LayerNorm nor RMSNorm.

    References
    ----------
    Ferrando and Voita 2024 (2403.00824), who follow edges above a threshold down from one position of the output; the mean over
    positions and the whole graph is how Hanna et al.'s EAP-IG code compares the method with others.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> circuit = mi.discover(toy.model, toy.task, method="flow", edges=20)
    >>> circuit.provenance["estimator"]
    'information-flow routes'
    """
    check_model_and_task(model, task)
    layout, task = layout_of(model), task.to(model.device)
    places = Selection(tuple(dict.fromkeys(_read(group) for group in layout.groups))) | layout.written
    per_prompt = 8 * task.clean.shape[1] * model.cfg.d_model * len(layout.writers)
    rows = max(1, budget_of(model, memory, at_most=1 << 30) // per_prompt)
    found = []
    with progress_bar(len(task), "flow", show=progress) as bar:
        for first in range(0, len(task), rows):
            part = task[first : first + rows]
            cache = run(model, part.clean, capture=places).cache
            found.append(_shares(cache, layout, mask_of(part).to(model.device)))
            bar.update(len(part))
    return Effects(
        quantity="share of what the reader reads",
        axes=("edge",),
        coords={"edge": tuple(tuple(edge) for edge in layout.edges)},
        per_example=torch.cat(found, dim=1).cpu(),
        provenance={
            "model": model.name,
            "task": task.name,
            "prompts": len(task),
            "method": "information-flow routes",
            "ablation": "none",
            "forwards": 1,
            "normalized": False,
            "task_provenance": dict(task.provenance),
        },
    )


def _read(group: ReaderGroup) -> Site:
    return group.site if group.port == "in" else Site("resid_pre", group.layer)


def _head_parts(model: Model, layer: int, z: Tensor) -> Tensor:
    """``[batch pos head d_model]``: what each head adds to the stream; these sum, with the bias, to what attention adds."""
    parts = torch.einsum("bphd,hdm->bphm", z.float(), model.projection(layer, "o").weight.float())
    after = model.norm_after("attn", layer)
    if after is None:
        return parts
    # At the scale of the whole sum: a head normed by itself would count as much as all of them.
    norm = linear_norm(after, model.attention_sums(layer, z))
    if norm is None:
        raise ModelError(
            f"the norm {type(after).__name__} of {model.name} is no LayerNorm or RMSNorm, so that heads have no part of their "
            "own in what it gives; use 'eap-ig'"
        )
    middle = parts - parts.mean(dim=-1, keepdim=True) if norm.centred else parts
    return middle * norm.scale.unsqueeze(2) * norm.weight


def _shares(cache: Cache, layout: Layout, mask: Tensor) -> Tensor:
    """``[edge batch]``."""

    def heads(layer: int) -> Tensor:
        return _head_parts(cache.model, layer, cache[Site("z", layer)])

    table = rearrange(layout.stacked(lambda site: cache[site].float(), heads), "b w (p m) -> b w p m", p=mask.shape[1])
    known: dict[tuple[Site, int], Tensor] = {}
    columns = torch.zeros(len(mask), len(layout.writers), len(layout.readers), device=mask.device)
    for group in layout.groups:
        key = (_read(group), group.n_writers)
        if key not in known:
            x = cache[key[0]].float().unsqueeze(1)
            proximity = (x.abs().sum(-1) - (x - table[:, : group.n_writers]).abs().sum(-1)).clamp_min(0)
            total = proximity.sum(dim=1, keepdim=True)
            share = torch.where(total > 0, proximity / total, 0.0)
            known[key] = (share * mask.unsqueeze(1)).sum(-1) / mask.sum(-1, keepdim=True)
        columns[:, : group.n_writers, group.readers.start : group.readers.stop] = known[key].unsqueeze(2)
    return columns[:, torch.tensor(layout.src), torch.tensor(layout.dst)].T
