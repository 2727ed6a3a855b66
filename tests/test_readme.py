"""What the README shows is what happens: its Python runs, its commands work, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mechinterp as mi
from mechinterp.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """The arguments of every line of a shell block that calls this program."""
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == [program]]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


# --- Python


def test_every_block_runs(empty: Path) -> None:
    names: dict[str, object] = {}
    assert blocks("python")
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    assert {path.name for path in empty.iterdir()} == {"induction.json", "induction.svg"}
    report, circuit = names["report"], names["circuit"]
    assert isinstance(report, mi.Report)
    assert report.faithfulness > 0.9
    assert isinstance(circuit, mi.Circuit)
    saved = mi.Circuit.load("induction.json")
    assert saved == circuit.with_report(report)
    assert saved.certificate is not None and saved.certificate.claims["faithfulness"] == report.faithfulness
    # "Every result shows itself: `effects` is a heat map, `circuit` a diagram, `report` a summary."
    effects = names["effects"]
    assert isinstance(effects, mi.Effects)
    assert effects.axes == ("layer", "head")
    assert (effects._repr_svg_() or "").startswith("<svg")
    assert (circuit._repr_svg_() or "").startswith("<svg")
    assert "faithfulness" in report._repr_html_()


def test_every_name_exists() -> None:
    names = set(re.findall(r"\bmi((?:\.\w+)+)", README))
    assert len(names) >= 8
    for name in names:
        value: object = mi
        for part in name.split(".")[1:]:
            value = getattr(value, part)


def test_every_site_can_be_selected(smollm2: mi.Model) -> None:
    sentence = re.search(r"Sites are written as the field writes\s+them: (.*?)\n\n", README, re.DOTALL)
    assert sentence
    sites = re.findall(r"`([^`]+)`", sentence[1])
    assert len(sites) == 5
    for site in sites:
        assert len(mi.select(site, smollm2.cfg)) >= 1


# --- the command line


def test_every_command_works_on_a_toy(empty: Path) -> None:
    """All lines in their order, with the toy and its task instead of the real ones."""
    told = {}
    lines = commands("mechinterp")
    assert {words[0] for words in lines} == {"discover", "evaluate", "verify", "draw", "patch", "tasks", "models"}
    for words in lines:
        words = ["induction" if word == "ioi" else "toy:induction" if word == "smollm2" else word for word in words]
        if words[0] == "patch":
            words += ["--model", "toy:induction"]
        if "--edges" in words:
            words[words.index("--edges") + 1] = "12"
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, (words, result.output)
        told[words[0]] = result.stdout
    written = {path.relative_to(empty).as_posix() for path in empty.rglob("*") if path.is_file()}
    found = {f"circuits/ioi/{name}" for name in ("circuit.json", "diagram.svg", "diagram.html", "report.md")}
    assert written == found | {"heads.png", "ioi.pdf"}
    assert "hold" in told["verify"]
    assert "faithfulness" in told["discover"] and "faithfulness" in told["evaluate"]
    assert "ioi" in told["tasks"] and "smollm2" in told["models"]


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [words[0] for words in commands("make")]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


# --- what it points to


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_every_folder_and_file_that_it_names_exists() -> None:
    for name in re.findall(r"`([\w./-]+/)`", README):
        assert (ROOT / name).is_dir(), name


def test_it_fits_on_a_screen() -> None:
    assert len(README.splitlines()) <= 70
