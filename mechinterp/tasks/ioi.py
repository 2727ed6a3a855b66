"""Indirect object identification: "Then, Mary and John went ..., and John gave a drink to" -> " Mary"."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from string import Formatter
from typing import Literal, NamedTuple

from mechinterp.errors import TaskError, did_you_mean
from mechinterp.tasks.drawing import check_number, draw_distinct
from mechinterp.tasks.task import Task
from mechinterp.tasks.words import Tokenizer, encode, single_token_words, spell, tokenizer_name

__all__ = ["CORRUPTIONS", "NAMES", "TEMPLATES", "ioi"]

TEMPLATES: tuple[str, ...] = (
    "Then, {A} and {B} went to the {place}, and {S} gave a {object} to",
    "Later, {A} and {B} sat in the {place}, and {S} handed a {object} to",
    "Last night {A} and {B} were at the {place}, when {S} gave a {object} to",
    "One day {A} and {B} met at the {place}, and {S} offered a {object} to",
    "This morning {A} and {B} walked to the {place}. There {S} gave a {object} to",
)
"""Default prompts: of equal length, and with the names at the same positions, for the tokenizers of GPT-2 and
SmolLM2, so that an average over prompts is an average over like positions."""

_NAMES = """
    Aaron Adam Alan Alice Amanda Amy Andrea Andrew Angela Anna Anthony Arthur Barbara Benjamin Brian Bruce
    Carl Carol Catherine Charles Christine Claire Daniel David Deborah Dennis Diane Donald Dorothy Douglas
    Edward Elizabeth Emily Emma Eric Fred George Hannah Harry Helen Henry Jack Jacob James Jane Janet
    Jason Jennifer Jeremy Jessica Joan John Jonathan Joseph Joshua Julia Julie Karen Katherine Keith Kelly
    Kenneth Kevin Larry Laura Lauren Linda Lisa Louise Lucy Margaret Maria Marie Martha Martin Mary
    Matthew Michael Michelle Nancy Nathan Nicholas Nicole Oliver Patricia Patrick Paul Peter Philip Rachel
    Rebecca Richard Robert Roger Ruth Ryan Samantha Samuel Sandra Sarah Scott Sharon Simon Stephanie
    Stephen Susan Teresa Thomas Timothy Tom Tony Vincent Walter William
"""
NAMES: tuple[str, ...] = tuple(_NAMES.split())
"""First names to draw from; those that are not one token for the tokenizer at hand are left out."""

_PLACES = """
    store park school office garden hospital station library market restaurant house beach museum
"""
PLACES: tuple[str, ...] = tuple(_PLACES.split())
_OBJECTS = """
    drink book ball ring key letter necklace snack flower gift pen map coin hat box ticket
