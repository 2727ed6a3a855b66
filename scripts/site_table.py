"""Write the table of docs/sites.md again: which sites are proved on which architecture.

Run: python scripts/site_table.py [--check]     (a few seconds; --check changes nothing and fails where the file is old)

Each row is the audit of a tiny random model of that architecture, so the table says what `mechinterp.load` will
prove or refuse, and why. The models are those of tests/core/architectures.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "sites.md"
START, END = "<!-- table: python scripts/site_table.py -->", "<!-- end of the table -->"


def audits(names: Iterable[str]) -> dict[str, Any]:
    """The audit of a tiny random model of each architecture."""
    import mechinterp as mi
    from tests.core.architectures import module_of

    return {name: mi.load(module_of(name), name=name).audit for name in names}


def cells(audit: Any, footnotes: dict[str, int]) -> list[str]:
    """For each site a mark, or the number of the footnote that says why it is refused or what is special."""
    from mechinterp.core.sites import KINDS

    row = []
    for site in KINDS:
        said = audit.refused.get(site) or audit.notes.get(site)
        if said is None:
            row.append("✓")
            continue
        number = footnotes.setdefault(general(said, audit.model), len(footnotes) + 1)
        row.append(f"{'✓' if site in audit.notes else '–'} [{number}]")
    return row


def general(reason: str, name: str) -> str:
    """A reason without the name of the model, so that equal ones share a footnote."""
    import re

    from tests.core.architectures import ARCHITECTURES

    for word in (f"{name} ({ARCHITECTURES[name].model})", ARCHITECTURES[name].model, name):
        reason = reason.replace(word, "the model")
    reason = reason.replace("the q of", "the queries or keys of").replace("the k of", "the queries or keys of")
    # How far off differs by layer and model.
    return re.sub(r": in layer \d+ it is off by [\d.e+-]+ of the largest number", "", reason)


def table(found: dict[str, Any]) -> str:
    """The table and its footnotes, as Markdown."""
    from mechinterp.core.sites import KINDS

    footnotes: dict[str, int] = {}
    lines = [f"| architecture | {' | '.join(f'`{site}`' for site in KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells(audit, footnotes))} |" for name, audit in found.items()]
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in footnotes.items())])


def main(check: bool) -> int:
    sys.path.insert(0, str(ROOT))
    from tests.core.architectures import ARCHITECTURES

    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(START)[0], page.split(END)[1]
    made = f"{before}{START}\n\n{table(audits(ARCHITECTURES))}\n\n{END}{after}"
    if check:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
