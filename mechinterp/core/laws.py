"""What ties the sites of a model together: which is computed from which, and what must hold between their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import einsum, repeat
from torch import Tensor

from mechinterp.core.model import Model
from mechinterp.core.sites import Site

__all__ = ["LAWS", "Law", "after", "joint_norm", "tame", "tolerance"]

Values = Mapping[Site, Tensor]
Sides = Callable[[Model, int, Callable[[str], Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Law:
    """Two things that have to be equal at a layer.

    Parameters
    ----------
    text
        How it is written.
    needs
        The sites that it speaks of.
    broken
        An edit of one of these sets one side by hand, so that the two sides may differ.
    blame
        The sites that are not what they say where it does not hold.
    sides
        ``(model, layer, value of a site) -> (left, right)``.
    where
        ``"sequential"``, ``"parallel"`` or ``"all"``: the blocks for which it is meant; ``"last"``: the last block alone.
    """

    text: str
    needs: tuple[str, ...]
    broken: tuple[str, ...]
    blame: tuple[str, ...]
    sides: Sides
    where: str = "all"

    def holds_for(self, model: Model, layer: int) -> bool:
        if self.where == "last":
            return layer == model.cfg.n_layers - 1
        return self.where in ("all", "parallel" if model.cfg.parallel else "sequential")


def tolerance(dtype: torch.dtype) -> float:
    """How far two sides may differ, relative to the largest number in them.

    Norms and softmax are taken in float32 also where the model is in float64; half precision rounds each term of a sum.
    """
    return {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2}.get(dtype, 5e-2)


def tame(value: Tensor) -> Tensor:
    """In float32 or better, and what a mask hides brought to zero."""
    value = value if value.dtype == torch.float64 else value.float()
    return value.masked_fill(value < -1e4, 0.0)


def joint_norm(model: Model, layer: int, port: str) -> bool:
    """Whether one norm spans the queries (or keys) of all heads, so that each head's depend on the others' (OLMo 2)."""
    norm = getattr(model.block(layer).attn, f"{port}_norm", None)
    weight = getattr(getattr(norm, "original_component", None), "weight", None)
    heads = model.cfg.n_heads if port == "q" else model.cfg.n_kv_heads
    return weight is not None and weight.ndim == 1 and weight.numel() == heads * model.cfg.d_head and heads > 1


def after(model: Model) -> dict[str, frozenset[str]]:
    """For each site of a block, the sites of the same block that an edit of it can change."""
    reads = {
        "q_in": ("resid_pre",), "k_in": ("resid_pre",), "v_in": ("resid_pre",),
        "q": ("q_in",), "k": ("k_in",), "v": ("v_in",),
        "scores": ("q", "k"), "pattern": ("scores",), "z": ("pattern", "v"), "head_out": ("z",), "attn_out": ("head_out",),
        "resid_mid": ("resid_pre", "attn_out"),
        "mlp_in": ("resid_pre",) if model.cfg.parallel else ("resid_mid",),
        "mlp_pre": ("mlp_in",), "mlp_post": ("mlp_in", "mlp_pre"), "mlp_out": ("mlp_in", "mlp_post"),
        "resid_post": ("resid_pre", "attn_out", "mlp_out") + (() if model.cfg.parallel else ("resid_mid",)),
    }  # fmt: skip
    found: dict[str, set[str]] = {name: set() for name in ("resid_pre", *reads)}
    for name, sources in reads.items():
        # Sources come first in the table, so that one pass is enough.
        for other in found:
            if other in sources or found[other] & set(sources):
                found[other].add(name)
    return {name: frozenset(others) for name, others in found.items()}


# -- the laws --------------------------------------------------------------------------------------

Get = Callable[[str], Tensor]


def _sum_of_block(model: Model, layer: int, get: Get) -> tuple[Tensor, Tensor]:
    middle = get("resid_pre") + get("attn_out") if model.cfg.parallel else get("resid_mid")
    return middle + get("mlp_out"), get("resid_post")


def _sum_of_heads(model: Model, layer: int, get: Get) -> tuple[Tensor, Tensor]:
    return model.heads_add(layer, get("head_out")), get("attn_out")


def _values_mixed(model: Model, layer: int, get: Get) -> tuple[Tensor, Tensor]:
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    values = repeat(get("v"), "b k kv d -> b k (kv g) d", g=group)
    return einsum(get("pattern"), values, "b h q k, b k h d -> b q h d"), get("z")


def _projected(port: str) -> Sides:
    def sides(model: Model, layer: int, get: Get) -> tuple[Tensor, Tensor]:
        projection = model.projection(layer, port)
        value = einsum(model.norm("attn", layer)(get(f"{port}_in")), projection.weight, "b p h m, h m d -> b p h d")
        return (value if projection.bias is None else value + projection.bias), get(port)

    return sides


LAWS = (
    Law("resid_pre + attn_out = mlp_in", ("resid_mid", "mlp_in"), ("mlp_in",), ("attn_out", "resid_mid", "mlp_in"),
        lambda model, layer, get: (get("resid_mid"), get("mlp_in")), "sequential"),
    Law("resid_pre + attn_out + mlp_out = resid_post", ("resid_mid", "mlp_out", "resid_post"), ("resid_post",),
        ("attn_out", "mlp_out", "resid_mid"), _sum_of_block, "sequential"),
    Law("resid_pre + attn_out + mlp_out = resid_post", ("resid_pre", "attn_out", "mlp_out", "resid_post"), ("resid_post",),
        ("attn_out", "mlp_out"), _sum_of_block, "parallel"),
    Law("sum of head_out + bias = attn_out", ("head_out", "attn_out"), ("attn_out",), ("head_out",), _sum_of_heads),
    Law("z through the output projection = attn_out", ("z", "attn_out"), ("attn_out", "head_out"), ("z", "head_out"),
        lambda model, layer, get: (model.attention_adds(layer, get("z")), get("attn_out"))),
    Law("pattern times v = z", ("pattern", "v", "z"), ("z",), ("pattern", "scores"), _values_mixed),
    Law("pattern rows = 1", ("pattern",), ("pattern",), ("pattern",),
        lambda model, layer, get: (tame(get("pattern")).sum(-1), torch.ones((), device=model.device))),
    Law("softmax of scores = pattern", ("scores", "pattern"), ("pattern",), ("scores",),
        lambda model, layer, get: (get("scores").float().softmax(-1), get("pattern"))),
    Law("q_in normed and projected = q", ("q_in", "q"), ("q",), ("q_in",), _projected("q")),
    Law("k_in normed and projected = k", ("k_in", "k"), ("k",), ("k_in",), _projected("k")),
    Law("v_in normed and projected = v", ("v_in", "v"), ("v",), ("v_in",), _projected("v")),
    Law("MLP of mlp_in = mlp_out", ("mlp_in", "mlp_out"), ("mlp_out", "mlp_pre", "mlp_post"), ("mlp_in",),
        lambda model, layer, get: (model.mlp_adds(layer, get("mlp_in")), get("mlp_out"))),
    Law("mlp_post through the output projection = mlp_out", ("mlp_post", "mlp_out"), ("mlp_out",), ("mlp_post", "mlp_pre"),
        lambda model, layer, get: (model.neurons_add(layer, get("mlp_post")), get("mlp_out"))),
    Law("norm of the last resid_post = final_norm", ("resid_post", "final_norm"), ("final_norm",), ("final_norm",),
        lambda model, layer, get: (model.norm("final")(get("resid_post")), get("final_norm")), "last"),
)  # fmt: skip
