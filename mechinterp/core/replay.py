"""Running only what a change can reach: from the changed layer on, from the first changed position on.

A recorded run keeps what enters every block, and the keys and values of all its positions. A counterfactual run then
enters at the block that its change belongs to, in the middle of it where attention has not changed, and computes only
the positions from the first changed one; keys and values of earlier positions come from the recording. Rows that enter
at later blocks join those that are already under way, so one pass through the blocks serves all of them.

This is arithmetic on the same modules, not an approximation. It is checked against a full forward pass once on every
loaded model (`why_not_exact`), and not used where it is not exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mechinterp.core.answers import answer_logits
from mechinterp.core.edits import Replace
from mechinterp.core.hooks import HookRegistry, active_registries, block_calls, foreign_hooks
from mechinterp.core.model import Model
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.core.spans import Place, part_of
from mechinterp.errors import EditError, MechInterpError

__all__ = [
    "ENTRIES",
    "Door",
    "Entry",
    "Recording",
    "door_of",
    "record",
    "replay",
    "replay_block",
    "replay_within",
    "why_not_exact",
]

# What has to be computed again in the block where a change enters.
# "tail": from the middle on (the MLP); "skip": nothing, the change is in what the block adds.
# Changes at all other sites of a block take the whole of it: "block".
ENTRIES = {
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
    values
        For each recorded whole site its value ``[batch pos ...]``.
    calls
        The keyword arguments of each block.
    cache
        Keys and values ``[batch kv_head pos d_head]`` of each layer.
    logits
        ``[batch vocab]``: what the receiving prompts themselves answer.
    positions
        Named positions.
    start
        The first position that a replay computes. What a change puts in at earlier positions is taken to be what is
        there already.
    """

    model: Model
    tokens: Tensor
    values: Mapping[Site, Tensor]
    calls: Sequence[Mapping[str, Any]]
    cache: Sequence[tuple[Tensor, Tensor]]
    logits: Tensor
    positions: Mapping[str, Tensor]
    start: int = 0

    def since(self, start: int) -> Recording:
        """The same recording for replays of the positions from ``start``. Copies nothing."""
        return replace(self, start=start)

    def value(self, name: str, layer: int) -> Tensor:
        """What was recorded there, from ``start``: ``[batch pos ...]``."""
        return self.values[Site(name, layer)][:, self.start :]


@dataclass(frozen=True, eq=False)
class Entry:
    """One counterfactual run: the sites in blocks that it changes, with their new values ``[batch ...]``."""

    changes: tuple[tuple[Site, Tensor], ...]

    @cached_property
    def door(self) -> Door:
        """Where this run enters."""
        return door_of([site for site, _ in self.changes])


class Door(NamedTuple):
    """Where a run enters: the first layer that it changes, the (first) name of what it changes there, and how much of that
    layer is computed again: ``"block"``, ``"tail"`` or ``"skip"``.
    """

    layer: int
    name: str
    kind: str


def door_of(sites: Sequence[Site]) -> Door:
    """Where a run that changes these sites enters."""
    layer = min(site.layer or 0 for site in sites)
    names = [site.name for site in sites if site.layer == layer]
    return Door(layer, names[0], ENTRIES.get(names[0], "block") if len(set(names)) == 1 else "block")


class _PrefixCache:
    """What attention sees as its cache: the recorded keys and values of earlier positions, the same for every row."""

    def __init__(self, recording: Recording, copies: int) -> None:
        self.recording, self.copies = recording, copies

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.recording.start:
            return keys, values
        return self._after(self.recording.cache[layer][0], keys), self._after(self.recording.cache[layer][1], values)

    def _after(self, before: Tensor, new: Tensor) -> Tensor:
        prefix = before[:, :, : self.recording.start]
        return torch.cat([prefix.repeat(self.copies, 1, 1, 1), new], dim=2)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.recording.start


