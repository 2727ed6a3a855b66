"""Amounts of memory, read and measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mechinterp.core import memory
from mechinterp.core.memory import bytes_of, free_bytes, in_words
from mechinterp.errors import SelectorError


@pytest.mark.parametrize(
    ("amount", "size"),
    [(1, 1), ("1B", 1), ("2 GiB", 2 << 30), ("2gib", 2 << 30), ("1.5 KiB", 1536), (" 500 MB ", 500_000_000), ("1 TB", 10**12)],
)
def test_amounts(amount: int | str, size: int) -> None:
    assert bytes_of(amount) == size


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ("much", "cannot read 'much' as an amount of memory; write a number of bytes, or '2 GiB' or '500 MB'"),
        ("2", "cannot read '2' as an amount of memory; write a number of bytes, or '2 GiB' or '500 MB'"),
        ("2 GiBs", "there is no unit 'GiBs' of memory in '2 GiBs'. Did you mean 'GiB' or 'GB'?"),
        ("0 MB", "'0 MB' is less than one byte of memory; write something like '2 GiB'"),
        (-5, "-5 is less than one byte of memory; write something like '2 GiB'"),
    ],
)
def test_refusals(amount: int | str, message: str) -> None:
    with pytest.raises(SelectorError, match=f"^{re.escape(message)}$"):
        bytes_of(amount)


def test_free() -> None:
    # Not more than there is, and not nothing.
    total = int(next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)) << 10
    assert 1 << 20 < free_bytes("cpu") <= total
    assert free_bytes(torch.device("cpu")) > 0


def test_containers(tmp_path: Path) -> None:
    for name, text in (("max", "1000000"), ("current", "700000"), ("stat", "anon 5\ninactive_file 100000\nfile 7")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory._container(tmp_path) == 400_000
    (tmp_path / "memory.max").write_text("max")
    assert memory._container(tmp_path) is None
    assert memory._container(tmp_path / "nowhere") is None


def test_a_device_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: object())
    assert free_bytes("meta") == 2 << 30

    class Module:
        mem_get_info = staticmethod(lambda device: (100, 1000))
        memory_reserved = staticmethod(lambda device: 50)
        memory_allocated = staticmethod(lambda device: 20)

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    assert free_bytes("meta") == 130


def test_words() -> None:
    assert [in_words(size) for size in (5, 2048, 3 << 19, 5 << 30)] == ["5 B", "2.0 KiB", "1.5 MiB", "5.0 GiB"]
