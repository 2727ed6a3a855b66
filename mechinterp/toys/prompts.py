"""Prompt pairs for the induction toys."""

from __future__ import annotations

import random
from typing import Any

from mechinterp.errors import TaskError
from mechinterp.tasks import Task

__all__ = ["induction_pairs", "spelled"]


def spelled(tokenizer: Any) -> dict[int, str]:
    """The text of every token id."""
    return {index: word for word, index in tokenizer.get_vocab().items()}


def induction_pairs(tokenizer: Any, *, n: int, seed: int, length: int, repeat: int | None = None) -> Task:
    """``<s> r1 ... rL``, then a part of it once more; the answer is what followed the last word before.

    `mechinterp.tasks.induction` changes one thing at a time, so that each of its corruptions shows a part of
    the circuit. Here the counterfactual has another word A in all places where A stands, and another B behind
    it: ``... A B ... A`` becomes ``... C D ... C``. What is looked up, where it is found and what is said
    there all change, so that every edge of the mechanism carries something else; no other word changes.

    Parameters
    ----------
    tokenizer
        Of `mechinterp.tasks.word_tokenizer`: ids from 2 on are words.
    n, seed
        How many pairs, and which.
    length
        L, the number of different words.
    repeat
        How many of them are said again, from the first on. Default: only one, drawn anew for each prompt.

    Returns
    -------
    Task
        Positions: ``earlier`` (A), ``target`` (B), ``end`` (A again).
    """
    if n < 1:
        raise TaskError(f"a toy was asked for {n} pairs: n is at least 1.")
    generator = random.Random(seed)
    words = range(2, len(tokenizer))
    clean, corrupt, right, wrong, earlier = [], [], [], [], []
    for _ in range(n):
        *drawn, other, said_then = generator.sample(words, length + 2)
        last = generator.randrange(length - 1) if repeat is None else repeat - 1
        again = drawn[last : last + 1] if repeat is None else drawn[:repeat]
        clean.append([0, *drawn, *again])
        changed = list(drawn)
        changed[last], changed[last + 1] = other, said_then
        corrupt.append([0, *changed, *again[:-1], other])
        right.append(drawn[last + 1])
        wrong.append(said_then)
        earlier.append(last + 1)
    return Task(
        name="induction",
        clean=clean,
        corrupt=corrupt,
        right=right,
        wrong=wrong,
        positions={"earlier": earlier, "target": [at + 1 for at in earlier], "end": [-1] * n},
        provenance={"generator": "toys", "n": n, "seed": seed, "length": length, "repeat": repeat},
        texts=tuple(" ".join(spelled(tokenizer)[token] for token in row[1:]) for row in clean),
        strings=spelled(tokenizer),
    )
