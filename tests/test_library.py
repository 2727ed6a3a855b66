"""The library of circuits: its page says what the files claim, and the files are of a size to be shipped."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Any

import pytest

import mechinterp as mi

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(file.parent for file in (ROOT / "circuits").glob("*/circuit.json"))


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("circuit_library", ROOT / "scripts" / "circuit_library.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_files_say(script: Any) -> None:
    """After a change of a circuit: python scripts/circuit_library.py --keep."""
    text = (ROOT / "circuits" / "README.md").read_text(encoding="utf-8")
    assert text == script.page(script.kept(text))
    assert all(f"[{folder.name}]({folder.name}/report.md)" in text for folder in FOLDERS)


def test_a_circuit_is_of_a_task_that_the_model_can_do(script: Any) -> None:
    table = script.kept((ROOT / "circuits" / "README.md").read_text(encoding="utf-8"))
    asked = [line.split()[1] for line in table.splitlines()[2:]]
    assert asked == list(mi.tasks.TASKS)
    able = set(asked) - set(script.unable(table))
    found = {each.task for each in script.certificates().values() if each.model == "smollm2"}
    assert found == able


def test_a_task_that_is_not_done_is_told(script: Any) -> None:
    table = "| ioi | 128 | 17 | 0.984 (0.945 to 0.996) | 0.4 |\n| gender | 128 | 11 | 0.900 (0.836 to 0.941) | 0.1 |"
    assert script.unable(table) == ["gender"]
    assert "Left out: gender." in script.page(table)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_small_and_whole(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {"circuit.json", "diagram.svg", "diagram.html", "report.md"}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 250_000
    certificate = mi.Circuit.load(folder).certificate
    assert certificate is not None
    assert shlex.join(certificate.command) in (folder / "report.md").read_text(encoding="utf-8")


def test_the_thorough_certificate_is_of_the_circuit_of_the_demo() -> None:
    quick, thorough = (mi.Circuit.load(ROOT / "circuits" / f"ioi{name}-smollm2-135m") for name in ("", "-thorough"))
    assert quick.edges == thorough.edges
    assert thorough.certificate is not None
    assert {"completeness", "minimality", "hypotheses", "ablations", "curve", "stability"} <= set(
        thorough.certificate.claims["further"]
    )


def test_the_page_on_ioi_says_what_the_certificate_says() -> None:
    page = (ROOT / "docs" / "ioi.md").read_text(encoding="utf-8")
    certificate = mi.Circuit.load(ROOT / "circuits" / "ioi-thorough-smollm2-135m").certificate
    assert certificate is not None
    claims, further = certificate.claims, certificate.claims["further"]
    low, high = claims["faithfulness_interval"]
    assert f"| faithfulness on held-out prompts | {claims['faithfulness']:.3f} ({low:.3f} to {high:.3f});" in page
    assert f"| {further['without']:.3f} of the behaviour is left |" in page
    assert f"Jaccard {further['stability']['jaccard']:.3f} " in page
    assert f"CPR {further['curve']['cpr']:.3f}, CMD {further['curve']['cmd']:.3f}" in page
    assert f"    {shlex.join(certificate.command)}\n" in page and "`python scripts/ioi_page.py`" in page
    assert "## What does not follow" in page
