"""From modules, bridges, folders and names to a model; and what is said where that does not work."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mechinterp as mi
from mechinterp.errors import ModelError


def plain_of(twins: Any) -> Any:
    return copy.deepcopy(twins.plain.module)


@pytest.fixture
def module(twins_of: Callable[..., Any]) -> Any:
    """A fresh Hugging Face module, not yet wrapped."""
    return plain_of(twins_of("gpt2"))


def test_a_module_is_wrapped_in_place_and_once(module: Any, tokens: Tensor) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = mi.load(module)
    assert model.hf is module
    assert model.name == "GPT2LMHeadModel"
    assert model.tokenizer is None
    again = mi.load(module, name="again")
    assert again.bridge is model.bridge
    assert again.name == "again"
    assert torch.equal(again(tokens), model(tokens))
    for name, parameter in module.state_dict().items():
        if name in before:
            assert torch.equal(parameter, before[name])


def test_a_module_in_training_is_put_into_eval_mode(module: Any, tokens: Tensor) -> None:
    model = mi.load(module.train())
    assert not model.hf.training
    # GPT-2 has dropout: two passes agree only without it.
    assert torch.equal(model(tokens), model(tokens))


def test_a_module_with_a_fused_kernel(twins_of: Callable[..., Any], tokens: Tensor) -> None:
    """Such a kernel has no pattern to see. In the open, the logits were the same up to 1e-6 of the largest."""
    module = plain_of(twins_of("llama"))
    module.config._attn_implementation = "sdpa"
    fused = copy.deepcopy(module)
    model = mi.load(module)
    with torch.no_grad():
        wanted = fused(input_ids=tokens).logits
        assert float((model(tokens) - wanted).abs().max() / wanted.abs().max()) < 2e-6
    assert mi.run(model, tokens, capture="L0.pattern")["L0.pattern"].shape == (3, 4, 7, 7)


def test_hooks_from_before_the_wrapping_stay(module: Any, tokens: Tensor) -> None:
    fired: list[str] = []
    module.register_forward_hook(lambda *_: fired.append("whole"))
    module.transformer.h[1].register_forward_hook(lambda *_: fired.append("block"))
    model = mi.load(module)
    fired.clear()
    mi.run(model, tokens, edits=[mi.Zero("L0.z")], capture="L1.z")
    assert fired == ["block", "whole"]


def test_hooks_that_would_never_fire_again_are_refused(module: Any, tokens: Tensor) -> None:
    """transformer_lens computes attention (and some norms) itself, and calls the plain modules no more."""
    fired: list[str] = []
    handle = module.transformer.h[1].attn.register_forward_hook(lambda *_: fired.append("attention"))
    norm = module.transformer.ln_f.register_full_backward_hook(lambda *_: None)
    before = [path for path, _ in module.named_modules()]
    module.train()
    message = (
        "mine has hooks of yours that would never fire again, on transformer.h.1.attn, transformer.ln_f: transformer_lens "
        "computes these parts itself. Remove them before mi.load, and use mi.HookRegistry or mi.run(..., edits=, capture=) "
        "at a site such as 'L0.attn_out' instead"
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        mi.load(module, name="mine")
    # The module is as it was: not wrapped, and its hooks fire.
    assert [path for path, _ in module.named_modules()] == before
    assert module.training
    module(input_ids=tokens)
    assert fired == ["attention"]
    handle.remove()
    norm.remove()
    assert mi.load(module).audit.refused == {}


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2", "GPT-NeoX (Pythia)", "GPT-J", "GPT-Neo", "OPT", "Bloom",
                                  "Falcon (40B)", "Phi-3", "OLMo 2", "Mixtral"])  # fmt: skip
def test_exactly_the_hooks_that_would_be_lost_are_refused(name: str, tokens: Tensor) -> None:
    """By trying: hooks on every plain module, which of them fire before and after transformer_lens has wrapped it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    from mechinterp.core.bridging import _is_replaced, _mend_falcon
    from tests.core.architectures import module_of

    module = module_of(name)
    fired: set[str] = set()
    for path, part in module.named_modules():
        part.register_forward_hook(lambda *_, path=path: fired.add(path))
    module(input_ids=tokens)
    before = set(fired)
    fired.clear()
    refused: set[str] = set()

    def look(adapter: Any) -> None:
        _mend_falcon(adapter, module.config)
        refused.update(path for path in before if _is_replaced(adapter.component_mapping, module, path))

    build_bridge_from_module(module, type(module).__name__, hf_config=module.config, post_adapter_hook=look)
    module(input_ids=tokens)
    lost = before - fired
    assert lost <= refused
    # Some that go on firing are refused too, those inside a module that is lost; nothing else.
    assert all(path in lost or any(path.startswith(f"{each}.") for each in lost) for path in refused)


