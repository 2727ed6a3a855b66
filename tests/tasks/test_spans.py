"""Spans: prompts cut at their names, token by token."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from mechinterp.errors import TaskError
from mechinterp.tasks import Task


def task_of(lengths: list[int], positions: dict[str, Any]) -> Task:
    width, n = max(lengths), len(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    clean, corrupt = torch.ones(n, width, dtype=torch.long), torch.zeros(n, width, dtype=torch.long)
    return Task("mine", clean, corrupt, [2] * n, [3] * n, mask=mask, positions=positions)


def test_every_token_is_in_one_span() -> None:
    task = task_of([7, 5, 6], {"end": -1, "S": [1, 2, 0], "V": [4, 3, 2]})
    spans = task.spans
    assert spans.names == ("..S", "S", "S..V", "V", "V..end", "end", "end..")
    assert spans.index.tolist() == [[0, 1, 2, 2, 3, 4, 5], [0, 0, 1, 3, 5, -1, -1], [1, 2, 3, 4, 4, 5, -1]]
    assert spans.sizes.tolist() == [[1, 1, 2, 1, 1, 1, 0], [2, 1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 2, 1, 0]]
    assert spans.filled == spans.names[:-1]
    assert torch.equal(spans.onehot.sum(dim=-1).bool(), task.mask)  # type: ignore[arg-type]
    assert repr(spans) == "Spans: ..S (0 to 2 tokens), S, S..V (0 to 2 tokens), V, V..end (0 to 2 tokens), end"
    # Parts of a task have the same spans, whether or not these have tokens there.
    assert task[[1]].spans.names == spans.names and task[[1]].spans.index.tolist() == spans.index[[1]].tolist()
    assert spans.place("V..end") == 4


def test_by_hand() -> None:
    """Each token against a loop over the names."""
    generator = random.Random(0)
    lengths = [generator.randint(6, 12) for _ in range(40)]
    places = [sorted(generator.sample(range(length), 3)) for length in lengths]
    spans = task_of(lengths, {name: [place[i] for place in places] for i, name in enumerate("abc")}).spans
    for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
        for pos in range(12):
            before = max((i for i in range(3) if place[i] < pos), default=-1)
            borders = ["", *"abc", ""]
            expected = "abc"[place.index(pos)] if pos in place else f"{borders[before + 1]}..{borders[before + 2]}"
            found = int(spans.index[row, pos])
            assert found == -1 if pos >= length else spans.names[found] == expected


def test_names_of_one_token_share_a_span_and_without_names_positions_are_spans() -> None:
    spans = task_of([4, 4], {"a": [1, 2], "b": [1, 2]}).spans
    assert spans.names == ("..a=b", "a=b", "a=b..")
    assert spans.index.tolist() == [[0, 1, 2, 2], [0, 0, 1, 2]]
    spans = task_of([4, 4], {}).spans
    assert spans.names == spans.filled == ("0", "1", "2", "3")
    assert spans.index.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_prompts_of_unequal_length_need_names() -> None:
    # Token 3 of one is not token 3 of another: scores of such spans would mean nothing.
    with pytest.raises(TaskError) as caught:
        _ = task_of([4, 2], {}).spans
    assert str(caught.value) == (
        "task 'mine' names no positions and its prompts have 2 to 4 tokens, so that their tokens have no common spans; name "
        "some: dataclasses.replace(task, positions={'end': task.answer_pos})"
    )


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (
            {"IO": [1, 3], "S": [2, 2]},
            "in pair 0 IO at 1, S at 2 and in pair 1 IO at 3, S at 2. Take the pairs of one order, "
            "task[task.positions['IO'] < task.positions['S']], or leave a name out: dataclasses.replace(task, positions={...})",
        ),
        (
            {"IO": [1, 1], "S": [1, 2]},
            "in pair 0 IO at 1, S at 1 and in pair 1 IO at 1, S at 2. Take the pairs of one order, "
            "task[task.positions['IO'] == task.positions['S']], or leave a name out: dataclasses.replace(task, positions={...})",
        ),
    ],
    ids=["order", "same"],
)
def test_names_in_different_orders(positions: dict[str, list[int]], message: str) -> None:
    task = task_of([4, 4], positions)
    with pytest.raises(TaskError) as caught:
        task.spans  # noqa: B018
    start = "the names of task 'mine' come in different orders, so that its prompts have no common spans: "
    assert str(caught.value) == start + message
    chosen = (
        task[task.positions["IO"] < task.positions["S"]] if "<" in message else task[task.positions["IO"] == task.positions["S"]]
    )
    assert len(chosen) == 1 and chosen.spans.index[0].tolist() == ([0, 1, 3, 4] if "<" in message else [0, 1, 2, 2])


def test_an_unknown_span() -> None:
    with pytest.raises(TaskError) as caught:
        task_of([2], {"end": 1}).spans.place("S")
    assert str(caught.value) == "the prompts have no span 'S'; there are '..end', 'end', 'end..'"


@pytest.mark.parametrize(
    ("positions", "found"),
    [
        ({"IO": [1, 2], "S": [2, 2]}, "pair 0 IO at 1, S at 2 and in pair 1 IO at 2, S at 2"),
        ({"IO": [1, 2], "S": [1, 1]}, "pair 0 IO at 1, S at 1 and in pair 1 IO at 2, S at 1"),
    ],
    ids=["one token in one pair alone", "the second before the first"],
)
def test_names_that_meet_in_some_prompts_alone(positions: dict[str, list[int]], found: str) -> None:
    with pytest.raises(TaskError) as caught:
        task_of([4, 4], positions).spans  # noqa: B018
    assert found in str(caught.value)
