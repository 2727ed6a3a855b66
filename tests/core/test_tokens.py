"""Positions by the text of a token."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.select import select
from mechinterp.errors import SelectorError

WORDS = ["<s>", " Mary", "Mary", " John", " gave", ",", " it's", " a|b", "]"]


class Words:
    """A tokenizer of nine words; anything else is spelled out in commas."""

    bos_token_id = None

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [WORDS.index(text)] if text in WORDS else [5] * len(text)}

    def decode(self, ids: list[int]) -> str:
        return "".join(WORDS[i] for i in ids)


@pytest.fixture(scope="module")
def model(tiny_gpt2: Any) -> Any:
    return mi.load(tiny_gpt2(), tokenizer=Words(), name="words")


@pytest.fixture
def prompts() -> Tensor:
    #   <s> Mary gave ' it's' John          <s> John gave Mary Mary
    return torch.tensor([[0, 1, 4, 6, 3], [0, 3, 4, 2, 1]])


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("' gave'", [2, 2]),
        ("'gave'", [2, 2]),
        ("'John'", [4, 1]),
        ("' Mary'", [1, 4]),
        ("'Mary'#0", [1, 3]),
        ("'Mary'#-1", [1, 4]),
        ('"John"', [4, 1]),
    ],
)
def test_where_a_token_stands(model: Any, prompts: Tensor, text: str, where: list[int]) -> None:
    assert mi.token_positions(model, prompts)[text].tolist() == where
    run = mi.run(model, prompts, capture=f"L1.resid_post[{text}]")
    whole = run["L1.resid_post"]
    assert torch.equal(run[f"L1.resid_post[{text}]"], whole[torch.arange(2), where])
    # An edit there is the edit at the numbers.
    edited = mi.run(model, prompts, edits=[mi.Scale(f"L0.H1.z[{text}]", 0.5)]).logits
    by_hand = [mi.Scale(f"L0.H1.z[{pos}]", 0.5, rows=(row, row + 1)) for row, pos in enumerate(where)]
    assert torch.equal(edited, mi.run(model, prompts, edits=by_hand).logits)


def test_texts_that_look_like_grammar(model: Any) -> None:
    tokens = torch.tensor([[7, 6, 5, 8]])
    where = {"' a|b'": [0], '"it\'s"': [1], "','": [2], "']'": [3]}
    for text, pos in where.items():
        (site,) = mi.select(f"L0.z[{text}]", model.cfg)
        assert str(site) == f"L0.z[{text}]"
        assert select([str(site)], model.cfg).sites == (site,)
        assert mi.token_positions(model, tokens)[text].tolist() == pos
    assert [str(site) for site in mi.select("L0.z['a,b', 3, \"c\"#1] | embed['|']", model.cfg)] == [
        "L0.z['a,b']", "L0.z[3]", "L0.z['c'#1]", "embed['|']",
    ]  # fmt: skip


def test_beside_named_positions(model: Any, prompts: Tensor) -> None:
    found = mi.token_positions(model, prompts, {"S": torch.tensor([1, 2])})
    assert list(found) == ["S"]
    assert len(found) == 1
    assert found["S"].tolist() == [1, 2]
    assert "'gave'" in found
    assert "T" not in found
    with pytest.raises(KeyError):
        _ = found["T"]
    registry = mi.HookRegistry(model, found)
    registry.add(mi.Zero("L0.z['gave']"))
    with registry:
        logits = model(prompts)
    assert torch.equal(logits, mi.run(model, prompts, edits=[mi.Zero("L0.z[2]")]).logits)


REFUSED = [
    ("'Mary'", "the token 'Mary' is more than once in prompt 1 of 2 ('<s> John gaveMary Mary') (in the first of them at "
     "positions 3, 4); write 'Mary'#0 for the first, 'Mary'#-1 for the last"),
    ("'Mary'#1", "the token 'Mary' is not 2 times in prompt 0 of 2 (\"<s> Mary gave it's John\")."),
    ("\"it's\"", "the token \"it's\" is not in prompt 1 of 2 ('<s> John gaveMary Mary')."),
    ("','", "the token ',' is not in prompts 0, 1 of 2 (\"<s> Mary gave it's John\")."),
    ("'Bob'", "the token 'Bob' is not in prompts 0, 1 of 2 (\"<s> Mary gave it's John\"). It is 3 tokens: ',', ',', ','; "
     "name one of them"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text for text, _ in REFUSED])
def test_refused(model: Any, prompts: Tensor, text: str, message: str, same_hooks: Any) -> None:
    with same_hooks(model), pytest.raises(SelectorError, match=f"^{re.escape(message)}$"):
        mi.run(model, prompts, edits=[mi.Zero(f"L0.z[{text}]")])


def test_refused_without_a_tokenizer_or_tokens(tiny_gpt2: Any, model: Any, prompts: Tensor) -> None:
    bare = tiny_gpt2()
    message = (
        f"{bare.name} has no tokenizer, so no token has a text: give positions as numbers, or mi.load(..., tokenizer=tokenizer)"
    )
    with pytest.raises(SelectorError, match=f"^{re.escape(message)}$"):
        mi.run(bare, prompts, edits=[mi.Zero("L0.z['Mary']")])
    registry = mi.HookRegistry(model)
    registry.add(mi.Zero("L0.z['Mary']"))
    message = (
        "L0.z['Mary']: where the token 'Mary' stands is known only where the tokens are; use mi.run, or give a HookRegistry "
        "positions=mi.token_positions(model, tokens)"
    )
    with pytest.raises(SelectorError, match=f"^{re.escape(message)}$"), registry:
        model(prompts)
    with pytest.raises(SelectorError, match=r"^cannot read the token 'a'#b; write it like 'Mary' or 'Mary'#0$"):
        _ = mi.token_positions(model, prompts)["'a'#b"]
