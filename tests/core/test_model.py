"""The adapter: the same logits as the plain model, its shape in our words, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.sites import Site
from mechinterp.errors import ModelError, SiteError


class Letters:
    """A tokenizer of letters: ``a`` is 1."""

    bos_token_id: int | None = 0

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 96 for letter in text]}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "gemma2"])
def test_logits_are_those_of_the_plain_model(twins_of: Callable[..., Any], tokens: Tensor, architecture: str, seed: int) -> None:
    """Bit for bit, but on GPT-2, whose joint projection the bridge splits: there 7e-7 of the largest logit was seen."""
    twins = twins_of(architecture, seed)
    wanted = twins.plain.logits(tokens)
    with torch.no_grad():
        found = twins.model(tokens)
    if architecture == "gpt2":
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-6
    else:
        assert torch.equal(found, wanted)


def test_fixtures_of_the_suite(tiny_gpt2: Callable[..., Any], tiny_llama: Callable[..., Any], tokens: Tensor) -> None:
    for model in (tiny_gpt2(n_layers=1), tiny_llama(n_kv_heads=1)):
        assert model(tokens).shape == (3, 7, 61)
        assert len(model.sites) >= 21


def test_calls(gpt2: Any, tokens: Tensor) -> None:
    logits = gpt2(tokens)
    assert logits.requires_grad
    assert torch.equal(gpt2(tokens.int()), logits)
    assert torch.equal(gpt2(tokens, keep=[6]), gpt2(tokens, keep=(i for i in [6])))
    # Right padding is never seen: attention is causal.
    padded = torch.cat([tokens, torch.zeros(3, 4, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(gpt2(padded)[:, :7], logits, atol=1e-5, rtol=1e-5)


def test_keeps_no_cache_of_keys_and_values(twins: Any, tokens: Tensor) -> None:
    # It would be appended to, unseen, by whoever runs a block again.
    asked: list[Any] = []
    handle = twins.model.hf.register_forward_pre_hook(lambda m, args, kwargs: asked.append(kwargs["use_cache"]), with_kwargs=True)
    twins.model(tokens)
    mi.run(twins.model, tokens, edits=[mi.Zero("L0.z")], keep=[-1])
    handle.remove()
    assert asked == [False, False]


SHAPES = {
    "gpt2": {"n_kv_heads": 4, "d_mlp": 128, "norm": "ln", "positional": "learned", "parallel": False, "post_norm": False},
    "llama": {"n_kv_heads": 2, "d_mlp": 48, "norm": "rms", "positional": "rotary", "parallel": False, "post_norm": False},
    "neox": {"n_kv_heads": 4, "d_mlp": 48, "norm": "ln", "positional": "rotary", "parallel": True, "post_norm": False},
    "gemma2": {"n_kv_heads": 2, "d_mlp": 48, "norm": "rms", "positional": "rotary", "parallel": False, "post_norm": True},
}


def test_shape(twins: Any) -> None:
    cfg = twins.model.cfg
    common = {"n_layers": 2, "n_heads": 4, "d_model": 32, "d_head": 8, "d_vocab": 61, "n_ctx": 32, "attn_only": False}
    expected = SHAPES[twins.architecture] | common
    assert {name: getattr(cfg, name) for name in expected} == expected
    assert cfg.architecture == type(twins.plain.module).__name__


def test_projections_are_the_weights(twins: Any, tokens: Tensor) -> None:
    """By what they do: the plain model's normed stream through them gives its queries, keys, values, outputs."""
    values = twins.plain.values(tokens, 1)
    parts = twins.plain.parts(1)
    normed = parts.norm1(values["resid_pre"])
    for which in "qkv":
        projection = twins.model.projection(1, which)
        found = torch.einsum("bpm,hmd->bphd", normed, projection.weight)
        if projection.bias is not None:
            found = found + projection.bias
        torch.testing.assert_close(found, values[which], atol=1e-5, rtol=1e-5)
    assert torch.equal(twins.model.projection(1, "o").weight, twins.plain.output_weight(1))
    assert twins.model.projection(1, "o").bias is None


