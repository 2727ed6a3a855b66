from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mechinterp.errors import MetricError, TaskError
from mechinterp.tasks import METRICS, Task
from mechinterp.tasks.checks import check_devices

PADDED = {
    "name": "padded",
    "clean": [[0, 5, 7, 8], [0, 6, 9, 9]],
    "corrupt": [[0, 4, 7, 8], [0, 5, 3, 3]],
    "right": [[1, -1], [2, 3]],
    "wrong": [[2], [1]],
    "mask": [[True, True, True, True], [True, True, False, False]],
}


def test_repr_is_the_headline(task: Task) -> None:
    assert repr(task) == "Task mine: 2 pairs of 3 tokens, differ at 1 position, metric logit_diff"
    assert repr(task[:1]) == "Task mine: 1 pair of 3 tokens, differ at 1 position, metric logit_diff"
    assert repr(Task(**PADDED)) == "Task padded: 2 pairs of 2 to 4 tokens, differ at 1 position, metric logit_diff"


def test_lists_become_int64_tensors_with_answers_in_two_dimensions(task: Task) -> None:
    assert task.clean.dtype == task.right.dtype == task.answer_pos.dtype == torch.int64
    assert task.right.shape == (2, 1)
    assert task.answer_pos.tolist() == [2, 2]
    assert len(task) == 2


def test_ragged_answers_are_padded_with_minus_one(pair: dict[str, Any]) -> None:
    task = Task(**{**pair, "right": [[1, 3], [2]]})
    assert task.right.tolist() == [[1, 3], [2, -1]]


def test_the_callers_tensors_are_copied(pair: dict[str, Any]) -> None:
    clean = torch.tensor(pair["clean"])
    task = Task(**{**pair, "clean": clean})
    clean.zero_()
    assert task.clean.tolist() == pair["clean"]


def test_padding_moves_the_answer_and_hides_differences() -> None:
    task = Task(**PADDED)
    assert task.answer_pos.tolist() == [3, 1]
    assert task.lengths.tolist() == [4, 2]
    assert task.differs.tolist() == [[False, True, False, False], [False, True, False, False]]
    assert task.first_difference.tolist() == [1, 1]


def test_first_difference_of_equal_prompts_is_past_the_end(pair: dict[str, Any]) -> None:
    task = Task(**{**pair, "corrupt": [[0, 5, 7], [0, 5, 7]]})
    assert task.first_difference.tolist() == [3, 1]


def test_negative_positions_resolve_at_once() -> None:
    task = Task(**PADDED, answer_pos=-1, positions={"second": -1, "given": [0, -2]})
    assert task.answer_pos.tolist() == [3, 1]
    assert task.positions["second"].tolist() == [3, 1]
    assert task.positions["given"].tolist() == [0, 0]


@pytest.mark.parametrize("rows", [[1, 0], torch.tensor([1, 0]), slice(None, None, -1), [-1, 0]])
def test_subsets_keep_the_order_asked_for(rows: Any) -> None:
    task = Task(**PADDED, positions={"end": -1}, texts=("a", "b"))
    part = task[rows]
    assert part.clean.tolist() == task.clean.flip(0).tolist()
    assert part.right.tolist() == task.right.flip(0).tolist()
    assert part.positions["end"].tolist() == [1, 3]
    assert part.mask is not None and task.mask is not None
    assert part.mask.tolist() == task.mask.flip(0).tolist()
    assert part.texts == ("b", "a")


def test_subsets_by_mask_number_range_and_repetition(task: Task) -> None:
    assert task[torch.tensor([False, True])].clean.tolist() == [[0, 6, 7]]
    assert task[[False, True]].clean.tolist() == [[0, 6, 7]]
    assert task[-1].clean.tolist() == [[0, 6, 7]]
    assert len(task[[0, 0, 1, 1]]) == 4
    assert [one.clean.tolist() for one in task] == [[[0, 5, 7]], [[0, 6, 7]]]


def _numbered(n: int) -> Task:
    rows = [[0, row] for row in range(n)]
    return Task("numbered", rows, [[1, row] for row in range(n)], [1] * n, [2] * n, provenance={"seed": 3})


