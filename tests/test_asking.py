"""Options of tasks on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import mechinterp as mi
from mechinterp import asking, cli
from tests.commands import call, refused


def test_options_of_a_task_are_passed_on_and_judged_with(tmp_path: Path) -> None:
    words = ("induction", "--model", "toy:induction", "--option", "corruption=value", "--option", "repeat=4")
    call("discover", *words, "--edges", 5, "--n", 8, "--random-circuits", 0, "--out", tmp_path)
    circuit = mi.Circuit.load(tmp_path)
    made = circuit.provenance["task_provenance"]
    assert (made["corruption"], made["repeat"]) == ("value", 4)
    # Fresh prompts are made in the same way, though it is not said again.
    model = mi.load("toy:induction")
    for seed in (1, 2):
        fresh = cli._fresh(circuit, model, None, None, 4, seed)
        assert (fresh.provenance["corruption"], fresh.provenance["repeat"], fresh.provenance["seed"]) == ("value", 4, seed)


def test_every_generator_has_its_options() -> None:
    known = {name: tuple(asking.generator_options(make)) for name, make in mi.tasks.TASKS.items()}
    assert known == {
        "ioi": ("corruption", "order", "bos"),
        "greater_than": ("bos",),
        "induction": ("length", "repeat", "corruption", "bos"),
        "agreement": ("bos",),
        "gender": ("bos",),
        "docstring": ("corruption", "bos"),
    }
    assert asking.task_options("induction", None, ["length=9", "bos=false"]) == {"length": 9, "bos": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ioi", "--option", "ordr=ABBA"), "the task 'ioi' has no option 'ordr'. Did you mean 'order'?"),
        (("ioi", "--option", "names=Mary"), "the task 'ioi' has no option 'names'. There are: corruption, order, bos."),
        (("ioi", "--option", "bos=maybe"), "--option bos=maybe: bos is a number, or true or false"),
        (("ioi", "--option", "ABBA"), "--option ABBA: write NAME=VALUE, such as order=ABBA"),
        (
            ("toy", "--model", "toy:copy", "--option", "order=ABBA"),
            "--option order=ABBA is of a named task, and these prompts are pairs of their own; leave it out",
        ),
    ],
)
def test_options_that_no_task_has(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(monkeypatch, capsys, "discover", *words) == f"mechinterp: {message}"
