"""What generators have in common: prompts that are all distinct, and pairs that are aligned token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mechinterp.errors import TaskError
from mechinterp.tasks.words import Tokenizer, encode, single_token_words

__all__ = ["aligned", "check_number", "draw_distinct", "known_words"]

Fill = TypeVar("Fill")


def check_number(task: str, n: int) -> None:
    """Refuse fewer than one pair."""
    if n < 1:
        raise TaskError(f"{task} was asked for {n} pairs: n is at least 1.")


def draw_distinct(n: int, draw: Callable[[int], tuple[str, Fill]], *, advice: str) -> dict[str, Fill]:
    """n prompts by their text, none twice.

    Parameters
    ----------
    n
        How many.
    draw
        From the number of prompts found so far to the text of one more and what filled it.
    advice
        What to pass where there are not so many: ``"more nouns"``.

    Raises
    ------
    TaskError
        n distinct prompts were not found in 50 n + 100 draws.
    """
    drawn: dict[str, Fill] = {}
    for _ in range(50 * n + 100):
        if len(drawn) == n:
            break
        text, fill = draw(len(drawn))
        drawn.setdefault(text, fill)
    if len(drawn) < n:
        raise TaskError(
            f"only {len(drawn)} distinct prompts were found in {50 * n + 100} draws, and {n} were asked: "
            f"ask for fewer, or pass {advice}."
        )
    return drawn


def known_words(tokenizer: Tokenizer, words: Sequence[str], own: Sequence[str] | None, argument: str) -> dict[str, int]:
    """Those of ``words`` that are one token; of ``own``, where they were given, all must be.

    Raises
    ------
    TaskError
        A word of ``own`` that is not one token after a space.
    """
    known = single_token_words(tokenizer, words if own is None else own)
    if own is not None and len(known) < len(set(own)):
        longer = next(word for word in own if word not in known)
        raise TaskError(f"{longer!r} is not one token after a space for this tokenizer: leave it out of {argument}=.")
    return known


def aligned(
    task: str, tokenizer: Tokenizer, clean: str, corrupt: str, *, differ: int, length: int | None, bos: bool
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a pair, and the positions at which they differ.

    Raises
    ------
    TaskError
        They differ at more or fewer tokens than they should, or are not as long as each other or the other prompts.
    """
    tokens, changed = encode(tokenizer, clean, bos=bos), encode(tokenizer, corrupt, bos=bos)
    places = [place for place, (a, b) in enumerate(zip(tokens, changed, strict=False)) if a != b]
    if len(tokens) != len(changed) or len(places) != differ or length not in (None, len(tokens)):
        expected = f"{differ} and {length or 'as many'}"
        raise TaskError(
            f"{clean!r} and its counterfactual differ at {len(places)} tokens, of {len(tokens)} and {len(changed)} tokens, where "
            f"{expected} were expected: this tokenizer splits words by context, and {task} cannot be asked of it."
        )
    return tokens, changed, places
