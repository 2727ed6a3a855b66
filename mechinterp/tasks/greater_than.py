"""Greater-than: "The war lasted from the year 1745 to the year 17" -> a later one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from mechinterp.errors import TaskError
from mechinterp.tasks.drawing import check_number, draw_distinct, known_words
from mechinterp.tasks.task import Task
from mechinterp.tasks.words import Tokenizer, encode, plain, spell, tokenizer_name

__all__ = ["NOUNS", "greater_than"]

_NOUNS = """
    accord affair agreement alliance assault attack battle campaign coalition competition conflict
    conquest contest crisis crusade debate decline dispute drought effort empire engagement epidemic
    expansion expedition fight friendship growth hostility invasion investigation journey marriage mission
    movement negotiation occupation operation outbreak partnership peace period plague plan process
    program progress project pursuit quest raid reign relationship revolution rise rivalry rule search
    siege strike struggle study trial trip unity voyage war
"""
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())
"""Things that last; those that are not one token for the tokenizer at hand are left out."""

CENTURIES = tuple(range(11, 19))
TEMPLATE = "The {noun} lasted from the year {year} to the year {century}"


class _Years(NamedTuple):
    """How a tokenizer writes years."""

    kind: str
    answers: dict[int, int]
    """The token that says each number after a century: year 0 to 99, or decade 0 to 9."""
    usable: list[tuple[int, int]]
    """(century, year) that are written so, and have answers on both sides."""


def greater_than(tokenizer: Tokenizer, *, n: int, seed: int, nouns: Sequence[str] | None = None, bos: bool = True) -> Task:
    """How does the model know that an end comes after its start?

    Asked in the way in which the tokenizer writes years:

    - *Two digits a token* (GPT-2: `` 17`` ``45``). Right: the two-digit tokens above 45; wrong: those below.
      The counterfactual starts in year 01.
    - *Every digit a token* (SmolLM2, Llama 2). Asked of the decade digit. Right: the digits above 4; wrong:
      those below. The counterfactual starts in decade 0: 1705.

    In both, the start itself is neither right nor wrong: a war may end in the decade in which it began. One
    token differs between clean and corrupt, and no clean prompt occurs twice.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    n
        Number of pairs.
    seed
        Decides nouns and years.
    nouns
        What lasted; default: those of `NOUNS` that are single tokens.
    bos
        Put the tokenizer's BOS token in front, if it has one.

    Returns
    -------
    Task
        With positions ``noun``, ``century`` (last token of the century in the first year), ``start`` (the
        token that is compared) and ``end``; metric ``prob_diff``; ``provenance["compares"]`` says which of
        the two questions was asked.

    Raises
    ------
    TaskError
        When the tokenizer writes years in a third way, a noun is not one token, or n distinct prompts cannot
        be made.

    Examples
    --------
    >>> from mechinterp.tasks import word_tokenizer
    >>> task = greater_than(word_tokenizer(), n=4, seed=0)
    >>> task
    Task greater_than: 4 pairs of 16 tokens, differ at 1 position, metric prob_diff
    >>> task.provenance["compares"]
    'decade digit'

    References
    ----------
    Hanna et al. (2023), "How does GPT-2 compute greater-than?", arXiv:2305.00586. There the start year
    itself counts as wrong; here it is left out.
    """
    check_number("greater_than", n)
    years = _years(tokenizer)
    known = known_words(tokenizer, NOUNS, nouns, "nouns")
    if not known:
        raise TaskError("no noun of greater_than is a single token for this tokenizer: pass nouns=[...] that are.")

    generator = random.Random(seed)

    def draw(turn: int) -> tuple[str, tuple[str, int, int]]:
        noun = generator.choice(list(known))
        century, year = generator.choice(years.usable)
        return _prompt(noun, century, year), (noun, century, year)

    drawn = draw_distinct(n, draw, advice="more nouns")
    clean, corrupt, right, wrong = [], [], [], []
    positions: dict[str, list[int]] = {"noun": [], "century": [], "start": [], "end": []}
    for text, (noun, century, year) in drawn.items():
        earlier, start = (1, year) if years.kind == "two-digit year" else (year % 10, year // 10)
        tokens = encode(tokenizer, text, bos=bos)
        changed = encode(tokenizer, _prompt(noun, century, earlier), bos=bos)
        differs = [place for place, (a, b) in enumerate(zip(tokens, changed, strict=False)) if a != b]
        if len(differs) != 1 or tokens[differs[0]] != years.answers[start] or len(tokens) != len(changed):
            raise TaskError(
                f"{text!r} and its counterfactual differ at {len(differs)} tokens, where 1 was expected: "
                "this tokenizer splits years by context, and greater_than cannot be asked of it."
            )
        clean.append(tokens)
        corrupt.append(changed)
        right.append([token for number, token in years.answers.items() if number > start])
        wrong.append([token for number, token in years.answers.items() if number < start])
        for name, where in zip(positions, (tokens.index(known[noun]), differs[0] - 1, differs[0], len(tokens) - 1), strict=True):
            positions[name].append(where)
    ids = {token for rows in (clean, corrupt, right, wrong) for row in rows for token in row}
    return Task(
        name="greater_than",
        clean=clean,
        corrupt=corrupt,
        right=right,
        wrong=wrong,
        positions=positions,
        metric="prob_diff",
        provenance={
            "generator": "greater_than",
            "n": n,
            "seed": seed,
            "compares": years.kind,
            "nouns": len(known),
            "tokenizer": tokenizer_name(tokenizer),
            "bos": bos and tokenizer.bos_token_id is not None,
        },
        texts=tuple(drawn),
        strings=spell(tokenizer, ids),
    )


def _prompt(noun: str, century: int, year: int) -> str:
    return TEMPLATE.format(noun=noun, year=f"{century}{year:02d}", century=century)


def _years(tokenizer: Tokenizer) -> _Years:
    """How this tokenizer writes years, read off every year of every century."""
    added = {(century, year): _added(tokenizer, century, year) for century in CENTURIES for year in range(100)}
    # A year that the tokenizer has as one token, as GPT-2 has some, is left out; the others show the pattern.
    whole = {key: tokens[0] for key, tokens in added.items() if len(tokens) == 1}
    answers = {year: token for (_, year), token in whole.items()}
    if len(answers) == 100 and all(answers[year] == token for (_, year), token in whole.items()):
        usable = [(century, year) for century, year in whole if 2 <= year <= 98 and (century, 1) in whole]
        return _Years("two-digit year", answers, usable)
    answers = {year // 10: tokens[0] for (_, year), tokens in added.items() if len(tokens) == 2}
    digits = [(century, year) for (century, year), tokens in added.items() if len(tokens) == 2]
    if len(digits) == len(added) and all(added[key][0] == answers[key[1] // 10] for key in digits):
        return _Years("decade digit", answers, [key for key in digits if 10 <= key[1] <= 89])
    raise TaskError(
        "this tokenizer writes years neither as two tokens of two digits, nor digit by digit, so "
        "greater_than has no one-token answers on it: write pairs of your own and read them with "
        "Task.from_jsonl."
    )


def _added(tokenizer: Tokenizer, century: int, year: int) -> list[int]:
    """The tokens that the year adds to its century; none where the two do not come apart."""
    try:
        before = plain(tokenizer, f"year {century}")
        written = plain(tokenizer, f"year {century}{year:02d}")
    except TaskError:
        return []
    return written[len(before) :] if written[: len(before)] == before else []