def record(registry: HookRegistry, tokens: Tensor, sites: Iterable[Site], read: Tensor) -> Recording:
    """Run the receiving prompts once, with a registry's edits and captures; keep what replays of changes at these sites need.

    ``read`` are the ``[batch]`` positions whose logits are kept.
    """
    from transformers import DynamicCache

    model = registry.model
    needed = {Site("resid_pre", 0)}
    for site in sites:
        names = ["resid_pre", site.name] if site.name in ENTRIES else ["resid_pre"]
        if ENTRIES.get(site.name) == "tail":
            names += ["attn_out", "mlp_out"] if model.cfg.parallel else ["resid_mid"]
        elif ENTRIES.get(site.name) == "skip":
            names += ["resid_post", "mlp_out"]
        needed |= {Site(name, site.layer) for name in names}
    kept: dict[Site, Tensor] = {}
    registry.capture(Selection(tuple(sorted(needed, key=str))), kept)
    cache = DynamicCache()
    with torch.no_grad(), registry, block_calls(model) as calls:
        logits = answer_logits(model, tokens, read, cache=cache)
    return Recording(
        model, tokens, kept, calls, [(layer.keys, layer.values) for layer in cache.layers], logits, registry.positions
    )


def _cut(call: Mapping[str, Any], start: int, length: int) -> dict[str, Any]:
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


def replay(recording: Recording, entries: Sequence[Entry], read: Tensor, vocabulary: Tensor | None = None) -> Tensor:
    """Answer logits ``[entry batch vocab]`` of each counterfactual run, at positions ``read [batch]``.

    With ``vocabulary`` only the logits of these tokens are computed.

    Cost: for each entry, the blocks after its layer (and what its kind names of its own) at the positions from
    ``recording.start``, and one row of the unembedding.
    """
    model, batch = recording.model, len(recording.tokens)
    by_layer: dict[int, dict[str, list[Entry]]] = {}
    for entry in entries:
        by_layer.setdefault(entry.door.layer, {}).setdefault(entry.door.kind, []).append(entry)
    hidden = recording.value("resid_pre", 0)[:0]
    # Rows in the order in which they joined.
    joined: list[Entry] = []
    with torch.no_grad():
        for layer in range(min(by_layer), model.cfg.n_layers):
            new = by_layer.get(layer, {})
            if whole := new.get("block"):
                hidden = torch.cat([hidden, recording.value("resid_pre", layer).repeat(len(whole), 1, 1)])
                joined += whole
            if joined:
                hidden = _run_block(recording, layer, hidden, len(joined), _changes(recording, layer, joined))
            if tails := new.get("tail"):
                hidden = torch.cat([hidden, _run_tails(recording, layer, tails)])
                joined += tails
            if skips := new.get("skip"):
                hidden = torch.cat([hidden, *(_run_skip(recording, layer, entry) for entry in skips)])
                joined += skips
        place = {id(entry): i for i, entry in enumerate(joined)}
        arranged = rearrange(hidden, "(entry b) p m -> entry b p m", b=batch)
        rows = torch.arange(batch, device=hidden.device)
        answer = arranged[:, rows, read - recording.start][[place[id(entry)] for entry in entries]]
        return model.unembed(answer, vocabulary)


def replay_within(recording: Recording, registry: HookRegistry, copies: int, read: Tensor, *, first: int = 0) -> Tensor:
    """Answer logits ``[copy batch vocab]`` of so many copies of the receiving prompts, on which a registry acts that is partial.

    All blocks from the ``first`` are computed, at the positions from ``recording.start``: the registry's functions see these
    alone.
    """
    model, batch = recording.model, len(recording.tokens)
    hidden = recording.value("resid_pre", first).repeat(copies, 1, 1)
    with torch.no_grad(), registry:
        for layer in range(first, model.cfg.n_layers):
            hidden = _run_block(recording, layer, hidden, copies, {})
        rows = torch.arange(copies * batch, device=hidden.device)
        logits = model.unembed(hidden[rows, (read - recording.start).repeat(copies)])
    return rearrange(logits, "(n b) v -> n b v", b=batch)


