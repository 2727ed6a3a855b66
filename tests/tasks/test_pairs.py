from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mechinterp.errors import FileFormatError, TaskError
from mechinterp.tasks import Task, word_tokenizer

GOOD = {"clean": "Mary gave a", "corrupt": "John gave a", "right": " book", "wrong": " ring"}
Read = Callable[..., Task]


@pytest.fixture
def tokenizer() -> Any:
    return word_tokenizer(["Mary", "John", "gave", "a", "the", "book", "ring", "drink", "to", "and"])


@pytest.fixture
def read(tmp_path: Path, tokenizer: Any) -> Read:
    def read(*lines: Any, **options: Any) -> Task:
        file = tmp_path / "gifts.jsonl"
        file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return Task.from_jsonl(file, tokenizer, **options)

    return read


def test_a_file_becomes_a_task(read: Read, tokenizer: Any) -> None:
    task = read(GOOD, "", {**GOOD, "right": [" book", " drink"]})
    assert repr(task) == "Task gifts: 2 pairs of 4 tokens, differ at 1 position, metric logit_diff"
    text = "\n".join([json.dumps(GOOD), "", json.dumps({**GOOD, "right": [" book", " drink"]})])
    assert task.token_strings == (("<s>", "Mary", "gave", "a"),) * 2
    ids = tokenizer.get_vocab()
    assert task.right.tolist() == [[ids["book"], -1], [ids["book"], ids["drink"]]]
    assert task.string(ids["drink"]) == "drink"
    assert task.texts == ("Mary gave a", "Mary gave a")
    assert task.provenance == {
        "generator": "from_jsonl",
        "file": "gifts.jsonl",
        "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "n": 2,
        "tokenizer": "words",
        "bos": True,
    }


def test_options(read: Read) -> None:
    task = read(GOOD, name="mine", metric="accuracy", bos=False)
    assert repr(task) == "Task mine: 1 pair of 3 tokens, differ at 1 position, metric accuracy"


def test_token_ids_in_the_place_of_texts(read: Read, tokenizer: Any) -> None:
    word = tokenizer.get_vocab()
    start, end = tokenizer.bos_token_id, word["a"]
    ids = {"clean": [start, word["Mary"], word["gave"], end], "corrupt": [start, word["John"], word["gave"], end]}
    answers = {"right": word["book"], "wrong": [word["ring"], word["drink"]]}
    places = {"positions": {"who": 1, "end": "a"}}
    given, written = (
        read({**ids, **answers, **places}),
        read({**GOOD, "right": " book", "wrong": [" ring", " drink"], "positions": {"who": "Mary", "end": -1}}),
    )
    for name in ("clean", "corrupt", "right", "wrong"):
        assert getattr(given, name).tolist() == getattr(written, name).tolist()
    assert {name: where.tolist() for name, where in given.positions.items()} == {"who": [1], "end": [3]}
    assert given.token_strings == written.token_strings
    # Both kinds of lines in one file.
    assert read(GOOD, {**ids, **answers}).clean[0].tolist() == read({**ids, **answers}, GOOD).clean[0].tolist() == ids["clean"]
    with pytest.raises(TaskError) as caught:
        read({**ids, "right": len(tokenizer), "wrong": 1})
    n = len(tokenizer)
    assert str(caught.value) == f"gifts.jsonl, line 1: has the token {n}, and the tokenizer has tokens 0 to {n - 1}."


def test_lines_of_different_length_are_padded_on_the_right(read: Read) -> None:
    task = read(GOOD, {**GOOD, "clean": "Mary gave John a", "corrupt": "Mary gave Mary a"})
    assert task.lengths.tolist() == [4, 5]
    assert task.answer_pos.tolist() == [3, 4]
    assert task.mask is not None and task.mask.tolist() == [[True] * 4 + [False], [True] * 5]


