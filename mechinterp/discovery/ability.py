"""Does the model do the task at all? To be asked before anything is explained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch

from mechinterp.core.answers import answer_logits
from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.model import Model
from mechinterp.core.plan import rows_per_forward
from mechinterp.patching.compare import MetricLike
from mechinterp.tasks import Task, accuracy, resolve_metric

__all__ = ["Ability", "check_task"]


@dataclass(frozen=True)
class Ability:
    """How well a model does a task. Made by `check_task`.

    Parameters
    ----------
    accuracy, corrupt_accuracy
        Share of prompts on which the best right answer has a larger logit than the best wrong one; of the corrupt prompts by
        the clean ones' answers. Where right and wrong trade places, 1 less the second is the accuracy on those.
    interval
        Of ``accuracy``: Wilson's, 95 %.
    first
        Share of the clean prompts whose most likely token, of the whole vocabulary, is a right answer.
    clean, corrupt
        Mean of the metric.
    """

    task: str
    model: str
    prompts: int
    tokens: int
    accuracy: float
    interval: tuple[float, float]
    corrupt_accuracy: float
    first: float
    metric: str
    clean: float
    corrupt: float
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"Ability: {self.task} on {self.model}, {self.prompts} prompts: accuracy {self.accuracy:.3f} "
            f"({low:.3f} to {high:.3f}), {self.corrupt_accuracy:.3f} on corrupt prompts; first choice {self.first:.3f}; "
            f"{self.metric} clean {self.clean:.3f}, corrupt {self.corrupt:.3f}"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def check_task(model: Model, task: Task, *, metric: MetricLike = None) -> Ability:
    """Does the model do this task, and does the counterfactual take it away?

    Parameters
    ----------
    model, task
        What to run on what.
    metric
        As in `mechinterp.patch`.

    Returns
    -------
    Ability
        Accuracy, and the mean of the metric on clean and corrupt prompts.

    Notes
    -----
    Cost: 2 forward passes over the prompts. Accuracy compares right and wrong answers alone, ``first`` all tokens: a model may
    know which of two is right and still say a third.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> mi.check_task(toy.model, toy.task).accuracy
    1.0
    """
    check_model_and_task(model, task)
    rule, task = resolve_metric(metric, task), task.to(model.device)
    right, others, values, moved, best = [], [], [], [], []
    at_once = rows_per_forward(model, task.clean.shape[1])
    for start in range(0, len(task), at_once):
        part = task[start : start + at_once]
        with torch.no_grad():
            clean, corrupt = (answer_logits(model, tokens, part.answer_pos) for tokens in (part.clean, part.corrupt))
        right.append(accuracy(clean, part))
        others.append(accuracy(corrupt, part))
        values.append(rule(clean, part, clean))
        moved.append(rule(corrupt, part, clean))
        best.append((clean.argmax(dim=-1, keepdim=True) == part.right).any(dim=1).float())
    share = float(torch.cat(right).mean())
    return Ability(
        task=task.name,
        model=model.name,
        prompts=len(task),
        tokens=task.clean.shape[1],
        accuracy=share,
        interval=_wilson(share, len(task)),
        corrupt_accuracy=float(torch.cat(others).mean()),
        first=float(torch.cat(best).mean()),
        metric=rule.name,
        clean=float(torch.cat(values).float().mean()),
        corrupt=float(torch.cat(moved).float().mean()),
        provenance=dict(task.provenance),
    )


def _wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Where the true share lies, if n draws gave this one. Unlike the bootstrap's, of some width where all were right."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
