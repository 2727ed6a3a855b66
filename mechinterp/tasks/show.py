"""How a task shows itself: a small table for notebooks, and a frame."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from mechinterp.errors import missing_extra

if TYPE_CHECKING:
    import pandas

    from mechinterp.tasks.task import Task

__all__ = ["task_frame", "task_html"]

SHOWN = 5
# Weight and underline beside the colour: the mark survives print and colour blindness.
MARK = "background:#fde2c4;font-weight:bold;text-decoration:underline"
CELL = "text-align:left;vertical-align:top;padding:3px 8px;border-bottom:1px solid #ddd"


def task_html(task: Task) -> str:
    """The headline and the first pairs as one self-contained HTML table, differing tokens marked."""
    head = "".join(f'<th style="{CELL}">{title}</th>' for title in ("", "clean", "corrupt", "right", "wrong"))
    rows = "".join(_row(task, number) for number in range(min(SHOWN, len(task))))
    more = f'<div style="color:#555">and {len(task) - SHOWN} more</div>' if len(task) > SHOWN else ""
    return (
        f'<div style="color:#111;background:#fff;font:13px sans-serif"><b>{escape(repr(task))}</b>'
        f'<table style="border-collapse:collapse;color:#111;background:#fff"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>{more}</div>"
    )


def task_frame(task: Task) -> pandas.DataFrame:
    """One row per pair: prompts and answers as text, then the answer position and every named position."""
    try:
        import pandas
    except ImportError as error:
        raise missing_extra("a table", "pandas", "frames") from error
    columns = {
        "clean": [_text(task, row) for row in _real_tokens(task, "clean")],
        "corrupt": [_text(task, row) for row in _real_tokens(task, "corrupt")],
        "right": [_answers(task, row) for row in task.right.tolist()],
        "wrong": [_answers(task, row) for row in task.wrong.tolist()],
        "answer_pos": task.answer_pos.tolist(),
        "first_difference": task.first_difference.tolist(),
    }
    for name, where in task.positions.items():
        columns[f"pos_{name}"] = where.tolist()
    frame = pandas.DataFrame(columns)
    frame.index.name = "batch"
    return frame


def _real_tokens(task: Task, side: str) -> list[list[int]]:
    tokens = getattr(task, side).tolist()
    return [row[:length] for row, length in zip(tokens, task.lengths.tolist(), strict=True)]


def _text(task: Task, tokens: list[int]) -> str:
    # Ids without their text would run together.
    return ("" if task.strings is not None else " ").join(task.string(token) for token in tokens)


def _answers(task: Task, ids: list[int]) -> str:
    return " | ".join(task.string(token) for token in ids if token >= 0)


def _row(task: Task, number: int) -> str:
    pair = task[number]
    differs = pair.differs[0].tolist()
    cells = [f"{number}"]
    for side in ("clean", "corrupt"):
        (tokens,) = _real_tokens(pair, side)
        spelled = [
            f'<span style="{MARK}">{escape(task.string(token))}</span>' if different else escape(task.string(token))
            for token, different in zip(tokens, differs, strict=False)
        ]
        cells.append(("" if task.strings is not None else " ").join(spelled))
    cells += [escape(_answers(task, pair.right[0].tolist())), escape(_answers(task, pair.wrong[0].tolist()))]
    return "<tr>" + "".join(f'<td style="{CELL}">{cell}</td>' for cell in cells) + "</tr>"
