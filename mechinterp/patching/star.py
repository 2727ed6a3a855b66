"""AtP*: attention computed anew where queries or keys change, and gradients that cannot cancel across a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from mechinterp.core.hooks import HookRegistry
from mechinterp.core.model import Model
from mechinterp.core.plan import rows_per_forward
from mechinterp.core.replay import Recording, replay_block, why_not_exact
from mechinterp.core.run import Cache
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import ModelError

__all__ = ["check_dropping", "check_fixing", "fixed_edges", "fixed_sites", "in_a_branch", "unsigned"]

# What lies on the stream itself has a gradient also when nothing flows back through its own layer.
_STREAM = ("embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "final_norm", "logits")


def check_fixing(model: Model) -> None:
    """Refuse models whose attention cannot be computed anew by itself.

    Raises
    ------
    ModelError
        Its blocks cannot be called alone, or do not give what they give in the model.
    """
    reason = why_not_exact(model)
    if reason:
        raise ModelError(
            f"attention of {model.name} ({model.cfg.architecture}) cannot be computed anew for other queries and keys: {reason}; "
            "use rules='grad-drop', or 'eap-ig'"
        )


def check_dropping(model: Model) -> None:
    """Refuse models of one layer.

    Raises
    ------
    ModelError
        There is no other layer through which the gradient could be dropped.
    """
    if model.cfg.n_layers < 2:
        raise ModelError(
            f"{model.name} has one layer, and GradDrop leaves out the gradient through another; use rules='qk-fix', or 'eap-ig'"
        )


def in_a_branch(cell: Sequence[Site]) -> bool:
    """Whether all of this lies in attention or MLP of one layer, so that it has no gradient when that layer is dropped."""
    return len({site.layer for site in cell}) == 1 and not any(site.name in _STREAM for site in cell)


def unsigned(scores: Tensor, lost: Tensor) -> Tensor:
    """``[2 cell batch]``: the plain scores, and the mean of the absolute ones over the dropped layers.

    Of ``scores`` ``[1 + layer cell batch]`` the first are with nothing dropped. ``lost`` ``[cell]`` tells which cells have no
    score in one of the layers, their own; the mean is over the others.
    """
    others = len(scores) - 1 - lost.to(scores)
    return torch.stack([scores[0], scores[1:].abs().sum(dim=0) / others.unsqueeze(-1)])


def fixed_edges(recording: Recording, layer: int, port: str, change: Tensor, gradients: Tensor, memory: int) -> Tensor:
    """What each writer does to the metric through the queries (or the keys) of each head, attention computed exactly.

    For writer u the stream that attention reads is x + change_u; norm, queries, rotary embedding, scores, masks and softmax
    follow from it, while keys and values (or queries and values) stay. The effect is (z' - z) . dm/dz.

    Parameters
    ----------
    port
        ``"q"`` or ``"k"``.
    change
        ``[batch writer pos d_model]``, from position ``recording.start``.
    gradients
        ``[drop batch pos head d_head]`` at z, from there as well.

    Returns
    -------
    Tensor
        ``[drop (head writer) batch]``, of KV heads for ``"k"``.

    Notes
    -----
    Cost: a row through this layer's attention for each writer.
    """
    stream = recording.value("resid_pre", layer)
    keep: dict[str, Callable[[Tensor], Tensor]] = {name: _first_copy(len(stream)) for name in "qkv" if name != port}
    found = []
    for chunk in torch.split(change, _at_once(recording, memory), dim=1):
        moved = stream + chunk.transpose(0, 1).to(stream.dtype)
        hidden = torch.cat([stream.unsqueeze(0), moved]).flatten(0, 1)
        found.append(_effects(_mixed(recording, layer, hidden, keep), gradients, _heads(recording.model, port)))
    return torch.cat(found, dim=2).flatten(1, 2)


def fixed_sites(
    recording: Recording,
    layer: int,
    port: str,
    cells: Sequence[Sequence[Site]],
    change: Tensor,
    gradients: Tensor,
    memory: int,
) -> Iterator[tuple[int, Tensor]]:
    """What cells of one layer's queries (or keys) do to the metric, attention computed exactly.

    Parameters
    ----------
    cells
        Parts of ``q`` or ``k`` of that layer; one cell's are moved together.
    change
        ``[batch pos head d_head]``: other run minus receiving run, at all positions.
    gradients
        ``[drop batch pos head d_head]`` at z, from position ``recording.start``.

    Yields
    ------
    (int, Tensor)
        Which cell, and its effect ``[drop batch]``.

    Notes
    -----
    Cost: a row through this layer's attention for each cell. Cells that differ in the head alone share a row: the queries and
    keys of a head reach no other one's pattern.
    """
    stream = recording.value("resid_pre", layer)
    shared: dict[object, list[int]] = {}
    for i, cell in enumerate(cells):
        alone = len(cell) == 1 and cell[0].head is not None
        shared.setdefault((cell[0].pos, cell[0].neuron) if alone else (i,), []).append(i)
    rows = list(shared.values())
    # The numbers of the places that a site names.
    whole = Site(port, layer)
    numbers = Cache(
        recording.model, Selection((whole,)), {whole: torch.arange(change.numel()).reshape(change.shape)}, recording.positions
    )
    at_once = _at_once(recording, memory)
    for first in range(0, len(rows), at_once):
        some = rows[first : first + at_once]
        moved = [torch.zeros_like(change) for _ in (0, *some)]
        for row, members in zip(moved[1:], some, strict=True):
            for site in (site for i in members for site in cells[i]):
                chosen = numbers[site].flatten().to(change.device)
                row.view(-1)[chosen] = change.flatten()[chosen]
        added = torch.cat(moved)[:, recording.start :]
        hidden = stream.repeat(len(moved), 1, 1)
        z = _mixed(recording, layer, hidden, {port: _adding(added)})
        found = _effects(z, gradients, _heads(recording.model, port))
        for place, members in enumerate(some):
            for i in members:
                head = cells[i][0].head
                own = slice(None) if head is None or len(cells[i]) > 1 else slice(head, head + 1)
                yield i, found[:, own, place].sum(dim=1)


def _heads(model: Model, port: str) -> int:
    return model.cfg.n_heads if port == "q" else model.cfg.n_kv_heads


def _at_once(recording: Recording, memory: int) -> int:
    """How many copies of the prompts go through attention together."""
    batch, length = recording.tokens.shape
    return max(1, rows_per_forward(recording.model, length - recording.start, memory=memory) // batch - 1)


def _first_copy(batch: int) -> Callable[[Tensor], Tensor]:
    """All copies of the prompts get what the first one has."""
    return lambda value: value[:batch].repeat(len(value) // batch, *[1] * (value.ndim - 1))


def _adding(added: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: value + added.to(value.dtype)


def _mixed(recording: Recording, layer: int, hidden: Tensor, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """z ``[copy batch pos head d_head]`` of a layer whose block reads ``hidden``, with these edits of q, k and v."""
    kept: dict[Site, Tensor] = {}
    registry = HookRegistry(recording.model, partial=True)
    for name, act in edits.items():
        registry.transform(Site(name, layer), act)
    z = Site("z", layer)
    registry.capture(Selection((z,)), kept)
    replay_block(recording, registry, layer, hidden)
    return rearrange(kept[z], "(n b) p h d -> n b p h d", b=len(recording.tokens))


def _effects(z: Tensor, gradients: Tensor, heads: int) -> Tensor:
    """``[drop head copy batch]``: what the copies but the first one change, times the gradient; summed to so many heads."""
    change = (z[1:] - z[0]).float()
    # One product for each prompt and head.
    left, right = change.permute(1, 3, 0, 2, 4).flatten(3), gradients.float().permute(1, 3, 0, 2, 4).flatten(3)
    each = (left @ right.transpose(2, 3)).permute(3, 1, 2, 0)
    return rearrange(each, "n (h group) w b -> n h group w b", h=heads).sum(dim=2)
