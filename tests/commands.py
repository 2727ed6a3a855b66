"""Calls of the command line in the process of the tests."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from mechinterp import cli


def call(*words: object) -> str:
    result = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a call that has to fail says on the error stream, in one line."""
    monkeypatch.setattr(sys, "argv", ["mechinterp", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in told
    return " ".join(told.split())
