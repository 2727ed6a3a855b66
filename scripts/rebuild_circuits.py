"""Make every circuit in circuits/ again, each by the command that its own file records."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from mechinterp.graph import Circuit

ROOT = Path(__file__).parents[1]


def commands() -> dict[Path, tuple[str, ...]]:
    """The command of each file; a file without one is an error, since nobody could make it again."""
    found = {}
    for file in sorted((ROOT / "circuits").glob("*/circuit.json")):
        certificate = Circuit.load(file).certificate
        if certificate is None or certificate.command[:1] != ("mechinterp",):
            raise SystemExit(f"{file} does not record the command that made it")
        found[file] = certificate.command[1:]
    return found


if __name__ == "__main__":
    for file, words in commands().items():
        print(f"{file.relative_to(ROOT)}: mechinterp {shlex.join(words)}", flush=True)
        subprocess.run([sys.executable, "-m", "mechinterp", *words, *sys.argv[1:]], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "scripts/circuit_library.py"], cwd=ROOT, check=True)