def test_logits_that_the_wrapping_changes(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechinterp.core import bridging

    honest = bridging._tiny_logits
    calls: list[int] = []

    def other(module: Any, name: str) -> Tensor:
        calls.append(1)
        return honest(module, name) * (1.0 if len(calls) == 1 else 1.5)

    monkeypatch.setattr(bridging, "_tiny_logits", other)
    message = (
        "transformer_lens computes other logits for this GPT2LMHeadModel than Hugging Face does, off by 5.0e-01 of the largest; "
        "its adapter does not know this variant of the architecture. Load another variant, or another model"
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        mi.load(module)


def test_supported_architectures() -> None:
    from mechinterp.core.bridging import _nearest, supported_architectures

    known = supported_architectures()
    assert {"GPT2LMHeadModel", "Gemma3ForCausalLM"} <= set(known)
    assert _nearest("LamaForCausalLM", known).startswith("Did you mean 'LlamaForCausalLM'")
    assert _nearest("BertModel", known).startswith("Among them: GPT2LMHeadModel, ")


def test_a_toy_by_another_name() -> None:
    toy = mi.load("toy:induction", name="mine", tokenizer="any object")
    assert (toy.name, toy.tokenizer) == ("mine", "any object")
    assert mi.load("toy:induction", dtype=torch.float64).dtype == torch.float64


def test_a_bridge(module: Any, tokens: Tensor) -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    plain = copy.deepcopy(module)
    bridge = build_bridge_from_module(module, "GPT2LMHeadModel", hf_config=module.config)
    model = mi.load(bridge, name="bridge")
    assert model.bridge is bridge
    assert torch.equal(model(tokens), bridge(tokens))
    with torch.no_grad():
        assert float((model(tokens) - plain(input_ids=tokens).logits).abs().max()) < 1e-5
    # What is asked for is done, not ignored.
    assert mi.load(bridge, dtype=torch.float64).dtype == torch.float64


def test_a_bridge_whose_weights_were_processed(module: Any) -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(module, "GPT2LMHeadModel", hf_config=module.config)
    bridge.enable_compatibility_mode(disable_warnings=True)
    message = (
        "mine is a bridge in compatibility mode: its weights were folded and centred, so it is another parametrisation of "
        "the model. Pass a fresh bridge, without enable_compatibility_mode()"
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        mi.load(bridge, name="mine")


def test_a_model_again(module: Any) -> None:
    model = mi.load(module)
    assert mi.load(model) is model
    other = mi.load(model, name="other", tokenizer="any object")
    assert (other.name, other.tokenizer) == ("other", "any object")
    assert (model.name, model.tokenizer) == ("GPT2LMHeadModel", None)
    assert other.bridge is model.bridge


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(twins: Any, tokens: Tensor, dtype: torch.dtype) -> None:
    """Every site can be read and edited in another precision; logits follow the plain model in the same."""
    module = plain_of(twins)
    plain = copy.deepcopy(module).to(dtype)
    model = mi.load(module, dtype=dtype, name="mine")
    assert model.dtype == dtype
    with torch.no_grad():
        wanted, found = plain(input_ids=tokens).logits, model(tokens)
    assert found.dtype == wanted.dtype
    tolerance = 1e-6 if dtype == torch.float64 else 3e-2
    assert float((found - wanted).abs().max() / wanted.abs().max()) < tolerance
    assert model.sites == twins.model.sites, model.audit.refused


def test_a_folder(twins_of: Callable[..., Any], tokens: Tensor, tmp_path: Path) -> None:
    twins = twins_of("llama")
    folder = tmp_path / "my-model"
    plain_of(twins).save_pretrained(folder)
    model = mi.load(str(folder))
    assert model.name == "my-model"
    assert model.tokenizer is None
    assert torch.equal(model(tokens), twins.plain.logits(tokens))
    assert mi.load(folder, name="mine", dtype=torch.float64).dtype == torch.float64


def test_a_folder_that_cannot_be_read(twins_of: Callable[..., Any], tmp_path: Path) -> None:
    tail = "); it needs config.json and *.safetensors as model.save_pretrained(folder) writes them"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError) as error:
        mi.load(str(tmp_path))
    assert str(error.value).startswith(f"cannot load the folder {str(tmp_path)!r} (Unrecognized model in ")
    assert str(error.value).endswith(tail)
    plain_of(twins_of("llama")).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:400])
    with pytest.raises(ModelError) as error:
        mi.load(str(tmp_path))
    assert str(error.value).startswith(f"cannot load the folder {str(tmp_path)!r} (Error while deserializing header")
    assert str(error.value).endswith(tail)


