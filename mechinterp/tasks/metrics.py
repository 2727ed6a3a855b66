"""Metrics: from the logits at the answer position to one number per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp.errors import MetricError, did_you_mean
from mechinterp.shapes import AnswerLogits, PerExample

if TYPE_CHECKING:
    from mechinterp.tasks.task import Task

__all__ = [
    "METRICS",
    "Metric",
    "accuracy",
    "gather_answer_logits",
    "kl",
    "log_prob",
    "logit_diff",
    "prob_diff",
    "resolve_metric",
]


@dataclass(frozen=True)
class Metric:
    """A number per example, read from the logits at the answer position.

    Parameters
    ----------
    name
        What results and error messages call it.
    fn
        ``fn(logits, task)``, or ``fn(logits, task, reference)`` if `needs_reference`, with logits
        [batch vocab]; returns [batch].
    needs_reference
        Whether the metric compares with the logits of the clean run.
    higher_is_better
        False for distances such as `kl`.
    differentiable
        False where the gradient is zero almost everywhere, as for `accuracy`; gradient estimates refuse
        these.
    answers_only
        Whether it reads the logits of the right and wrong answers and of no other token, and each pair by itself.
        Sweeps then compute no other logits, and measure many runs at once.

    Raises
    ------
    MetricError
        When called with logits that do not fit the task, without a reference that it needs, or when `fn`
        returns something else than one finite floating number per example.

    Examples
    --------
    >>> import torch
    >>> from mechinterp.tasks import Metric, Task
    >>> task = Task(name="one", clean=[[0, 1]], corrupt=[[0, 2]], right=[1], wrong=[2])
    >>> margin = Metric("margin", lambda logits, task: logits.max(dim=-1).values)
    >>> margin(torch.tensor([[0.0, 3.0, 1.0]]), task)
    tensor([3.])
    """

    name: str
    fn: Callable[..., Tensor]
    needs_reference: bool = False
    higher_is_better: bool = True
    differentiable: bool = True
    answers_only: bool = False

    def __call__(self, logits: Tensor, task: Task, reference: Tensor | None = None) -> PerExample:
        """One number per example.

        Parameters
        ----------
        logits
            [batch vocab], at the answer position (see `gather_answer_logits`). Half precision is computed in
            float32, float64 stays.
        task
            Of the same batch.
        reference
            [batch vocab], the clean run's logits at the answer position; read only if `needs_reference`.

        Returns
        -------
        Tensor
            [batch], differentiable with respect to `logits` where `differentiable` is true.
        """
        logits = self._checked(logits, task, "logits")
        if not self.needs_reference:
            return self._finished(self.fn(logits, task), len(task))
        if reference is None:
            raise MetricError(
                f"metric {self.name!r} compares with the clean run and got no reference: pass reference=, "
                "the clean run's logits [batch vocab] at the answer position."
            )
        reference = self._checked(reference, task, "reference")
        if reference.shape != logits.shape:
            raise MetricError(
                f"metric {self.name!r} got logits of shape {list(logits.shape)} and a reference of shape "
                f"{list(reference.shape)}: take both from the same model and task."
            )
        return self._finished(self.fn(logits, task, reference), len(task))

    def __repr__(self) -> str:
        return f"Metric {self.name} ({'higher' if self.higher_is_better else 'lower'} is better)"

    def _checked(self, logits: Tensor, task: Task, what: str) -> Tensor:
        if logits.ndim != 2 or len(logits) != len(task):
            raise MetricError(
                f"metric {self.name!r} got {what} of shape {list(logits.shape)} for a task of {len(task)} "
                "pairs: it reads [batch vocab] at the answer position (gather_answer_logits takes them "
                "from [batch pos vocab])."
            )
        if not logits.is_floating_point():
            raise MetricError(f"metric {self.name!r} got {what} of dtype {logits.dtype}: it reads floating logits.")
        largest = max(int(task.right.max()), int(task.wrong.max()))
        if largest >= logits.shape[1]:
            raise MetricError(
                f"task {task.name!r} has answer token {largest}, and the model has {logits.shape[1]} "
                "logits: make the task with this model's tokenizer."
            )
        return logits if logits.dtype == torch.float64 else logits.float()

    def _finished(self, value: Any, n: int) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != (n,):
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise MetricError(
                f"metric {self.name!r} returned {got} for {n} pairs: return a tensor of shape [{n}], one "
                "number per example, not averaged."
            )
        if not value.is_floating_point():
            raise MetricError(f"metric {self.name!r} returned dtype {value.dtype}: return floating numbers (.float()).")
        bad = ~value.detach().isfinite()
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise MetricError(
                f"metric {self.name!r} is {value[row].item()} on pair {row} ({int(bad.sum())} of {n} "
                "pairs are not finite): look at that pair's logits for inf or nan."
            )
        return value


def _logit_diff(logits: Tensor, task: Task) -> Tensor:
    return _mean(logits, task.right) - _mean(logits, task.wrong)


def _prob_diff(logits: Tensor, task: Task) -> Tensor:
    probs = logits.softmax(dim=-1)
    return _sum(probs, task.right) - _sum(probs, task.wrong)


def _log_prob(logits: Tensor, task: Task) -> Tensor:
    of_right = _pick(logits, task.right, fill=float("-inf")).logsumexp(dim=-1)
    return of_right - logits.logsumexp(dim=-1)


def _accuracy(logits: Tensor, task: Task) -> Tensor:
    lowest = float("-inf")
    best_right = _pick(logits, task.right, fill=lowest).amax(dim=-1)
    best_wrong = _pick(logits, task.wrong, fill=lowest).amax(dim=-1)
    return (best_right > best_wrong).to(logits.dtype)


def _kl(logits: Tensor, task: Task, reference: Tensor) -> Tensor:
    expected = reference.log_softmax(dim=-1)
    # kl_div, and not p * (log p - log q): a token of probability zero in the reference counts 0, not nan.
    return torch.nn.functional.kl_div(logits.log_softmax(dim=-1), expected, reduction="none", log_target=True).sum(dim=-1)


def _pick(values: Tensor, ids: Tensor, fill: float) -> Tensor:
    """Take values [batch vocab] at ids [batch answer]: [batch answer], `fill` where the id is padding."""
    ids = ids.to(values.device)
    return values.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, fill)


def _sum(values: Tensor, ids: Tensor) -> Tensor:
    return _pick(values, ids, fill=0.0).sum(dim=-1)


def _mean(values: Tensor, ids: Tensor) -> Tensor:
    return _sum(values, ids) / (ids >= 0).sum(dim=-1).to(values.device)


logit_diff = Metric("logit_diff", _logit_diff, answers_only=True)
"""Mean logit of the right answers minus mean logit of the wrong ones."""

prob_diff = Metric("prob_diff", _prob_diff)
"""Summed probability of the right answers minus that of the wrong ones, in [-1, 1]."""

log_prob = Metric("log_prob", _log_prob)
"""Log of the summed probability of the right answers, in nats."""

accuracy = Metric("accuracy", _accuracy, differentiable=False, answers_only=True)
"""1 where the best right answer beats the best wrong answer, else 0; a tie is 0."""

kl = Metric("kl", _kl, needs_reference=True, higher_is_better=False)
"""KL(reference || logits) in nats, over the whole vocabulary: how far the output is from the clean run's."""

