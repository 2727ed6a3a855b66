"""Read a task from a file of your own pairs, one JSON object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sized
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from mechinterp.errors import FileFormatError, TaskError, did_you_mean
from mechinterp.tasks.task import Task
from mechinterp.tasks.words import Tokenizer, encode, plain, spell, tokenizer_name

__all__ = ["read_pairs"]

REQUIRED = ("clean", "corrupt", "right", "wrong")
KEYS = (*REQUIRED, "positions")


@dataclass(frozen=True)
class _Pair:
    text: str
    clean: list[int]
    corrupt: list[int]
    right: list[int]
    wrong: list[int]
    positions: dict[str, int]


def read_pairs(
    path: str | PathLike[str],
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    metric: str = "logit_diff",
    bos: bool = True,
) -> Task:
    """A task from a file with one pair a line.

    Each line is a JSON object::

        {"clean": "The capital of France is", "corrupt": "The capital of Spain is",
         "right": " Paris", "wrong": " Madrid", "positions": {"country": " France", "end": -1}}

    ``right`` and ``wrong`` are one answer or a list; each is exactly one token after the clean prompt, so it
    usually begins with a space. ``positions`` is optional, and has the same names on every line: a number
    counts tokens (BOS included, negative ones from the end), a text names the one token of the clean prompt
    that it is. Clean and corrupt have equally many tokens; lines may differ, and are padded on the right.
    Empty lines are skipped.

    A line may give token ids in the place of texts, for clean, corrupt and all answers alike:
    ``{"clean": [0, 504, 2364], "corrupt": [0, 504, 3575], "right": 7042, "wrong": [1, 2]}``. They are taken as they are, without
    another BOS.

    Parameters
    ----------
    path
        The file, UTF-8.
    tokenizer
        The model's tokenizer.
    name
        The task's name; default: the file's.
    metric
        Name of the task's metric.
    bos
        Put the tokenizer's BOS token in front, if it has one.

    Raises
    ------
    FileFormatError
        When a line is not such an object, or there is none. The message names the line.
    TaskError
        When a pair does not align, an answer is not one token, or a position is not found. The message names
        the line.
    OSError
        When there is no such file.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from mechinterp.tasks import word_tokenizer
    >>> line = '{"clean": "Mary gave a", "corrupt": "John gave a", "right": " book", "wrong": " ring"}'
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "gifts.jsonl"
    >>> _ = file.write_text(line)
    >>> read_pairs(file, word_tokenizer())
    Task gifts: 1 pair of 4 tokens, differ at 1 position, metric logit_diff
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{path.name} is not a UTF-8 text file ({error.reason}): it holds one JSON object a line."
        ) from None
    pairs: list[_Pair] = []
    names: list[str] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            pair = _pair(_record(line), tokenizer, bos)
        except FileFormatError as error:
            raise FileFormatError(f"{where}: {error}") from None
        except TaskError as error:
            raise TaskError(f"{where}: {error}") from None
        if names is not None and sorted(pair.positions) != names:
            raise TaskError(
                f"{where}: names the positions {sorted(pair.positions)}, and the lines before {names}: every line names the same."
            )
        names = sorted(pair.positions)
        pairs.append(pair)
    if not pairs:
        raise FileFormatError(f"{path.name} has no pairs: write one JSON object a line, with the keys {', '.join(REQUIRED)}.")
    longest = max(len(pair.clean) for pair in pairs)
    mask = torch.tensor([[place < len(pair.clean) for place in range(longest)] for pair in pairs])
    padding = _padding(tokenizer)
    ids = {token for pair in pairs for row in (pair.clean, pair.corrupt, pair.right, pair.wrong) for token in row}
    return Task(
        name=path.stem if name is None else name,
        clean=[pair.clean + [padding] * (longest - len(pair.clean)) for pair in pairs],
        corrupt=[pair.corrupt + [padding] * (longest - len(pair.clean)) for pair in pairs],
        right=[pair.right for pair in pairs],
        wrong=[pair.wrong for pair in pairs],
        mask=None if bool(mask.all()) else mask,
        positions={name: [pair.positions[name] for pair in pairs] for name in names or []},
        metric=metric,
        provenance={
            "generator": "from_jsonl",
            "file": path.name,
            "sha256": hashlib.sha256(content).hexdigest()[:16],
            "n": len(pairs),
            "tokenizer": tokenizer_name(tokenizer),
            "bos": bos and tokenizer.bos_token_id is not None,
        },
        texts=tuple(pair.text for pair in pairs),
        strings=spell(tokenizer, ids),
    )