def test_a_name_offline() -> None:
    with pytest.raises(ModelError) as error:
        mi.load("nobody/no-such-model")
    said = str(error.value)
    assert said.startswith(
        "cannot load 'nobody/no-such-model': it is no local folder with a model, and the model hub did not give it ("
    )
    assert said.endswith(
        "). Offline, use mi.load('smollm2') or mi.load('toy:induction'), or copy the model folder here (config.json, "
        "*.safetensors, tokenizer.json) and pass its path"
    )
    # The whole of the hub's own explanation is at hand, its first line is quoted.
    assert error.value.__cause__ is not None
    assert "\n" not in said


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9))


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=9))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_kv=4, num_heads=2, d_ff=8, vocab_size=9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            "Linear is not a Hugging Face transformer: it has no config. Pass a PreTrainedModel, or name the activations of a "
            "plain module: mi.load(module, sites={...}, example=inputs)",
        ),
        (
            bert,
            "transformer_lens cannot wrap BertModel (bert): Unsupported architecture: BertModel. It wraps 162 architectures. "
            "Among them: GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM, ...",
        ),
        (
            t5,
            "T5ForConditionalGeneration (T5ForConditionalGeneration) gives no logits of token ids alone (You must specify "
            "exactly one of input_ids or inputs_embeds); pass a decoder, such as ...ForCausalLM",
        ),
        (mamba, "MambaForCausalLM (mamba) is not a transformer of attention and MLP blocks: its blocks have no attn and no mlp"),
    ],
    ids=["linear", "bert", "t5", "mamba"],
)
def test_what_cannot_be_wrapped(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        mi.load(make())


def test_loading_leaves_the_process_as_it_was(module: Any) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers), torch.is_grad_enabled(), torch.random.get_rng_state())
    mi.load(module)
    assert (root.level, list(root.handlers), torch.is_grad_enabled()) == before[:3]
    assert torch.equal(torch.random.get_rng_state(), before[3])


def test_attention_only_is_seen(module: Any) -> None:
    with torch.no_grad():
        for block in module.transformer.h:
            block.mlp.c_proj.weight.zero_()
            block.mlp.c_proj.bias.zero_()
    assert mi.load(module).cfg.attn_only


def test_models_that_see_what_comes_are_refused() -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    bert = BertForMaskedLM(BertConfig(vocab_size=50, initializer_range=0.3, **sizes)).eval()
    with pytest.raises(
        ModelError, match=r"^bert \(BertForMaskedLM\) is not causal: .* Load a decoder \(a causal language model\)$"
    ):
        mi.load(bert, name="bert")
