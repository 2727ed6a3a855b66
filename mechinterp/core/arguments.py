"""What entry points are given: the model first, then the task. Anything else is refused with what to do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mechinterp.core.model import Model
from mechinterp.errors import ModelError, TaskError

__all__ = ["check_model", "check_model_and_task"]


def check_model(model: object, prompts: object = None) -> None:
    """Refuse what is not a `Model`.

    Raises
    ------
    ModelError
        The two arguments are swapped, or the model is not loaded yet.
    """
    if isinstance(model, Model):
        return
    if isinstance(prompts, Model):
        raise ModelError(f"a {type(model).__name__} was given where the model belongs: the model comes first, then the task")
    if isinstance(model, nn.Module):
        raise ModelError(f"a raw {type(model).__name__} was given; wrap it first: model = mi.load(module)")
    if isinstance(model, str):
        raise ModelError(f"the name {model!r} was given where a model is needed; load it first: model = mi.load({model!r})")
    raise ModelError(f"a {type(model).__name__} was given where a model is needed: model = mi.load('smollm2'), then the task")


def check_model_and_task(model: object, task: Any) -> None:
    """Refuse what is not a `Model` and a task with clean and corrupt prompts.

    Raises
    ------
    ModelError
        As `check_model`.
    TaskError
        The task is tokens, texts or something else.
    """
    check_model(model, task)
    # Asked by what it has: the core knows no tasks.
    if all(hasattr(task, name) for name in ("clean", "corrupt", "right", "wrong", "answer_pos")):
        return
    what = "token ids alone were" if isinstance(task, Tensor) else f"a {type(task).__name__} was"
    raise TaskError(
        f"{what} given where a task is needed, which has clean and corrupt prompts and answers: "
        "mi.Task(name=..., clean=..., corrupt=..., right=..., wrong=...), or one of mi.tasks"
    )