"""
OBJECTS: tuple[str, ...] = tuple(_OBJECTS.split())

ORDERS = ("ABBA", "BABA")
CORRUPTIONS = ("third-name", "swap", "abc")
FIELDS = ("A", "B", "S", "place", "object")


class _Fill(NamedTuple):
    """The words of one pair: which prompt, in which order, and who is who."""

    template: str
    io_first: bool
    io: str
    subject: str
    others: tuple[str, str, str]
    place: str
    object: str

    def clean(self) -> str:
        return self._prompt(self.io, self.subject, self.subject)

    def corrupt(self, corruption: str) -> str:
        if corruption == "third-name":
            return self._prompt(self.io, self.subject, self.others[0])
        if corruption == "swap":
            return self._prompt(self.io, self.subject, self.io)
        return self._prompt(*self.others)

    def _prompt(self, io: str, subject: str, again: str) -> str:
        first, second = (io, subject) if self.io_first else (subject, io)
        return self.template.format(A=first, B=second, S=again, place=self.place, object=self.object)


def ioi(
    tokenizer: Tokenizer,
    *,
    n: int,
    seed: int,
    corruption: str = "third-name",
    templates: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    order: Literal["ABBA", "BABA"] | None = None,
    bos: bool = True,
) -> Task:
    """How does the model know who receives the gift?

    Two people are named, one of them (the subject S) again; the right answer is the other one (the indirect
    object IO), the wrong one is S. Half of the prompts name IO first ("ABBA"), half S first ("BABA"), unless
    ``order`` asks for one of them, and the templates take turns, so that neither order nor wording gives the
    answer away. No clean prompt occurs twice.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    n
        Number of pairs.
    seed
        Decides names, places and objects.
    corruption
        What the counterfactual changes:

        - ``"third-name"``: the second mention of S becomes a third name, so nothing says which of the two
          receives. One token differs, at S2; the logit difference falls to about zero.
        - ``"swap"``: the second mention of S becomes IO, so the answer is S. One token differs, at S2; the
          logit difference changes sign.
        - ``"abc"``: all three mentions become three other names, as in the paper's reference set.
    templates
        Prompts with the fields ``{A}`` and ``{B}`` (the two people, in order), ``{S}`` (the second mention),
        and optionally ``{place}`` and ``{object}``; default `TEMPLATES`. Of the defaults, those of the
        commonest token length are used; your own must be equally long.
    names
        First names to draw from; default: those of `NAMES` that are single tokens.
    order
        ``"ABBA"``: all prompts name IO first; ``"BABA"``: S first; None: both take turns. Circuits at positions
        (``mi.discover(..., positions=True)``) need one: the spans of `Task.spans` come in one order.
    bos
        Put the tokenizer's BOS token in front, if it has one.

    Returns
    -------
    Task
        With positions ``IO``, ``S1``, ``S1+1``, ``S2`` and ``end``, all prompts of equal length, metric
        ``logit_diff``. On SmolLM2: 17 tokens, first difference at position 12.

    Raises
    ------
    TaskError
        When names or templates do not suit the tokenizer, or n distinct prompts cannot be made.

    Examples
    --------
    >>> from mechinterp.tasks import word_tokenizer
    >>> task = ioi(word_tokenizer(), n=4, seed=0)
    >>> task
    Task ioi: 4 pairs of 17 tokens, differ at 1 position, metric logit_diff
    >>> sorted(task.positions)
    ['IO', 'S1', 'S1+1', 'S2', 'end']

    References
    ----------
    Wang et al. (2022), "Interpretability in the Wild", arXiv:2211.00593. There the three names of the ABC set
    replace all mentions; the default here changes S2 alone, so that everything before it is shared by both
    runs.
    """
    check_number("ioi", n)
    if corruption not in CORRUPTIONS:
        raise TaskError(f"ioi has no corruption {corruption!r}. {did_you_mean(corruption, CORRUPTIONS)}")
    if order not in (None, *ORDERS):
        raise TaskError(f"ioi has no order {order!r} of the names. {did_you_mean(order, ORDERS)}")
    known = _known_names(tokenizer, names)
    places, objects = single_token_words(tokenizer, PLACES), single_token_words(tokenizer, OBJECTS)
    chosen = _chosen_templates(tokenizer, templates, known, list(places), list(objects))
    fills = _draw(chosen, list(known), list(places), list(objects), n, seed, order)

    clean = [encode(tokenizer, fill.clean(), bos=bos) for fill in fills]
    corrupt = [encode(tokenizer, fill.corrupt(corruption), bos=bos) for fill in fills]
    right, wrong = [known[fill.io] for fill in fills], [known[fill.subject] for fill in fills]
    positions = _positions(fills, clean, right, wrong)
    return Task(
        name="ioi",
        clean=clean,
        corrupt=corrupt,
        right=right,
        wrong=wrong,
        positions=positions,
        metric="logit_diff",
        provenance={
            "generator": "ioi",
            "n": n,
            "seed": seed,
            "corruption": corruption,
            "templates": dict(Counter(fill.template for fill in fills)),
            "orders": dict(Counter("ABBA" if fill.io_first else "BABA" for fill in fills)),
            "names": len(known),
            "tokenizer": tokenizer_name(tokenizer),
            "bos": bos and tokenizer.bos_token_id is not None,
            **({} if order is None else {"order": order}),
        },
        texts=tuple(fill.clean() for fill in fills),
        strings=spell(tokenizer, {token for row in [*clean, *corrupt] for token in row}),
    )


def _known_names(tokenizer: Tokenizer, names: Sequence[str] | None) -> dict[str, int]:
    known = single_token_words(tokenizer, NAMES if names is None else names)
    if names is not None and len(known) < len(set(names)):
        longer = [name for name in names if name not in known]
        raise TaskError(
            f"{', '.join(map(repr, longer))} {'is' if len(longer) == 1 else 'are'} not one token after a "
            "space for this tokenizer: an answer is one token, so leave "
            f"{'it' if len(longer) == 1 else 'them'} out of names=."
        )
    if len(known) < 5:
        raise TaskError(
            f"{len(known)} of {len(NAMES if names is None else names)} names are single tokens for this "
            "tokenizer, and ioi needs 5: pass names=[...] that are."
        )
    return known


def _chosen_templates(
    tokenizer: Tokenizer,
    templates: Sequence[str] | None,
    names: dict[str, int],
    places: list[str],
    objects: list[str],
) -> list[str]:
    """The templates that all have the same number of tokens."""
    if templates is not None and (isinstance(templates, str) or not templates):
        raise TaskError("templates is a list of prompts with the fields {A}, {B} and {S}, at least one.")
    a, b = list(names)[:2]
    lengths: dict[str, int] = {}
    problem = "there are none"
    for template in TEMPLATES if templates is None else templates:
        try:
            _check_template(template, places, objects)
            filled = _Fill(template, True, a, b, (a, b, a), (places or [""])[0], (objects or [""])[0]).clean()
            lengths[template] = len(encode(tokenizer, filled, bos=False))
        except TaskError as error:
            if templates is not None:
                raise
            problem = str(error)
    if not lengths:
        raise TaskError(f"no default template of ioi suits this tokenizer, pass templates=. The last reason: {problem}")
    common = Counter(lengths.values()).most_common(1)[0][0]
    if templates is not None and set(lengths.values()) != {common}:
        listed = "; ".join(f"{count} tokens: {template!r}" for template, count in lengths.items())
        raise TaskError(f"the templates have different lengths, and all prompts of a task have the same. {listed}")
    return [template for template, count in lengths.items() if count == common]


def _check_template(template: str, places: list[str], objects: list[str]) -> None:
    """Refuse a template whose fields do not make an IOI prompt."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise TaskError(f"template {template!r} cannot be read ({error}).") from None
    fields = [name for _, name, _, _ in parts if name is not None]
    for name in fields:
        if name not in FIELDS:
            raise TaskError(f"template {template!r} has a field {{{name}}}. {did_you_mean(name, FIELDS)}")
    people = [name for name in fields if name in ("A", "B", "S")]
    if people != ["A", "B", "S"]:
        raise TaskError(f"template {template!r} has the people {people}: it needs {{A}}, {{B}} and then {{S}}, each once.")
    for literal, field, _, _ in parts:
        if field is not None and not literal.endswith(" "):
            raise TaskError(
                f"template {template!r} has no space before {{{field}}}: a word at the start of a "
                f"sentence is another token, so begin with another word, such as 'Then, {{A}} and ...'."
            )
    if template != template.rstrip() or parts[-1][1] is not None:
        raise TaskError(f"template {template!r} ends in a field or a space: end with the word before the answer.")
    for name, words in (("place", places), ("object", objects)):
        if name in fields and not words:
            raise TaskError(f"no {name} is a single token for this tokenizer: use a template without {{{name}}}.")