def replay_block(recording: Recording, registry: HookRegistry, layer: int, hidden: Tensor) -> None:
    """One block alone on copies of the receiving prompts that read ``hidden`` ``[(copy batch) pos d_model]``.

    It ends as soon as everything in the registry, which is partial, has acted.
    """
    with torch.no_grad(), registry.stopping_early():
        _run_block(recording, layer, hidden, len(hidden) // len(recording.tokens), {})


def _changes(recording: Recording, layer: int, entries: Sequence[Entry]) -> dict[Site, list[tuple[int, Site, Tensor]]]:
    """What these runs change in a layer: for each whole site the first row, the part and its new value."""
    changes: dict[Site, list[tuple[int, Site, Tensor]]] = {}
    for i, entry in enumerate(entries):
        for site, new in entry.changes:
            if site.layer == layer:
                changes.setdefault(site.whole, []).append((i * len(recording.tokens), site, new))
    return changes


def _run_block(
    recording: Recording, layer: int, hidden: Tensor, copies: int, changes: Mapping[Site, list[tuple[int, Site, Tensor]]]
) -> Tensor:
    """The block's output for so many copies of the prompts, with these changes."""
    model, batch = recording.model, len(recording.tokens)
    call = _cut(recording.calls[layer], recording.start, recording.tokens.shape[1])
    for name, value in call.items():
        # What is given per prompt is repeated for every copy of the prompts.
        per_prompt = isinstance(value, Tensor) and value.ndim and value.shape[0] == batch > 1
        # Bloom's has a row for each prompt and head.
        if per_prompt or (name == "alibi" and isinstance(value, Tensor)):
            call[name] = value.repeat(copies, *([1] * (value.ndim - 1)))
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor) and len(value[0]) == batch > 1:
            call[name] = tuple(part.repeat(copies, *([1] * (part.ndim - 1))) for part in value)
    call[model.cache_argument(layer)] = _PrefixCache(recording, copies)
    if not changes:
        out = model.block(layer)(hidden, **call)
    else:
        registry = HookRegistry(model, partial=True)
        for whole, listed in changes.items():
            registry.transform(whole, _putting(recording, listed))
        with registry:
            out = model.block(layer)(hidden, **call)
    return out[0] if isinstance(out, tuple) else out


def _putting(recording: Recording, listed: Sequence[tuple[int, Site, Tensor]]) -> Callable[[Tensor], Tensor]:
    """A function that puts new values in: each from its first row on."""

    def act(value: Tensor) -> Tensor:
        value = value.clone()
        for first, site, new in listed:
            _put(recording, value[first : first + len(recording.tokens)], site, new)
        return value

    return act


def _changed(recording: Recording, entry: Entry) -> Tensor:
    """What was recorded of the site at which a run enters, with its changes put in: ``[batch pos ...]``."""
    value = recording.value(entry.door.name, entry.door.layer).clone()
    for site, new in entry.changes:
        if site.layer == entry.door.layer:
            _put(recording, value, site, new)
    return value


def _put(recording: Recording, value: Tensor, site: Site, new: Tensor) -> None:
    """Write the new value of a site into the whole activation, which begins at position ``start``. In place."""
    start, length = recording.start, recording.tokens.shape[1]
    place: Place = None
    if isinstance(site.pos, str):
        found = recording.positions[site.pos].tolist()
        place = tuple(each - start if each >= start else None for each in found)
    elif site.pos is not None:
        place = site.pos % length - start
        if place < 0:
            return
    index, meant = part_of(site, slice(0, len(value)), place, value.device)
    old = value[index]
    wanted = list(old.shape)
    if site.pos is None:
        # A single head has no head axis any more.
        axes, at = site.kind.axes, site.kind.pos_axis or 0
        pos_axis = at - (site.head is not None and axes.index(site.kind.head_axis or "") < at)
        wanted[pos_axis] = length
    if list(new.shape) != wanted or new.dtype != value.dtype:
        raise EditError(
            f"the new value of {site} is {new.dtype} of shape {list(new.shape)}; "
            f"what it replaces is {value.dtype} of shape {wanted}"
        )
    if site.pos is None:
        new = new.narrow(pos_axis, start, length - start)
    elif meant is not None:
        new = torch.where(meant.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    value[index] = new


def _run_tails(recording: Recording, layer: int, entries: Sequence[Entry]) -> Tensor:
    """Block outputs of entries whose change comes after attention: ``[(entry batch) pos d_model]``."""
    model = recording.model
    before = recording.value("resid_pre", layer)
    done: dict[int, Tensor] = {}
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.door.name, []).append(entry)

    def rows(name: str, group: list[Entry]) -> Tensor:
        return recording.value(name, layer).repeat(len(group), 1, 1)

    def give(group: list[Entry], out: Tensor) -> None:
        done.update(zip(map(id, group), rearrange(out, "(g b) p m -> g b p m", g=len(group)), strict=True))

    def changed(name: str) -> Tensor:
        return torch.cat([_changed(recording, entry) for entry in grouped[name]])

    added = {}
    if "z" in grouped:
        added["z"] = model.attention_adds(layer, changed("z"))
    if "attn_out" in grouped:
        added["attn_out"] = changed("attn_out")
    if "resid_mid" in grouped:
        added["resid_mid"] = changed("resid_mid") - before.repeat(len(grouped["resid_mid"]), 1, 1)
    if added:
        group = [entry for name in added for entry in grouped[name]]
        mid = before.repeat(len(group), 1, 1) + torch.cat(list(added.values()))
        give(group, mid + (rows("mlp_out", group) if model.cfg.parallel else model.mlp_adds(layer, mid)))
    for name, group in grouped.items():
        if name in added:
            continue
        mid = rows("resid_pre", group) + rows("attn_out", group) if model.cfg.parallel else rows("resid_mid", group)
        adds = model.mlp_adds(layer, changed(name)) if name == "mlp_in" else model.neurons_add(layer, changed(name))
        give(group, mid + adds)
    return torch.cat([done[id(entry)] for entry in entries])


