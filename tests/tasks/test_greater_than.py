from __future__ import annotations

import re
from typing import Any

import pytest

from mechinterp.errors import TaskError
from mechinterp.tasks import Task, greater_than, word_tokenizer

WORDS = ["The", "lasted", "from", "the", "year", "to", "war", "siege", "trip"]


def chunked(pattern: str, numbers: list[str]) -> Any:
    """A word tokenizer that cuts numbers by a pattern of its own."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = word_tokenizer([*WORDS, *numbers])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(pattern), "isolated")]
    )
    return tokenizer


@pytest.fixture
def two_digits() -> Any:
    return chunked(r"\d{2}", [f"{number:02d}" for number in range(100)])


def years(task: Task) -> list[int]:
    assert task.texts is not None
    return [int(re.search(r"\d{4}", text).group()[2:]) for text in task.texts]  # type: ignore[union-attr]


def test_digit_by_digit_asks_for_the_decade(tokenizer: Any) -> None:
    task = greater_than(tokenizer, n=30, seed=0)
    assert task.metric == "prob_diff"
    assert task.provenance["compares"] == "decade digit"
    for row, year in enumerate(years(task)):
        right = {int(task.string(token)) for token in task.right[row].tolist() if token >= 0}
        wrong = {int(task.string(token)) for token in task.wrong[row].tolist() if token >= 0}
        assert right == set(range(year // 10 + 1, 10))
        assert wrong == set(range(year // 10))


def test_two_digit_tokens_ask_for_the_year(two_digits: Any) -> None:
    task = greater_than(two_digits, n=30, seed=0)
    assert task.provenance["compares"] == "two-digit year"
    for row, year in enumerate(years(task)):
        right = {int(task.string(token)) for token in task.right[row].tolist() if token >= 0}
        wrong = {int(task.string(token)) for token in task.wrong[row].tolist() if token >= 0}
        assert right == set(range(year + 1, 100))
        assert wrong == set(range(year))
    starts = task.corrupt.gather(1, task.positions["start"][:, None])[:, 0].tolist()
    assert {task.string(token) for token in starts} == {"01"}


def test_years_that_are_one_token_are_not_drawn() -> None:
    # As GPT-2 has some: here all of the 1700s but two, and 1101, without which 11xx has no counterfactual.
    whole = [f"17{number:02d}" for number in range(100) if number not in (1, 45)] + ["1101"]
    pattern = "|".join([*whole, r"\d{2}"])
    task = greater_than(chunked(pattern, [*whole, *(f"{number:02d}" for number in range(100))]), n=200, seed=0)
    assert task.texts is not None
    drawn = {re.search(r"\d{4}", text).group() for text in task.texts}  # type: ignore[union-attr]
    assert not any(year.startswith("11") for year in drawn)
    assert {year for year in drawn if year.startswith("17")} <= {"1745"}


def test_one_token_differs_at_the_start(tokenizer: Any) -> None:
    task = greater_than(tokenizer, n=30, seed=0)
    assert task.clean.shape == (30, 16)
    assert task.differs.sum(dim=1).tolist() == [1] * 30
    assert task.first_difference.tolist() == task.positions["start"].tolist()
    zeros = task.corrupt.gather(1, task.positions["start"][:, None])[:, 0].tolist()
    assert {task.string(token) for token in zeros} == {"0"}
    assert (task.positions["century"] == task.positions["start"] - 1).all()
    assert task.positions["end"].tolist() == [15] * 30


def test_prompts_are_distinct_and_the_seed_decides(tokenizer: Any) -> None:
    first, again, other = (greater_than(tokenizer, n=30, seed=seed) for seed in (0, 0, 1))
    assert len(set(first.texts or ())) == 30
    assert first.texts == again.texts != other.texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "greater_than was asked for 0 pairs: n is at least 1."),
        (
            {"nouns": ["war", "kerfuffle"]},
            "'kerfuffle' is not one token after a space for this tokenizer: leave it out of nouns=.",
        ),
        (
            {"n": 1000, "nouns": ["war"]},
            ("only 640 distinct prompts were found in 50100 draws, and 1000 were asked: ask for fewer, or pass more nouns."),
        ),
    ],
)
def test_messages(tokenizer: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        greater_than(tokenizer, **{"n": 4, "seed": 0, **arguments})
    assert str(caught.value) == message


def test_messages_about_tokenizers() -> None:
    three = chunked(r"\d{1,3}", [str(number) for number in range(1000)])
    with pytest.raises(TaskError) as caught:
        greater_than(three, n=4, seed=0)
    assert str(caught.value) == (
        "this tokenizer writes years neither as two tokens of two digits, nor digit by digit, so "
        "greater_than has no one-token answers on it: write pairs of your own and read them with "
        "Task.from_jsonl."
    )
    with pytest.raises(TaskError) as caught:
        greater_than(word_tokenizer(["year", "to", "the", *"0123456789"]), n=4, seed=0)
    assert str(caught.value) == ("no noun of greater_than is a single token for this tokenizer: pass nouns=[...] that are.")
