"""The prompts that the command line asks for: named tasks with their options, a toy's own, or pairs from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from mechinterp.errors import MechInterpError, did_you_mean

__all__ = ["REPEATING", "check_names", "generator_options", "task_of", "task_options"]

# What the command line says otherwise.
GIVEN = ("tokenizer", "n", "seed")
# Toys whose model was made for (or trained on) repeated words.
REPEATING = ("induction", "gqa_induction", "trained")


def check_names(model: str, task: str, pairs: Path | None, metric: str | None) -> None:
    """Refuse what can be seen to be wrong before a model is loaded."""
    from mechinterp.tasks import resolve_task
    from mechinterp.tasks.metrics import check_metric_name

    if metric is not None:
        check_metric_name(metric)
    if pairs is not None:
        if not pairs.is_file():
            raise MechInterpError(f"there is no file of pairs {pairs}; give JSON lines, see `mechinterp tasks`")
        return
    name = model.removeprefix("toy:")
    if task == "toy":
        if name == model:
            raise MechInterpError(f"the task 'toy' belongs to the toys, and {model} is none; see `mechinterp tasks`")
        return
    made = resolve_task(task)
    from mechinterp.toys import NAMES

    if name != model and name in NAMES and not (made.__name__ == "induction" and name in REPEATING):
        fits = "'induction' or 'toy'" if name in REPEATING else "'toy'"
        raise MechInterpError(f"{model} cannot do the task {task!r}: it was made for {fits}, its own")


def task_options(task: str, pairs: Path | None, given: list[str] | None) -> dict[str, Any]:
    """What ``--option NAME=VALUE`` says, as the generator takes it."""
    from mechinterp import tasks

    if not given:
        return {}
    if pairs is not None or task == "toy":
        raise MechInterpError(f"--option {given[0]} is of a named task, and these prompts are pairs of their own; leave it out")
    known = generator_options(tasks.resolve_task(task))
    read: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise MechInterpError(f"--option {each}: write NAME=VALUE, such as order=ABBA")
        if name not in known:
            raise MechInterpError(f"the task {task!r} has no option {name!r}. {did_you_mean(name, known)}")
        words: dict[str, Any] = {"true": True, "false": False}
        read[name] = int(value) if value.isdecimal() else words.get(value, value)
        if isinstance(read[name], str) and not any(kind in known[name] for kind in ("str", "Literal")):
            raise MechInterpError(f"--option {each}: {name} is a number, or true or false")
    return read


def generator_options(make: Callable[..., Any]) -> dict[str, str]:
    """What a generator can be told in a word or a number, and its type."""
    kinds = {name: str(each.annotation) for name, each in signature(make).parameters.items() if name not in GIVEN}
    return {name: kind for name, kind in kinds.items() if "Sequence" not in kind}


def task_of(
    model: Any, name: str, pairs: Path | None, n: int | None, *, seed: int, usual: int, options: Mapping[str, Any] | None = None
) -> Any:
    """The prompts of a command: pairs from a file, a toy's own task, or a named one."""
    from mechinterp import tasks

    options = options or {}
    if pairs is not None:
        task = tasks.Task.from_jsonl(pairs, tokenizer_of(model), name=name)
        task = replace(task, provenance={**task.provenance, "path": str(pairs)})
        return task if n is None else task.sample(n, seed=seed)
    if name == "toy":
        return own_task(model.name.removeprefix("toy:"), n, seed=seed, usual=usual)
    make = tasks.resolve_task(name)
    n = usual if n is None else n
    if make is tasks.induction:
        return make(model.tokenizer or model.cfg.d_vocab, n=n, seed=seed, **options)
    return make(tokenizer_of(model), n=n, seed=seed, **options)


def own_task(toy: str, n: int | None, *, seed: int, usual: int) -> Any:
    """The task that a toy was made for; of one that draws nothing, a sample."""
    from mechinterp import toys

    make = toys.maker(toy)
    if "n" in signature(make).parameters:
        return make(n=usual if n is None else n, seed=seed).task
    return make().task if n is None else make().task.sample(n, seed=seed)


def tokenizer_of(model: Any) -> Any:
    if model.tokenizer is None:
        raise MechInterpError(
            f"{model.name} has no tokenizer, which this task needs; use --model smollm2, or the task 'induction'"
        )
    return model.tokenizer
