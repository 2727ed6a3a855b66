"""Files of circuits: which one is meant, what is in it, and writing it without ever leaving half of one."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from mechinterp.errors import FileFormatError

__all__ = ["FORMAT", "VERSION", "file_of", "read_content", "write_atomically"]

FORMAT: Final = "mechinterp-circuit"
# 1 knew no spans, and 2 no neurons; a circuit without them is written as what it would have been.
VERSION: Final = 3


def file_of(path: Path) -> Path:
    """The file itself, or the one that `mechinterp discover` wrote into this folder."""
    if not path.is_dir():
        return path
    if not (path / "circuit.json").is_file():
        raise FileFormatError(f"{path} is a folder without a circuit.json. Give the file that Circuit.save() wrote.")
    return path / "circuit.json"


def read_content(path: Path) -> dict[str, Any]:
    """The checked JSON object of a circuit file."""
    remedy = "Circuits are JSON files written by Circuit.save()."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} is not JSON ({error}). {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise FileFormatError(f"{path} is not a circuit: its format is {found!r}, not {FORMAT!r}. {remedy}")
    if content.get("version") not in range(1, VERSION + 1):
        raise FileFormatError(
            f"{path} is of version {content.get('version')!r}; this mechinterp reads versions 1 to {VERSION}. Upgrade mechinterp."
        )
    return content


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes private files; a saved circuit gets the permissions that any new file would.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
