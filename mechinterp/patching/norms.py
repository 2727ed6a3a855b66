"""What a norm does to a change of its input, without a graph: the same for every head that reads the same stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["LinearNorm", "linear_norm"]


@dataclass(frozen=True, eq=False)
class LinearNorm:
    """A norm at one input x ``[batch pos d_model]``: out = weight * unit + bias, unit = (x - its mean, where centred) * scale.

    Parameters
    ----------
    weight
        ``[d_model]``.
    scale
        ``[batch pos 1]``: one over the size of x.
    unit
        ``[batch pos d_model]``.
    """

    weight: Tensor
    scale: Tensor
    unit: Tensor
    centred: bool

    def pull(self, gradients: Sequence[Tensor], projections: Sequence[Tensor], out: Tensor, *, frozen: bool = False) -> None:
        """Write to ``out`` ``[head (batch pos) d_model]`` the gradient at x of what each head for itself projects from the norm.

        Of LayerNorm and RMSNorm that is scale * (g - unit * mean(g * unit)), with g the weighted (and centred) gradient at the
        output. With ``frozen`` the scale counts as a constant, and the second term falls away.

        Parameters
        ----------
        gradients
            ``[batch pos head d_head]`` each.
        projections
            ``[head d_model d_head]`` each, for as many heads.
        """
        first = 0
        for gradient, projection in zip(gradients, projections, strict=True):
            scaled = (gradient.float() * self.scale.unsqueeze(2)).permute(2, 0, 1, 3).flatten(1, 2)
            # One product for each head, in the layout that the scores are taken in: nothing is copied before it or after it.
            torch.bmm(scaled, projection.float().transpose(1, 2), out=out[first : first + len(projection)])
            first += len(projection)
        out.mul_(self.weight)
        if self.centred:
            out.sub_(out.mean(dim=-1, keepdim=True))
        if not frozen:
            unit = self.unit.flatten(0, 1)
            along = (out * unit).mean(dim=-1, keepdim=True)
            out.addcmul_(unit, along, value=-1)


def linear_norm(module: nn.Module, x: Tensor) -> LinearNorm | None:
    """The norm at x; ``None`` where the module is no LayerNorm or RMSNorm of any kind, which is found out by trying it.

    Weight and bias are read off two inputs of unit size and no mean, since architectures keep them in different ways (Gemma as
    1 + w).
    """
    if isinstance(module, nn.Identity):
        return None
    with torch.no_grad():
        width = x.shape[-1]
        # So large that what is added under the root does not show.
        signs = torch.ones(width, device=x.device, dtype=torch.float32)
        signs[1::2] = -1.0
        if width % 2:
            return None
        probe = (signs * 1e3).to(x.dtype)
        up, down, moved = (module(each[None, None])[0, 0].float() for each in (probe, -probe, probe + 1e3))
        weight, bias = (up - down) / 2 * signs, (up + down) / 2
        centred = bool(torch.allclose(moved, up, rtol=1e-2, atol=1e-3))
        out = module(x).float() - bias
        middle = x.float() - x.float().mean(dim=-1, keepdim=True) if centred else x.float()
        shaped = weight * middle
        size = shaped.square().sum(dim=-1, keepdim=True)
        scale = (out * shaped).sum(dim=-1, keepdim=True) / size.clamp_min(torch.finfo(torch.float32).tiny)
        tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 0.05
        if not bool((out - scale * shaped).abs().max() <= tolerance * out.abs().max()):
            return None
        return LinearNorm(weight, scale, middle * scale, centred)
