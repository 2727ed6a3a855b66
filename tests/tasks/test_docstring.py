from __future__ import annotations

from typing import Any

import pytest

from mechinterp.errors import TaskError
from mechinterp.tasks import docstring, word_tokenizer
from mechinterp.tasks.docstring import ARGUMENTS


def at(task: Any, name: str, corrupt: bool = False) -> list[int]:
    return (task.corrupt if corrupt else task.clean).gather(1, task.positions[name][:, None])[:, 0].tolist()


def test_positions_hold_the_arguments(tokenizer: Any) -> None:
    task = docstring(tokenizer, n=20, seed=0)
    assert task.clean.shape == (20, 27) and task.metric == "logit_diff"
    assert at(task, "C") == task.right[:, 0].tolist() and at(task, "D") == task.wrong[:, 0].tolist()
    assert at(task, "A") == at(task, "A2") and at(task, "B") == at(task, "B2")
    assert {task.string(token) for token in at(task, "C-1")} == {","}
    assert {task.string(token) for token in at(task, "end")} == {"param"}
    for row in task.clean.tolist():
        assert len({token for token in row if task.string(token) in ARGUMENTS}) == 7


def test_swapping_makes_the_wrong_answer_right(tokenizer: Any) -> None:
    task = docstring(tokenizer, n=20, seed=0)
    assert at(task, "C", corrupt=True) == task.wrong[:, 0].tolist()
    assert at(task, "D", corrupt=True) == task.right[:, 0].tolist()
    assert task.differs.sum(dim=1).tolist() == [2] * 20
    assert task.first_difference.tolist() == task.positions["C"].tolist()


def test_random_names_take_both_answers_away(tokenizer: Any) -> None:
    task = docstring(tokenizer, n=20, seed=0, corruption="random")
    assert task.differs.sum(dim=1).tolist() == [2] * 20
    assert not (task.corrupt == task.right).any() and not (task.corrupt == task.wrong).any()
    swapped = docstring(tokenizer, n=20, seed=0)
    assert task.texts == swapped.texts


def test_prompts_are_distinct_and_the_seed_decides(tokenizer: Any) -> None:
    first, again, other = (docstring(tokenizer, n=20, seed=seed) for seed in (0, 0, 1))
    assert len(set(first.texts or ())) == 20
    assert first.texts == again.texts != other.texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "docstring was asked for 0 pairs: n is at least 1."),
        ({"corruption": "swop"}, "docstring has no corruption 'swop'. Did you mean 'swap'?"),
        ({"words": ["size", "xyzzy"]}, "'xyzzy' is not one token after a space for this tokenizer: leave it out of words=."),
        (
            {"words": ["size", "name"]},
            "2 words are single tokens for this tokenizer, and docstring needs 9 (names, descriptions, and a name for the "
            "method): pass words=[...] that are.",
        ),
    ],
)
def test_messages(tokenizer: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        docstring(tokenizer, **{"n": 4, "seed": 0, **arguments})
    assert str(caught.value) == message


def test_a_word_of_the_frame_as_argument_is_refused() -> None:
    # ":param self:" would have the word in the frame too.
    words = ["self", *ARGUMENTS[:9]]
    tokenizer = word_tokenizer(["def", "param", "(", ":", "):", ",", '"""', "to", "the", *words])
    with pytest.raises(TaskError, match=r"tokens 'self' and 2 tokens .*, where 2 and 2 were expected"):
        docstring(tokenizer, n=40, seed=0, words=words)
