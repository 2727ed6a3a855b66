"""What the README shows is what happens: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mechinterp as mi
from mechinterp.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    assert isinstance(names["report"], mi.Report)
    assert names["report"].faithfulness > 0.5
    assert {path.name for path in tmp_path.iterdir()} == {"induction.json", "induction.svg"}


def test_names_exist() -> None:
    for name in set(re.findall(r"\bmi\.(\w+)", README)):
        assert name in mi.__all__, name


def test_commands_exist() -> None:
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    told = [words for words in commands if words and words[0] == "mechinterp"]
    assert len(told) >= 5
    known = {command.name or command.callback.__name__: command for command in app.registered_commands if command.callback}
    for words in told:
        shown = CliRunner().invoke(app, [words[1], "--help"])
        assert shown.exit_code == 0 and words[1] in known
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, (words, option)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
