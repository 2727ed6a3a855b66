"""Who wrote what into the residual stream: its parts, each as the vector that was added."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import einsum
from torch import Tensor

from mechinterp.core.model import Model
from mechinterp.core.norms import FrozenNorm, freeze_norm
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import ModelError

__all__ = ["Writers", "check_written", "per_part", "written_sites"]

Parts = dict[str, Tensor]


def check_written(model: Model) -> None:
    """Refuse models whose stream is no sum of what was added to it."""
    for name in ("attn_out", "mlp_out", "z"):
        if name not in model.sites:
            raise ModelError(
                f"the residual stream of {model.name} is not the sum of what its heads and MLPs write: logits cannot be split "
                "among them. mi.logit_lens reads the stream after each layer, and mi.patch measures what each part does. What "
                f"does not hold: {model.audit.refused[name]}"
            )


def written_sites(model: Model) -> Selection:
    """The activations that all parts of the stream are computed from."""
    sites = [Site("resid_pre", 0)]
    if "pos_embed" in model.sites:
        sites += [Site("embed"), Site("pos_embed")]
    for layer in range(model.cfg.n_layers):
        sites.append(Site("z", layer))
        if not model.cfg.attn_only:
            sites.append(Site("mlp_out", layer))
            if model.norm_after("mlp", layer) is not None and "mlp_post" in model.sites:
                sites.append(Site("mlp_post", layer))
    return Selection((*sites, Site("resid_post", model.cfg.n_layers - 1)))


class Writers:
    """The parts of the residual stream at some positions.

    All parts together are the last ``resid_post``. Where a norm stands between attention or MLP and the stream, a part is what
    that norm, its scale held, makes of it.

    Parameters
    ----------
    model
        Where the weights are.
    values
        The activations of `written_sites`, ``[batch pos ...]``.
    """

    def __init__(self, model: Model, values: Mapping[Site, Tensor]) -> None:
        self.model, self.values = model, values

    def value(self, name: str, layer: int | None = None) -> Tensor:
        return self.values[Site(name, layer)].double()

    def embedding(self) -> Parts:
        """``embed`` and, where they are vectors that are added, ``pos_embed``: ``[batch pos d_model]``."""
        whole = self.value("resid_pre", 0)
        if Site("pos_embed") in self.values:
            embed, pos = self.value("embed"), self.value("pos_embed")
            # Not where the embedding is projected or normed before block 0 reads it.
            if embed.shape == whole.shape and torch.allclose(embed + pos, whole, rtol=0, atol=1e-4 * float(whole.abs().max())):
                return {"embed": whole - pos, "pos_embed": pos}
        return {"embed": whole}

    def attention(self, layer: int) -> tuple[Tensor, Tensor]:
        """``[batch pos head d_model]``, what each head adds to the stream, and ``[batch pos d_model]``, what no head does."""
        z = self.values[Site("z", layer)]
        heads = einsum(z.double(), self.model.projection(layer, "o").weight.double(), "b p h d, h d m -> b p h m")
        with torch.no_grad():
            bias = self.model.attention_sums(layer, torch.zeros_like(z[:1, :1])).double()
        after = self.model.norm_after("attn", layer)
        if after is None:
            return heads, bias.expand(*heads.shape[:2], -1)
        frozen = freeze_norm(after, heads.sum(dim=2) + bias)
        return per_part(frozen)(heads), frozen(bias) + frozen.bias

    def mlp(self, layer: int) -> tuple[Tensor, Tensor]:
        """``[batch pos d_model]`` each: what the MLP adds to the stream but for its bias, and that bias."""
        out, bias = self.value("mlp_out", layer), self.mlp_bias(layer)
        frozen = self.norm_after_mlp(layer)
        added = bias.expand_as(out) if frozen is None else frozen(bias) + frozen.bias
        return out - added, added

    def mlp_bias(self, layer: int) -> Tensor:
        """``[1 1 d_model]``, before a norm that it may have to pass."""
        if "mlp_post" not in self.model.sites:
            # The experts of a mixture are taken as one, biases included.
            return torch.zeros(1, 1, self.model.cfg.d_model, dtype=torch.float64, device=self.model.device)
        none = torch.zeros(1, 1, self.model.cfg.d_mlp, dtype=self.model.dtype, device=self.model.device)
        with torch.no_grad():
            return self.model.neurons_sum(layer, none).double()

    def norm_after_mlp(self, layer: int) -> FrozenNorm | None:
        """The norm between this MLP and the stream, its scale held."""
        after = self.model.norm_after("mlp", layer)
        if after is None or Site("mlp_post", layer) not in self.values:
            return None
        with torch.no_grad():
            return freeze_norm(after, self.model.neurons_sum(layer, self.values[Site("mlp_post", layer)]))


def per_part(frozen: FrozenNorm) -> FrozenNorm:
    """The same norm for parts on an axis before the last."""
    return FrozenNorm(frozen.scale.unsqueeze(-2), frozen.weight, frozen.bias, frozen.centred)
