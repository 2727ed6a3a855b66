"""Prompts of unequal length: padded is unpadded, and the end is each prompt's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.sites import KINDS, Site
from mechinterp.errors import ModelError, SelectorError, TaskError

ROWS = [[5, 9, 2, 44, 17, 30, 8], [12, 3, 7], [50, 21, 6, 33, 60]]


@pytest.fixture(scope="module", params=["gpt2", "llama", "neox", "gemma2", "bloom"])
def model(request: pytest.FixtureRequest, twins_of: Callable[..., Any]) -> Any:
    if request.param != "bloom":
        return twins_of(request.param).model
    import transformers as hf

    torch.manual_seed(1)
    config = hf.BloomConfig(n_layer=2, n_head=4, hidden_size=32, vocab_size=61, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    module = hf.BloomForCausalLM(config).eval()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.25)
    return mi.load(module, name="tiny-bloom")


def cut(site: Site, value: Tensor, length: int) -> Tensor:
    """The real part of one row."""
    for axis, name in enumerate(site.kind.axes[1:]):
        if name in ("pos", "q_pos", "k_pos"):
            value = value.narrow(axis, 0, length)
    return value


def test_padded_is_unpadded(model: Any) -> None:
    """Logits and every site of the model, with edits at ends, at positions and everywhere."""
    every = mi.Selection(tuple(Site(name, 1 if KINDS[name].per_layer else None) for name in model.sites))
    push = torch.randn(32, generator=torch.Generator().manual_seed(0))
    edits = [mi.Add("L0.resid_post[-1]", push), mi.Scale("L0.H1.z[2]", 3.0), mi.Scale("L0.mlp_out", 0.5), mi.Zero("L1.H0.z[-3]")]
    together = mi.run(model, ROWS, edits=edits, capture=every)
    assert together.tokens.shape == (3, 7)
    assert together.lengths is not None
    assert together.lengths.tolist() == [7, 3, 5]
    for row, prompt in enumerate(ROWS):
        alone = mi.run(model, [prompt], edits=edits, capture=every)
        assert alone.lengths is None
        length = len(prompt)
        torch.testing.assert_close(together.logits[row, :length], alone.logits[0], atol=2e-5, rtol=1e-4)
        for site in every:
            found = cut(site, together[site][row], length)
            torch.testing.assert_close(found, alone[site][0], atol=2e-5, rtol=1e-4)
            for pos in (-1, -3, 1):
                one, other = together.cache[site.at(pos)][row], alone.cache[site.at(pos)][0]
                if site.name in ("pattern", "scores"):
                    one, other = one[:, :length], other[:, :length]
                torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(together.logits, mi.run(model, ROWS).logits, atol=1e-2)


def test_all_ways_to_say_it(model: Any) -> None:
    wanted = mi.run(model, ROWS, capture="L0.z[-1]")
    tensors = [torch.tensor(row) for row in ROWS]
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    tokens = torch.zeros(3, 7, dtype=torch.long)
    for row, prompt in enumerate(ROWS):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    task = mi.Task(name="t", clean=tokens, corrupt=tokens, right=[1] * 3, wrong=[2] * 3, mask=mask)
    ways: list[tuple[Any, dict[str, Any]]] = [
        (tensors, {}),
        (tokens, {"mask": mask}),
        (tokens, {"mask": mask.long()}),
        (task, {}),
        ([ROWS[0], tensors[1], ROWS[2]], {"batch": 2}),
    ]
    for prompts, options in ways:
        found = mi.run(model, prompts, capture="L0.z[-1]", **options)
        assert found.lengths is not None
        assert found.lengths.tolist() == [7, 3, 5]
        torch.testing.assert_close(found["L0.z[-1]"], wanted["L0.z[-1]"], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.logits[1, :3], wanted.logits[1, :3], atol=2e-5, rtol=1e-4)
    assert torch.equal(wanted.cache.mask, mask)
    assert mi.run(model, tokens, mask=torch.ones_like(mask)).lengths is None
    assert repr(wanted) == "Run: 3 prompts of 3 to 7 tokens, 1 activations captured"


def test_kept_positions_are_each_prompts_own(model: Any) -> None:
    full = mi.run(model, ROWS).logits
    found = mi.run(model, ROWS, keep=[-1, 0, -2]).logits
    for row, prompt in enumerate(ROWS):
        wanted = full[row, [len(prompt) - 1, 0, len(prompt) - 2]]
        torch.testing.assert_close(found[row], wanted, atol=2e-5, rtol=1e-4)


def test_texts(smollm2: Any) -> None:
    texts = ["The capital of France is", "One two three four five six seven"]
    found = mi.run(smollm2, texts, capture="L3.resid_post[-1]", keep=[-1])
    for row, text in enumerate(texts):
        alone = mi.run(smollm2, text, capture="L3.resid_post[-1]", keep=[-1])
        assert alone.tokens.shape[1] == int(found.lengths[row] if found.lengths is not None else 0)
        torch.testing.assert_close(found.logits[row], alone.logits[0], atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(found["L3.resid_post[-1]"][row], alone["L3.resid_post[-1]"][0], atol=1e-3, rtol=1e-3)


def test_rows_packed_behind_each_other_take_the_lengths_again(gpt2: Any) -> None:
    given = mi.run(gpt2, ROWS)
    registry = mi.HookRegistry(gpt2, lengths=given.lengths)
    registry.add(mi.Zero("L0.mlp_out[-1]", rows=(3, 6)))
    with registry:
        packed = gpt2(given.tokens.repeat(2, 1))
    wanted = mi.run(gpt2, ROWS, edits=[mi.Zero("L0.mlp_out[-1]")])
    torch.testing.assert_close(packed[3:], wanted.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:3], given.logits, atol=1e-5, rtol=1e-5)


SHORT = (
    "L0.z[5]: there is no position 5 in prompt 1, which has 3 tokens; leave the prompt out with rows=, or give each prompt its "
    "own position by a name"
)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        (ROWS, {"edits": [mi.Zero("L0.z[5]")]}, SelectorError, SHORT),
        (ROWS, {"edits": [mi.Zero("L0.z[-4]")]}, SelectorError, SHORT.replace("5", "-4")),
        (ROWS, {"keep": [3]}, SelectorError, "keep=[3]: prompt 1 has 3 tokens, and no position 3"),
        (ROWS, {"keep": [-4]}, SelectorError, "keep=[-4]: prompt 1 has 3 tokens, and no position -4"),
        ([[1, 2], []], {}, TaskError, "prompt 1 has no tokens; leave it out"),
        (torch.zeros(2, 0, dtype=torch.long), {}, TaskError, "tokens of shape [2, 0] hold no prompt with a token in it"),
        ([], {}, TaskError, "there are no prompts"),
        (
            [torch.zeros(2, 2, dtype=torch.long)],
            {},
            ModelError,
            "a prompt in a list is torch.int64 of shape [2, 2], not whole numbers [pos]; pass lists of token ids, or one tensor "
            "[batch pos] for all",
        ),
        ("some text", {}, ModelError, "tiny-gpt2 has no tokenizer; pass one: mi.load(..., tokenizer=tokenizer)"),
        (
            ROWS,
            {"mask": torch.ones(3, 7)},
            TaskError,
            "a list of prompts is padded here; pass mask= with a tensor of tokens that you padded yourself",
        ),
        (
            torch.ones(2, 3, dtype=torch.long),
            {"mask": torch.ones(2, 2)},
            TaskError,
            "the mask has shape [2, 2], the tokens [2, 3]; give True for each real token",
        ),
        (
            torch.ones(2, 3, dtype=torch.long),
            {"mask": torch.tensor([[1, 1, 1], [0, 1, 1]])},
            TaskError,
            "prompt 1 has real tokens at positions [1, 2]: padding belongs on the right, so that positions count from the first "
            "token; pass a list of prompts, and they are padded",
        ),
    ],
)
def test_refusals(gpt2: Any, same_hooks: Any, prompts: Any, options: Any, error: type[Exception], message: str) -> None:
    with same_hooks(gpt2), pytest.raises(error, match=f"^{re.escape(message)}$"):
        mi.run(gpt2, prompts, **options)


def test_more_refusals(gpt2: Any, tokens: Tensor) -> None:
    task = mi.Task(name="t", clean=tokens, corrupt=tokens, right=[1] * 3, wrong=[2] * 3)
    with pytest.raises(TaskError, match=r"^a task brings its own mask; leave out mask=, or pass task.clean with it$"):
        mi.run(gpt2, task, mask=torch.ones(3, 7))
    registry = mi.HookRegistry(gpt2, lengths=torch.tensor([7, 3]))
    registry.add(mi.Zero("L0.z[-1]"))
    with pytest.raises(SelectorError, match=r"^L0.z\[-1\]: lengths are given for 2 prompts, the batch has 3$"), registry:
        gpt2(tokens)
    found = mi.run(gpt2, ROWS, capture="L0.z")
    with pytest.raises(SelectorError, match=f"^{re.escape(SHORT)}$"):
        found["L0.z[5]"]
    # Leaving the short prompt out is what the message says.
    mi.run(gpt2, ROWS, edits=[mi.Zero("L0.z[4]", rows=(2, 3)), mi.Zero("L0.z[6]", rows=(0, 1))])


def test_the_ids_of_one_prompt(gpt2: Any) -> None:
    assert torch.equal(mi.run(gpt2, [1, 2, 3]).logits, mi.run(gpt2, torch.tensor([[1, 2, 3]])).logits)
