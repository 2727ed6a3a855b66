"""Running only what a change can reach: from the changed layer on, from the first changed position on.

A recorded run keeps what enters every block, and the keys and values of all its positions. A counterfactual run then
enters at the block that its change belongs to, in the middle of it where attention has not changed, and computes only
the positions from the first changed one; keys and values of earlier positions come from the recording. Rows that enter
at later blocks join those that are already under way, so one pass through the blocks serves all of them.

This is arithmetic on the same modules, not an approximation. It is checked against a full forward pass once on every
loaded model (`why_not_exact`), and not used where it is not exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mechinterp.core.hooks import HookRegistry, active_registries, block_calls, foreign_hooks
from mechinterp.core.model import Model
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site

__all__ = ["ENTRIES", "Entry", "Recording", "record", "replay", "why_not_exact"]

# What has to be computed again in the block where a change enters.
# "block": all of it; "tail": from the middle on (the MLP); "skip": nothing, the change is in what the block adds.
ENTRIES = {
    "resid_pre": "block",
    "attn_out": "tail",
    "resid_mid": "tail",
    "z": "tail",
    "mlp_in": "tail",
    "mlp_post": "tail",
    "mlp_out": "skip",
    "resid_post": "skip",
}


@dataclass(frozen=True, eq=False)
class Recording:
    """One full run of the receiving prompts, with all that later runs start from.

    Parameters
    ----------
    start
        The first position that any run from this recording changes; tensors begin there. What a change puts in at
        earlier positions is taken to be what is there already.
    values
        For each recorded whole site its value ``[batch pos ...]``, from ``start``.
    calls
        The keyword arguments of each block, cut to the positions from ``start``.
    prefix
        Keys and values ``[batch kv_head start d_head]`` of each layer, before ``start``.
    """

    model: Model
    tokens: Tensor
    start: int
    values: dict[Site, Tensor]
    calls: list[dict[str, Any]]
    prefix: list[tuple[Tensor, Tensor]]
    positions: Mapping[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One counterfactual run: the sites it changes, all of one layer, with their new values ``[batch ...]``."""

    layer: int
    kind: str
    changes: tuple[tuple[Site, Tensor], ...]


class _PrefixCache:
    """What attention sees as its cache: the recorded keys and values of earlier positions, the same for every row."""

    def __init__(self, prefix: Sequence[tuple[Tensor, Tensor]], copies: int) -> None:
        self.prefix, self.copies = prefix, copies

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        before_k, before_v = self.prefix[layer]
        again = (self.copies, 1, 1, 1)
        return torch.cat([before_k.repeat(again), keys], dim=2), torch.cat([before_v.repeat(again), values], dim=2)

    def get_seq_length(self, layer: int = 0) -> int:
        return int(self.prefix[layer][0].shape[2])


def record(
    model: Model, tokens: Tensor, start: int, names: Sequence[str], positions: Mapping[str, Tensor] | None = None
) -> Recording:
    """Run the receiving prompts once and keep what replays of changes at these kinds of sites start from."""
    from transformers import DynamicCache

    needed = {"resid_pre"} | {name for name in names if name in ENTRIES}
    if needed & {"attn_out", "z", "mlp_in", "mlp_post", "resid_mid"} and not model.cfg.parallel:
        needed.add("resid_mid")
    if needed & {"mlp_out", "resid_post"}:
        needed |= {"resid_post", "mlp_out"}
    if model.cfg.parallel:
        needed |= {"attn_out", "mlp_out"}
    layers = range(model.cfg.n_layers)
    selection = Selection(tuple(Site(name, layer) for name in sorted(needed) for layer in layers))
    kept: dict[Site, Tensor] = {}
    registry = HookRegistry(model)
    registry.capture(selection, kept)
    cache = DynamicCache()
    with torch.no_grad(), registry, block_calls(model) as calls:
        model.hf(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=torch.tensor([0], device=model.device))
    values = {site: value[:, start:] for site, value in kept.items()}
    prefix = [(layer.keys[:, :, :start], layer.values[:, :, :start]) for layer in cache.layers]
    cut = [_cut(call, start, tokens.shape[1]) for call in calls]
    return Recording(model, tokens, start, values, cut, prefix, positions or {})


