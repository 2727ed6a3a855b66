from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mechinterp.errors import MetricError
from mechinterp.tasks import (
    METRICS,
    Metric,
    Task,
    accuracy,
    gather_answer_logits,
    kl,
    log_prob,
    logit_diff,
    prob_diff,
    resolve_metric,
)


@pytest.fixture
def task() -> Task:
    return Task(
        name="two",
        clean=[[0, 1, 2], [0, 2, 1]],
        corrupt=[[0, 2, 2], [0, 1, 1]],
        right=[[1, 3], [2, -1]],
        wrong=[[2, -1], [1, 0]],
        answer_pos=[2, 1],
    )


LOGITS = torch.tensor([[0.5, 2.0, 1.0, 4.0], [1.0, 3.0, 2.0, -1.0]])


def test_logit_diff_by_hand(task: Task) -> None:
    assert logit_diff(LOGITS, task).tolist() == [3.0 - 1.0, 2.0 - 2.0]


def test_prob_diff_and_log_prob_by_hand(task: Task) -> None:
    odds = [[math.exp(value) for value in row] for row in LOGITS.tolist()]
    first, second = ([value / sum(row) for value in row] for row in odds)
    expected = torch.tensor([first[1] + first[3] - first[2], second[2] - second[1] - second[0]])
    torch.testing.assert_close(prob_diff(LOGITS, task), expected)
    right = torch.tensor([first[1] + first[3], second[2]])
    torch.testing.assert_close(log_prob(LOGITS, task), right.log())


def test_accuracy_is_strict_and_takes_the_best_of_each_side(task: Task) -> None:
    assert accuracy(LOGITS, task).tolist() == [1.0, 0.0]
    assert accuracy(torch.zeros(2, 4), task).tolist() == [0.0, 0.0]


def test_kl_by_hand_and_against_torch(task: Task) -> None:
    reference = LOGITS.flip(0)
    p, q = reference.softmax(-1), LOGITS.softmax(-1)
    torch.testing.assert_close(kl(LOGITS, task, reference), (p * (p / q).log()).sum(-1))
    distribution = torch.distributions.Categorical
    oracle = torch.distributions.kl_divergence(distribution(logits=reference), distribution(logits=LOGITS))
    torch.testing.assert_close(kl(LOGITS, task, reference), oracle)
    assert kl(LOGITS, task, LOGITS).abs().max() < 1e-6


def test_kl_is_finite_where_the_reference_has_probability_zero(task: Task) -> None:
    reference = LOGITS.clone()
    reference[:, 0] = -1e9
    assert kl(LOGITS, task, reference).isfinite().all()


@pytest.mark.parametrize("name", sorted(METRICS))
def test_gradients_match_finite_differences(name: str, task: Task) -> None:
    metric = METRICS[name]
    logits = LOGITS.double().requires_grad_()
    reference = LOGITS.flip(0).double()
    if not metric.differentiable:
        assert not metric(logits, task, reference).requires_grad
        return
    assert torch.autograd.gradcheck(lambda x: metric(x, task, reference), (logits,))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_half_precision_is_computed_in_float32(name: str, task: Task) -> None:
    reference = LOGITS.flip(0)
    half = METRICS[name](LOGITS.bfloat16(), task, reference)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, METRICS[name](LOGITS, task, reference))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_batched_equals_one_by_one(name: str, task: Task) -> None:
    reference = LOGITS.flip(0)
    batched = METRICS[name](LOGITS, task, reference)
    single = [METRICS[name](LOGITS[[row]], task[row], reference[[row]]) for row in range(2)]
    torch.testing.assert_close(batched, torch.cat(single))


def test_gather_takes_each_rows_own_position(task: Task) -> None:
    logits = torch.arange(24.0).reshape(2, 3, 4)
    assert gather_answer_logits(logits, task).tolist() == [logits[0, 2].tolist(), logits[1, 1].tolist()]


def test_resolve(task: Task) -> None:
    assert resolve_metric(None, task) is logit_diff
    assert resolve_metric("kl", task) is kl
    assert resolve_metric(accuracy, task) is accuracy

    def margin(logits: Tensor, task: Task) -> Tensor:
        return logits.amax(dim=-1)

    metric = resolve_metric(margin, task)
    assert metric.name == "margin"
    assert metric(LOGITS, task).tolist() == [4.0, 3.0]


def test_repr() -> None:
    assert repr(logit_diff) == "Metric logit_diff (higher is better)"
    assert repr(kl) == "Metric kl (lower is better)"


def test_resolve_messages(task: Task) -> None:
    with pytest.raises(MetricError) as caught:
        resolve_metric("prob_dif", task)
    assert str(caught.value).startswith("there is no metric 'prob_dif'. Did you mean 'prob_diff'")
    with pytest.raises(MetricError) as caught:
        inspect.unwrap(resolve_metric)(3, task)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "a metric is a name, a Metric or a function of (logits, task), not int. Names: logit_diff, "
        "prob_diff, log_prob, accuracy, kl."
    )


def _returns(value: Any) -> Metric:
    return Metric("mine", lambda logits, task: value)


@pytest.mark.parametrize(
    ("metric", "logits", "message"),
    [
        (
            kl,
            LOGITS,
            (
                "metric 'kl' compares with the clean run and got no reference: pass reference=, the clean "
                "run's logits [batch vocab] at the answer position."
            ),
        ),
        (
            logit_diff,
            LOGITS[:1],
            (
                "metric 'logit_diff' got logits of shape [1, 4] for a task of 2 pairs: it reads [batch "
                "vocab] at the answer position (gather_answer_logits takes them from [batch pos "
                "vocab])."
            ),
        ),
        (
            logit_diff,
            LOGITS.long(),
            "metric 'logit_diff' got logits of dtype torch.int64: it reads floating logits.",
        ),
        (
            logit_diff,
            LOGITS[:, :3],
            ("task 'two' has answer token 3, and the model has 3 logits: make the task with this model's tokenizer."),
        ),
        (
            _returns(torch.tensor(1.0)),
            LOGITS,
            ("metric 'mine' returned shape [] for 2 pairs: return a tensor of shape [2], one number per example, not averaged."),
        ),
        (
            _returns(0.5),
            LOGITS,
            ("metric 'mine' returned float for 2 pairs: return a tensor of shape [2], one number per example, not averaged."),
        ),
        (
            _returns(torch.tensor([True, False])),
            LOGITS,
            "metric 'mine' returned dtype torch.bool: return floating numbers (.float()).",
        ),
        (
            _returns(torch.tensor([1.0, math.nan])),
            LOGITS,
            ("metric 'mine' is nan on pair 1 (1 of 2 pairs are not finite): look at that pair's logits for inf or nan."),
        ),
    ],
)
def test_call_messages(task: Task, metric: Metric, logits: Tensor, message: str) -> None:
    with pytest.raises(MetricError) as caught:
        metric(logits, task)
    assert str(caught.value) == message


def test_reference_and_gather_messages(task: Task) -> None:
    with pytest.raises(MetricError) as caught:
        kl(LOGITS, task, torch.zeros(2, 5))
    assert str(caught.value) == (
        "metric 'kl' got logits of shape [2, 4] and a reference of shape [2, 5]: take both from the same model and task."
    )
    with pytest.raises(MetricError) as caught:
        gather_answer_logits(torch.zeros(2, 1, 4), task)
    assert str(caught.value) == (
        "logits of shape [2, 1, 4] do not fit task 'two': expected [2 3 vocab] (batch pos vocab), every position of every prompt."
    )
