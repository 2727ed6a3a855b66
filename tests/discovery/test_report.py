"""The page and the files: they say the numbers, and every circuit can be written."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mechinterp as mi
from mechinterp.discovery.report import report_markdown, save_all, summary


def test_the_page_says_the_numbers() -> None:
    toy = mi.toys.induction()
    found_on, held_out = toy.task.split(seed=0)
    circuit = mi.discover(toy.model, found_on, edges=5)
    report = mi.evaluate(circuit, toy.model, held_out, seed=0)
    stories = mi.describe(circuit, toy.model, found_on)
    page = report_markdown(circuit, report, stories, command=["mechinterp", "discover", "a b"], seconds=12.3)
    assert page.startswith("# The circuit of induction in toy:induction\n")
    assert f"5 of {report.all_edges} edges carry 100%" in page
    assert f"| 5 random circuits of equal size | mean {sum(report.random_faithfulness) / 5:.3f} (" in page
    assert f"{report.beats_random} of 5 beaten |" in page
    assert all(
        (f"| `{story.node}` | {story.effect:+.2f} ± {story.error:.2f} |" in page) is (abs(story.effect) >= 0.005)
        for story in stories
    )
    assert "mechinterp discover 'a b'" in page
    assert f"| accuracy | {report.model_accuracy:.3f} | | {report.circuit_accuracy:.3f} |" in page


def story(node: str, effect: float, error: float, role: str = "") -> mi.HeadStory:
    return mi.HeadStory(node, effect, ("end", 1.0), (("IO", 0.5),), ("m0<v>",), ("logits",), role, error)


def test_heads_within_their_error_are_not_told() -> None:
    toy = mi.toys.induction()
    circuit = toy.truth["resample"]
    report = mi.evaluate(circuit, toy.model, toy.task, seed=0)
    stories = [
        story("a0.h1", 0.30, 0.05, "name mover"),
        story("a0.h2", 0.20, 0.11),
        story("a0.h3", -0.10, 0.02),
        story("a0.h4", -0.10, 0.06),
        story("a0.h5", 0.009, 0.0),
        story("a0.h6", -0.004, 0.0),
        story("a0.h7", 0.02, float("nan")),
    ]
    assert [each.node for each in stories if each.clear] == ["a0.h1", "a0.h3", "a0.h7"]
    page = report_markdown(circuit, report, stories)
    assert "- **name mover**: `a0.h1` attends from end to IO." in page
    assert "- **other heads that help**: `a0.h7` from end to IO." in page
    assert "- **heads that work against the answer**: `a0.h3` from end to IO." in page
    # The table has all that do not round to nothing, with their errors where there are any.
    rows = re.findall(r"^\| `(a\d\.h\d)` \| (.*?) \|", page, re.MULTILINE)
    assert rows == [
        ("a0.h1", "+0.30 ± 0.05"),
        ("a0.h2", "+0.20 ± 0.11"),
        ("a0.h3", "-0.10 ± 0.02"),
        ("a0.h4", "-0.10 ± 0.06"),
        ("a0.h5", "+0.01 ± 0.00"),
        ("a0.h7", "+0.02"),
    ]


def test_errors_are_those_of_patching() -> None:
    toy = mi.toys.copy()
    stories = {each.node: each for each in mi.describe(toy.truth["resample"], toy.model, toy.task)}
    effects = mi.patch(toy.model, toy.task, "L*.H*.z", direction="noise")
    for name, layer, head in (("a1.h2", 1, 2), ("a0.h1", 0, 1)):
        assert stories[name].error == pytest.approx(float(effects.standard_error[layer, head]), abs=1e-5)
        assert stories[name].effect == pytest.approx(float(effects.values[layer, head]), abs=1e-5)


@pytest.mark.parametrize("which", ["full", "empty"])
def test_every_circuit_can_be_written(setting: Any, which: str, tmp_path: Path) -> None:
    circuit = getattr(mi.Circuit, which)(setting.model)
    report = mi.evaluate(circuit, setting.model, setting.task, seed=0, random_circuits=0)
    stories = mi.describe(circuit, setting.model, setting.task)
    paths = save_all(tmp_path / "new" / "folder", circuit, report, stories)
    assert [path.name for path in paths] == ["circuit.json", "diagram.svg", "diagram.html", "report.md"]
    assert dict(mi.Circuit.load(paths[0]).report) == report.to_json()
    page = paths[3].read_text()
    # Nothing is said about random circuits where there were none.
    assert "andom circuits" not in page
    assert not re.search(r"\bnan\b", page)


def test_circuits_of_neurons_list_their_neurons_and_no_edges() -> None:
    toy = mi.toys.memory()
    circuit = mi.discover(toy.model, toy.task, unit="neuron", nodes=6, steps=3)
    report = mi.evaluate(circuit, toy.model, toy.task, seed=0, random_circuits=0)
    page = report_markdown(circuit, report, mi.describe(circuit, toy.model, toy.task))
    assert "| head | effect | at | attends to | usually called |" in page
    (line,) = [line for line in page.splitlines() if line.startswith("**Neurons**")]
    scores = circuit.provenance["selection"]["node_scores"]
    best = max((name for name in scores if ".n" in name), key=lambda name: abs(scores[name]))
    assert line.startswith(f"**Neurons** with the largest scores: `{best}` {scores[best]:+.3f}")
    counts = ", ".join(f"{mlp} {len(kept)}" for mlp, kept in circuit.neurons.items())
    assert line.endswith(f"Kept of each MLP: {counts}.")


REPORT = mi.Report(
    task="t",
    model="m",
    metric="logit_diff",
    prompts=7,
    clean=3.0,
    corrupt=-1.0,
    circuit=2.5,
    faithfulness=0.875,
    faithfulness_interval=(0.8, 0.95),
    mean_of_ratios=0.9,
    random_faithfulness=(),
    random_interval=None,
    beats_random=0,
    model_accuracy=1.0,
    circuit_accuracy=0.75,
    edges=9,
    connected=5,
    all_edges=110,
    nodes=4,
    ablation="resample",
    seed=0,
    forwards=12,
    seconds=0.1,
    empty=-1.0,
)


def found(**said: Any) -> mi.Circuit:
    shape = mi.GraphShape(n_layers=2, n_heads=4)
    origin = {"method": "eap", "prompts": 1, "forwards": 2, "backwards": 3, "selection": {"rule": "top", "n": 2}}
    return mi.Circuit(shape, dict.fromkeys(mi.Circuit.full(shape).edges[:2]), origin | said)


def test_the_summary_says_the_numbers() -> None:
    stories = [story(f"a0.h{i}", 0.5 - 0.1 * i, 0.5 if i == 1 else 0.01) for i in range(7)]
    assert summary(found(), REPORT, stories).split("\n") == [
        "circuit        5 connected edges of 110, 4 nodes (eap, top)",
        "task           t on m, 1 prompt to find it, 7 held out",
        "logit_diff     clean 3.000, corrupt -1.000, circuit 2.500",
        "accuracy       model 1.000, circuit 0.750",
        "faithfulness   0.875 (0.800 to 0.950)",
        # Of the first five those that are clear.
        "heads          a0.h0 +0.50, a0.h2 +0.30, a0.h3 +0.20, a0.h4 +0.10",
        "cost           14 forward, 3 backward passes",
    ]
    rivals = replace(REPORT, random_faithfulness=(0.125, 0.375), random_interval=(0.125, 0.375))
    lines = summary(found(), rivals, []).split("\n")
    assert lines[4] == "faithfulness   0.875 (0.800 to 0.950), random circuits 0.250"
    assert lines[5] == "heads          none with a clear effect"


@pytest.mark.parametrize(
    ("report", "said", "line"),
    [
        ({"pairs": 3}, {}, "3 pairs of edge and span on 5 connected edges of 110, 4 nodes (eap, top)"),
        (
            {"neurons": 6},
            {"unit": "neuron", "selection": {"rule": "edges among nodes", "n_nodes": 9}},
            "6 neurons in the place of whole MLPs, 5 connected edges of 110, 4 nodes (eap, neurons)",
        ),
        # Where a method chooses by itself; more or fewer than were asked for.
        ({}, {"method": "acdc", "selection": {"rule": "acdc"}}, "5 connected edges of 110, 4 nodes (acdc)"),
        ({}, {"selection": {"rule": "top", "n": 4}}, "5 connected edges of 110, 4 nodes (eap, top; 4 asked for, 2 found)"),
        ({}, {"selection": {"rule": "top", "n": 1}}, "5 connected edges of 110, 4 nodes (eap, top; 1 asked for, 2 found)"),
    ],
)
def test_the_summary_says_how_it_was_chosen(report: dict[str, Any], said: dict[str, Any], line: str) -> None:
    assert summary(found(**said), replace(REPORT, **report), []).split("\n")[0] == f"circuit        {line}"
