"""The page and the files: they say the numbers, and every circuit can be written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import mechinterp as mi
from mechinterp.discovery.report import report_markdown, save_all


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
    assert all(f"| `{story.node}` | {story.effect:+.2f} |" in page for story in stories)
    assert "mechinterp discover 'a b'" in page
    assert f"| accuracy | {report.model_accuracy:.3f} | | {report.circuit_accuracy:.3f} |" in page


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