METRICS: Mapping[str, Metric] = MappingProxyType(
    {metric.name: metric for metric in (logit_diff, prob_diff, log_prob, accuracy, kl)}
)
"""The built-in metrics by name."""


def resolve_metric(metric: str | Metric | Callable[[Tensor, Task], Tensor] | None, task: Task) -> Metric:
    """Which metric is meant: a name, a `Metric`, a plain function, or the task's own.

    Parameters
    ----------
    metric
        A name in `METRICS`; a `Metric`; a function of (logits [batch vocab], task) that returns [batch]; or
        None for ``task.metric``.
    task
        Where the default comes from.

    Raises
    ------
    MetricError
        For a name that there is not, or something that cannot be called.

    Examples
    --------
    >>> from mechinterp.tasks import Task
    >>> task = Task(name="one", clean=[[0, 1]], corrupt=[[0, 2]], right=[1], wrong=[2])
    >>> resolve_metric(None, task)
    Metric logit_diff (higher is better)
    >>> resolve_metric("kl", task)
    Metric kl (lower is better)
    >>> def entropy(logits, task):
    ...     return torch.distributions.Categorical(logits=logits).entropy()
    >>> resolve_metric(entropy, task).name
    'entropy'
    """
    if metric is None:
        metric = task.metric
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        return METRICS[check_metric_name(metric)]
    if callable(metric):
        return Metric(getattr(metric, "__name__", type(metric).__name__), metric)
    raise MetricError(
        f"a metric is a name, a Metric or a function of (logits, task), not {type(metric).__name__}. Names: {', '.join(METRICS)}."
    )


def check_metric_name(name: str) -> str:
    """`name` itself if it is in `METRICS`; else a `MetricError` with the nearest names."""
    if name not in METRICS:
        raise MetricError(
            f"there is no metric {name!r}. {did_you_mean(name, METRICS)} A metric of your own is a "
            "function of (logits [batch vocab], task), passed as metric=."
        )
    return name


def gather_answer_logits(logits: Tensor, task: Task) -> AnswerLogits:
    """Which logits does the metric read? Those at each example's answer position.

    Parameters
    ----------
    logits
        [batch pos vocab].
    task
        Of the same batch.

    Returns
    -------
    Tensor
        [batch vocab], same dtype and device, differentiable.

    Raises
    ------
    MetricError
        When batch or positions do not fit the task, for instance when only the last position was computed.

    Examples
    --------
    >>> from mechinterp.tasks import Task
    >>> task = Task(name="one", clean=[[0, 1]], corrupt=[[0, 2]], right=[1], wrong=[2])
    >>> logits = torch.arange(6.0).reshape(1, 2, 3)
    >>> gather_answer_logits(logits, task)
    tensor([[3., 4., 5.]])
    """
    expected: tuple[Any, ...] = tuple(task.clean.shape)
    if logits.ndim != 3 or tuple(logits.shape[:2]) != expected:
        raise MetricError(
            f"logits of shape {list(logits.shape)} do not fit task {task.name!r}: expected [{expected[0]} "
            f"{expected[1]} vocab] (batch pos vocab), every position of every prompt."
        )
    rows = torch.arange(len(task), device=logits.device)
    return logits[rows, task.answer_pos.to(logits.device)]