def test_split_is_a_partition_that_its_seed_decides() -> None:
    task = _numbered(20)
    found_on, held_out = task.split(0.25, seed=0)
    assert (len(found_on), len(held_out)) == (15, 5)
    both = [*found_on.clean.tolist(), *held_out.clean.tolist()]
    assert sorted(both) == task.clean.tolist()
    assert task.split(0.25, seed=0)[1].clean.tolist() == held_out.clean.tolist()
    assert task.split(0.25, seed=1)[1].clean.tolist() != held_out.clean.tolist()
    assert held_out.provenance == {"seed": 3, "split_seed": 0, "split_held_out": 0.25, "split": "held_out"}
    assert found_on.provenance["split"] == "found_on"


def test_split_never_puts_one_prompt_on_both_sides() -> None:
    task = _numbered(6)[[0, 0, 0, 1, 1, 2, 3, 4, 5, 5]]
    for seed in range(20):
        found_on, held_out = task.split(0.5, seed=seed)
        assert not {tuple(row) for row in found_on.clean.tolist()} & {tuple(row) for row in held_out.clean.tolist()}
        assert len(found_on) + len(held_out) == 10


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_split_leaves_no_side_empty(share: float) -> None:
    found_on, held_out = _numbered(3).split(share, seed=0)
    assert len(found_on) >= 1 and len(held_out) >= 1


def test_swap_exchanges_the_sides(task: Task) -> None:
    swapped = task.swap()
    assert swapped.clean.tolist() == task.corrupt.tolist()
    assert swapped.right.tolist() == task.wrong.tolist()
    assert swapped.provenance == {"swapped": True}
    assert swapped.swap().provenance == {"swapped": False}


def test_to_moves_every_tensor() -> None:
    task = Task(**PADDED, positions={"end": -1}).to("cpu")
    assert {task.clean.device.type, task.positions["end"].device.type} == {"cpu"}


def test_it_is_frozen(task: Task) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"  # type: ignore[misc]


def test_strings_label_tokens(pair: dict[str, Any]) -> None:
    task = Task(**pair, strings={0: "<s>", 5: " a", 6: " b", 7: " c"})
    assert task.token_strings == (("<s>", " a", " c"), ("<s>", " b", " c"))
    assert task.corrupt_token_strings == (("<s>", " b", " c"), ("<s>", " a", " c"))
    assert task.string(5) == " a"
    assert task.string(99) == "<99>"
    assert Task(**pair).token_strings is None


MESSAGES = [
    (
        {"clean": [[0, 5], [0]]},
        (
            "clean cannot be read as a tensor of token ids (expected sequence of length 2 at dim 1 (got 1)): "
            "rows must be equally long."
        ),
    ),
    ({"clean": [[0.0, 5.0], [0.0, 1.0]]}, "clean has dtype torch.float32: it holds integers."),
    ({"clean": [0, 5]}, "clean has shape [2]: it holds token ids [batch pos], one row per prompt."),
    (
        {"corrupt": [[0, 6, 7], [0, -5, 7]]},
        "corrupt of pair 1 has a negative token id: pad with any valid id and say so in mask=.",
    ),
    (
        {"corrupt": [[0, 6], [0, 5]]},
        (
            "clean has shape [2, 3] and corrupt [2, 2]: the two are aligned token by token, so each "
            "pair needs as many tokens on both sides."
        ),
    ),
    (
        {"clean": torch.zeros(0, 3, dtype=torch.int64), "corrupt": torch.zeros(0, 3, dtype=torch.int64)},
        "clean has shape [0, 3]: a task has at least one pair of at least one token.",
    ),
    (
        {"mask": [[1, 1, 1], [1, 1, 0]]},
        ("mask has shape [2, 3] and dtype torch.int64: it holds booleans of the prompts' shape [2, 3], True for real tokens."),
    ),
    (
        {"mask": [[True, True, True], [False, True, True]]},
        (
            "mask of pair 1 has padding before a real token, or no real token: pad on the right "
            "(tokenizer.padding_side = 'right')."
        ),
    ),
    (
        {"right": [1, 2, 3]},
        "right has shape [3, 1] for 2 pairs: it holds token ids [batch] or [batch answer].",
    ),
    ({"right": [1, -2]}, "right has a token id below -1: ids count from 0, and -1 is padding."),
    ({"right": [[1], []]}, "pair 1 has no right answer: every pair needs at least one."),
    ({"wrong": [[2, 2], [1, 3]]}, "wrong answers of pair 0 have token 2 twice: name each once."),
    (
        {"wrong": [2, 2]},
        "token 2 is both a right and a wrong answer of pair 1: the two sets must not overlap.",
    ),
    ({"answer_pos": [0]}, "answer_pos has shape [1] for 2 pairs: it holds one position per pair."),
    (
        {"answer_pos": [0, 3]},
        "answer_pos of pair 1 is 3, and its prompt has 3 tokens: positions go from 0 to 2.",
    ),
    (
        {"positions": {"S2": [0, -4]}},
        "position 'S2' of pair 1 is -4, and its prompt has 3 tokens: positions go from 0 to 2.",
    ),
    ({"texts": ("one",)}, "there are 2 pairs and 1 texts: pass one text per pair."),
]


