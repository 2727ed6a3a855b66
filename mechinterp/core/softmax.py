"""Attention that computes its own softmax, opened: scores and pattern become places where an edit counts.

`transformer_lens` calls some attention modules as they are (GPT-J, GPT-Neo, OPT) and shows the pattern only afterwards, when
a change comes too late. Their softmax is the one call in them that turns scores into a pattern, so it is intercepted: scores
pass through one empty module, the pattern through another, and hooks on those see and change them in the middle of the
computation. While no hook is there the module runs untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["OPENED", "open_softmax"]

# The empty module that each site passes through.
OPENED = {"scores": "opened_scores", "pattern": "opened_pattern"}

_SOFTMAX = {nn.functional.softmax, torch.softmax, torch.Tensor.softmax}


class _Opened(TorchFunctionMode):
    """Softmax by way of the two empty modules; everything else as it is. Acts in this thread alone."""

    def __init__(self, attention: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention, self.dtype = attention, dtype

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in _SOFTMAX:
            return function(*args, **(kwargs or {}))
        pattern = function(self.attention.opened_scores(args[0]), *args[1:], **(kwargs or {}))
        # Softmax is taken in float32 and rounded before it weighs the values: it is seen as it is used.
        return self.attention.opened_pattern(pattern.to(self.dtype))


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not (self.opened_scores._forward_hooks or self.opened_pattern._forward_hooks):
        return self.closed_forward(*args, **kwargs)
    stream: Any = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    with _Opened(self, stream.dtype):
        return self.closed_forward(*args, **kwargs)


def open_softmax(attention: Any) -> None:
    """Let the scores and the pattern of this attention module be hooked. Once is enough, twice does nothing more."""
    if hasattr(attention, "closed_forward"):
        return
    # Methods and no closures: a deep copy of the module must run its own weights.
    attention.closed_forward = attention.forward
    attention.opened_scores, attention.opened_pattern = nn.Identity(), nn.Identity()
    attention.forward = MethodType(_forward, attention)
