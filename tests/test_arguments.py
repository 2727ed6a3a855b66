"""The public functions given the wrong kind of thing: each says what it was given, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import GraphError, MetricError, ModelError, TaskError

pytestmark = pytest.mark.usefixtures("unchecked_types")


@pytest.fixture(scope="module")
def toy() -> Any:
    return mi.toys.induction(n=4)


# Every entry point that takes a model and a task, called with these two.
ENTRIES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "patch": lambda model, task, _: mi.patch(model, task, "L0.mlp_out"),
    "plan": lambda model, task, _: mi.plan(model, task, "L0.mlp_out"),
    "attribute": lambda model, task, _: mi.attribute(model, task),
    "discover": lambda model, task, _: mi.discover(model, task, edges=5),
    "run_circuits": lambda model, task, circuit: mi.run_circuits(model, task, [circuit]),
    "evaluate": lambda model, task, circuit: mi.evaluate(circuit, model, task, seed=0),
    "describe": lambda model, task, circuit: mi.describe(circuit, model, task),
}
EVERY = pytest.mark.parametrize("entry", ENTRIES)


def refused(call: Callable[[], Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@EVERY
def test_a_raw_module(entry: str, toy: Any) -> None:
    module = torch.nn.Linear(2, 2)
    told = refused(lambda: ENTRIES[entry](module, toy.task, toy.truth["resample"]), ModelError)
    assert told == "a raw Linear was given; wrap it first: model = mi.load(module)"


@EVERY
def test_swapped(entry: str, toy: Any) -> None:
    told = refused(lambda: ENTRIES[entry](toy.task, toy.model, toy.truth["resample"]), ModelError)
    assert told == "a Task was given where the model belongs: the model comes first, then the task"


@EVERY
def test_tokens_where_a_task_is_needed(entry: str, toy: Any) -> None:
    told = refused(lambda: ENTRIES[entry](toy.model, toy.task.clean, toy.truth["resample"]), TaskError)
    assert told == (
        "token ids alone were given where a task is needed, which has clean and corrupt prompts and answers: "
        "mi.Task(name=..., clean=..., corrupt=..., right=..., wrong=...), or one of mi.tasks"
    )
    assert refused(lambda: ENTRIES[entry](toy.model, "ioi", toy.truth["resample"]), TaskError).startswith(
        "a str was given where a task is needed, "
    )


@EVERY
def test_a_name_and_nothing_at_all(entry: str, toy: Any) -> None:
    told = refused(lambda: ENTRIES[entry]("gpt2", toy.task, toy.truth["resample"]), ModelError)
    assert told == "the name 'gpt2' was given where a model is needed; load it first: model = mi.load('gpt2')"
    told = refused(lambda: ENTRIES[entry](None, toy.task, toy.truth["resample"]), ModelError)
    assert told == "a NoneType was given where a model is needed: model = mi.load('smollm2'), then the task"


def test_run_takes_a_model_first(toy: Any) -> None:
    assert refused(lambda: mi.run(toy.task, toy.model), ModelError) == (
        "a Task was given where the model belongs: the model comes first, then the task"
    )
    assert refused(lambda: mi.run(toy.model.hf, toy.task), ModelError) == (
        f"a raw {type(toy.model.hf).__name__} was given; wrap it first: model = mi.load(module)"
    )


@pytest.mark.parametrize("entry", ["evaluate", "describe"])
def test_a_circuit_comes_first(entry: str, toy: Any) -> None:
    call = ENTRIES[entry]
    assert refused(lambda: call(toy.task, toy.truth["resample"], toy.model), GraphError) == (
        "a Model was given where a circuit belongs: the circuit comes first, then model and task"
    )
    assert refused(lambda: call(toy.model, toy.task, "circuit.json"), GraphError) == (
        "the name 'circuit.json' was given where a circuit belongs; load it: mi.Circuit.load(path)"
    )


def test_one_circuit_is_a_list_of_one(toy: Any) -> None:
    circuit = toy.truth["resample"]
    one, many = (mi.run_circuits(toy.model, toy.task, given) for given in (circuit, [circuit]))
    assert torch.equal(one.circuits, many.circuits)


def test_one_edit_is_a_list_of_one(toy: Any) -> None:
    edit = mi.Zero("L0.mlp_out")
    one, many = (mi.run(toy.model, toy.task, edits=given) for given in (edit, [edit]))
    assert torch.equal(one.logits, many.logits)
    assert one.edits == (edit,)


def test_a_model_says_its_shape_to_selectors(toy: Any) -> None:
    assert mi.select("L*.H-1.z", toy.model) == mi.select("L*.H-1.z", toy.model.cfg)
    assert len(mi.select("L*.mlp_out", SimpleNamespace(cfg=toy.model.cfg))) == 2


def test_metrics_take_logits_and_task(toy: Any) -> None:
    def largest(logits: Any) -> Any:
        return logits.amax(dim=-1)

    assert refused(lambda: mi.patch(toy.model, toy.task, "L0.mlp_out", metric=largest), MetricError) == (
        "the metric 'largest' cannot be called with two arguments (too many positional arguments): it is a function of "
        "(logits [batch vocab], task) that returns one number per pair"
    )
    # Further arguments with defaults, or any number of them, are no reason to refuse.
    for fine in (lambda logits, task, scale=2.0: scale * logits.amax(dim=-1), lambda *both: both[0].amax(dim=-1)):
        assert mi.patch(toy.model, toy.task, "L0.mlp_out", metric=fine, normalize=False).values.shape == (1,)


@pytest.mark.parametrize("source", [42, None, ["gpt2"]])
def test_what_is_no_source_of_a_model(source: Any) -> None:
    assert refused(lambda: mi.load(source), ModelError) == (
        f"a model cannot be loaded from a {type(source).__name__}: give a name such as 'smollm2', a folder, "
        "a .gguf file or a Hugging Face module"
    )
