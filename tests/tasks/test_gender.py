from __future__ import annotations

from typing import Any

import pytest

from mechinterp.errors import TaskError
from mechinterp.tasks import gender, word_tokenizer
from mechinterp.tasks.gender import FEMALE, MALE, ROLES


def test_one_token_differs_at_the_name(tokenizer: Any) -> None:
    task = gender(tokenizer, n=20, seed=0)
    assert task.clean.shape[0] == 20 and task.metric == "logit_diff"
    assert task.differs.sum(dim=1).tolist() == [1] * 20
    assert task.first_difference.tolist() == task.positions["name"].tolist()
    assert (task.positions["is"] == task.positions["name"] + 1).all()
    assert (task.positions["end"] == task.clean.shape[1] - 1).all()
    roles = task.clean.gather(1, task.positions["role"][:, None])[:, 0].tolist()
    assert {task.string(token) for token in roles} <= set(ROLES)


def test_the_pronoun_goes_with_the_name_and_half_are_female(tokenizer: Any) -> None:
    task = gender(tokenizer, n=20, seed=0)
    names = task.clean.gather(1, task.positions["name"][:, None])[:, 0].tolist()
    others = task.corrupt.gather(1, task.positions["name"][:, None])[:, 0].tolist()
    for row, (name, other) in enumerate(zip(names, others, strict=True)):
        female = task.string(name) in FEMALE
        assert female is (row % 2 == 0)
        assert task.string(other) in (MALE if female else FEMALE)
        assert task.string(int(task.right[row, 0])) == ("she" if female else "he")
        assert task.string(int(task.wrong[row, 0])) == ("he" if female else "she")


def test_prompts_are_distinct_and_the_seed_decides(tokenizer: Any) -> None:
    first, again, other = (gender(tokenizer, n=20, seed=seed) for seed in (0, 0, 1))
    assert len(set(first.texts or ())) == 20
    assert first.texts == again.texts != other.texts


def test_names_of_ones_own(tokenizer: Any) -> None:
    task = gender(tokenizer, n=4, seed=0, female=["Mary"], male=["John"])
    assert [text.split()[1] for text in task.texts or ()] == ["Mary", "John", "Mary", "John"]
    assert task.provenance["names"] == {"female": 1, "male": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "gender was asked for 0 pairs: n is at least 1."),
        ({"female": ["Xanthippe"]}, "'Xanthippe' is not one token after a space for this tokenizer: leave it out of female=."),
        ({"male": ["Mary"]}, "'Mary' is among the female and the male names: leave it out of one of them."),
        (
            {"n": 50, "female": ["Mary"], "male": ["John"]},
            "only 20 distinct prompts were found in 2600 draws, and 50 were asked: ask for fewer, or pass more names.",
        ),
    ],
)
def test_messages(tokenizer: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        gender(tokenizer, **{"n": 4, "seed": 0, **arguments})
    assert str(caught.value) == message


def test_a_tokenizer_without_the_words() -> None:
    with pytest.raises(TaskError) as caught:
        gender(word_tokenizer(["to", "the", "Mary", "she", "doctor"]), n=4, seed=0)
    assert str(caught.value) == (
        "1 female and 0 male names, 1 roles and 1 of 2 pronouns are single tokens for this tokenizer, and gender needs 1, 1, 1 "
        "and 2: pass female= and male= names that are."
    )
