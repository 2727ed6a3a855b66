"""Wrapping a Hugging Face module with `transformer_lens`, and what has to be checked and mended on the way."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp.core.softmax import open_softmax
from mechinterp.errors import MechInterpError, ModelError, did_you_mean

__all__ = ["bridge_of", "open_attention", "supported_architectures"]


def bridge_of(module: nn.Module, name: str) -> Any:
    """The bridge around a live module, made in place the first time.

    Raises
    ------
    ModelError
        No adapter for this architecture; hooks on modules that the bridge never calls; logits that the bridge changes.
        The module is then as it was, but where the logits change.
    """
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise ModelError(
            f"{type(module).__name__} is not a Hugging Face transformer: it has no config. Pass a PreTrainedModel, or name "
            "the activations of a plain module: mi.load(module, sites={...}, example=inputs)"
        )
    existing = getattr(module, "_mechinterp_bridge", None)
    if existing is not None:
        # Bridging twice would wrap the hook points of the first time.
        return existing
    before = module.training, getattr(config, "_attn_implementation", None)
    module.eval()
    plain: list[Tensor] = []

    def check(adapter: Any) -> None:
        _check_hooks(adapter, module, name)
        _mend_falcon(adapter, config)
        plain.append(_tiny_logits(module, name))

    # The bridge makes layers of its own, with random numbers that it then replaces.
    with _quiet(), torch.random.fork_rng(devices=[]):
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        # A fused attention kernel shows no scores and no pattern to hook.
        config._attn_implementation = "eager"
        try:
            bridge = build_bridge_from_module(
                module, type(module).__name__, hf_config=config, model_name=name, post_adapter_hook=check
            )
        except MechInterpError:
            module.train(before[0])
            config._attn_implementation = before[1]
            raise
        except (ValueError, KeyError, RuntimeError, AttributeError) as error:
            module.train(before[0])
            known = supported_architectures()
            raise ModelError(
                f"transformer_lens cannot wrap {type(module).__name__} ({config.model_type}): {error}. "
                f"It wraps {len(known)} architectures. {_nearest(type(module).__name__, known)}"
            ) from error
    try:
        bridged = _tiny_logits(module, name)
    except ModelError as error:
        cause = error.__cause__
        raise ModelError(
            f"transformer_lens cannot run {type(module).__name__} in {plain[0].dtype}".replace("torch.", "")
            + f" ({str(cause).splitlines()[0][:200]}); load it with dtype=torch.float32"
        ) from cause
    _check_logits(plain[0], bridged, type(module).__name__)
    object.__setattr__(module, "_mechinterp_bridge", bridge)
    return bridge


def supported_architectures() -> tuple[str, ...]:
    """Class names of the Hugging Face models that `transformer_lens` wraps here."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    return tuple(sorted(SUPPORTED_ARCHITECTURES))


def _nearest(name: str, known: tuple[str, ...]) -> str:
    sort = [other for other in known if other.endswith("ForCausalLM")]
    near = did_you_mean(name, sort)
    if near.startswith("Did you mean"):
        return near
    return "Among them: GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM, ..."


@contextmanager
def _quiet() -> Iterator[None]:
    """transformer_lens sets its log level on import; the caller's logging stays as it was."""
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def open_attention(bridge: Any) -> None:
    """Open the softmax of every attention module that the bridge calls as it is, and shows only afterwards."""
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    for block in bridge.blocks:
        attention: Any = getattr(block, "attn", None)
        if type(attention) is AttentionBridge:
            open_softmax(attention.original_component)


# -- the caller's hooks ----------------------------------------------------------------------------


def _check_hooks(adapter: Any, module: nn.Module, name: str) -> None:
    """Refuse hooks on modules that the bridge replaces by its own computation: they would never fire again."""
    hooked = [path for path, part in module.named_modules() if _has_hooks(part)]
    silent = [path for path in hooked if _is_replaced(adapter.component_mapping, module, path)]
    if silent:
        raise ModelError(
            f"{name} has hooks of yours that would never fire again, on {', '.join(silent[:4])}"
            f"{f' and {len(silent) - 4} more' if len(silent) > 4 else ''}: transformer_lens computes these parts itself. "
            "Remove them before mi.load, and use mi.HookRegistry or mi.run(..., edits=, capture=) at a site such as "
            "'L0.attn_out' instead"
        )


