"""The vocabulary of shapes: one word per axis, the same in types, einops strings, `Effects.axes` and errors.

===========  ====================================================================
``batch``    prompts, or rows of one forward pass
``pos``      token positions; ``q_pos`` and ``k_pos`` where attention has two
``layer``    blocks of the transformer, from 0
``head``     query heads, from 0; ``kv_head`` key-value heads of grouped queries
``d_model``  width of the residual stream
``d_head``   width of one head
``d_mlp``    neurons of one MLP
``vocab``    tokens of the tokenizer
===========  ====================================================================
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "AnswerLogits",
    "Heads",
    "Logits",
    "Mask",
    "Pattern",
    "PerExample",
    "Positions",
    "Residual",
    "Tokens",
]

Tokens = Int[Tensor, "batch pos"]
Mask = Bool[Tensor, "batch pos"]
Positions = Int[Tensor, "batch"]
Logits = Float[Tensor, "batch pos vocab"]
AnswerLogits = Float[Tensor, "batch vocab"]
PerExample = Float[Tensor, "batch"]
Residual = Float[Tensor, "batch pos d_model"]
Heads = Float[Tensor, "batch pos head d_head"]
Pattern = Float[Tensor, "batch head q_pos k_pos"]
