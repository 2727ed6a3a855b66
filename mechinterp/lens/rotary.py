"""Rotary positions as matrices, taken from the model's own code and held against its scores."""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.laws import tolerance
from mechinterp.core.model import Model
from mechinterp.core.run import run
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import ModelError

__all__ = ["rotation"]

# How many tokens the model's own scores are looked at on.
LENGTH = 5


@torch.no_grad()
def rotation(model: Model, layer: int, distance: int) -> Tensor:
    """``[d_head d_head]``: score(q, k) = q R k / sqrt(d_head) for a query so many positions behind its key.

    The identity at distance 0, and on models whose queries and keys meet as they are.

    Raises
    ------
    ModelError
        A distance that is no number of positions of this model; positions that do not turn queries and keys; attention in which
        something else happens to them (norms of queries and keys), so that no matrix between them says what it does.

    Notes
    -----
    Cost: one forward pass over five tokens, up to this layer's scores, which the matrix has to give.
    """
    if not 0 <= distance < model.cfg.n_ctx:
        raise ModelError(
            f"distance={distance}: a query stands 0 to {model.cfg.n_ctx - 1} positions behind its key in {model.name}"
        )
    turns = _turns(model, layer)
    if turns is None and model.cfg.positional == "rotary":
        raise ModelError(
            f"the queries and keys of {model.name} ({model.cfg.architecture}) are turned by their positions, but its code has no "
            "one module rotary_emb and function apply_rotary_pos_emb to take the angles from, so where a head looks cannot be "
            "told from its weights"
        )
    if turns is None and distance:
        raise ModelError(
            f"the positions of {model.name} are {model.cfg.positional}: they do not turn queries and keys, so that the distance "
            "between them is not in the weights; leave out distance="
        )
    _check(model, layer, turns)
    if turns is None:
        return torch.eye(model.cfg.d_head, device=model.device)
    both = _turned(model, turns, torch.tensor([distance, 0]))
    return both[0] @ both[1].T


def _turns(model: Model, layer: int) -> Any:
    """The module that gives the angles, if the model has one."""
    if model.cfg.positional != "rotary":
        return None
    found = [module for name, module in model.hf.named_modules() if name.endswith("rotary_emb")]
    apply = _apply(model, layer)
    if len(found) != 1 or apply is None:
        return None
    # Gemma 3 has other angles in layers with a window.
    windowed = hasattr(found[0], "layer_types")
    return (partial(found[0], layer_type=model.hf.config.layer_types[layer]) if windowed else found[0]), apply


def _apply(model: Model, layer: int) -> Any:
    home = sys.modules[type(model.block(layer).attn.original_component).__module__]
    return getattr(home, "apply_rotary_pos_emb", None)


def _turned(model: Model, turns: Any, places: Tensor) -> Tensor:
    """``[place d_head d_head]``: R with ``q R`` the query at that place."""
    angles, apply = turns
    size, places = model.cfg.d_head, places.to(model.device)
    basis = torch.eye(size, device=model.device).expand(len(places), -1, -1)
    cos, sin = angles(basis, places[None])
    # One basis vector for each head: [batch head pos d_head].
    rows, angles = basis.transpose(0, 1)[None], (cos.float(), sin.float())
    try:
        turned = apply(rows, rows, *angles)[0]
    except RuntimeError:
        # Some architectures split off the coordinates that do not turn before they call it (Phi, StableLM).
        part = rows[..., : cos.shape[-1]]
        turned = torch.cat([apply(part, part, *angles)[0], rows[..., cos.shape[-1] :]], dim=-1)
    return turned[0].transpose(0, 1)


def _check(model: Model, layer: int, turns: Any) -> None:
    """The model's own scores have to be what the matrices give, but for one factor."""
    n = min(LENGTH, model.cfg.n_ctx)
    tokens = (torch.arange(n, device=model.device)[None] * 7 + 1) % model.cfg.d_vocab
    sites = Selection(tuple(Site(name, layer) for name in ("q", "k", "scores")))
    seen = run(model, tokens, capture=sites, logits=False).cache.whole
    q, k, scores = (seen[site][0].float() for site in sites)
    k = k.repeat_interleave(model.cfg.n_heads // model.cfg.n_kv_heads, dim=1)
    if turns is not None:
        turned = _turned(model, turns, torch.arange(n))
        q, k = (torch.einsum("phd,pde->phe", each, turned) for each in (q, k))
    expected = torch.einsum("qhd,khd->hqk", q, k)
    cap = getattr(model.hf.config, "attn_logit_softcapping", None)
    causal = torch.ones(n, n, dtype=torch.bool, device=model.device).tril()
    given, expected = (each[:, causal] for each in (scores, expected))
    if cap is not None:
        given = cap * torch.atanh((given / cap).clamp(-1 + 1e-7, 1 - 1e-7))
    # Keys outside of a sliding window have no score.
    seen_keys = given > -1e4
    given, expected = given[seen_keys], expected[seen_keys]
    factor = float((given * expected).sum() / expected.pow(2).sum().clamp(min=1e-30))
    off = float((given - factor * expected).abs().max() / given.abs().max().clamp(min=1e-30))
    if not (off < max(1e-3, tolerance(model.dtype)) and math.isfinite(factor)):
        raise ModelError(
            f"the attention scores of layer {layer} of {model.name} ({model.cfg.architecture}) are not the products of its "
            f"queries and keys{'' if turns is None else ', turned by their positions'} (off by {off:.0%}): it does more to them, "
            "such as a norm, or a number for the distance (ALiBi), so no matrix between them says where a head looks"
        )