def _has_hooks(module: nn.Module) -> bool:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # transformers has hooks of its own where outputs are recorded.
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hooks in kinds for hook in hooks.values())


def _is_replaced(mapping: dict[str, Any], module: nn.Module, path: str) -> bool:
    """Whether the module at this path is no longer called once the bridge is there."""
    inside = False
    for place, key, component in _components(mapping, module, ""):
        if place == path:
            # A fused projection is cut into its parts.
            return key in ("qkv", "gate_up") or not _calls_original(component)
        inside = inside or (path.startswith(f"{place}.") and not _calls_original(component))
    return inside


def _components(mapping: Mapping[str, Any], module: nn.Module, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """Each component of the adapter, with the path of the module that it wraps, and its key."""
    for key, component in mapping.items():
        path = f"{prefix}{component.name}" if component.name else prefix.rstrip(".")
        try:
            wrapped = module.get_submodule(path)
        except AttributeError:
            continue
        for each in [f"{path}.{i}" for i in range(len(wrapped))] if isinstance(wrapped, nn.ModuleList) else [path]:
            if component.name:
                yield each, key, component
            yield from _components(component.submodules, module, f"{each}." if each else "")


def _calls_original(component: Any) -> bool:
    from transformer_lens.model_bridge import generalized_components as kinds

    if isinstance(component, kinds.NormalizationBridge):
        return bool(component.use_native_layernorm_autograd)
    if isinstance(component, kinds.AttentionBridge):
        return type(component) is kinds.AttentionBridge
    return not isinstance(component, kinds.JointGateUpMLPBridge)


# -- what the bridge computes ----------------------------------------------------------------------


def _tiny_logits(module: Any, name: str) -> Tensor:
    tokens = torch.arange(5, device=next(module.parameters()).device)[None] % module.config.get_text_config().vocab_size
    try:
        with torch.no_grad():
            logits = module(input_ids=tokens, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"{name} ({type(module).__name__}) gives no logits of token ids alone ({str(error).splitlines()[0][:200]}); "
            "pass a decoder, such as ...ForCausalLM"
        ) from error
    return logits


def _check_logits(plain: Tensor, bridged: Tensor, architecture: str) -> None:
    """A wrong layout of weights changes logits wholly; rounding in another order does not."""
    off = float((bridged - plain).abs().max() / plain.abs().max().clamp(min=1e-9))
    if not off < (0.1 if torch.finfo(plain.dtype).bits == 16 else 1e-3):
        raise ModelError(
            f"transformer_lens computes other logits for this {architecture} than Hugging Face does, off by {off:.1e} of the "
            "largest; its adapter does not know this variant of the architecture. Load another variant, or another model"
        )


def _mend_falcon(adapter: Any, config: Any) -> None:
    """transformer_lens 4.3 takes Falcon's grouped projection for three stacked ones; it is interleaved by group."""
    if getattr(config, "model_type", "") != "falcon" or not config.new_decoder_architecture:
        return
    heads, groups, width = config.num_attention_heads, config.num_kv_heads, config.hidden_size // config.num_attention_heads
    adapter.cfg.n_key_value_heads = groups

    def split(attention: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        fused = attention.query_key_value
        parts = [fused.weight] if fused.bias is None else [fused.weight, fused.bias]
        # [(group (queries key value) d_head) ...]
        grouped = [part.detach().unflatten(0, (groups, heads // groups + 2, width)) for part in parts]
        cuts = (slice(None, -2), slice(-2, -1), slice(-1, None))
        return tuple(_linear([part[:, cut].flatten(0, 2) for part in grouped]) for cut in cuts)  # type: ignore[return-value]

    attention = adapter.component_mapping["blocks"].submodules["attn"]
    attention.split_qkv_matrix = split


def _linear(parts: list[Tensor]) -> nn.Linear:
    weight, bias = parts[0], parts[1] if len(parts) > 1 else None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear
