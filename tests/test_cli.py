"""The command line from end to end on a toy, and what it says when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mechinterp as mi
from mechinterp.cli import app


def call(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("circuit")
    told = call("discover", "induction", "--model", "toy:induction", "--edges", "12", "--n", "16", "--out", str(target))
    assert "faithfulness" in told and "report.md" in told and len(told.strip().splitlines()) == 10
    return target


def test_discover_writes_everything(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"circuit.json", "diagram.svg", "diagram.html", "report.md"}
    circuit = mi.Circuit.load(folder / "circuit.json")
    assert len(circuit) >= 12 and circuit.n_connected == len(circuit)
    report = json.loads((folder / "circuit.json").read_text())["report"]
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert f"{report['faithfulness']:.3f}" in page and f"{report['clean']:.3f}" in page
    assert "a1.h5" in page


def test_evaluate_and_draw(folder: Path, tmp_path: Path) -> None:
    told = call("evaluate", str(folder / "circuit.json"), "--n", "8", "--random-circuits", "1", "--model", "toy:induction")
    assert "faithfulness" in told
    call("draw", str(folder / "circuit.json"), "--out", str(tmp_path / "c.png"))
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_patch() -> None:
    told = call("patch", "induction", "L*.H*.z", "--model", "toy:induction", "--n", "4", "--top", "2")
    assert {line.split()[0] for line in told.splitlines()[1:]} == {"L0.H3.z", "L1.H5.z"}


def test_lists_and_help() -> None:
    assert {"ioi", "greater_than", "induction"} <= {line.split()[0] for line in call("tasks").splitlines()}
    assert {"smollm2", "toy:induction"} <= {line.split()[0] for line in call("models").splitlines()}
    for name in ("discover", "evaluate", "draw", "patch", "tasks", "models"):
        assert name in call("--help") and call(name, "--help")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["discover", "ioy", "--model", "toy:induction"], "there is no task 'ioy'. Did you mean 'ioi'?"),
        (["draw", "missing.json"], "missing.json"),
        (["patch", "induction", "L*.H*.y", "--model", "toy:induction"], "there is no site 'y'"),
    ],
)
def test_errors_have_no_traceback(words: list[str], says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mechinterp", *words], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
