"""Where each site is seen, and how an edit there is made to mean what the site says.

A hook name is not a causal meaning. ``ln2.hook_in`` *shows* the residual stream between attention and
MLP, but a change there reaches the MLP alone. So each site has a `Place`: the hook point where its value
is computed and changed, the tensors that must have been seen before, and two functions between the
hooked tensor and the site's own axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from mechinterp.core.sites import ATTN_PROJECTED, KINDS, LN2_IN, MLP_IN, Site, loses_positions
from mechinterp.core.softmax import OPENED
from mechinterp.errors import SiteError

if TYPE_CHECKING:
    from mechinterp.core.model import Model

__all__ = ["Place", "place_of"]

Read = Callable[[Tensor, dict[str, Tensor]], Tensor]
Write = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Place:
    """How to see and to change one activation.

    Parameters
    ----------
    site
        The whole activation (no head, position or neuron).
    point
        The module whose output is hooked.
    needs
        Tensors that have to be kept when they pass: a name for each hook point.
    read
        ``(hooked, kept) -> value`` with the site's axes.
    write
        ``(hooked, old, new, kept) -> hooked`` such that the site takes the new value.
    stage
        Of sites that share a hook point, the one that is computed from the other has the later stage.
    """

    site: Site
    point: nn.Module
    read: Read
    write: Write
    needs: tuple[tuple[str, nn.Module], ...] = ()
    stage: int = 0


# Under this name a site whose value cannot be read off the hooked tensor keeps what was last written to it,
# so that a second edit starts from the first one's result, and a capture sees both.
_WRITTEN = "written"


def _same(tensor: Tensor, kept: dict[str, Tensor]) -> Tensor:
    return tensor


def _put(hooked: Tensor, old: Tensor, new: Tensor, kept: dict[str, Tensor]) -> Tensor:
    return new


def place_of(model: Model, site: Site) -> Place:
    """Where this activation is, on this model.

    Raises
    ------
    SiteError
        The architecture does not have it, or an edit there could not do what the name says.
    """
    whole, layer = site.whole, site.layer
    special = _SPECIAL.get(site.name)
    if special is not None:
        return special(model, whole)
    kind = KINDS[site.name]
    point = model.point(str(kind.point), layer)
    if site.name in ("q", "k", "v", "z"):
        heads = model.cfg.n_heads if kind.head_axis == "head" else model.cfg.n_kv_heads

        # Projections are flat [batch pos (head d_head)] on some architectures, split on others.
        def split(hooked: Tensor, kept: dict[str, Tensor]) -> Tensor:
            return hooked if hooked.ndim == 4 else rearrange(hooked, "b p (h d) -> b p h d", h=heads)

        def join(hooked: Tensor, old: Tensor, new: Tensor, kept: dict[str, Tensor]) -> Tensor:
            return new.reshape(hooked.shape)

        # What the queries, keys and values read is edited at the same point, and comes before them.
        return Place(whole, point, split, join, stage=1)
    return _by_position(model, Place(whole, point, _same, _put))


def _by_position(model: Model, place: Place) -> Place:
    """The place with a position axis, where the hooked tensor has lost it."""
    if not loses_positions(place.point):
        return place
    # OPT runs its MLP on [(batch pos) d_model]; how many prompts there are is known from what enters the block.
    before = model.point(str(KINDS["resid_pre"].point), place.site.layer)

    def split(hooked: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return hooked.reshape(*kept["resid_pre"].shape[:2], -1)

    def join(hooked: Tensor, old: Tensor, new: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return new.reshape(hooked.shape)

    return Place(place.site, place.point, split, join, (("resid_pre", before),))


def _final_norm(model: Model, site: Site) -> Place:
    try:
        return Place(site, model.point(str(KINDS[site.name].point)), _same, _put)
    except SiteError:
        raise SiteError(
            f"{model.name} ({model.cfg.architecture}) has no norm after its last block; use the last resid_post"
        ) from None


def _square(model: Model, site: Site) -> Place:
    opened = getattr(model.block(site.layer or 0).attn.original_component, OPENED[site.name], None)
    return Place(site, opened or model.point(str(KINDS[site.name].point), site.layer), _same, _put)


def _pos_embed(model: Model, site: Site) -> Place:
    if model.cfg.positional != "learned":
        raise SiteError(f"{model.name} has no position embedding vectors: its positions are {model.cfg.positional}")
    tokens = model.point(str(KINDS["embed"].point))

    # It is computed once for all rows, so an edit of one row needs its own copy.
    def widen(hooked: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return hooked.expand(kept["embed"].shape[0], -1, -1)

    return Place(site, model.point(str(KINDS["pos_embed"].point)), widen, _put, (("embed", tokens),))


def _resid_mid(model: Model, site: Site) -> Place:
    if model.cfg.parallel:
        raise SiteError(
            f"{model.name} ({model.cfg.architecture}) computes attention and MLP in parallel: "
            "there is no residual stream between them; use 'resid_pre' or 'attn_out'"
        )
    before = model.point(str(KINDS["resid_pre"].point), site.layer)
    attn_out = model.point(str(KINDS["attn_out"].point), site.layer)

    def read(hooked: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return kept["resid_pre"] + hooked

    # What attention adds is moved by the difference, so that the skip connection sees it as well.
    def write(hooked: Tensor, old: Tensor, new: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return hooked + (new - old)

    return Place(site, attn_out, read, write, (("resid_pre", before),), stage=1)


def _mlp_in(model: Model, site: Site) -> Place:
    if not model.cfg.parallel:
        # Post-norm blocks without a norm in front let the MLP read the stream itself.
        has_norm = getattr(model.block(site.layer or 0), "ln2", None) is not None
        return _by_position(model, Place(site, model.point(LN2_IN if has_norm else MLP_IN, site.layer), _same, _put))
    before = model.point(str(KINDS["resid_pre"].point), site.layer)

    def read(hooked: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return kept.get(_WRITTEN, kept["resid_pre"])

    def write(hooked: Tensor, old: Tensor, new: Tensor, kept: dict[str, Tensor]) -> Tensor:
        kept[_WRITTEN] = new
        value = model.norm("mlp", site.layer)(new)
        if torch.is_grad_enabled():
            return value
        changed = (new != old).any(dim=-1, keepdim=True)
        return value.where(changed, hooked)

    return Place(site, model.point(MLP_IN, site.layer), read, write, (("resid_pre", before),))


def _neurons(model: Model, site: Site) -> Place:
    if getattr(model.block(site.layer or 0).mlp, "out", None) is None:
        raise SiteError(
            f"the MLP of {model.name} ({model.cfg.architecture}) is a mixture of experts: it has no one set of neurons; "
            "use 'mlp_in' or 'mlp_out', the experts as one"
        )
    return _by_position(model, Place(site, model.point(str(KINDS[site.name].point), site.layer), _same, _put))


def _head_out(model: Model, site: Site) -> Place:
    z = place_of(model, Site("z", site.layer))

    def read(hooked: Tensor, kept: dict[str, Tensor]) -> Tensor:
        if _WRITTEN in kept:
            return kept[_WRITTEN]
        weight = model.projection(site.layer or 0, "o").weight
        return einsum(z.read(kept["z"], kept), weight, "b p h d, h d m -> b p h m")

    def write(hooked: Tensor, old: Tensor, new: Tensor, kept: dict[str, Tensor]) -> Tensor:
        kept[_WRITTEN] = new
        return hooked + (new - old).sum(dim=2)

    return Place(site, model.point(ATTN_PROJECTED, site.layer), read, write, (("z", z.point),))


def _port(which: str) -> Callable[[Model, Site], Place]:
    def place(model: Model, site: Site) -> Place:
        inner = place_of(model, Site(which, site.layer))
        before = model.point(str(KINDS["resid_pre"].point), site.layer)
        heads = model.cfg.n_heads if which == "q" else model.cfg.n_kv_heads

        def read(hooked: Tensor, kept: dict[str, Tensor]) -> Tensor:
            if _WRITTEN in kept:
                return kept[_WRITTEN]
            return kept["resid_pre"].unsqueeze(2).expand(-1, -1, heads, -1)

        # Splitting the stream per head beforehand costs memory on every forward and switches other
        # hooks off. Recomputing the projection of what changed is exact and costs nothing otherwise.
        def write(hooked: Tensor, old: Tensor, new: Tensor, kept: dict[str, Tensor]) -> Tensor:
            kept[_WRITTEN] = new
            projection = model.projection(site.layer or 0, which)
            value = einsum(model.norm("attn", site.layer)(new), projection.weight, "b p h m, h m d -> b p h d")
            if projection.bias is not None:
                value = value + projection.bias
            if torch.is_grad_enabled():
                return value.reshape(hooked.shape)
            # Untouched heads and positions keep their own bits.
            changed = (new != old).any(dim=-1, keepdim=True)
            return value.where(changed, inner.read(hooked, kept)).reshape(hooked.shape)

        return Place(site, inner.point, read, write, (("resid_pre", before),))

    return place


def _logits(model: Model, site: Site) -> Place:
    # The model's own output, after a soft cap where it has one.
    return Place(site, model.hf, _same, _put)


_SPECIAL: dict[str, Callable[[Model, Site], Place]] = {
    "pos_embed": _pos_embed,
    "resid_mid": _resid_mid,
    "mlp_in": _mlp_in,
    "head_out": _head_out,
    "q_in": _port("q"),
    "k_in": _port("k"),
    "v_in": _port("v"),
    "mlp_pre": _neurons,
    "mlp_post": _neurons,
    "scores": _square,
    "pattern": _square,
    "final_norm": _final_norm,
    "logits": _logits,
}
