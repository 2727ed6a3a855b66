"""Amounts of memory: as people write them, and as much as is free."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from mechinterp.errors import SelectorError, did_you_mean

__all__ = ["bytes_of", "free_bytes", "in_words"]

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*")
# Where a system does not say what it has left.
_UNKNOWN = 2 << 30


def bytes_of(amount: int | str) -> int:
    """How many bytes is this amount of memory?

    Parameters
    ----------
    amount
        A number of bytes, or a number with a unit: ``"2 GiB"``, ``"500 MB"``, ``"1.5GiB"``.

    Raises
    ------
    SelectorError
        It cannot be read, has an unknown unit, or is less than one byte.

    Examples
    --------
    >>> bytes_of("2 GiB"), bytes_of("500 MB"), bytes_of(4096)
    (2147483648, 500000000, 4096)
    """
    if isinstance(amount, str):
        match = _AMOUNT.fullmatch(amount)
        if match is None:
            raise SelectorError(f"cannot read {amount!r} as an amount of memory; write a number of bytes, or '2 GiB' or '500 MB'")
        units = {unit.lower(): size for unit, size in _UNITS.items()}
        if match[2].lower() not in units:
            raise SelectorError(f"there is no unit {match[2]!r} of memory in {amount!r}. {did_you_mean(match[2], _UNITS)}")
        size = int(float(match[1]) * units[match[2].lower()])
    else:
        size = int(amount)
    if size < 1:
        raise SelectorError(f"{amount!r} is less than one byte of memory; write something like '2 GiB'")
    return size


def free_bytes(device: torch.device | str) -> int:
    """How many bytes can still be allocated on this device, without anything being paged out?

    Of the machine's own memory: what the system calls available, and no more than the limit of the container. Of an
    accelerator: what its driver has left and what torch keeps for reuse. A system that does not say counts as 2 GiB.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return min(size for size in (_machine(), _container()) if size is not None)
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return _UNKNOWN
    kept = module.memory_reserved(device) - module.memory_allocated(device)
    return int(module.mem_get_info(device)[0] + kept)


def in_words(size: int) -> str:
    """An amount of memory for people.

    Examples
    --------
    >>> in_words(3 << 19)
    '1.5 MiB'
    """
    for unit in ("GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f} {unit}"
    return f"{size} B"


def _machine() -> int:
    # The pages that sysconf calls available leave out the file cache, which gives way when memory is asked for.
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    for name, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        try:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
        except (AttributeError, ValueError, OSError):
            continue
    return _UNKNOWN


def _container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        limit = int((root / "memory.max").read_text(encoding="ascii"))
        used = int((root / "memory.current").read_text(encoding="ascii"))
        stat = (root / "memory.stat").read_text(encoding="ascii").split()
        # File pages that nobody works with count as used, and give way.
        return max(1, limit - used + int(stat[stat.index("inactive_file") + 1]))
    except (OSError, ValueError):
        return None
