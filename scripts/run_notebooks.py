"""Execute the notebooks again, in place, and keep what they show: no timings, nor what other libraries say on stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def tidy(notebook: Any) -> None:
    """Leave out what changes with every run and says nothing about the results."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        kept: list[Any] = []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                continue
            # What was printed comes in pieces, cut where the kernel happened to send it.
            if kept and output.output_type == "stream" == kept[-1].output_type:
                kept[-1].text += output.text
            else:
                kept.append(output)
        cell.outputs = kept


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb")):
        print(path.name, flush=True)
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}, record_timing=False).execute()
        tidy(notebook)
        nbformat.write(notebook, path)
