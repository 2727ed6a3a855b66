from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from mechinterp.errors import TaskError
from mechinterp.tasks import Task, induction


def follower(tokens: list[int], length: int) -> int:
    """What followed the last token's earlier occurrence among the first `length`, by hand."""
    return tokens[tokens[:length].index(tokens[-1]) + 1]


@pytest.mark.parametrize("corruption", ["key", "value", "query"])
@pytest.mark.parametrize(("length", "repeat"), [(4, 1), (12, 6), (12, 9), (30, 5)])
def test_looking_up_by_hand_gives_right_and_wrong(corruption: str, length: int, repeat: int) -> None:
    task = induction(50, n=40, seed=0, length=length, repeat=repeat, corruption=corruption, bos=False)
    assert task.clean.shape == (40, length + repeat)
    for row in range(40):
        assert follower(task.clean[row].tolist(), length) == task.right[row, 0]
        assert follower(task.corrupt[row].tolist(), length) == task.wrong[row, 0]


@pytest.mark.parametrize(("corruption", "changed"), [("key", 2), ("value", 1), ("query", 1)])
def test_each_corruption_changes_only_what_it_says(corruption: str, changed: int) -> None:
    task = induction(50, n=40, seed=0, corruption=corruption, bos=0)
    assert task.differs.sum(dim=1).tolist() == [changed] * 40
    where = {"key": "earlier", "value": "target", "query": "end"}[corruption]
    assert task.first_difference.tolist() == task.positions[where].tolist()


def test_key_keeps_the_tokens_and_the_places_of_both_answers() -> None:
    task = induction(50, n=40, seed=0, bos=0)
    assert (task.clean.sort(dim=1).values == task.corrupt.sort(dim=1).values).all()
    for tokens in (task.clean, task.corrupt):
        assert (tokens.gather(1, task.positions["target"][:, None]) == task.right).all()
        assert (tokens.gather(1, task.positions["foil"][:, None]) == task.wrong).all()


def test_the_first_part_has_no_token_twice() -> None:
    task = induction(14, n=40, seed=0, length=12, bos=0)
    assert all(len(set(row)) == 12 for row in task.clean[:, 1:13].tolist())
    assert (task.clean[:, 0] == 0).all() and not (task.clean[:, 1:] == 0).any()


def test_positions() -> None:
    task = induction(50, n=3, seed=0, length=10, repeat=4, bos=7)
    assert task.positions["earlier"].tolist() == [4] * 3
    assert task.positions["target"].tolist() == [5] * 3
    assert task.positions["end"].tolist() == task.answer_pos.tolist() == [14] * 3
    assert "foil" not in induction(50, n=3, seed=0, corruption="value").positions


def test_a_tokenizer_gives_ordinary_words(tokenizer: Any) -> None:
    task = induction(tokenizer, n=10, seed=0)
    assert task.clean.shape == (10, 19)
    assert (task.clean[:, 0] == tokenizer.bos_token_id).all()
    words = {task.string(token) for token in task.clean[:, 1:].reshape(-1).tolist()}
    assert all(word.isalpha() and word.islower() for word in words)
    assert induction(tokenizer, n=10, seed=0, bos=False).clean.shape == (10, 18)


def test_words_with_a_space_in_front_are_preferred() -> None:
    class Bytes:
        bos_token_id = None

        def get_vocab(self) -> dict[str, int]:
            words = [f"{front}w{chr(97 + index)}rd" for front in ("", "\u0120") for index in range(20)]
            return {word: index for index, word in enumerate([*words, "Upper", "\u0120x", "\u01201745"])}

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            raise AssertionError("random tokens are drawn, not written")

        def decode(self, token_ids: list[int]) -> str:
            return str(token_ids[0])

    task = induction(Bytes(), n=10, seed=0)
    assert task.clean.min() >= 20 and task.clean.max() < 40


def test_a_list_of_ids_is_drawn_from() -> None:
    task = induction([3, 5, 7, 9, 11], n=10, seed=0, length=4)
    assert set(task.clean.reshape(-1).tolist()) <= {3, 5, 7, 9, 11}


def test_the_seed_decides() -> None:
    def tokens(seed: int) -> Task:
        return induction(50, n=5, seed=seed)

    assert torch.equal(tokens(0).clean, tokens(0).clean) and torch.equal(tokens(0).corrupt, tokens(0).corrupt)
    assert not torch.equal(tokens(0).clean, tokens(1).clean)


def test_provenance(tokenizer: Any) -> None:
    assert induction(50, n=5, seed=3, bos=0).provenance == {
        "generator": "induction",
        "n": 5,
        "seed": 3,
        "length": 12,
        "repeat": 6,
        "corruption": "key",
        "vocabulary": 49,
        "tokenizer": None,
        "bos": True,
    }
    assert induction(tokenizer, n=5, seed=3).provenance["tokenizer"] == "words"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "induction was asked for 0 pairs: n is at least 1."),
        ({"corruption": "keys"}, "induction has no corruption 'keys'. Did you mean 'key'?"),
        (
            {"length": 6, "repeat": 4},
            (
                "induction cannot repeat 4 of 6 tokens: repeat is from 1 to length - 3, so that an answer, "
                "another token and its successor come after it."
            ),
        ),
        (
            {"tokenizer": 12},
            (
                "induction needs 13 different tokens for length=12, and there are 12: ask for a shorter "
                "length, or give more tokens."
            ),
        ),
        (
            {"tokenizer": 0.5},
            "induction draws from a tokenizer, a vocabulary size or a list of token ids, not from a float.",
        ),
        (
            {"tokenizer": "gpt2"},
            "induction draws from a tokenizer, a vocabulary size or a list of token ids, not from a str.",
        ),
    ],
)
def test_messages(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        inspect.unwrap(induction)(**{"tokenizer": 50, "n": 2, "seed": 0, **arguments})
    assert str(caught.value) == message