def _cut(call: dict[str, Any], start: int, length: int) -> dict[str, Any]:
    """A block's keyword arguments for the positions from ``start``."""
    cut: dict[str, Any] = {}
    for name, value in call.items():
        if name == "attention_mask" and isinstance(value, Tensor) and value.ndim == 4:
            cut[name] = value[:, :, start:, :]
        elif name == "position_embeddings" and isinstance(value, tuple):
            cut[name] = tuple(part[:, start:] if part.shape[1] == length else part for part in value)
        elif name in ("position_ids", "cache_position") and isinstance(value, Tensor):
            cut[name] = value[..., start:]
        elif name in ("past_key_values", "layer_past", "hidden_states"):
            continue
        else:
            cut[name] = value
    cut["use_cache"] = True
    return cut


def replay(recording: Recording, entries: Sequence[Entry], read: Tensor) -> Tensor:
    """Answer logits ``[entry batch vocab]`` of each counterfactual run, at positions ``read [batch]``.

    Cost: for each entry, the blocks after its layer (and what its kind names of its own) at the positions from
    ``recording.start``, and one row of the unembedding.
    """
    model, batch = recording.model, len(recording.tokens)
    order = sorted(range(len(entries)), key=lambda i: entries[i].layer)
    by_layer: dict[int, list[Entry]] = {}
    for i in order:
        by_layer.setdefault(entries[i].layer, []).append(entries[i])
    hidden = recording.values[Site("resid_pre", 0)][:0]
    # Rows in the order in which they joined; stable within a layer by kind.
    joined: list[Entry] = []
    with torch.no_grad():
        for layer in range(min(by_layer), model.cfg.n_layers):
            new = by_layer.get(layer, [])
            whole = [entry for entry in new if entry.kind == "block"]
            if whole:
                hidden = torch.cat([hidden, *(_changed(recording, entry, "resid_pre") for entry in whole)])
                joined += whole
            if len(hidden):
                hidden = _run_block(recording, layer, hidden)
            tails = [entry for entry in new if entry.kind == "tail"]
            if tails:
                hidden = torch.cat([hidden, _run_tails(recording, layer, tails)])
                joined += tails
            skips = [entry for entry in new if entry.kind == "skip"]
            if skips:
                hidden = torch.cat([hidden, *(_run_skip(recording, layer, entry) for entry in skips)])
                joined += skips
        rows = torch.arange(len(hidden), device=hidden.device)
        answer = hidden[rows, (read - recording.start).repeat(len(joined))]
        logits = model.unembed(answer)
    place = {id(entry): i for i, entry in enumerate(joined)}
    arranged = logits.reshape(len(joined), batch, -1)
    return arranged[[place[id(entry)] for entry in entries]]


def _run_block(recording: Recording, layer: int, hidden: Tensor) -> Tensor:
    call = dict(recording.calls[layer])
    copies = len(hidden) // len(recording.tokens)
    for name, value in call.items():
        # What is given per prompt is repeated for every copy of the prompts.
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == len(recording.tokens) > 1:
            call[name] = value.repeat(copies, *([1] * (value.ndim - 1)))
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor) and len(value[0]) == len(recording.tokens) > 1:
            call[name] = tuple(part.repeat(copies, *([1] * (part.ndim - 1))) for part in value)
    call[recording.model.cache_argument(layer)] = _PrefixCache(recording.prefix, copies)
    out = recording.model.block(layer)(hidden, **call)
    return out[0] if isinstance(out, tuple) else out


def _changed(recording: Recording, entry: Entry, name: str) -> Tensor:
    """The recorded value of a site with the entry's changes of it put in, ``[batch pos ...]``."""
    value = recording.values[Site(name, entry.layer)].clone()
    for site, new in entry.changes:
        if site.name != name:
            continue
        index: list[Any] = [slice(None)] * value.ndim
        axes = site.kind.axes
        if site.head is not None:
            index[axes.index(site.kind.head_axis or "")] = site.head
        if site.neuron is not None:
            index[-1] = site.neuron
        if site.pos is None:
            new = new[:, recording.start :]
        elif isinstance(site.pos, str):
            index[0] = torch.arange(len(value), device=value.device)
            index[1] = recording.positions[site.pos].to(value.device) - recording.start
            unchanged = index[1] < 0
            index[1] = index[1].clamp(min=0)
            new = torch.where(unchanged.reshape(-1, *[1] * (new.ndim - 1)), value[tuple(index)], new)
        else:
            place = site.pos % recording.tokens.shape[1] - recording.start
            if place < 0:
                continue
            index[1] = place
        value[tuple(index)] = new
    return value


