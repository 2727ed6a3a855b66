"""Docstrings: which argument of a Python function is documented next."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mechinterp.errors import TaskError, did_you_mean
from mechinterp.tasks.drawing import aligned, check_number, draw_distinct, known_words
from mechinterp.tasks.task import Task
from mechinterp.tasks.words import Tokenizer, spell, tokenizer_name

__all__ = ["ARGUMENTS", "CORRUPTIONS", "docstring"]

_ARGUMENTS = """
    action address amount author base block body bound center channel client code color command content context count
    data date depth device distance domain event factor family field file files filter folder format frame group height
    host image index input item key kind label language last layer left length level limit line link list load local
    location logger mask match message method mode model module name network node number object offset options order output
    owner page parent password path pattern period position power prefix process project property query range rate reason
    record region request response result role root rule sample scale schema scope score section seed service session shape
    sheet side signal size source speed stage state status step stream style subject table tag target task text time title token
    tree type unit user value version video weight width window word
"""
ARGUMENTS: tuple[str, ...] = tuple(_ARGUMENTS.split())
"""Names of arguments, and words to describe them; those that are not one token for the tokenizer at hand are left out."""
CORRUPTIONS = ("swap", "random")
TEMPLATE = 'def {function}(self, {a}, {b}, {c}, {d}):\n    """\n    :param {a}: {x}\n    :param {b}: {y}\n    :param'
CHANGED = 'def {function}(self, {a}, {b}, {e}, {f}):\n    """\n    :param {a}: {x}\n    :param {b}: {y}\n    :param'


def docstring(
    tokenizer: Tokenizer, *, n: int, seed: int, corruption: str = "swap", words: Sequence[str] | None = None, bos: bool = True
) -> Task:
    """How does the model know which argument a docstring documents next?

    A method with four arguments documents two of them, in order; the right answer is the third, the wrong one the fourth.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    n
        Number of pairs.
    seed
        Decides names and descriptions.
    corruption
        What the counterfactual changes in the signature; the docstring stays:

        - ``"swap"``: the third and the fourth argument trade places, so the wrong answer is right.
        - ``"random"``: both become other words, so that neither answer is to be had.
    words
        Words to draw from, 9 at least; default: those of `ARGUMENTS` that are single tokens.
    bos
        Put the tokenizer's BOS token in front, if it has one.

    Returns
    -------
    Task
        With positions ``A``, ``B``, ``C``, ``D`` (the arguments in the signature), ``C-1`` (the comma before C), ``A2``, ``B2``
        (in the docstring) and ``end``; metric ``logit_diff``.

    Raises
    ------
    TaskError
        When there is no such corruption, words are not single tokens, or n distinct prompts cannot be made.

    Examples
    --------
    >>> from mechinterp.tasks import word_tokenizer
    >>> task = docstring(word_tokenizer(), n=4, seed=0)
    >>> task
    Task docstring: 4 pairs of 27 tokens, differ at 2 positions, metric logit_diff

    References
    ----------
    Heimersheim and Janiak (2023), "A circuit for Python docstrings in a 4-layer attention-only transformer". There the method has
    six arguments, descriptions of two words, and the wrong answers are all other names of the prompt.
    """
    check_number("docstring", n)
    if corruption not in CORRUPTIONS:
        raise TaskError(f"docstring has no corruption {corruption!r}. {did_you_mean(corruption, CORRUPTIONS)}")
    known = known_words(tokenizer, ARGUMENTS, words, "words")
    if len(known) < 9:
        raise TaskError(
            f"{len(known)} words are single tokens for this tokenizer, and docstring needs 9 (names, descriptions, and a name "
            "for the method): pass words=[...] that are."
        )
    generator = random.Random(seed)
    ordered = list(known)

    def draw(turn: int) -> tuple[str, dict[str, str]]:
        *letters, function = generator.sample(ordered, 9)
        a, b, c, d, x, y, e, f = letters
        if corruption == "swap":
            e, f = d, c
        fill = {"function": function, "a": a, "b": b, "c": c, "d": d, "x": x, "y": y, "e": e, "f": f}
        return TEMPLATE.format(**fill), fill

    drawn = draw_distinct(n, draw, advice="more words")
    clean: list[list[int]] = []
    corrupt, right, wrong = [], [], []
    positions: dict[str, list[int]] = {name: [] for name in ("A", "B", "C-1", "C", "D", "A2", "B2", "end")}
    for text, fill in drawn.items():
        length = len(clean[0]) if clean else None
        tokens, changed, (third, fourth) = aligned(
            "docstring", tokenizer, text, CHANGED.format(**fill), differ=2, length=length, bos=bos
        )
        of_a, of_b = ([i for i, token in enumerate(tokens) if token == known[fill[letter]]] for letter in "ab")
        if len(of_a) != 2 or len(of_b) != 2 or tokens[third] != known[fill["c"]] or tokens[fourth] != known[fill["d"]]:
            raise TaskError(
                f"{text!r} has {len(of_a)} tokens {fill['a']!r} and {len(of_b)} tokens {fill['b']!r}, where 2 and 2 were "
                "expected: this tokenizer splits words by context, and docstring cannot be asked of it."
            )
        clean.append(tokens)
        corrupt.append(changed)
        right.append(known[fill["c"]])
        wrong.append(known[fill["d"]])
        places = (of_a[0], of_b[0], third - 1, third, fourth, of_a[1], of_b[1], len(tokens) - 1)
        for name, place in zip(positions, places, strict=True):
            positions[name].append(place)
    return Task(
        name="docstring",
        clean=clean,
        corrupt=corrupt,
        right=right,
        wrong=wrong,
        positions=positions,
        provenance={
            "generator": "docstring",
            "n": n,
            "seed": seed,
            "corruption": corruption,
            "words": len(known),
            "tokenizer": tokenizer_name(tokenizer),
            "bos": bos and tokenizer.bos_token_id is not None,
        },
        texts=tuple(drawn),
        strings=spell(tokenizer, {*right, *wrong, *(token for row in [*clean, *corrupt] for token in row)}),
    )
