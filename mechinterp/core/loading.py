"""From a hub name, a folder, a GGUF file, a live module or a bridge to a `Model`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mechinterp.core.bridging import bridge_of, open_attention
from mechinterp.core.model import Model, ModelConfig
from mechinterp.errors import ModelError

__all__ = ["load_model", "wrap"]

Source = str | os.PathLike[str] | nn.Module | Model


def load_model(
    source: Source,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    name: str | None = None,
) -> Model:
    """A `Model` of a hub name, folder, GGUF file, Hugging Face module or bridge; see `mechinterp.load`."""
    if isinstance(source, Model):
        if all(given is None for given in (device, dtype, tokenizer, name)):
            return source
        module, found, default_name = source.bridge, source.tokenizer, source.name
    elif isinstance(source, nn.Module):
        module, found = source, None
        default_name = type(source).__name__
    elif str(source).endswith(".gguf"):
        from mechinterp.core.gguf import load_gguf

        module, found, _ = load_gguf(Path(source))
        default_name = Path(source).stem
    else:
        module, found = _from_pretrained(str(source))
        default_name = Path(str(source)).name if Path(str(source)).is_dir() else str(source)
    if device is not None or dtype is not None:
        (module.original_model if _is_bridge(module) else module).to(device=device, dtype=dtype)
    if _is_bridge(module):
        found = found or module.tokenizer
    return wrap(module, tokenizer=tokenizer or found, name=name or default_name)


def _is_bridge(module: nn.Module) -> bool:
    return type(module).__name__ == "TransformerBridge"


def _from_pretrained(source: str) -> tuple[nn.Module, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # Float32 unless asked otherwise: effects are differences of close numbers.
        module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, SafetensorError) as error:
        if Path(source).is_dir():
            raise ModelError(
                f"cannot load the folder {source!r} ({str(error).splitlines()[0][:200]}); it needs config.json and "
                "*.safetensors as model.save_pretrained(folder) writes them"
            ) from error
        raise ModelError(
            f"cannot load {source!r}: it is no local folder with a model, and the model hub did not give it "
            f"({str(error).splitlines()[0][:200]}). Offline, use mi.load('smollm2') or mi.load('toy:induction'), or copy the "
            "model folder here (config.json, *.safetensors, tokenizer.json) and pass its path"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        tokenizer = None
    return module, tokenizer


def wrap(module: nn.Module, *, tokenizer: Any = None, name: str) -> Model:
    """A `Model` around a live Hugging Face module or a bridge.

    The module is bridged in place, as `transformer_lens` does: its weights stay, its submodules get hook points.

    Raises
    ------
    ModelError
        `transformer_lens` has no adapter for the architecture, or the bridge's weights were processed one-way.
    """
    if _is_bridge(module):
        bridge: Any = module
        if getattr(bridge, "compatibility_mode", False):
            raise ModelError(
                f"{name} is a bridge in compatibility mode: its weights were folded and centred, so it is another "
                "parametrisation of the model. Pass a fresh bridge, without enable_compatibility_mode()"
            )
    else:
        bridge = bridge_of(module, name)
    module = bridge.original_model
    module.eval()
    cfg = _config(bridge)
    open_attention(bridge)
    model = Model(bridge=bridge, tokenizer=tokenizer, name=name, cfg=cfg)
    _check_causal(model)
    # Proved now, so that no site is ever used that does not mean what it says.
    _ = model.audit
    return model


def _check_causal(model: Model) -> None:
    """Refuse models in which a position sees what comes after it: padding, replays and prefixes all rest on that."""
    high = min(model.cfg.d_vocab, 1000)
    tokens = torch.arange(1, 5, device=model.device).repeat(2, 1) % high
    tokens[1, -1] = (tokens[1, -1] + high // 2) % high
    with torch.no_grad():
        early = model(tokens)[:, :-1].float()
    if not float((early[0] - early[1]).abs().max()) <= 1e-2 * float(early.std()):
        raise ModelError(
            f"{model.name} ({model.cfg.architecture}) is not causal: the logits at a position change with the tokens after it. "
            "Load a decoder (a causal language model)"
        )


def _config(bridge: Any) -> ModelConfig:
    given, module = bridge.cfg, bridge.original_model
    hf = getattr(module.config, "text_config", module.config)
    blocks = list(bridge.blocks)
    lacking = [part for part in ("attn", "mlp") if not hasattr(blocks[0], part)]
    if lacking:
        raise ModelError(
            f"{type(module).__name__} ({module.config.model_type}) is not a transformer of attention and MLP blocks: "
            f"its blocks have no {' and no '.join(lacking)}"
        )
    n_kv = getattr(given, "n_key_value_heads", None) or given.n_heads
    first = blocks[0]
    return ModelConfig(
        architecture=type(module).__name__,
        n_layers=given.n_layers,
        n_heads=given.n_heads,
        n_kv_heads=int(n_kv),
        d_model=given.d_model,
        d_head=given.d_head,
        d_mlp=_width(first) or int(given.d_mlp or 4 * given.d_model),
        d_vocab=given.d_vocab,
        n_ctx=int(getattr(hf, "max_position_embeddings", None) or getattr(hf, "n_positions", None) or given.n_ctx),
        norm="rms" if given.uses_rms_norm else "ln",
        positional={"standard": "learned"}.get(given.positional_embedding_type, given.positional_embedding_type),
        parallel=bool(given.parallel_attn_mlp),
        attn_only=all(_writes_nothing(block) for block in blocks),
        post_norm=hasattr(first, "ln1_post") or hasattr(first, "ln2_post"),
    )


def _width(block: Any) -> int | None:
    """How many neurons the MLP has, by the weights of its last projection; ``None`` of a mixture of experts."""
    module = getattr(getattr(getattr(block, "mlp", None), "out", None), "original_component", None)
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    # Hugging Face's Conv1D (GPT-2) keeps [in out], torch's Linear [out in].
    return int(weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1])


def _writes_nothing(block: Any) -> bool:
    """Whether the MLP's last projection is exactly zero, so that the block is attention only."""
    out = getattr(getattr(block, "mlp", None), "out", None)
    module = getattr(out, "original_component", None)
    if module is None or not hasattr(module, "weight"):
        return False
    parts = [module.weight, getattr(module, "bias", None)]
    return not any(bool((part != 0).any()) for part in parts if part is not None)