def _run_tails(recording: Recording, layer: int, entries: Sequence[Entry]) -> Tensor:
    """Block outputs of entries whose change comes after attention: ``[(entry batch) pos d_model]``."""
    model = recording.model
    middle, attention, mlp_in, neurons = [], [], [], []
    for entry in entries:
        name = entry.changes[0][0].name
        if name == "z":
            attention.append(entry)
        elif name == "mlp_post":
            neurons.append(entry)
        elif name == "mlp_in":
            mlp_in.append(entry)
        else:
            middle.append(entry)
    done: dict[int, Tensor] = {}
    before = recording.values[Site("resid_pre", layer)]

    def finish(group: list[Entry], added: Tensor) -> None:
        """From what attention adds ``[(entry batch) pos d_model]`` to the block's output."""
        resid = before.repeat(len(group), 1, 1)
        if model.cfg.parallel:
            out = resid + added + recording.values[Site("mlp_out", layer)].repeat(len(group), 1, 1)
        else:
            mid = resid + added
            out = mid + model.mlp_adds(layer, mid)
        for entry, part in zip(group, rearrange(out, "(g b) p m -> g b p m", g=len(group)), strict=True):
            done[id(entry)] = part

    if attention:
        z = torch.cat([_changed(recording, entry, "z") for entry in attention])
        finish(attention, model.attention_adds(layer, z))
    if middle:
        added = []
        for entry in middle:
            if entry.changes[0][0].name == "attn_out":
                added.append(_changed(recording, entry, "attn_out"))
            else:
                added.append(_changed(recording, entry, "resid_mid") - before)
        finish(middle, torch.cat(added))
    for group, name in ((mlp_in, "mlp_in"), (neurons, "mlp_post")):
        if not group:
            continue
        value = torch.cat([_changed(recording, entry, name) for entry in group])
        mid = (
            before + recording.values[Site("attn_out", layer)]
            if model.cfg.parallel
            else recording.values[Site("resid_mid", layer)]
        )
        adds = model.mlp_adds(layer, value) if name == "mlp_in" else model.neurons_add(layer, value)
        out = mid.repeat(len(group), 1, 1) + adds
        for entry, part in zip(group, rearrange(out, "(g b) p m -> g b p m", g=len(group)), strict=True):
            done[id(entry)] = part
    return torch.cat([done[id(entry)] for entry in entries])


def _run_skip(recording: Recording, layer: int, entry: Entry) -> Tensor:
    if entry.changes[0][0].name == "resid_post":
        return _changed(recording, entry, "resid_post")
    old = recording.values[Site("mlp_out", layer)]
    return recording.values[Site("resid_post", layer)] + (_changed(recording, entry, "mlp_out") - old)


def why_not_exact(model: Model) -> str:
    """Why replay cannot be used on this model; empty where it can.

    Checked once for each loaded model: replays at every kind of site, from a first changed position in the middle,
    against full forward passes with the same edits. Hooks of the caller's own make it unusable while they are attached,
    and so does a registry around the call, since they expect whole runs.
    """
    if active_registries():
        return "it runs inside a HookRegistry, whose edits act on whole forward passes"
    foreign = foreign_hooks(model)
    if foreign:
        return f"{foreign} hooks of yours are attached, which expect whole forward passes"
    if model.replay_checked is None:
        model.replay_checked = _check(model)
    return model.replay_checked


def _check(model: Model) -> str:
    from mechinterp.core.edits import Replace
    from mechinterp.core.run import run
    from mechinterp.errors import MechInterpError

    generator = torch.Generator().manual_seed(0)
    length, start, batch = 6, 3, 2
    tokens = torch.randint(0, min(model.cfg.d_vocab, 1000), (batch, length), generator=generator).to(model.device)
    read = torch.full((batch,), length - 1, device=model.device)
    layer = min(1, model.cfg.n_layers - 1)
    names = [name for name in ENTRIES if not (name == "resid_mid" and model.cfg.parallel)]
    try:
        recording = record(model, tokens, start, names)
        for name in names:
            site = Site(name, layer)
            value = run(model, tokens, capture=site)[site].clone()
            noise = torch.randn(value[:, start:].shape, generator=generator).to(value.device, value.dtype)
            value[:, start:] += noise * value[:, start:].abs().mean()
            full = run(model, tokens, edits=[Replace(site, value)]).logits[:, -1]
            again = replay(recording, [Entry(layer, ENTRIES[name], ((site, value),))], read)[0]
            error = float((again - full).abs().max() / (full - full.mean(-1, keepdim=True)).abs().max().clamp(min=1e-9))
            tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2 if model.dtype != torch.float64 else 1e-9
            if not error < tolerance:
                return f"a replay from {name} differs from a full forward pass by {error:.1e} of the largest logit"
    except (MechInterpError, RuntimeError, TypeError, AttributeError, KeyError, ValueError, IndexError) as error:
        return f"its blocks cannot be called alone ({type(error).__name__}: {error})"
    return ""