def _run_skip(recording: Recording, layer: int, entry: Entry) -> Tensor:
    if entry.door.name == "resid_post":
        return _changed(recording, entry)
    return recording.value("resid_post", layer) + (_changed(recording, entry) - recording.value("mlp_out", layer))


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
        model.replay_prefix = not _check(model, 3)
        # Some attention (Falcon's) takes no keys and values of earlier positions: there whole prompts are replayed.
        model.replay_checked = "" if model.replay_prefix else _check(model, 0)
    return model.replay_checked


def _check(model: Model, start: int) -> str:
    from mechinterp.core.run import run

    generator = torch.Generator().manual_seed(0)
    length, batch = 6, 2
    tokens = torch.randint(0, min(model.cfg.d_vocab, 1000), (batch, length), generator=generator).to(model.device)
    read = torch.full((batch,), length - 1, device=model.device)
    names = [name for name in ("resid_pre", "q", "k", "v", "pattern", "mlp_pre", *ENTRIES) if name in model.sites]
    # Every kind of entry, spread over the layers; the last run changes two layers.
    layers = range(model.cfg.n_layers)
    sites = [Site(name, layers[i * len(layers) // len(names)]) for i, name in enumerate(names)]
    runs: list[list[Site]] = [[site] for site in sites] + [[sites[0], sites[-1]]]
    try:
        recording = record(HookRegistry(model), tokens, sites, read).since(start)
        kept = run(model, tokens, capture=Selection(tuple(sites)))
        changes, edits = [], []
        for i, run_sites in enumerate(runs):
            changed = []
            for site in dict.fromkeys(run_sites):
                value = kept[site].clone()
                late = value.narrow(site.kind.pos_axis or 1, start, length - start)
                late += torch.randn(late.shape, generator=generator).to(late.device, late.dtype) * late.abs().mean()
                changed.append((site, value))
                edits.append(Replace(site, value, rows=(i * batch, (i + 1) * batch)))
            changes.append(Entry(tuple(changed)))
        full = run(model, tokens.repeat(len(runs), 1), edits=edits).logits[:, -1].reshape(len(runs), batch, -1).float()
        again = replay(recording, changes, read).float()
        some = torch.arange(0, model.cfg.d_vocab, max(1, model.cfg.d_vocab // 7), device=model.device)
        few = replay(recording, changes[:1], read, some).float()
    except (MechInterpError, RuntimeError, TypeError, AttributeError, KeyError, ValueError, IndexError) as error:
        return f"its blocks cannot be called alone ({type(error).__name__}: {error})"
    scale = (full - full.mean(-1, keepdim=True)).abs().max().clamp(min=1e-9)
    errors = ((again - full).abs().amax(dim=(1, 2)) / scale).tolist()
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(model.dtype, 3e-2)
    if not float((few - again[:1, :, some]).abs().max() / scale) < tolerance:
        return "its logits are not a linear map of the last norm"
    for run_sites, off in zip(runs, errors, strict=True):
        if not off < tolerance:
            return f"a replay from {run_sites[0].name} differs from a full forward pass by {off:.1e} of the largest logit"
    return ""