def _record(line: str) -> dict[str, Any]:
    """The line as an object with the right keys and types."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise FileFormatError(f"is not JSON ({error.msg} at column {error.colno}): write one object a line.") from None
    if not isinstance(record, dict):
        raise FileFormatError(f'is a JSON {type(record).__name__}, not an object: write {{"clean": ..., ...}}.')
    for key in record:
        if key not in KEYS:
            raise FileFormatError(f"has the key {key!r}. {did_you_mean(key, KEYS)}")
    for key in REQUIRED:
        if key not in record:
            raise FileFormatError(f"has no key {key!r}: a pair needs {', '.join(REQUIRED)}.")
    in_ids = isinstance(record["clean"], list)
    for key in ("clean", "corrupt"):
        if not (_are_ids(record[key]) if in_ids else isinstance(record[key], str) and record[key]):
            kind = "a list of token ids, as clean is" if in_ids and key == "corrupt" else "the prompt as text, or as token ids"
            raise FileFormatError(f"has {record[key]!r} for {key!r}: it is {kind}.")
    for key in ("right", "wrong"):
        answers = record[key] if isinstance(record[key], list) else [record[key]]
        if not (_are_ids(answers) if in_ids else answers and all(isinstance(answer, str) and answer for answer in answers)):
            kind = "a token id, as in clean" if in_ids else "an answer as text"
            raise FileFormatError(f"has {record[key]!r} for {key!r}: it is {kind}, or a list of them.")
        record[key] = answers
    places = record.setdefault("positions", {})
    if not isinstance(places, dict) or not all(type(place) in (int, str) for place in places.values()):
        raise FileFormatError(f"has {places!r} for 'positions': it is an object of token numbers or token texts.")
    return record


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


def _pair(record: dict[str, Any], tokenizer: Tokenizer, bos: bool) -> _Pair:
    text, clean, corrupt = record["clean"], record["clean"], record["corrupt"]
    in_ids = isinstance(clean, list)
    if in_ids:
        _check_known(tokenizer, [*clean, *corrupt, *record["right"], *record["wrong"]])
        text = tokenizer.decode(clean)
    else:
        clean, corrupt = encode(tokenizer, clean, bos=bos), encode(tokenizer, corrupt, bos=bos)
    if len(clean) != len(corrupt):
        raise TaskError(
            f"clean has {len(clean)} tokens and corrupt {len(corrupt)}, and they are aligned token by "
            f"token: clean is {_spelled(tokenizer, clean)}, corrupt is {_spelled(tokenizer, corrupt)}. "
            "Use words of equal length."
        )
    if clean == corrupt:
        raise TaskError("clean and corrupt are the same tokens: change what the answer depends on.")
    right, wrong = (
        record[key] if in_ids else [_answer(tokenizer, text, answer) for answer in record[key]] for key in ("right", "wrong")
    )
    for key, tokens in (("right", right), ("wrong", wrong)):
        if len(set(tokens)) < len(tokens):
            raise TaskError(f"names an answer of {key!r} twice: {record[key]!r}. Name each once.")
    for answer, token in zip(record["right"], right, strict=True):
        if token in wrong:
            raise TaskError(f"{answer!r} is both a right and a wrong answer: the two sets must not overlap.")
    places = {name: _place(tokenizer, clean, name, place) for name, place in record["positions"].items()}
    return _Pair(text, clean, corrupt, right, wrong, places)


def _check_known(tokenizer: Tokenizer, ids: list[int]) -> None:
    known = len(tokenizer) if isinstance(tokenizer, Sized) else None
    if known is not None and max(ids) >= known:
        raise TaskError(f"has the token {max(ids)}, and the tokenizer has tokens 0 to {known - 1}.")


def _answer(tokenizer: Tokenizer, prompt: str, answer: str) -> int:
    """The one token that `answer` adds to the prompt."""
    if prompt != prompt.rstrip():
        raise TaskError(f"the prompt ends in a space: leave it out, and begin the answer with it ({' ' + answer.lstrip()!r}).")
    before = plain(tokenizer, prompt)
    if prompt[-1].isalpha() and answer[0].isalpha() and _is_one(tokenizer, prompt, before, " " + answer):
        raise TaskError(
            f"the answer {answer!r} would continue the prompt's last word: write {' ' + answer!r}, with a "
            "space in front. If a suffix is meant, give prompts and answers as token ids."
        )
    added = _added(tokenizer, prompt, before, answer)
    if added is None:
        raise TaskError(
            f"the answer {answer!r} changes the prompt's last token, or has a word that the tokenizer does "
            "not know: choose an answer that is one token of its own."
        )
    if len(added) != 1:
        raise TaskError(
            f"the answer {answer!r} is {len(added)} tokens {_spelled(tokenizer, added)}, and an answer is "
            "one token: choose another, or put its beginning into both prompts."
        )
    return added[0]


def _is_one(tokenizer: Tokenizer, prompt: str, before: list[int], answer: str) -> bool:
    added = _added(tokenizer, prompt, before, answer)
    return added is not None and len(added) == 1


def _added(tokenizer: Tokenizer, prompt: str, before: list[int], answer: str) -> list[int] | None:
    """The tokens that `answer` adds to a prompt, None when it changes the prompt's own or is not known."""
    try:
        whole = plain(tokenizer, prompt + answer)
    except TaskError:
        return None
    return whole[len(before) :] if whole[: len(before)] == before and len(whole) > len(before) else None


def _place(tokenizer: Tokenizer, tokens: list[int], name: str, place: int | str) -> int:
    """A position as a number from 0."""
    if isinstance(place, int):
        if not -len(tokens) <= place < len(tokens):
            raise TaskError(f"position {name!r} is {place}, and clean has {len(tokens)} tokens, from 0 to {len(tokens) - 1}.")
        return place % len(tokens)
    # Tokens carry the space in front of them; people rarely write it.
    found = [index for index, token in enumerate(tokens) if tokenizer.decode([token]).strip() == place.strip()]
    if len(found) != 1:
        raise TaskError(
            f"position {name!r} is {place!r}, which is {len(found)} of clean's tokens "
            f"{_spelled(tokenizer, tokens)}: name a token that occurs once, or give its number."
        )
    return found[0]


def _spelled(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return "[" + "|".join(tokenizer.decode([token]) for token in tokens) + "]"


def _padding(tokenizer: Tokenizer) -> int:
    """Any valid id: padding is masked, and nothing reads it."""
    for attribute in ("pad_token_id", "eos_token_id", "bos_token_id"):
        token = getattr(tokenizer, attribute, None)
        if token is not None:
            return int(token)
    return 0
