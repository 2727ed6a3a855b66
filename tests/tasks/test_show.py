from __future__ import annotations

import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from mechinterp.errors import MissingExtraError
from mechinterp.tasks import Task, ioi


class Reader(HTMLParser):
    """Collects the text and every tag and attribute, and whether the tags close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.marked: list[str] = []
        self.attributes: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data
        if self.open[-1:] == ["span"]:
            self.marked.append(data)


def test_html_shows_the_first_pairs_and_marks_what_differs(tokenizer: Any) -> None:
    task = ioi(tokenizer, n=7, seed=0)
    html = task._repr_html_()
    reader = Reader(html)
    assert reader.open == []
    assert repr(task) in html
    assert "and 2 more" in html
    assert len(reader.cells) == 5 * 5
    assert reader.cells[3] == task.string(int(task.right[0, 0]))
    changed = [task.string(int(task.clean[row, 12])) for row in range(5)]
    assert reader.marked[::2] == changed
    assert reader.attributes == {"style"}


def test_html_is_self_contained_and_escaped() -> None:
    evil = "<script>alert(1)</script>"
    task = Task(evil, [[0, 1]], [[0, 2]], [1], [2], strings={0: "<s>", 1: evil, 2: "&"})
    html = task._repr_html_()
    assert "<script" not in html and "http" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert Reader(html).cells == ["0", f"<s>{evil}", "<s>&", evil, "&"]


def test_html_shows_ids_without_strings_and_hides_padding() -> None:
    task = Task("ids", [[3, 1, 9]], [[4, 1, 9]], [[1, -1]], [2], mask=[[True, True, False]])
    assert Reader(task._repr_html_()).cells == ["0", "<3> <1>", "<4> <1>", "<1>", "<2>"]


def test_to_frame() -> None:
    task = Task(
        "frame",
        [[0, 1], [0, 2]],
        [[0, 2], [0, 1]],
        [[1, 3], [2, -1]],
        [2, 1],
        positions={"end": -1},
        strings={0: "<s>", 1: " a", 2: " b", 3: " c"},
    )
    frame = task.to_frame()
    assert frame.index.name == "batch"
    assert frame.to_dict("records") == [
        {
            "clean": "<s> a",
            "corrupt": "<s> b",
            "right": " a |  c",
            "wrong": " b",
            "answer_pos": 1,
            "first_difference": 1,
            "pos_end": 1,
        },
        {
            "clean": "<s> b",
            "corrupt": "<s> a",
            "right": " b",
            "wrong": " a",
            "answer_pos": 1,
            "first_difference": 1,
            "pos_end": 1,
        },
    ]


def test_to_frame_without_pandas(monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError) as caught:
        task.to_frame()
    assert str(caught.value) == "a table needs pandas. Run: pip install 'mechinterp-hooks[frames]'"
