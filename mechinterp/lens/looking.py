"""Runs prompts and collects, layer by layer, the numbers that sorts of heads are told by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mechinterp.core.model import Model
from mechinterp.core.plan import rows_per_forward
from mechinterp.core.prompts import Batch
from mechinterp.core.resampling import sign_test
from mechinterp.core.run import run
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import TaskError
from mechinterp.lens.detectors import Places, at_distances, copies, matches, on_keys, weighed
from mechinterp.lens.folding import unembedding, writing
from mechinterp.tasks import Task
from mechinterp.tasks.induction import drawable

__all__ = ["Looked", "look", "said_twice"]

# How many tokens are said twice, where there is room.
_LENGTH = 24
# Score, null and p-value: [layer head batch] twice, and [layer head].
Found = tuple[Tensor, Tensor, Tensor]


def said_twice(model: Model, *, n: int, length: int | None, seed: int | None) -> tuple[Batch, Batch]:
    """n prompts of other random tokens and then these, and the same number of prompts of these tokens twice.

    Raises
    ------
    TaskError
        No seed, no prompts, or too few tokens or positions.
    """
    if seed is None:
        raise TaskError("random tokens are drawn where no prompts are given: say seed=0, or pass prompts")
    if n < 1:
        raise TaskError(f"n={n}: give the number of random prompts, 1 or more; 32 are usual")
    bos = getattr(model.hf.config, "bos_token_id", None)
    if model.tokenizer is None:
        # Ids are drawn; the token that stands in front is none of them.
        front, choices = drawable(model.cfg.d_vocab, bos if isinstance(bos, int) and 0 <= bos < model.cfg.d_vocab else False)
    else:
        front, choices = drawable(model.tokenizer)
    room = min((model.cfg.n_ctx - len(front)) // 2, len(choices) // 2)
    length = min(_LENGTH, room) if length is None else length
    if not 4 <= length <= room:
        raise TaskError(
            f"length={length}: {model.name} can be told {room} random tokens twice (it reads {model.cfg.n_ctx} and has "
            f"{len(choices)} to draw from, twice as many as are said); give 4 to {room}"
        )
    generator, pool = torch.Generator().manual_seed(seed), torch.tensor(choices)
    rows = torch.stack([pool[torch.randperm(len(pool), generator=generator)[: 2 * length]] for _ in range(n)])
    start = torch.tensor(front, dtype=rows.dtype).expand(n, -1)
    again, other = rows[:, :length], rows[:, length:]
    plain, repeated = (torch.cat([start, first, again], dim=1) for first in (other, again))
    return Batch(plain, {}, None), Batch(repeated, {}, None)


@dataclass
class Looked:
    """What was seen, ``[layer head batch]`` each, prompt by prompt.

    ``there`` is a score where something is repeated, ``elsewhere`` the same where nothing is; ``at`` has the distances last.
    """

    there: dict[str, Tensor] = field(default_factory=dict)
    elsewhere: dict[str, Tensor] = field(default_factory=dict)
    counted: dict[str, Tensor] = field(default_factory=dict)
    copying: Tensor = field(default_factory=lambda: torch.empty(0))
    at: Tensor = field(default_factory=lambda: torch.empty(0))
    sink: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))
    moved: tuple[Tensor, Tensor] | None = None

    def distance(self) -> Tensor:
        """``[layer head]``: of 2 and more, the one with most attention on average."""
        return self.at[..., 2:].mean(dim=2).argmax(dim=-1) + 2

    def found(self) -> dict[str, Found]:
        """Score, null and p-value of each detector, in the order of their table."""
        zero = torch.zeros_like(self.copying)
        pairs = {"previous_token": (self.at[..., 1], _best_but(self.at, torch.ones_like(self.distance())))}
        for name, score in self.there.items():
            kept = self.counted[name]
            if bool(kept.any()):
                pairs[name] = (score[..., kept], self.elsewhere[name][..., kept])
        if "induction" in pairs:
            score, null = pairs["induction"]
            pairs["induction"] = (score, null.clamp(min=0))
        pairs |= {"copying": (self.copying, zero), "copy_suppression": (-self.copying, zero)}
        if self.moved is not None:
            pairs["name_mover"] = self.moved
        best = self.distance()
        chosen = self.at.gather(-1, best[..., None, None].expand(*self.at.shape[:3], 1))[..., 0]
        pairs |= {"positional": (chosen, _best_but(self.at, best)), "bos_sink": self.sink}
        tested = {}
        for name, (score, null) in pairs.items():
            p = sign_test((score - null).flatten(0, 1)).reshape(score.shape[:2])
            tested[name] = (score, null, p)
        return tested


def _best_but(at: Tensor, distance: Tensor) -> Tensor:
    """``[layer head batch]``: the most at any other distance than this ``[layer head]``, that of 0 included."""
    places = torch.arange(at.shape[-1])
    return at.masked_fill((places == distance[..., None])[:, :, None, :], -1.0).amax(dim=-1)


def look(model: Model, plain: Batch, repeated: Batch, task: Task | None) -> Looked:
    """One pass over the prompts; two where those with repetitions are others than those without."""
    own = Places.of(plain)
    there = own if repeated is plain else Places.of(repeated)
    targets = {"duplicate_token": there.duplicate, "prefix_matching": there.prefix, "induction": there.prefix}
    table, others = _Table(), _Others(there.real, targets)
    if repeated is not plain:
        for rows, layer, pattern, copied in _passes(model, repeated, there):
            for name, weights in targets.items():
                table.put(name, layer, weighed(_counting(name, pattern, copied), weights[rows]))
    for rows, layer, pattern, copied in _passes(model, plain, own):
        real = own.real[rows]
        for name, weights in targets.items():
            counting = _counting(name, pattern, copied)
            table.put(f"elsewhere {name}" if repeated is not plain else name, layer, weighed(counting, weights[rows]))
            if repeated is plain:
                others.add(name, layer, counting, rows)
        table.put("at", layer, at_distances(pattern, real))
        table.put("keys", layer, on_keys(pattern, real))
        queries = real.clone()
        queries[:, 0] = False
        shares = queries.float() / queries.sum(dim=1, keepdim=True)
        moved = pattern * copied[:, :, None, :]
        table.put("copying", layer, torch.einsum("bhqk,bq->hb", moved, shares))
        if task is not None:
            for side, value in zip(("right", "wrong"), _moved(moved, task, own, rows), strict=True):
                table.put(side, layer, value)
    keys = table.whole("keys")
    looked = Looked(
        there={name: table.whole(name) for name in targets},
        elsewhere={name: others.mean(name) if repeated is plain else table.whole(f"elsewhere {name}") for name in targets},
        counted={name: matches(weights) for name, weights in targets.items()},
        copying=table.whole("copying"),
        at=table.whole("at"),
        sink=(keys[..., 0], keys[..., 1:].amax(dim=-1)),
    )
    if task is not None:
        said = (task.clean[:, :, None] == task.right[:, None, :]).any(dim=(1, 2)).cpu()
        if bool(said.any()):
            looked.moved = (table.whole("right")[..., said], table.whole("wrong")[..., said])
    return looked


def _counting(name: str, pattern: Tensor, copied: Tensor) -> Tensor:
    """Attention, or what is copied by it."""
    return pattern * copied[:, :, None, :] if name == "induction" else pattern


def _moved(moved: Tensor, task: Task, places: Places, rows: slice) -> tuple[Tensor, Tensor]:
    """``[head batch]`` twice: what is copied of the answer, and the most that is copied of another token."""
    some = torch.arange(moved.shape[0])
    read = moved[some, :, task.answer_pos[rows].cpu()]
    # A token that stands in several places counts with all of them; of the first position nothing is copied.
    each = torch.einsum("bhk,bkj->bhj", read, places.same[rows].float())
    answers = (task.clean[rows, :, None] == task.right[rows, None, :]).any(dim=2).cpu() & places.real[rows]
    rest = places.real[rows] & ~answers
    best = [each.masked_fill(~there[:, None], -torch.inf).amax(dim=2).T for there in (answers, rest)]
    return best[0], best[1].clamp(min=0)


def _passes(model: Model, batch: Batch, places: Places) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """For each part of the batch and each layer: rows, patterns ``[batch head q_pos k_pos]``, copying ``[batch head k_pos]``."""
    wanted = Selection(tuple(Site(name, layer) for layer in range(model.cfg.n_layers) for name in ("pattern", "v")))
    group, at_once = model.cfg.n_heads // model.cfg.n_kv_heads, rows_per_forward(model, batch.tokens.shape[1])
    for first in range(0, len(batch.tokens), at_once):
        part, rows = batch[first : first + at_once], slice(first, min(first + at_once, len(batch.tokens)))
        cache = run(model, part.tokens, capture=wanted, logits=False).cache.whole
        words = unembedding(model, part.tokens)
        for layer in range(model.cfg.n_layers):
            value = cache[Site("v", layer)].float().repeat_interleave(group, dim=2)
            moved = torch.einsum("bkhd,hdm->bkhm", value, writing(model, layer))
            copied = copies(moved.cpu(), words.cpu(), places[rows])
            real = places.real[rows].float()
            pattern = cache[Site("pattern", layer)].float().cpu() * (real[:, :, None] * real[:, None, :])[:, None]
            yield rows, layer, pattern, copied


class _Table:
    """Numbers by name and layer, put together from the parts of a batch."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[int, list[Tensor]]] = {}

    def put(self, name: str, layer: int, value: Tensor) -> None:
        """Add ``[head batch ...]`` of some rows."""
        self.parts.setdefault(name, {}).setdefault(layer, []).append(value)

    def whole(self, name: str) -> Tensor:
        """``[layer head batch ...]``."""
        return torch.stack([torch.cat(parts, dim=1) for _, parts in sorted(self.parts[name].items())])


class _Others:
    """The mean of the other prompts at the places that count in one: the sum of all, less its own."""

    def __init__(self, real: Tensor, targets: dict[str, Tensor]) -> None:
        # Only prompts that are long enough have a row there.
        others = (real.float().sum(dim=0) - real.float()).clamp(min=1)
        self.weights = {name: weights / others[:, :, None] for name, weights in targets.items()}
        self.own, self.sums = _Table(), dict[tuple[str, int], Tensor]()

    def add(self, name: str, layer: int, values: Tensor, rows: slice) -> None:
        """Add ``[batch head q_pos k_pos]`` of some rows."""
        self.own.put(name, layer, weighed(values, self.weights[name][rows]))
        self.sums[name, layer] = self.sums.get((name, layer), 0.0) + values.sum(dim=0)

    def mean(self, name: str) -> Tensor:
        """``[layer head batch]``."""
        layers = sorted(layer for each, layer in self.sums if each == name)
        every = [torch.einsum("hqk,bqk->hb", self.sums[name, layer], self.weights[name]) for layer in layers]
        return torch.stack(every) - self.own.whole(name)
