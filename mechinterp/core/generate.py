"""Text that a model goes on with while its activations are edited and captured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.cache import Cache
from mechinterp.core.edits import Edit
from mechinterp.core.hooks import HookRegistry, active_registries
from mechinterp.core.model import Model
from mechinterp.core.prompts import Runnable, batch_of
from mechinterp.core.select import Selection, select
from mechinterp.core.sites import Site
from mechinterp.core.spans import Scope, Span, aligned
from mechinterp.errors import EditError, InertError, ModelError

__all__ = ["Generation", "generate"]


@dataclass(frozen=True, eq=False)
class Generation:
    """What a model went on with.

    Parameters
    ----------
    tokens
        ``[batch pos]``: prompt and generated tokens of each row from position 0 on; behind `lengths` the row is filled up.
    lengths
        ``[batch]``: tokens of each row, the token that ended it included.
    prompt_lengths
        ``[batch]``: how many of them were given.
    answer
        ``[batch new vocab]``: the logits from which each new token was chosen; ``None`` where they were not asked for. Behind the
        end of a row they mean nothing. Read it as `logits`.
    texts
        The generated part of each row; ``None`` without a tokenizer.
    cache
        The captured activations, by absolute position. The model never reads the last token of a row: there are none of it.
    edits
        What was changed, and in which part.
    provenance
        Model, temperature, seed, and the forward passes that it took.
    """

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    answer: Tensor | None
    texts: tuple[str, ...] | None
    cache: Cache
    edits: tuple[tuple[Edit, Scope], ...]
    provenance: Mapping[str, object]

    @property
    def logits(self) -> Tensor:
        if self.answer is None:
            raise EditError("the logits of this generation were not kept; leave out logits=False")
        return self.answer

    @property
    def new(self) -> tuple[Tensor, ...]:
        """The generated tokens of each row."""
        ends = zip(self.tokens, self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return tuple(row[first:stop] for row, first, stop in ends)

    def __getitem__(self, key: Site | str) -> Tensor:
        return self.cache[key]

    def __repr__(self) -> str:
        new = (self.lengths - self.prompt_lengths).tolist()
        counts = str(new[0]) if len(set(new)) == 1 else f"{min(new)} to {max(new)}"
        edits = f", {len(self.edits)} edits" if self.edits else ""
        first = "" if self.texts is None else f"; {self.texts[0]!r}"
        kept = f"{len(self.cache.whole)} activations captured"
        return f"Generation: {len(new)} prompts, {counts} new tokens each{edits}, {kept}{first}"


def generate(
    model: Model,
    prompts: Runnable,
    *,
    max_new_tokens: int,
    edits: Iterable[Edit | tuple[Edit, Scope]] = (),
    scope: Scope = "all",
    capture: str | Site | Selection | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    stop: int | Sequence[int] | None = None,
    use_cache: bool = True,
    logits: bool = True,
    mask: Tensor | None = None,
) -> Generation:
    """What does the model go on with, while these edits act?

    Positions are absolute: an edit at ``[12]`` acts when position 12 is read, in the prompt or as a generated token. Negative
    and named positions are those of the prompt. An edit without a position acts on the prompt as a whole, and then on
    each generated token by itself: what it brings is a vector ``[d]`` (or with a position, the value there); a tensor for a
    whole prompt goes with ``scope="prompt"``.

    Parameters
    ----------
    model, prompts, mask
        As in `mechinterp.run`. Rows of unequal length are run together.
    max_new_tokens
        How many tokens are generated at most.
    edits
        Edits; or pairs of an edit and its own scope.
    scope
        Where edits act: on the ``"prompt"``, on ``"generated"`` tokens as they are read, or on ``"all"``.
    capture
        A selector of activations to keep, of all positions. Later keys of a pattern are 0, of scores the least number.
    temperature
        0: the likeliest token. Otherwise tokens are drawn from ``softmax(logits / temperature)``.
    seed
        For drawing: needed with a temperature, refused without.
    stop
        Tokens that end a row. Default: those that the model declares; ``()``: none.
    use_cache
        Keep keys and values of what was read. Without, every token costs a whole forward pass; the text is the same.
    logits
        Whether to keep the logits of each new token.

    Returns
    -------
    Generation
        ``.tokens``, ``.texts``, ``.logits``, ``.cache``.

    Raises
    ------
    InertError
        An edit whose position or scope was never reached.
    EditError
        A value for whole prompts at generated tokens; a call inside a `HookRegistry`; a temperature without a seed.
    ModelError
        The text would be longer than the model reads.

    Notes
    -----
    Cost: one forward pass over the prompts, and one over a single position for each new token but the last.

    Examples
    --------
    >>> import mechinterp as mi
    >>> model = mi.load("toy:induction")
    >>> made = mi.generate(model, [[1, 2, 3, 1], [4, 4]], max_new_tokens=3, edits=[mi.Scale("L1.H0.z", 0.5)], scope="generated")
    >>> made.lengths.tolist()
    [7, 5]
    """
    if max_new_tokens < 1:
        raise ModelError(f"max_new_tokens={max_new_tokens}: give the number of tokens to generate, 1 or more")
    if temperature < 0 or (temperature > 0) != (seed is not None):
        raise EditError(
            f"temperature={temperature} and seed={seed} do not go together: 0 takes the likeliest token and draws nothing; "
            "above 0 tokens are drawn, which takes a seed"
        )
    if not model.cfg.d_vocab:
        raise ModelError(f"{model.name} is a plain module, which generates no text; mi.run and mi.HookRegistry work on it")
    if active_registries():
        raise EditError("a HookRegistry is attached, whose edits mean whole prompts; pass them to generate as edits=")
    given = batch_of(model, prompts, mask)
    model.check_tokens(given.tokens)
    batch, width = given.tokens.shape
    lengths = [width] * batch if given.lengths is None else given.lengths.tolist()
    if width + max_new_tokens - 1 > model.cfg.n_ctx:
        raise ModelError(
            f"{width} tokens and {max_new_tokens} new ones do not fit {model.name}, which reads at most {model.cfg.n_ctx}; "
            f"ask for {max(0, model.cfg.n_ctx - width + 1)} at most"
        )
    scoped = tuple((edit, scope) if isinstance(edit, Edit) else edit for edit in edits)
    selection = Selection(()) if capture is None else select(capture, model.cfg)
    kept: dict[Site, Tensor] = {}
    named = given.named(model)
    registry = HookRegistry(model, named)
    for edit, own in scoped:
        registry.add(edit, scope=own)
        for site in select(edit.at, model.cfg):
            if isinstance(site.pos, int) and site.pos >= max(lengths) + max_new_tokens - 1:
                raise InertError(
                    f"{edit!r} at {site} would never be reached: of up to {max(lengths)} tokens and {max_new_tokens} new ones "
                    f"the model reads positions 0 to {max(lengths) + max_new_tokens - 2}"
                )
    registry.capture(selection, kept)
    touched = [*(site for edit, _ in scoped for site in select(edit.at, model.cfg)), *selection]
    loop = _Loop(model, given.tokens, lengths, use_cache=use_cache, whole=any(site.name == "logits" for site in touched))
    ends = _ends(model, stop)
    drawn = None
    if seed is not None:
        # All at once, so that a row's draws do not depend on when other rows end.
        drawn = torch.rand(batch, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    alive = torch.ones(batch, dtype=torch.bool, device=model.device)
    counts = torch.zeros(batch, dtype=torch.long, device=model.device)
    answers, parts = [], []
    with torch.no_grad(), registry:
        for step in range(max_new_tokens):
            registry.sees(*loop.spans())
            found = loop.forward()
            parts.append(dict(kept))
            if not use_cache:
                # Every pass computes all positions anew.
                del parts[:-1]
            if logits:
                answers.append(found)
            chosen = found.argmax(dim=-1) if drawn is None else _draw(found, temperature, drawn[:, step])
            counts += alive
            if ends:
                chosen = torch.where(alive, chosen, torch.full_like(chosen, ends[0]))
                alive = alive & ~torch.isin(chosen, torch.tensor(ends, device=chosen.device))
            loop.append(chosen, alive)
            if not bool(alive.any()):
                break
    prompt_lengths = torch.tensor(lengths)
    total = prompt_lengths + counts.cpu()
    tokens = loop.from_first(loop.tokens, Site("embed"))[:, : int(total.max())]
    filled = torch.arange(tokens.shape[1], device=tokens.device) >= total.to(tokens.device)[:, None]
    tokens = tokens.masked_fill(filled, ends[0] if ends else 0)
    whole = {site: loop.from_first(_joined(parts, site), site) for site in kept}
    read = total - 1
    cache = Cache(model, selection, whole, named, None if bool((read == loop.read).all()) else read)
    new = [row[length:stop_at] for row, length, stop_at in zip(tokens.tolist(), lengths, total.tolist(), strict=True)]
    return Generation(
        tokens,
        total,
        prompt_lengths,
        torch.stack(answers, dim=1) if logits else None,
        None if model.tokenizer is None else tuple(model.tokenizer.decode(row) for row in new),
        cache,
        scoped,
        {"model": model.name, "temperature": temperature, "seed": seed, "forwards": loop.passes, "use_cache": use_cache},
    )


class _Loop:
    """Feeds prompts and then their continuation, all rows at the same place: shorter prompts are padded on the left.

    That is exact, given the mask and each token's own position; a sliding window, too, sees the same distances.
    """

    def __init__(self, model: Model, tokens: Tensor, lengths: list[int], *, use_cache: bool, whole: bool) -> None:
        from transformers import DynamicCache

        self.model, self.width, self.whole = model, tokens.shape[1], whole
        self.lengths = None if min(lengths) == self.width else tuple(lengths)
        self.shifts = torch.tensor([self.width - length for length in lengths], device=model.device)
        tokens = tokens.to(model.device)
        self.tokens = tokens if self.lengths is None else aligned(tokens, 1, -self.shifts)
        self.cache = DynamicCache() if use_cache else None
        self.alive: list[tuple[bool, ...]] = []
        self.passes = 0
        self.own_positions = "position_ids" in signature(model.hf.forward).parameters

    @property
    def read(self) -> int:
        """Positions that were computed, padding included."""
        return self.tokens.shape[1] - 1

    @property
    def offset(self) -> int:
        """Where the next pass begins."""
        return self.tokens.shape[1] - 1 if self.cache is not None and self.passes else 0

    def spans(self) -> tuple[list[Span], int]:
        prompt = Span(self.lengths, self.width, generating=True)
        made = [Span(self.lengths, self.width, i, alive, generating=True) for i, alive in enumerate(self.alive)]
        return ([prompt, *made] if self.offset == 0 else made[-1:]), self.offset

    def forward(self) -> Tensor:
        """Logits ``[batch vocab]`` of the next token."""
        options: dict[str, Any] = {"use_cache": self.cache is not None}
        if self.cache is not None:
            options["past_key_values"] = self.cache
        if not self.whole:
            options["logits_to_keep"] = 1
        if self.lengths is not None:
            places = torch.arange(self.tokens.shape[1], device=self.tokens.device) - self.shifts[:, None]
            options["attention_mask"] = (places >= 0).long()
            if self.own_positions:
                options["position_ids"] = places.clamp(min=0)[:, self.offset :]
        logits = self.model.hf(input_ids=self.tokens[:, self.offset :], **options).logits[:, -1]
        self.passes += 1
        return logits

    def append(self, chosen: Tensor, alive: Tensor) -> None:
        self.tokens = torch.cat([self.tokens, chosen[:, None]], dim=1)
        self.alive.append(tuple(alive.tolist()))

    def from_first(self, value: Tensor, site: Site) -> Tensor:
        """Every row from its first token on, padding behind the last."""
        if self.lengths is not None:
            for axis, name in enumerate(site.kind.axes[: value.ndim]):
                if name in ("pos", "q_pos", "k_pos"):
                    value = aligned(value, axis, self.shifts)
        return value


def _joined(parts: list[dict[Site, Tensor]], site: Site) -> Tensor:
    """One activation of all passes, as one pass over everything would have it."""
    values, axes = [part[site] for part in parts], site.kind.axes
    if "k_pos" in axes:
        keys = values[-1].shape[-1]
        later = torch.finfo(values[0].dtype).min if site.name == "scores" else 0.0
        values = [torch.nn.functional.pad(value, (0, keys - value.shape[-1]), value=later) for value in values]
    return torch.cat(values, dim=site.kind.pos_axis or 0)


def _draw(logits: Tensor, temperature: float, drawn: Tensor) -> Tensor:
    """The token at which the cumulated probability passes a number drawn from [0, 1), for each row."""
    shares = torch.softmax(logits.double().cpu() / temperature, dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(shares, (drawn * shares[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    return found.clamp(max=logits.shape[-1] - 1).to(logits.device)


def _ends(model: Model, stop: int | Sequence[int] | None) -> list[int]:
    if stop is None:
        declared = [getattr(getattr(model.hf, name, None), "eos_token_id", None) for name in ("generation_config", "config")]
        stop = next((each for each in declared if each is not None), getattr(model.tokenizer, "eos_token_id", None))
    ends = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    for token in ends:
        if not 0 <= token < model.cfg.d_vocab:
            raise ModelError(f"stop={token} is no token of {model.name}, which knows 0 to {model.cfg.d_vocab - 1}")
    return ends
