"""Tasks: prompt pairs and metrics. They need a tokenizer, never a model.

=================  ==========================================================================================
`Task`             clean and corrupt prompts, right and wrong answers, named positions; `Task.from_jsonl`
`Spans`            the parts that its names cut the prompts into: ``task.spans``
`ioi`              who receives the gift
`greater_than`     a war ends after it began
`induction`        random tokens, repeated
`agreement`        one is, many are
`gender`           the pronoun that goes with a name
`docstring`        the argument that is documented next
`Metric`           from the logits at the answer position to one number per example: `logit_diff`,
`prob_diff`, `log_prob`, `accuracy`, `kl`
`TASKS`            the generators by name, called with a tokenizer, ``n=`` and ``seed=``
=================  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from mechinterp.errors import TaskError, did_you_mean
from mechinterp.tasks.agreement import agreement
from mechinterp.tasks.docstring import docstring
from mechinterp.tasks.gender import gender
from mechinterp.tasks.greater_than import greater_than
from mechinterp.tasks.induction import induction
from mechinterp.tasks.ioi import ioi
from mechinterp.tasks.metrics import (
    METRICS,
    Metric,
    accuracy,
    gather_answer_logits,
    kl,
    log_prob,
    logit_diff,
    prob_diff,
    resolve_metric,
)
from mechinterp.tasks.offline import word_tokenizer
from mechinterp.tasks.pairs import read_pairs
from mechinterp.tasks.spans import Spans
from mechinterp.tasks.task import Task
from mechinterp.tasks.words import Tokenizer

__all__ = [
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

TASKS: Mapping[str, Callable[..., Task]] = MappingProxyType(
    {make.__name__: make for make in (ioi, greater_than, induction, agreement, gender, docstring)}
)
"""The generators by name, each called as ``TASKS[name](tokenizer, n=..., seed=...)``."""


def resolve_task(name: str) -> Callable[..., Task]:
    """The generator of that name; hyphens do for underscores.

    Raises
    ------
    TaskError
        When there is none.

    Examples
    --------
    >>> resolve_task("greater-than") is greater_than
    True
    """
    key = name.replace("-", "_")
    if key not in TASKS:
        raise TaskError(f"there is no task {name!r}. {did_you_mean(key, TASKS)} Pairs of your own are read with Task.from_jsonl.")
    return TASKS[key]


def describe_tasks() -> dict[str, str]:
    """Which question each task asks, in one line.

    Examples
    --------
    >>> describe_tasks()["ioi"]
    'How does the model know who receives the gift?'
    """
    return {name: (make.__doc__ or "").strip().splitlines()[0] for name, make in TASKS.items()}