def _draw(
    templates: list[str], names: list[str], places: list[str], objects: list[str], n: int, seed: int, order: str | None
) -> list[_Fill]:
    """Draw n fills with distinct clean prompts; templates take turns, and orders where none is given."""
    generator = random.Random(seed)

    def draw(turn: int) -> tuple[str, _Fill]:
        io, subject, *others = generator.sample(names, 5)
        fill = _Fill(
            template=templates[turn % len(templates)],
            io_first=order == "ABBA" if order else (turn // len(templates)) % 2 == 0,
            io=io,
            subject=subject,
            others=(others[0], others[1], others[2]),
            place=generator.choice(places or [""]),
            object=generator.choice(objects or [""]),
        )
        return fill.clean(), fill

    return list(draw_distinct(n, draw, advice="more names or templates").values())


def _positions(fills: list[_Fill], clean: list[list[int]], right: list[int], wrong: list[int]) -> dict[str, list[int]]:
    """Where the names stand, found by their ids: exactly one IO and two S in each prompt."""
    found: dict[str, list[int]] = {"IO": [], "S1": [], "S1+1": [], "S2": [], "end": []}
    for fill, tokens, io, subject in zip(fills, clean, right, wrong, strict=True):
        of_io = [place for place, token in enumerate(tokens) if token == io]
        of_subject = [place for place, token in enumerate(tokens) if token == subject]
        if len(of_io) != 1 or len(of_subject) != 2 or len(tokens) != len(clean[0]):
            raise TaskError(
                f"{fill.clean()!r} has {len(of_io)} tokens {fill.io!r}, {len(of_subject)} tokens "
                f"{fill.subject!r} and {len(tokens)} tokens in all, where 1, 2 and {len(clean[0])} were "
                "expected: this tokenizer splits names by context; pass templates= or names= that it "
                "does not."
            )
        first, second = of_subject
        for name, where in zip(found, (of_io[0], first, first + 1, second, len(tokens) - 1), strict=True):
            found[name].append(where)
    return found
