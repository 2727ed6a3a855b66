"""The logit lens: what the residual stream, or what one part writes into it, says when it is read as the last stream is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechinterp.core.arguments import check_model
from mechinterp.core.effects import versions
from mechinterp.core.memory import bytes_of
from mechinterp.core.model import Model
from mechinterp.core.norms import FrozenNorm, freeze_norm
from mechinterp.core.plan import progress_bar, rows_per_forward
from mechinterp.core.prompts import Runnable, batch_of
from mechinterp.core.run import run
from mechinterp.core.select import Selection, select
from mechinterp.core.sites import Site
from mechinterp.errors import SelectorError, SiteError
from mechinterp.lens.asked import Pos, Targets, answers_of, as_targets, where_of
from mechinterp.lens.reading import LensReading
from mechinterp.lens.tuned import TunedLens
from mechinterp.lens.written import Writers, check_written

__all__ = ["logit_lens", "rows_of_logits"]

STREAM = ("resid_pre", "resid_mid", "resid_post")
CONTRIBUTIONS = ("embed", "pos_embed", "attn_out", "mlp_out", "head_out")
# What logits of one chunk of positions may take by default, and how many tensors of their size there are at once.
_CHUNK, _COPIES = 1 << 27, 6


def logit_lens(
    model: Model,
    prompts: Runnable,
    *,
    at: str | Site | Selection = "L*.resid_post",
    targets: Targets = None,
    top_k: int = 5,
    pos: Pos = None,
    lens: TunedLens | None = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> LensReading:
    """What would the model say if its residual stream ended here?

    The stream h goes through the model's own final norm and unembedding, biases, logit scale and soft cap included: logits =
    unembed(norm(h)); with a tuned lens, unembed(norm(h + A h + b)). At the last ``resid_post`` these are the model's logits.

    What a part *adds* to the stream (``head_out``, ``mlp_out``, ``attn_out``, ``embed``, ``pos_embed``) is no stream. It is
    read with the scale that the final norm has at the last stream of the same prompt and position, centred where the norm
    centres, without the biases of norm and unembedding and before a soft cap: so read, all parts and the biases sum to the
    model's (uncapped) logits. A head's part of an attention whose output passes a norm before it is added (Gemma 2) is what
    that norm, its scale held, makes of it.

    Parameters
    ----------
    model, prompts
        What to run: tokens ``[batch pos]``, texts, lists of ids, or a task (its clean prompts).
    at
        ``"L*.resid_post"``, ``"L*.resid_mid"``, ``"L*.resid_pre"``, or contributions: ``"L*.H*.head_out | L*.mlp_out"``. Not
        both.
    targets
        Tokens whose logit, log-probability and rank are wanted: ids ``[batch]`` or ``[batch k]``, or texts, asked of every
        prompt. Default for a task: its right answers, then its wrong ones.
    top_k
        How many of the likeliest tokens are kept.
    pos
        A position, its name, or several of them (default: all). Negative ones count from the end of each prompt.
    lens
        A `TunedLens`, which translates the stream first.
    memory
        What logits may take at a time, such as ``"500 MB"`` (default 128 MiB).
    progress
        Show a progress bar.

    Returns
    -------
    LensReading
        Likeliest tokens, entropy and KL(final || lens) at each site, prompt and position, and the targets' numbers, in nats. Of
        a contribution these are those of the softmax of what it adds to the logits, as if it spoke alone.

    Raises
    ------
    SelectorError
        Streams and contributions together; a position that a prompt does not have.
    SiteError
        A site that cannot be read so.
    TaskError
        Targets that are no tokens of this model.
    ModelError
        A contribution, on a model whose stream is not the sum of what is added to it; a lens that was tuned for another shape.

    Notes
    -----
    Cost: one forward pass, and one unembedding for each site and position. Memory: the logits ``[site batch pos vocab]`` are
    never made. Positions go through in chunks, one site at a time, each reduced to its few numbers before the next: at most six
    tensors ``[chunk vocab]`` exist, within ``memory`` (one position of a vocabulary of 262,144 is 6 MiB).

    References
    ----------
    nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023 (2303.08112).

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction(n=2)
    >>> reading = mi.logit_lens(toy.model, toy.task, pos=-1)
    >>> reading.top.shape == (2, 2, 1, 5)
    True
    """
    check_model(model, prompts)
    given = batch_of(model, prompts)
    model.check_tokens(given.tokens)
    sites = select(at, model.cfg)
    contributions = _check(model, sites, lens)
    if not 1 <= top_k <= model.cfg.d_vocab:
        raise SelectorError(f"top_k={top_k}: {model.name} has {model.cfg.d_vocab} tokens; ask for 1 or more of them")
    where = where_of(model, given, pos)
    answers = answers_of(prompts)
    wanted = torch.cat(answers, dim=1) if targets is None and answers is not None else None
    wanted = as_targets(model, targets, len(given.tokens)) if wanted is None else wanted
    parts, at_once = [], rows_per_forward(model, given.tokens.shape[1])
    chunk = rows_of_logits(model, memory)
    with progress_bar(len(given.tokens), "lens", show=progress) as bar:
        for first in range(0, len(given.tokens), at_once):
            rows = slice(first, min(first + at_once, len(given.tokens)))
            need = Selection((*_needed(model, sites), Site("resid_post", model.cfg.n_layers - 1)))
            kept = run(model, given.tokens[rows], capture=need, logits=False).cache.whole
            values = {site: where.gather(value, rows) for site, value in kept.items()}
            ids = None if wanted is None else wanted[rows].repeat_interleave(len(where.labels), dim=0).to(model.device)
            parts.append(_Reader(model, values, contributions, lens).read(sites, ids, top_k, chunk))
            bar.update(rows.stop - rows.start)
    shape = (len(sites), len(given.tokens), len(where.labels))
    found = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    # [site (batch pos) ...]: prompts came in parts, positions vary fastest.
    found = {name: value.reshape(len(value), *shape[1:], *value.shape[2:]) for name, value in found.items()}
    found = {name: _blank(value, where.real) for name, value in found.items()}
    tokens = torch.where(where.real, given.tokens.cpu().gather(1, where.index), -1)
    if "log_probs" in found and wanted is not None:
        absent = (wanted < 0)[None, :, None, :].expand_as(found["log_probs"])
        for name, fill in (("log_probs", torch.nan), ("logits", torch.nan), ("ranks", -1)):
            found[name] = found[name].masked_fill(absent, fill)
    final = found.pop("final")[0]
    seen = torch.cat([each.flatten() for each in (tokens, found["top"], final, *(() if wanted is None else (wanted,)))])
    return LensReading(
        sites=tuple(str(site) for site in sites),
        pos=where.labels,
        tokens=tokens,
        final=final,
        targets=wanted,
        strings=_strings(model, prompts, seen),
        provenance=_provenance(model, prompts, at, lens, contributions, len(given.tokens)),
        **found,
    )


def rows_of_logits(model: Model, memory: int | str | None) -> int:
    """How many positions are unembedded at a time, so that all logits of a chunk fit."""
    return max(1, (_CHUNK if memory is None else bytes_of(memory)) // (4 * _COPIES * model.cfg.d_vocab))


def _check(model: Model, sites: Selection, lens: TunedLens | None) -> bool:
    """Whether the sites are contributions; refuse what cannot be read."""
    for site in sites:
        if site.name not in (*STREAM, *CONTRIBUTIONS):
            raise SiteError(
                f"{site} is no vector of the residual stream: a lens reads {', '.join(STREAM)}, and what is added to them: "
                f"{', '.join(CONTRIBUTIONS)}"
            )
        if site.pos is not None or site.neuron is not None:
            raise SelectorError(f"{site} is a part of a vector or a position; a lens reads {site.whole}, with pos= for positions")
        if site.name == "head_out" and site.head is None:
            raise SelectorError(f"{site} is all heads: write 'L{site.layer}.H*.head_out' for each, or 'attn_out' for their sum")
    kinds = {site.name in CONTRIBUTIONS for site in sites}
    if len(kinds) > 1:
        raise SelectorError("streams and contributions are read in different ways; ask for them one after the other")
    if not kinds.pop():
        if lens is not None:
            lens.check(model, sites)
        return False
    if lens is not None:
        raise SelectorError("a tuned lens translates the residual stream, not what is added to it; leave out lens=")
    check_written(model)
    return True


def _needed(model: Model, sites: Selection) -> Selection:
    """What has to be captured: heads are computed from what they mixed."""
    return Selection(tuple(dict.fromkeys(Site("z" if site.name == "head_out" else site.name, site.layer) for site in sites)))


class _Reader:
    """Reads the sites of some prompts, ``values`` being ``[batch pos ...]`` for the positions that are asked for."""

    def __init__(self, model: Model, values: dict[Site, Tensor], contributions: bool, lens: TunedLens | None) -> None:
        self.model, self.values, self.contributions, self.lens = model, values, contributions, lens
        self.last = self._rows(values[Site("resid_post", model.cfg.n_layers - 1)])
        self.frozen = freeze_norm(model.norm("final"), self.last) if contributions else None
        self._heads: tuple[int | None, Tensor] = (None, self.last)

    def _rows(self, value: Tensor) -> Tensor:
        return value.flatten(0, 1)

    def vectors(self, site: Site) -> Tensor:
        """``[(batch pos) d_model]``."""
        if site.name != "head_out":
            return self._rows(self.values[site])
        if self._heads[0] != site.layer:
            self._heads = site.layer, Writers(self.model, self.values).attention(site.layer or 0)[0]
        return self._rows(self._heads[1][:, :, site.head])

    def logits(self, site: Site, rows: slice) -> Tensor:
        """``[rows vocab]`` in float32 or better."""
        stream = self.vectors(site)[rows]
        if self.frozen is not None:
            frozen = FrozenNorm(self.frozen.scale[rows], self.frozen.weight, self.frozen.bias, self.frozen.centred)
            return _wide(self.model.read_out(frozen(stream.double()).to(self.model.dtype), bias=False))
        return _wide(self.model.unembed(stream if self.lens is None else self.lens.translate(site, stream)))

    @torch.no_grad()
    def read(self, sites: Selection, ids: Tensor | None, top_k: int, chunk: int) -> dict[str, Tensor]:
        """Numbers ``[site (batch pos) ...]``, on the CPU."""
        found: dict[str, Tensor] = {}
        for first in range(0, len(self.last), chunk):
            rows = slice(first, first + chunk)
            final = _wide(self.model.unembed(self.last[rows])).log_softmax(-1)
            found.setdefault("final", torch.empty(1, len(self.last), dtype=torch.long))[:, rows] = final.argmax(-1)
            for i, site in enumerate(sites):
                for name, value in _numbers(self.logits(site, rows), final, None if ids is None else ids[rows], top_k).items():
                    if name not in found:
                        # Made once: small results kept between large ones would leave memory in pieces.
                        found[name] = torch.empty((len(sites), len(self.last), *value.shape[1:]), dtype=value.dtype)
                    found[name][i, rows] = value.cpu()
        return found


def _numbers(logits: Tensor, final: Tensor, ids: Tensor | None, top_k: int) -> dict[str, Tensor]:
    found = {}
    if ids is not None:
        found["logits"] = logits.gather(1, ids.clamp(min=0))
        found["ranks"] = torch.stack([(logits > each[:, None]).sum(-1) for each in found["logits"].unbind(1)], dim=1)
    log_probs = logits.log_softmax(-1)
    if ids is not None:
        found["log_probs"] = log_probs.gather(1, ids.clamp(min=0))
    best = log_probs.topk(top_k, dim=-1)
    found |= {"top": best.indices, "top_log_probs": best.values, "entropy": torch.special.entr(log_probs.exp()).sum(-1)}
    found["kl"] = torch.nn.functional.kl_div(log_probs, final, reduction="none", log_target=True).sum(-1)
    return found


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _blank(value: Tensor, real: Tensor) -> Tensor:
    """Nothing where there is padding."""
    mask = ~real.reshape(1, *real.shape, *[1] * (value.ndim - 3))
    return value.masked_fill(mask, torch.nan if value.is_floating_point() else -1)


def _strings(model: Model, prompts: Any, seen: Tensor) -> dict[int, str]:
    ids = [each for each in torch.unique(seen).tolist() if each >= 0]
    if model.tokenizer is not None:
        return {each: model.tokenizer.decode([each]) for each in ids}
    known = getattr(prompts, "strings", None) or {}
    return {each: known[each] for each in ids if each in known}


def _provenance(model: Model, prompts: Any, at: object, lens: TunedLens | None, contributions: bool, n: int) -> dict[str, Any]:
    return {
        "model": model.name,
        "task": getattr(prompts, "name", ""),
        "prompts": n,
        "method": "contributions through the lens" if contributions else "tuned lens" if lens is not None else "logit lens",
        "lens": "logit lens" if lens is None else "tuned lens",
        "lens_provenance": {} if lens is None else dict(lens.provenance),
        "at": str(at),
        "contributions": contributions,
        "forwards": 1,
        "versions": versions(),
    }
