from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mechinterp.errors import TaskError
from mechinterp.tasks import agreement, word_tokenizer
from mechinterp.tasks.agreement import NOUNS, VERBS


def test_one_token_differs_at_the_subject(tokenizer: Any) -> None:
    task = agreement(tokenizer, n=40, seed=0)
    assert task.clean.shape == (40, 6) and task.metric == "logit_diff"
    assert task.differs.sum(dim=1).tolist() == [1] * 40
    assert task.first_difference.tolist() == task.positions["subject"].tolist() == [2] * 40
    assert (task.positions["preposition"] == 3).all() and (task.positions["end"] == 5).all()


def test_the_answer_has_the_number_of_the_subject(tokenizer: Any) -> None:
    task = agreement(tokenizer, n=40, seed=0)
    number = {word: i for pair in (*NOUNS, *VERBS) for i, word in enumerate(pair)}
    for row in range(40):
        subject = number[task.string(int(task.clean[row, 2]))]
        assert number[task.string(int(task.corrupt[row, 2]))] == 1 - subject
        assert {number[task.string(token)] for token in task.right[row].tolist()} == {subject}
        assert {number[task.string(token)] for token in task.wrong[row].tolist()} == {1 - subject}
    assert task.right.shape == task.wrong.shape == (40, 3)


def test_numbers_take_turns_and_prompts_are_distinct(tokenizer: Any) -> None:
    task = agreement(tokenizer, n=40, seed=0)
    number = {word: i for pair in NOUNS for i, word in enumerate(pair)}
    seen = Counter(tuple(number[task.string(int(row[at]))] for at in (2, 5)) for row in task.clean)
    assert seen == dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 10)
    assert set(dict(task.provenance["conditions"]).values()) == {10}  # type: ignore[call-overload]
    assert len(set(task.texts or ())) == 40
    stems = {word: pair for pair in NOUNS for word in pair}
    assert all(stems[task.string(int(row[2]))] != stems[task.string(int(row[5]))] for row in task.clean)
    assert agreement(tokenizer, n=8, seed=1).texts != agreement(tokenizer, n=8, seed=0).texts
    assert agreement(tokenizer, n=8, seed=0).texts == (task.texts or ())[:8]


def test_nouns_and_verbs_of_ones_own(tokenizer: Any) -> None:
    task = agreement(tokenizer, n=2, seed=0, nouns=[("key", "keys"), ("car", "cars")], verbs=[("is", "are")], bos=False)
    assert task.clean.shape == (2, 5) and task.provenance["bos"] is False
    assert {task.string(token) for token in task.right[:, 0].tolist()} == {"is", "are"}
    assert task.provenance["verbs"] == ["is/are"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "agreement was asked for 0 pairs: n is at least 1."),
        (
            {"nouns": [("key", "keyring")]},
            "'keyring' is not one token after a space for this tokenizer: leave it out of nouns=.",
        ),
        ({"nouns": ["key"]}, "'key' of nouns= is no pair: write (singular, plural), such as ('author', 'authors')."),
        ({"verbs": [("is",)]}, "('is',) of verbs= is no pair: write (singular, plural), such as ('is', 'are')."),
        (
            {"nouns": [("key", "keys")]},
            "1 pairs of nouns, 3 of verbs and 6 prepositions are single tokens for this tokenizer, and agreement needs 2, 1 and "
            "1: pass nouns=[(singular, plural), ...] or verbs= that are.",
        ),
        (
            {"n": 100, "nouns": [("key", "keys"), ("car", "cars")]},
            "only 48 distinct prompts were found in 5100 draws, and 100 were asked: ask for fewer, or pass more nouns.",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_messages(tokenizer: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        agreement(tokenizer, **{"n": 4, "seed": 0, **arguments})
    assert str(caught.value) == message


def test_a_tokenizer_that_splits_by_context() -> None:
    from tokenizers import Regex, normalizers

    words = ["The", "the", "to", "near", "is", "are", "key", "keys", "car", "cars", "The keys"]
    tokenizer = word_tokenizer(words)
    # "The keys" becomes one word, though " keys" alone is one too.
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("The keys"), "The")
    with pytest.raises(TaskError) as caught:
        agreement(tokenizer, n=8, seed=0)
    assert "and its counterfactual differ at" in str(caught.value)
    assert str(caught.value).endswith("this tokenizer splits words by context, and agreement cannot be asked of it.")
