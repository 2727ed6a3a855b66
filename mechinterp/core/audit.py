"""Which sites mean what they say on this model, proved by a few tiny forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape

import torch
from einops import rearrange
from torch import Tensor

from mechinterp.core.edits import Add, Call
from mechinterp.core.model import Model
from mechinterp.core.run import run
from mechinterp.core.select import Selection
from mechinterp.core.sites import KINDS, Site
from mechinterp.errors import InertError, MechInterpError

__all__ = ["Audit", "audit"]


@dataclass(frozen=True)
class Audit:
    """The result of `audit`: each site is proved, or refused with a reason.

    ``largest`` holds the largest violation of each identity that was checked, in the units of the activations.
    """

    model: str
    proved: tuple[str, ...]
    refused: Mapping[str, str]
    largest: Mapping[str, float]

    def __repr__(self) -> str:
        lines = [f"Audit of {self.model}: {len(self.proved)} sites proved, {len(self.refused)} refused"]
        lines += [f"  refused {name}: {reason}" for name, reason in self.refused.items()]
        lines += [f"  {identity}: off by at most {value:.1e}" for identity, value in self.largest.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def audit(model: Model) -> Audit:
    """Does each site fire once, and does an edit there do what the definition says?

    Checks on two short random prompts: every site is captured exactly once; adding to it changes the logits;
    ``resid_pre + attn_out + mlp_out = resid_post``; the heads' outputs and the bias sum to the attention output;
    pattern rows sum to 1; replacing every site by itself changes no bit.

    Notes
    -----
    Cost: four tiny forward passes, and more where a site is refused. Made once, when a model is loaded, and kept as
    ``model.audit``. Sites that it refuses cannot be edited or captured from then on.
    """
    generator = torch.Generator().manual_seed(0)
    high = min(model.cfg.d_vocab, 1000)
    tokens = torch.randint(0, high, (2, 5), generator=generator).to(model.device)
    refused: dict[str, str] = {}
    values: dict[Site, Tensor] = {}
    # The last block would hide a site whose edits are lost only before another block.
    sites = [Site(name, 0 if kind.per_layer else None) for name, kind in KINDS.items()]
    _each(sites, refused, lambda part: values.update(_seen(model, tokens, part)))
    sites = [site for site in sites if site.name not in refused]
    _each(sites, refused, lambda part: _check_same(model, tokens, part))
    sites = [site for site in sites if site.name not in refused]
    _each(sites, refused, lambda part: _check_reach(model, tokens, part, values))
    proved = tuple(name for name in KINDS if name not in refused)
    named = {site.name: value for site, value in values.items()}
    return Audit(model.name, proved, {name: refused[name] for name in KINDS if name in refused}, _identities(model, named))


def _each(sites: list[Site], refused: dict[str, str], check: Callable[[list[Site]], None]) -> None:
    """Check all sites in one forward pass; only where that fails, one by one, to see which are refused and why."""
    try:
        check(sites)
    except MechInterpError:
        for site in sites:
            try:
                check([site])
            except MechInterpError as error:
                refused[site.name] = str(error)


def _seen(model: Model, tokens: Tensor, sites: list[Site]) -> dict[Site, Tensor]:
    """The value of each site: that it is seen exactly once and has its axes is checked by the capture."""
    out = run(model, tokens, capture=Selection(tuple(sites)))
    for site in sites:
        value = out.cache.whole[site]
        if not torch.isfinite(value).all() and site.name != "scores":
            raise InertError(f"{site} holds values that are not finite")
    return {site: out.cache.whole[site] for site in sites}


def _check_same(model: Model, tokens: Tensor, sites: list[Site]) -> None:
    """Replacing every site by itself changes no bit. Every site has its own rows: the logits put back would hide all others."""
    batch, tokens = len(tokens), tokens.repeat(len(sites), 1)
    edits = [Call(site, lambda value, _: value, rows=(i * batch, (i + 1) * batch)) for i, site in enumerate(sites)]
    same = run(model, tokens, edits=edits).logits
    base = run(model, tokens).logits
    if not torch.equal(same, base):
        raise InertError(
            f"replacing {sites[0]} by itself changes the logits by {float((same - base).abs().max()):.1e} "
            f"on {model.cfg.architecture}"
        )


def _check_reach(model: Model, tokens: Tensor, sites: list[Site], values: Mapping[Site, Tensor]) -> None:
    """An edit of each site changes the logits. Every site has its own rows of one forward pass; the first are unedited."""
    generator = torch.Generator().manual_seed(1)
    batch, edits = len(tokens), []
    for i, site in enumerate(sites, start=1):
        value = values[site]
        push = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        push = push * value.nan_to_num(0, 0, 0).abs().clamp(min=0.1, max=1e4)
        edits.append(Add(site, push, rows=(i * batch, (i + 1) * batch)))
    logits = run(model, tokens.repeat(len(sites) + 1, 1), edits=edits).logits.float()
    parts = rearrange(logits, "(site b) p v -> site b p v", b=batch)
    scale = float(parts[0].std()) or 1.0
    for site, part in zip(sites, parts[1:], strict=True):
        if float((part - parts[0]).abs().max()) < 1e-5 * scale and not _reads_nothing(model, site):
            raise InertError(f"an edit of {site} does not reach the logits on {model.cfg.architecture}")


def _reads_nothing(model: Model, site: Site) -> bool:
    """An MLP that writes exactly zero cannot show an edit of what it reads."""
    return model.cfg.attn_only and site.name in ("mlp_in", "mlp_pre", "mlp_post")


def _identities(model: Model, values: dict[str, Tensor]) -> dict[str, float]:
    largest: dict[str, float] = {}

    def note(identity: str, difference: Tensor) -> None:
        largest[identity] = float(difference.abs().max())

    have = values.keys()
    if {"resid_pre", "attn_out", "mlp_out", "resid_post"} <= have:
        total = values["resid_pre"] + values["attn_out"] + values["mlp_out"]
        note("resid_pre + attn_out + mlp_out - resid_post", total - values["resid_post"])
    if {"head_out", "attn_out"} <= have and not model.cfg.post_norm:
        rest = values["attn_out"] - values["head_out"].sum(dim=2)
        # What remains is the output bias, the same everywhere.
        note("attn_out - sum of head_out - bias", rest - rest[:1, :1])
    if "pattern" in have:
        note("pattern rows - 1", values["pattern"].sum(dim=-1) - 1)
    return largest
