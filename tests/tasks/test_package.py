from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import mechinterp.tasks
from mechinterp.errors import TaskError
from mechinterp.tasks import TASKS, describe_tasks, greater_than, resolve_task, word_tokenizer


def test_public_names() -> None:
    assert mechinterp.tasks.__all__ == [
        "METRICS",
        "TASKS",
        "Metric",
        "Spans",
        "Task",
        "Tokenizer",
        "accuracy",
        "agreement",
        "describe_tasks",
        "docstring",
        "gather_answer_logits",
        "gender",
        "greater_than",
        "induction",
        "ioi",
        "kl",
        "log_prob",
        "logit_diff",
        "prob_diff",
        "read_pairs",
        "resolve_metric",
        "resolve_task",
        "word_tokenizer",
    ]
    assert all(hasattr(mechinterp.tasks, name) for name in mechinterp.tasks.__all__)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_is_made_the_same_way_and_asks_a_question(name: str, tokenizer: Any) -> None:
    task = TASKS[name](tokenizer, n=4, seed=0)
    assert (task.name, len(task)) == (name, 4)
    assert task.provenance["generator"] == name
    assert describe_tasks()[name].endswith("?")


def test_resolve_task() -> None:
    assert resolve_task("greater-than") is resolve_task("greater_than") is greater_than
    with pytest.raises(TaskError) as caught:
        resolve_task("greater")
    assert str(caught.value) == (
        "there is no task 'greater'. Did you mean 'greater_than' or 'gender'? Pairs of your own are read with Task.from_jsonl."
    )


def test_word_tokenizer() -> None:
    tokenizer = word_tokenizer(["Mary", "17", "1", "7"])
    assert tokenizer.bos_token_id == 0
    assert tokenizer.encode("Mary 17", add_special_tokens=False) == [2, 4, 5]
    assert tokenizer.decode([2]) == "Mary"


def test_importing_tasks_is_light() -> None:
    code = (
        "import sys, mechinterp.tasks; print([m for m in ('transformers', 'transformer_lens', 'pandas', "
        "'networkx', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