def test_projections_follow_a_change_of_weights(twins_of: Callable[..., Any]) -> None:
    model = twins_of("llama").model
    before = model.projection(0, "o").weight.clone()
    module = model.block(0).attn.o.original_component
    module.weight = torch.nn.Parameter(module.weight * 2)
    assert torch.equal(model.projection(0, "o").weight, before * 2)


def test_norms_are_without_hooks(twins: Any, tokens: Tensor) -> None:
    values = twins.plain.values(tokens, 0)
    parts = twins.plain.parts(0)
    for which, plain, stream in (("attn", parts.norm1, "resid_pre"), ("mlp", parts.norm2, "mlp_in")):
        assert torch.equal(twins.model.norm(which, 0)(values[stream]), plain(values[stream]))
    last = twins.plain.values(tokens, 1)
    assert torch.equal(twins.model.norm("final")(last["resid_post"]), last["final_norm"])


def test_tokens(twins_of: Callable[..., Any]) -> None:
    model = mi.load(twins_of("gpt2").model, tokenizer=Letters(), name="letters")
    assert model.tokens("abc").tolist() == [[0, 1, 2, 3]]
    assert model.tokens(["abc", "cba"], bos=False).tolist() == [[1, 2, 3], [3, 2, 1]]
    with pytest.raises(ModelError, match=r"^the texts have \[2, 3\] tokens; give texts of one length, or one text at a time$"):
        model.tokens(["a", "ab"])
    model.tokenizer.bos_token_id = None
    assert model.tokens("abc").tolist() == [[1, 2, 3]]


REFUSED = [
    (torch.zeros(3), "tokens are torch.float32 of shape [3], not whole numbers [batch pos]; make them with model.tokens(texts)"),
    (
        torch.zeros(1, 3),
        "tokens are torch.float32 of shape [1, 3], not whole numbers [batch pos]; make them with model.tokens(texts)",
    ),
    (
        torch.zeros(3, dtype=torch.int64),
        "tokens are torch.int64 of shape [3], not whole numbers [batch pos]; make them with model.tokens(texts)",
    ),
    (torch.zeros(1, 33, dtype=torch.int64), "33 tokens do not fit tiny-gpt2, which reads at most 32"),
    (
        torch.tensor([[0, 61]]),
        "token ids reach from 0 to 61, but tiny-gpt2 knows 0 to 60; were they made with another tokenizer?",
    ),
    (
        torch.tensor([[-1, 6]]),
        "token ids reach from -1 to 6, but tiny-gpt2 knows 0 to 60; were they made with another tokenizer?",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_tokens_that_are_refused(gpt2: Any, wrong: Tensor, message: str, same_hooks: Any) -> None:
    with same_hooks(gpt2), pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        gpt2(wrong)


def test_refusals(gpt2: Any, twins_of: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=r"^tiny-gpt2 has no tokenizer; pass one: mi.load\(..., tokenizer=tokenizer\)$"):
        gpt2.tokens("abc")
    with pytest.raises(SiteError, match=r"^tiny-gpt2 \(GPT2LMHeadModel\) has no hook point 'blocks.1.nowhere'$"):
        gpt2.point("blocks.{}.nowhere", 1)
    neox = twins_of("neox").model
    with pytest.raises(SiteError, match=r"'resid_mid' is refused on tiny-neox: .* computes attention and MLP in parallel"):
        neox.place(Site("resid_mid", 0))


def test_what_it_says_of_itself(llama: Any) -> None:
    assert repr(llama) == (
        "Model tiny-llama: LlamaForCausalLM, 2 layers, 4 heads (2 KV), d_model 32, vocabulary 61, float32 on cpu"
    )
    said = llama.describe()
    assert (said["name"], said["device"], said["dtype"], said["n_kv_heads"]) == ("tiny-llama", "cpu", "torch.float32", 2)
    assert llama.device == torch.device("cpu")
    assert llama.dtype == torch.float32
