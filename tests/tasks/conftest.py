"""Small things that the task tests share; all of it works offline."""

from __future__ import annotations

from typing import Any

import pytest

from mechinterp.tasks import Task, word_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture
def pair() -> dict[str, Any]:
    """The arguments of a valid task of two pairs, to be broken one by one."""
    return {
        "name": "mine",
        "clean": [[0, 5, 7], [0, 6, 7]],
        "corrupt": [[0, 6, 7], [0, 5, 7]],
        "right": [1, 2],
        "wrong": [2, 1],
    }


@pytest.fixture
def task(pair: dict[str, Any]) -> Task:
    return Task(**pair)
