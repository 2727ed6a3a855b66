"""Generation: with the cache and without, token for token; positions absolute; every edit where and when it should."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.sites import Site
from mechinterp.errors import EditError, InertError, ModelError, SelectorError

NEW = 6
ROWS = [[5, 9, 2, 44, 17, 30, 8], [12, 3, 7], [50, 21, 6, 33, 60]]


@pytest.fixture
def direction() -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(3))


def edits_for(model: Any, direction: Tensor) -> list[Any]:
    """Of every kind that acts differently on a prompt and on single tokens."""
    return [
        mi.Add("L0.resid_post", direction, 0.7),
        (mi.Scale("L1.H2.z", -2.0), "generated"),
        (mi.Zero("L0.H1.pattern"), "prompt"),
        (mi.Scale("L0.mlp_out", 3.0, rows=(1, 3)), "generated"),
        mi.Zero("L1.H0.z[2]"),
        mi.Add("L1.attn_out[-1]", direction),
        mi.Scale("L0.H3.q_in[8]", 4.0),
        mi.Scale("L1.KV1.k", 0.5) if model.cfg.n_kv_heads == 2 else mi.Scale("L1.H1.k", 0.5),
        mi.Call("L1.mlp_post[4]", lambda value, site: value.flip(-1)),
        mi.Noise("L0.attn_out", 0.3, seed=3),
        mi.Swap("L1.H3.z[-1]", pairs=((0, 2),)),
        mi.Clamp("L1.mlp_out", high=0.8),
        mi.Mean("L1.H1.z[3]", direction[:8]),
    ]


# -- against others --------------------------------------------------------------------------------


def test_without_edits_it_is_what_hugging_face_generates(twins: Any, tokens: Tensor) -> None:
    found = mi.generate(twins.model, tokens, max_new_tokens=NEW, stop=())
    wanted = twins.plain.module.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    assert torch.equal(found.tokens, wanted)
    assert found.lengths.tolist() == [7 + NEW] * 3
    assert torch.equal(found.logits.argmax(-1), wanted[:, 7:])
    assert found.provenance["forwards"] == NEW


def test_it_ends_where_hugging_face_ends(twins: Any, tokens: Tensor) -> None:
    free = mi.generate(twins.model, tokens, max_new_tokens=NEW, stop=())
    end = int(free.tokens[1, 9])
    found = mi.generate(twins.model, tokens, max_new_tokens=NEW, stop=end)
    wanted = twins.plain.module.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    assert torch.equal(found.tokens, wanted)
    for row in range(3):
        ends = (free.tokens[row, 7:] == end).nonzero().flatten().tolist()
        assert int(found.lengths[row]) == (8 + ends[0] if ends else 7 + NEW)


@pytest.mark.parametrize(
    ("name", "layer", "where", "scope", "acts"),
    [
        ("resid_post", 0, "L0.resid_post", "all", lambda pos, n: pos >= 0),
        ("resid_post", 0, "L0.resid_post", "prompt", lambda pos, n: pos < n),
        ("mlp_out", 1, "L1.mlp_out", "generated", lambda pos, n: pos >= n),
        ("attn_out", 1, "L1.attn_out[9]", "all", lambda pos, n: pos == 9),
        ("attn_out", 0, "L0.attn_out[3]", "all", lambda pos, n: pos == 3),
        ("resid_pre", 1, "L1.resid_pre[-1]", "all", lambda pos, n: pos == n - 1),
        ("mlp_out", 0, "L0.mlp_out[7:9]", "generated", lambda pos, n: (pos == 7) | (pos == 8)),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_edits_act_where_they_say(
    twins: Any, tokens: Tensor, direction: Tensor, name: str, layer: int, where: str, scope: Any, acts: Any, use_cache: bool
) -> None:
    """Against a loop over the plain model, which changes the activations at these positions by hand."""
    found = mi.generate(
        twins.model, tokens, max_new_tokens=NEW, edits=[mi.Add(where, direction, 3.0)], scope=scope, stop=(), use_cache=use_cache
    )
    text = tokens
    for step in range(NEW):
        marked = acts(torch.arange(text.shape[1]), 7).float()[:, None] * 3.0 * direction
        logits = twins.plain.edited(text, name, layer, lambda value, marked=marked: value + marked)
        torch.testing.assert_close(found.logits[:, step], logits[:, -1], atol=2e-4, rtol=1e-4)
        text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found.tokens, text)
    plain = mi.generate(twins.model, tokens, max_new_tokens=NEW, stop=())
    assert not torch.allclose(plain.logits, found.logits, atol=1e-2)


# -- identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [ROWS, [row[:3] for row in ROWS]], ids=["unequal", "equal"])
def test_with_the_cache_is_without(twins: Any, direction: Tensor, prompts: Any) -> None:
    """Tokens, logits and every captured activation."""
    model = twins.model
    capture = "embed | L*.resid_post | L0.pattern | L1.z | L1.k | L*.mlp_post | L1.q_in | final_norm"
    options: Any = {"max_new_tokens": 8, "edits": edits_for(model, direction), "capture": capture, "stop": ()}
    on, off = (mi.generate(model, prompts, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(on.tokens, off.tokens)
    torch.testing.assert_close(on.logits, off.logits, atol=2e-4, rtol=1e-4)
    assert list(on.cache) == list(off.cache)
    for site in on.cache:
        for row, length in enumerate((on.lengths - 1).tolist()):
            one, other = (each[site][row].movedim(1, 0) if site.name == "pattern" else each[site][row] for each in (on, off))
            torch.testing.assert_close(one[:length], other[:length], atol=2e-4, rtol=1e-3)
    plain = mi.generate(model, prompts, max_new_tokens=8, stop=())
    assert not torch.allclose(plain.logits, on.logits, atol=1e-2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_unequal_length_are_those_rows_alone(twins: Any, direction: Tensor, use_cache: bool) -> None:
    model = twins.model
    # But for those that are about certain rows.
    edits = [each for each in edits_for(model, direction) if not isinstance(each, mi.Noise | mi.Swap)]
    edits = [each for each in edits if (each if isinstance(each, mi.Edit) else each[0]).rows is None]
    options: Any = {"max_new_tokens": 8, "edits": edits, "capture": "L1.resid_post | L0.pattern | L1.v", "stop": ()}
    together = mi.generate(model, ROWS, use_cache=use_cache, **options)
    assert together.prompt_lengths.tolist() == [7, 3, 5]
    for row, prompt in enumerate(ROWS):
        alone = mi.generate(model, [prompt], **options)
        length = len(prompt) + 8
        assert torch.equal(together.tokens[row, :length], alone.tokens[0])
        assert together.new[row].tolist() == alone.new[0].tolist()
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=2e-4, rtol=1e-4)
        for site in ("L1.resid_post", "L1.v"):
            torch.testing.assert_close(together[site][row, : length - 1], alone[site][0], atol=2e-4, rtol=1e-3)
        found = together["L0.pattern"][row, :, : length - 1, : length - 1]
        torch.testing.assert_close(found, alone["L0.pattern"][0], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(together["L1.resid_post[-1]"][row], alone["L1.resid_post[-1]"][0], atol=2e-4, rtol=1e-3)


def test_captures_are_those_of_one_run_over_the_text(twins: Any, tokens: Tensor) -> None:
    capture = "embed | L*.resid_pre | L*.z | L0.pattern | L0.scores | logits" + (
        " | pos_embed" if "gpt2" in twins.model.name else ""
    )
    found = mi.generate(twins.model, tokens, max_new_tokens=NEW, capture=capture, stop=())
    wanted = mi.run(twins.model, found.tokens[:, :-1], capture=capture)
    for site in found.cache:
        one, other = found[site], wanted[site]
        if site.name == "scores":
            one, other = (each.masked_fill(torch.ones(12, 12).triu(1).bool(), 0.0) for each in (one, other))
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found["logits"][:, 6:], found.logits, atol=0, rtol=0)


def test_an_edit_fires_once_at_its_position(gpt2: Any) -> None:
    """What is seen of a position, by a function that writes it down."""
    for use_cache in (True, False):
        seen: list[list[int]] = []

        def note(value: Tensor, site: Site, seen: list[list[int]] = seen) -> None:
            seen.append(list(value.shape))

        mi.generate(gpt2, ROWS[:1], max_new_tokens=4, edits=[mi.Call("L0.resid_post[8]", note)], stop=(), use_cache=use_cache)
        assert seen == [[1, 32]] * (1 if use_cache else 2)
        seen.clear()
        mi.generate(gpt2, ROWS[:1], max_new_tokens=3, edits=[mi.Call("L0.resid_post", note)], stop=(), use_cache=use_cache)
        whole, one = [1, 7, 32], [1, 1, 32]
        # Without the cache a pass sees everything again, in the same parts.
        assert seen == ([whole, one, one] if use_cache else [whole, whole, one, whole, one, one])


def test_values_for_a_prompt_as_a_whole(gpt2: Any, tokens: Tensor) -> None:
    other = mi.run(gpt2, tokens.flip(0), capture="L0.resid_post")["L0.resid_post"]
    edit = mi.Replace("L0.resid_post", other)
    for use_cache in (True, False):
        found = mi.generate(gpt2, tokens, max_new_tokens=NEW, edits=[edit], scope="prompt", stop=(), use_cache=use_cache)
        first = mi.run(gpt2, tokens, edits=[edit]).logits[:, -1]
        torch.testing.assert_close(found.logits[:, 0], first, atol=1e-5, rtol=1e-5)
    at = mi.Replace("L0.resid_post[8]", other[:, 3])
    found = mi.generate(gpt2, tokens, max_new_tokens=NEW, edits=[at], stop=(), capture="L0.resid_post")
    assert torch.equal(found["L0.resid_post"][:, 8], other[:, 3])


@pytest.mark.parametrize("architecture", ["bloom", "mistral"])
def test_padding_on_the_left_is_exact_with_alibi_and_with_windows(architecture: str) -> None:
    import transformers as hf

    torch.manual_seed(1)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 61}
    if architecture == "bloom":
        module: Any = hf.BloomForCausalLM(hf.BloomConfig(n_layer=2, n_head=4, hidden_size=32, **ids))
    else:
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
        module = hf.MistralForCausalLM(hf.MistralConfig(**sizes, intermediate_size=48, sliding_window=4, **ids))
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.25)
    model = mi.load(module.eval(), name=architecture)
    together = mi.generate(model, ROWS, max_new_tokens=8, edits=[mi.Scale("L0.z[5]", 3.0)], stop=())
    for row, prompt in enumerate(ROWS):
        alone = mi.generate(model, [prompt], max_new_tokens=8, edits=[mi.Scale("L0.z[5]", 3.0)], stop=(), use_cache=False)
        assert together.new[row].tolist() == alone.new[0].tolist()
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=2e-4, rtol=1e-4)


def test_a_real_model(smollm2: Any) -> None:
    texts = ["The capital of France is", "When Mary and John went to the store, John gave a drink to"]
    found = mi.generate(smollm2, texts, max_new_tokens=5)
    for text, new in zip(texts, found.new, strict=True):
        ids = smollm2.tokens(text)
        wanted = smollm2.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert new.tolist() == wanted[0, ids.shape[1] :].tolist()
    assert found.texts is not None
    assert found.texts[0].startswith(" Paris")
    # Steered, with the cache and without.
    apart = mi.run(smollm2, texts[0], capture="L15.resid_post[-1]")["L15.resid_post[-1]"][0]
    options: Any = {"max_new_tokens": 5, "edits": [mi.Add("L15.resid_post", apart, 0.3)], "scope": "generated"}
    on, off = (mi.generate(smollm2, texts, use_cache=use_cache, **options) for use_cache in (True, False))
    assert on.texts == off.texts
    assert on.texts != found.texts


# -- drawing ---------------------------------------------------------------------------------------


def test_drawing(gpt2: Any) -> None:
    prompt = torch.tensor(ROWS[:1]).repeat(4000, 1)
    found = mi.generate(gpt2, prompt, max_new_tokens=1, temperature=2.0, seed=7, stop=())
    shares = torch.softmax(found.logits[0, 0] / 2.0, dim=-1)
    counts = torch.bincount(found.tokens[:, -1], minlength=61) / 4000
    # Four standard deviations of a share of 4000 draws.
    assert float(((counts - shares).abs() - 4 * (shares * (1 - shares) / 4000).sqrt()).max()) < 0
    again = mi.generate(gpt2, prompt, max_new_tokens=1, temperature=2.0, seed=7, stop=())
    assert torch.equal(again.tokens, found.tokens)
    assert not torch.equal(mi.generate(gpt2, prompt, max_new_tokens=1, temperature=2.0, seed=8, stop=()).tokens, found.tokens)
    state = torch.get_rng_state()
    on, off = (
        mi.generate(gpt2, ROWS, max_new_tokens=8, temperature=1.5, seed=1, stop=(), use_cache=each) for each in (True, False)
    )
    assert torch.equal(on.tokens, off.tokens)
    assert torch.equal(torch.get_rng_state(), state)


# -- what it gives ---------------------------------------------------------------------------------


def test_a_row_that_ends_early(gpt2: Any) -> None:
    free = mi.generate(gpt2, ROWS, max_new_tokens=8, stop=())
    end = int(free.new[1][2])
    found = mi.generate(gpt2, ROWS, max_new_tokens=8, stop=[end], capture="L0.z", edits=[mi.Scale("L1.z[3]", 1.0)])
    assert found.new[1].tolist() == free.new[1].tolist()[: free.new[1].tolist().index(end) + 1]
    length = int(found.lengths[1])
    assert (found.tokens[1, length:] == end).all()
    assert found.cache.lengths is not None
    assert found.cache.lengths.tolist() == (found.lengths - 1).tolist()
    assert torch.equal(found["L0.z[-1]"][1], found["L0.z"][1, length - 2])
    assert repr(found).startswith("Generation: 3 prompts, ")
    assert repr(found).endswith(" new tokens each, 1 edits, 1 activations captured")
    # Everybody ends at once: nothing more is computed.
    short = mi.generate(gpt2, ROWS[1:2], max_new_tokens=8, stop=int(free.new[1][0]))
    assert short.provenance["forwards"] == 1
    # The model's own end of text.
    gpt2.hf.generation_config.eos_token_id = end
    assert mi.generate(gpt2, ROWS, max_new_tokens=8).new[1].tolist() == found.new[1].tolist()
    gpt2.hf.generation_config.eos_token_id = 0


def test_logits_may_be_left_out(gpt2: Any, tokens: Tensor) -> None:
    found = mi.generate(gpt2, tokens, max_new_tokens=2, logits=False)
    with pytest.raises(EditError, match=r"^the logits of this generation were not kept; leave out logits=False$"):
        found.logits  # noqa: B018


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_new_tokens": 0}, ModelError, "max_new_tokens=0: give the number of tokens to generate, 1 or more"),
    (
        {"max_new_tokens": 30},
        ModelError,
        "7 tokens and 30 new ones do not fit tiny-gpt2, which reads at most 32; ask for 26 at most",
    ),
    (
        {"temperature": 1.0},
        EditError,
        "temperature=1.0 and seed=None do not go together: 0 takes the likeliest token and draws nothing; above 0 tokens are "
        "drawn, which takes a seed",
    ),
    (
        {"seed": 1},
        EditError,
        "temperature=0.0 and seed=1 do not go together: 0 takes the likeliest token and draws nothing; above 0 tokens are drawn, "
        "which takes a seed",
    ),
    (
        {"edits": [mi.Zero("L0.z[12]")]},
        InertError,
        "Zero('L0.z[12]') at L0.z[12] would never be reached: of up to 7 tokens and 6 new ones the model reads positions 0 to 11",
    ),
    (
        {"edits": [mi.Zero("L0.z[3]")], "scope": "generated"},
        InertError,
        "Zero('L0.z[3]') at L0.z[3] was never reached: the longest prompt has 7 tokens, and 5 generated ones were read by the "
        "model (the last one never is)",
    ),
    (
        {"edits": [(mi.Scale("L0.z", 2.0), "generated")], "max_new_tokens": 1},
        InertError,
        "Scale('L0.z', factor=2.0) at L0.z was never reached: the longest prompt has 7 tokens, and 0 generated ones were read by "
        "the model (the last one never is)",
    ),
    (
        {"edits": [mi.Replace("L0.mlp_out", torch.zeros(3, 7, 32))]},
        EditError,
        "Replace at L0.mlp_out: the value has shape [3, 7, 32], but the activation there has [3, 1, 32]; expand it explicitly if "
        "one value is meant for all. While generating, an edit sees the prompt as a whole and then one token at a time: bring a "
        "vector [d], say a position, or limit it with scope='prompt'",
    ),
    (
        {"edits": [mi.Zero("L0.z[8]"), mi.Zero("L0.H1.z")]},
        EditError,
        "Zero('L0.z[8]') and Zero('L0.H1.z') both set L0.z[8]; drop one, give them different rows, or say which comes last with "
        "priority=",
    ),
    ({"stop": 99}, ModelError, "stop=99 is no token of tiny-gpt2, which knows 0 to 60"),
    ({"edits": [mi.Zero("L0.z[-8]")]}, SelectorError, "L0.z[-8]: there is no position -8; the prompts have positions 0 to 6"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSALS, ids=[str(i) for i in range(len(REFUSALS))])
def test_refusals(
    gpt2: Any, tokens: Tensor, same_hooks: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with same_hooks(gpt2), pytest.raises(error, match=f"^{re.escape(message)}$"):
        mi.generate(gpt2, tokens, **{"max_new_tokens": NEW, "stop": (), **options})


@pytest.mark.usefixtures("unchecked_types")
def test_scopes(gpt2: Any, tokens: Tensor) -> None:
    with pytest.raises(EditError, match=r"^there is no scope 'generate'. Did you mean 'generated'\?$"):
        mi.generate(gpt2, tokens, max_new_tokens=2, edits=[mi.Zero("L0.z")], scope="generate")  # type: ignore[arg-type]
    # A part of the text each: no conflict.
    both: list[Any] = [(mi.Zero("L0.mlp_out"), "prompt"), (mi.Replace("L0.mlp_out[8]", torch.zeros(3, 32)), "generated")]
    mi.generate(gpt2, tokens, max_new_tokens=4, edits=both, stop=())


def test_registries_around_it_are_refused(gpt2: Any, tokens: Tensor, same_hooks: Any) -> None:
    registry = mi.HookRegistry(gpt2)
    registry.add(mi.Zero("L0.z"))
    message = "a HookRegistry is attached, whose edits mean whole prompts; pass them to generate as edits="
    with same_hooks(gpt2), pytest.raises(EditError, match=f"^{message}$"), registry:
        mi.generate(gpt2, tokens, max_new_tokens=2)


def test_named_positions(gpt2: Any, tokens: Tensor, twins_of: Callable[..., Any]) -> None:
    task = mi.Task(name="named", clean=tokens, corrupt=tokens.flip(0), right=[1] * 3, wrong=[2] * 3, positions={"S": [1, 6, 3]})
    found = mi.generate(gpt2, task, max_new_tokens=4, edits=[mi.Zero("L0.z[S]")], capture="L0.z", stop=())
    for row, pos in enumerate([1, 6, 3]):
        assert float(found["L0.z"][row, pos].abs().max()) == 0
    assert torch.equal(found["L0.z[S]"], torch.zeros(3, 4, 8))
