"""Gendered pronouns: "So Mary is a really great friend, isn't" -> " she", and not " he"."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mechinterp.errors import TaskError
from mechinterp.tasks.drawing import aligned, check_number, draw_distinct, known_words
from mechinterp.tasks.task import Task
from mechinterp.tasks.words import Tokenizer, single_token_words, spell, tokenizer_name

__all__ = ["FEMALE", "MALE", "ROLES", "gender"]

_FEMALE = """
    Alice Amanda Amy Andrea Angela Anna Barbara Carol Catherine Christine Claire Deborah Diane Dorothy Elizabeth Emily Emma
    Hannah Helen Jane Janet Jennifer Jessica Joan Julia Julie Karen Katherine Laura Lauren Linda Lisa Louise Lucy
    Margaret Maria Marie Martha Mary Michelle Nancy Nicole Patricia Rachel Rebecca Ruth Samantha Sandra Sarah Sharon Stephanie
    Susan Teresa
"""
_MALE = """
    Aaron Adam Alan Andrew Anthony Arthur Benjamin Brian Bruce Carl Charles Daniel David Dennis Donald Douglas Edward Eric Fred
    George Harry Henry Jack Jacob James Jason Jeremy John Jonathan Joseph Joshua Keith Kenneth Kevin Larry Martin
    Matthew Michael Nathan Nicholas Oliver Patrick Paul Peter Philip Richard Robert Roger Ryan Samuel Scott Simon Stephen
    Thomas Timothy Tom Tony Vincent Walter William
"""
FEMALE: tuple[str, ...] = tuple(_FEMALE.split())
"""First names that are followed by "she"; those that are not one token for the tokenizer at hand are left out."""
MALE: tuple[str, ...] = tuple(_MALE.split())
"""First names that are followed by "he"."""
ROLES: tuple[str, ...] = ("friend", "neighbor", "teacher", "student", "writer", "singer", "doctor", "worker", "lawyer", "manager")
TEMPLATE = "So {name} is a really great {role}, isn't"
PRONOUNS = ("she", "he")


def gender(
    tokenizer: Tokenizer,
    *,
    n: int,
    seed: int,
    female: Sequence[str] | None = None,
    male: Sequence[str] | None = None,
    bos: bool = True,
) -> Task:
    """How does the model know which pronoun goes with a name?

    The counterfactual has a name of the other gender in the same place, and nothing else changed: right and wrong trade places.
    Half of the clean prompts ask for "she". What is explained is what the model has taken from text, not who anybody is.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    n
        Number of pairs.
    seed
        Decides names and roles.
    female, male
        First names; default: those of `FEMALE` and `MALE` that are single tokens.
    bos
        Put the tokenizer's BOS token in front, if it has one.

    Returns
    -------
    Task
        With positions ``name``, ``is`` (behind the name), ``role`` and ``end``; metric ``logit_diff``.

    Raises
    ------
    TaskError
        When names, roles or pronouns are not single tokens, or n distinct prompts cannot be made.

    Examples
    --------
    >>> from mechinterp.tasks import word_tokenizer
    >>> task = gender(word_tokenizer(), n=4, seed=0)
    >>> task
    Task gender: 4 pairs of 12 tokens, differ at 1 position, metric logit_diff
    >>> [task.string(token) for token in task.right[:, 0].tolist()]
    ['she', 'he', 'she', 'he']

    References
    ----------
    Mathwin et al. (2023), "Identifying a Preliminary Circuit for Predicting Gendered Pronouns in GPT-2 Small"; the prompt is
    theirs.
    """
    check_number("gender", n)
    names = [list(known_words(tokenizer, *each)) for each in ((FEMALE, female, "female"), (MALE, male, "male"))]
    roles, pronouns = single_token_words(tokenizer, ROLES), single_token_words(tokenizer, PRONOUNS)
    if not (names[0] and names[1] and roles and len(pronouns) == len(PRONOUNS)):
        raise TaskError(
            f"{len(names[0])} female and {len(names[1])} male names, {len(roles)} roles and {len(pronouns)} of 2 pronouns are "
            "single tokens for this tokenizer, and gender needs 1, 1, 1 and 2: pass female= and male= names that are."
        )
    both = set(names[0]) & set(names[1])
    if both:
        raise TaskError(f"{min(both)!r} is among the female and the male names: leave it out of one of them.")
    generator = random.Random(seed)

    def draw(turn: int) -> tuple[str, tuple[int, str, int]]:
        here, there = turn % 2, 1 - turn % 2
        role = generator.choice(list(roles))
        text = TEMPLATE.format(name=generator.choice(names[here]), role=role)
        return text, (here, TEMPLATE.format(name=generator.choice(names[there]), role=role), roles[role])

    drawn = draw_distinct(n, draw, advice="more names")
    clean: list[list[int]] = []
    corrupt, right, wrong = [], [], []
    positions: dict[str, list[int]] = {"name": [], "is": [], "role": [], "end": []}
    for text, (here, other, role) in drawn.items():
        length = len(clean[0]) if clean else None
        tokens, changed, (where,) = aligned("gender", tokenizer, text, other, differ=1, length=length, bos=bos)
        clean.append(tokens)
        corrupt.append(changed)
        right.append(pronouns[PRONOUNS[here]])
        wrong.append(pronouns[PRONOUNS[1 - here]])
        for name, place in zip(positions, (where, where + 1, tokens.index(role), len(tokens) - 1), strict=True):
            positions[name].append(place)
    return Task(
        name="gender",
        clean=clean,
        corrupt=corrupt,
        right=right,
        wrong=wrong,
        positions=positions,
        provenance={
            "generator": "gender",
            "n": n,
            "seed": seed,
            "names": {"female": len(names[0]), "male": len(names[1])},
            "roles": len(roles),
            "tokenizer": tokenizer_name(tokenizer),
            "bos": bos and tokenizer.bos_token_id is not None,
        },
        texts=tuple(drawn),
        strings=spell(tokenizer, {*right, *wrong, *(token for row in [*clean, *corrupt] for token in row)}),
    )