@pytest.mark.parametrize(("change", "message"), MESSAGES)
def test_messages(pair: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        Task(**{**pair, **change})
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


def test_an_unknown_metric_is_refused_at_once(pair: dict[str, Any]) -> None:
    with pytest.raises(MetricError) as caught:
        Task(**pair, metric="logit_dif")
    assert str(caught.value) == (
        "there is no metric 'logit_dif'. Did you mean 'logit_diff'? A metric of your own is a function of "
        "(logits [batch vocab], task), passed as metric=."
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (2, "there is no pair 2: the task has 2, from 0 to 1."),
        ([0, -3], "there is no pair -3: the task has 2, from 0 to 1."),
        ([], "the index chooses none of the 2 pairs: a task has at least one."),
        (slice(5, 6), "the index chooses none of the 2 pairs: a task has at least one."),
        ([True], "a boolean index of shape [1] does not fit 2 pairs."),
        (
            [0.5],
            (
                "an index of shape [1] and dtype torch.float32 chooses no pairs: use a number, a slice, or a "
                "list of numbers or booleans."
            ),
        ),
    ],
)
def test_index_messages(task: Task, rows: Any, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        task[rows]
    assert str(caught.value) == message


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(TaskError) as caught:
        check_devices(torch.zeros(1), torch.zeros(1, device="meta"))
    assert str(caught.value) == (
        "the tensors are on different devices (cpu, meta): make the task on one, and move it with task.to(device)."
    )


def test_split_messages(task: Task) -> None:
    with pytest.raises(TaskError) as caught:
        task.split(1.0, seed=0)
    assert str(caught.value) == "held_out is the share of pairs to hold out, between 0 and 1, not 1.0."
    with pytest.raises(TaskError) as caught:
        task[[0, 0]].split(seed=0)
    assert str(caught.value) == (
        "task 'mine' has one distinct clean prompt in 2 pairs, and a circuit is not judged on the prompt "
        "that found it: give at least 2 different prompts."
    )


def test_answers_alone_give_the_same_numbers() -> None:
    """With several right answers, and padding among them."""
    task = Task(name="several", clean=[[0, 1], [0, 2]], corrupt=[[0, 2], [0, 1]], right=[[7, 3], [5, -1]], wrong=[[1, 9], [3, 7]])
    narrow, ids = task.answers()
    assert ids.tolist() == [1, 3, 5, 7, 9]
    assert narrow.right.tolist() == [[3, 1], [2, -1]]
    logits = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    for name in ("logit_diff", "accuracy"):
        metric = METRICS[name]
        assert metric.answers_only
        assert torch.equal(metric(logits, task), metric(logits[:, ids], narrow))
    assert not METRICS["kl"].answers_only
    assert not METRICS["prob_diff"].answers_only
