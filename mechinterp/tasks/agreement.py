"""Subject-verb agreement: "The keys near the cabinet" -> " are", and not " is"."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from mechinterp.errors import TaskError
from mechinterp.tasks.drawing import aligned, check_number, draw_distinct
from mechinterp.tasks.task import Task
from mechinterp.tasks.words import Tokenizer, single_token_words, spell, tokenizer_name

__all__ = ["NOUNS", "PREPOSITIONS", "VERBS", "agreement"]

_NOUNS = """
    author bird boat book bottle box boy building car cat chair child/children clock cup dog door farmer flower girl guard house
    judge key king lady/ladies lamp letter man/men manager picture pilot plant queen ring rock sign singer student table teacher
    tower tree truck wall window woman/women worker writer
"""
NOUNS: tuple[tuple[str, str], ...] = tuple(
    (word.split("/")[0], word.split("/")[-1] if "/" in word else f"{word}s") for word in _NOUNS.split()
)
"""Singular and plural; pairs that are not one token each for the tokenizer at hand are left out."""
PREPOSITIONS: tuple[str, ...] = ("near", "behind", "beside", "opposite", "under", "above")
VERBS: tuple[tuple[str, str], ...] = (("is", "are"), ("was", "were"), ("has", "have"))
"""Singular and plural: an answer is every one of its number."""
TEMPLATE = "The {subject} {preposition} the {attractor}"
# Numbers of subject and attractor, 1 for plural: each as often as any other.
CONDITIONS = ((1, 0), (0, 1), (1, 1), (0, 0))


class _Fill(NamedTuple):
    """The words of one pair."""

    subject: tuple[str, str]
    preposition: str
    attractor: str
    numbers: tuple[int, int]

    def prompt(self, number: int) -> str:
        return TEMPLATE.format(subject=self.subject[number], preposition=self.preposition, attractor=self.attractor)


def agreement(
    tokenizer: Tokenizer,
    *,
    n: int,
    seed: int,
    nouns: Sequence[tuple[str, str]] | None = None,
    verbs: Sequence[tuple[str, str]] | None = None,
    bos: bool = True,
) -> Task:
    """How does the model know whether one or many do something?

    A noun stands between subject and verb (the attractor), of the other number in half of the prompts. The counterfactual has
    the subject in the other number, and nothing else changed: right and wrong trade places. Singular and plural, subject and
    attractor, take turns, so that none of them gives the answer away.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    n
        Number of pairs.
    seed
        Decides nouns and prepositions.
    nouns
        (singular, plural) of things or people; default: those of `NOUNS` that are single tokens.
    verbs
        (singular, plural); default: those of `VERBS` that are single tokens. Right are all verbs of the subject's number,
        wrong those of the other.
    bos
        Put the tokenizer's BOS token in front, if it has one.

    Returns
    -------
    Task
        With positions ``subject``, ``preposition`` and ``end`` (which is the attractor); metric ``logit_diff``.

    Raises
    ------
    TaskError
        When nouns or verbs are not single tokens, or n distinct prompts cannot be made.

    Examples
    --------
    >>> from mechinterp.tasks import word_tokenizer
    >>> task = agreement(word_tokenizer(), n=4, seed=0)
    >>> task
    Task agreement: 4 pairs of 6 tokens, differ at 1 position, metric logit_diff
    >>> task.provenance["conditions"]
    {'plural near singular': 1, 'singular near plural': 1, 'plural near plural': 1, 'singular near singular': 1}

    References
    ----------
    Linzen et al. (2016), "Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies", arXiv:1611.01368; Finlayson et
    al. (2021), arXiv:2106.06087. There one verb is asked for; here the mean logit of all verbs of a number.
    """
    check_number("agreement", n)
    known = _pairs(tokenizer, NOUNS, nouns, "nouns")
    answers = _pairs(tokenizer, VERBS, verbs, "verbs")
    prepositions = list(single_token_words(tokenizer, PREPOSITIONS))
    if len(known) < 2 or not answers or not prepositions:
        raise TaskError(
            f"{len(known)} pairs of nouns, {len(answers)} of verbs and {len(prepositions)} prepositions are single tokens for "
            "this tokenizer, and agreement needs 2, 1 and 1: pass nouns=[(singular, plural), ...] or verbs= that are."
        )
    generator = random.Random(seed)

    def draw(turn: int) -> tuple[str, _Fill]:
        numbers = CONDITIONS[turn % len(CONDITIONS)]
        subject, attractor = generator.sample(list(known), 2)
        fill = _Fill(subject, generator.choice(prepositions), attractor[numbers[1]], numbers)
        return fill.prompt(numbers[0]), fill

    drawn = draw_distinct(n, draw, advice="more nouns")
    clean: list[list[int]] = []
    corrupt, right, wrong = [], [], []
    positions: dict[str, list[int]] = {"subject": [], "preposition": [], "end": []}
    for text, fill in drawn.items():
        number = fill.numbers[0]
        length = len(clean[0]) if clean else None
        tokens, changed, (where,) = aligned(
            "agreement", tokenizer, text, fill.prompt(1 - number), differ=1, length=length, bos=bos
        )
        clean.append(tokens)
        corrupt.append(changed)
        right.append([ids[number] for ids in answers.values()])
        wrong.append([ids[1 - number] for ids in answers.values()])
        for name, place in zip(positions, (where, where + 1, len(tokens) - 1), strict=True):
            positions[name].append(place)
    called = ("singular", "plural")
    return Task(
        name="agreement",
        clean=clean,
        corrupt=corrupt,
        right=right,
        wrong=wrong,
        positions=positions,
        provenance={
            "generator": "agreement",
            "n": n,
            "seed": seed,
            "conditions": dict(Counter(f"{called[a]} near {called[b]}" for a, b in (fill.numbers for fill in drawn.values()))),
            "nouns": len(known),
            "verbs": ["/".join(pair) for pair in answers],
            "tokenizer": tokenizer_name(tokenizer),
            "bos": bos and tokenizer.bos_token_id is not None,
        },
        texts=tuple(drawn),
        strings=spell(tokenizer, {token for rows in (clean, corrupt, right, wrong) for row in rows for token in row}),
    )


def _pairs(
    tokenizer: Tokenizer, usual: Sequence[tuple[str, str]], own: Sequence[tuple[str, str]] | None, argument: str
) -> dict[tuple[str, str], tuple[int, int]]:
    """The pairs of which both words are one token, with their ids."""
    pairs = usual if own is None else own
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise TaskError(f"{pair!r} of {argument}= is no pair: write (singular, plural), such as {usual[0]!r}.")
    ids = single_token_words(tokenizer, [word for pair in pairs for word in pair])
    if own is not None:
        for word in (word for pair in own for word in pair):
            if word not in ids:
                raise TaskError(f"{word!r} is not one token after a space for this tokenizer: leave it out of {argument}=.")
    return {(one, many): (ids[one], ids[many]) for one, many in pairs if one in ids and many in ids}
