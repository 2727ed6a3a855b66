"""Which sites mean what they say on this model, proved by a few tiny forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from mechinterp.core.edits import Add
from mechinterp.core.model import Model
from mechinterp.core.run import run
from mechinterp.core.select import select
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
    Cost: two tiny forward passes for each site. Made once by ``model.audit`` and kept there.
    """
    generator = torch.Generator().manual_seed(0)
    high = min(model.cfg.d_vocab, 1000)
    tokens = torch.randint(0, high, (2, 5), generator=generator).to(model.device)
    proved: list[str] = []
    refused: dict[str, str] = {}
    values: dict[str, Tensor] = {}
    base = run(model, tokens).logits
    for name, kind in KINDS.items():
        # The last block would hide a site whose edits are lost only before another block.
        site = Site(name, 0 if kind.per_layer else None)
        try:
            values[name] = run(model, tokens, capture=site)[site]
            _prove(model, tokens, site, values[name], base)
        except MechInterpError as error:
            refused[name] = str(error)
        else:
            proved.append(name)
    return Audit(model.name, tuple(proved), refused, _identities(model, values))


def _prove(model: Model, tokens: Tensor, site: Site, value: Tensor, base: Tensor) -> None:
    expected = tuple(value.shape[: len(site.kind.axes)])
    if len(site.kind.axes) != value.ndim:
        raise InertError(f"{site} has shape {list(expected)} where the axes are {' '.join(site.kind.axes)}")
    if not torch.isfinite(value).all() and site.name != "scores":
        raise InertError(f"{site} holds values that are not finite")
    same = run(model, tokens, edits=[_replace(site, value)]).logits
    if not torch.equal(same, base):
        raise InertError(f"replacing {site} by itself changes the logits by {float((same - base).abs().max()):.1e}")
    generator = torch.Generator(device="cpu").manual_seed(1)
    push = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
    moved = run(model, tokens, edits=[Add(site, push * value.nan_to_num(0, 0, 0).abs().clamp(min=0.1))]).logits
    if torch.equal(moved, base) and not _reads_nothing(model, site):
        raise InertError(f"an edit of {site} does not reach the logits on {model.cfg.architecture}")


def _replace(site: Site, value: Tensor):  # type: ignore[no-untyped-def]
    from mechinterp.core.edits import Replace

    return Replace(site, value)


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