def test_positions_by_text_and_by_number(read: Read) -> None:
    task = read({**GOOD, "positions": {"who": "Mary", "verb": " gave", "first": 0, "end": -1}})
    assert {name: where.tolist() for name, where in task.positions.items()} == {
        "who": [1],
        "verb": [2],
        "first": [0],
        "end": [3],
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"clean": "a",',
            ("is not JSON (Expecting property name enclosed in double quotes at column 15): write one object a line."),
        ),
        ("[1]", 'is a JSON list, not an object: write {"clean": ..., ...}.'),
        ({**GOOD, "postions": {}}, "has the key 'postions'. Did you mean 'positions'?"),
        ({"clean": "a", "corrupt": "b"}, "has no key 'right': a pair needs clean, corrupt, right, wrong."),
        ({**GOOD, "clean": 3}, "has 3 for 'clean': it is the prompt as text, or as token ids."),
        ({**GOOD, "clean": ""}, "has '' for 'clean': it is the prompt as text, or as token ids."),
        ({**GOOD, "clean": []}, "has [] for 'clean': it is the prompt as text, or as token ids."),
        ({**GOOD, "clean": [1, True]}, "has [1, True] for 'clean': it is the prompt as text, or as token ids."),
        ({**GOOD, "clean": [1, 2]}, "has 'John gave a' for 'corrupt': it is a list of token ids, as clean is."),
        ({**GOOD, "corrupt": [1, 2]}, "has [1, 2] for 'corrupt': it is the prompt as text, or as token ids."),
        (
            {**GOOD, "clean": [1, 2], "corrupt": [1, 3], "right": " book"},
            "has ' book' for 'right': it is a token id, as in clean, or a list of them.",
        ),
        ({**GOOD, "wrong": []}, "has [] for 'wrong': it is an answer as text, or a list of them."),
        ({**GOOD, "wrong": [3]}, "has [3] for 'wrong': it is an answer as text, or a list of them."),
        (
            {**GOOD, "positions": {"end": True}},
            "has {'end': True} for 'positions': it is an object of token numbers or token texts.",
        ),
    ],
)
def test_messages_about_the_format_name_the_line(read: Read, line: Any, message: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        read(GOOD, line)
    assert str(caught.value) == f"gifts.jsonl, line 2: {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"corrupt": "John and Mary gave a"},
            (
                "clean has 4 tokens and corrupt 6, and they are aligned token by token: clean is "
                "[<s>|Mary|gave|a], corrupt is [<s>|John|and|Mary|gave|a]. Use words of equal length."
            ),
        ),
        (
            {"corrupt": "Mary gave a"},
            "clean and corrupt are the same tokens: change what the answer depends on.",
        ),
        (
            {"right": " book ring"},
            (
                "the answer ' book ring' is 2 tokens [book|ring], and an answer is one token: choose "
                "another, or put its beginning into both prompts."
            ),
        ),
        (
            {"right": "book"},
            (
                "the answer 'book' would continue the prompt's last word: write ' book', with a space in "
                "front. If a suffix is meant, give prompts and answers as token ids."
            ),
        ),
        (
            {"right": " novel"},
            (
                "the answer ' novel' changes the prompt's last token, or has a word that the tokenizer "
                "does not know: choose an answer that is one token of its own."
            ),
        ),
        (
            {"clean": "Mary gave a ", "corrupt": "John gave a "},
            "the prompt ends in a space: leave it out, and begin the answer with it (' book').",
        ),
        (
            {"right": [" book", " book"]},
            "names an answer of 'right' twice: [' book', ' book']. Name each once.",
        ),
        ({"wrong": " book"}, "' book' is both a right and a wrong answer: the two sets must not overlap."),
        (
            {"clean": "Zoe gave a"},
            "the tokenizer does not know a word of 'Zoe gave a': use words of its vocabulary.",
        ),
        (
            {"positions": {"who": "John"}},
            (
                "position 'who' is 'John', which is 0 of clean's tokens [<s>|Mary|gave|a]: name a token that "
                "occurs once, or give its number."
            ),
        ),
        ({"positions": {"end": 4}}, "position 'end' is 4, and clean has 4 tokens, from 0 to 3."),
    ],
)
def test_messages_about_tokens_name_the_line(read: Read, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        read(GOOD, "", {**GOOD, **change})
    assert str(caught.value) == f"gifts.jsonl, line 3: {message}"


def test_positions_have_the_same_names_on_every_line(read: Read) -> None:
    with pytest.raises(TaskError) as caught:
        read({**GOOD, "positions": {"end": -1}}, GOOD)
    assert str(caught.value) == (
        "gifts.jsonl, line 2: names the positions [], and the lines before ['end']: every line names the same."
    )


def test_empty_missing_and_binary_files(read: Read, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(FileFormatError) as caught:
        read("", "  ")
    assert str(caught.value) == (
        "gifts.jsonl has no pairs: write one JSON object a line, with the keys clean, corrupt, right, wrong."
    )
    with pytest.raises(FileNotFoundError):
        Task.from_jsonl(tmp_path / "none.jsonl", tokenizer)
    binary = tmp_path / "model.gguf"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError) as caught:
        Task.from_jsonl(binary, tokenizer)
    assert str(caught.value) == ("model.gguf is not a UTF-8 text file (invalid start byte): it holds one JSON object a line.")
