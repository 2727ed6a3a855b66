"""The words that toys speak: ordinary, short, each a token of its own."""

from __future__ import annotations

from typing import Any

__all__ = ["WORDS", "tokenizer_of"]

_SPELLED = """
apple bread chair dream eagle flute grape house ivory jewel knife lemon mango night ocean piano
queen river stone table uncle voice water yacht zebra angel beach cloud dance earth fence ghost
heart image juice koala light moon north olive pearl quilt robot shell tiger urban violin wagon
yeast acorn basil cabin daisy ember frost globe honey igloo jelly kayak lotus maple
"""

WORDS: tuple[str, ...] = tuple(_SPELLED.split())
"""62 words of three letters and more, so that `mechinterp.tasks.induction` draws from all of them."""


def tokenizer_of(words: tuple[str, ...], name: str) -> Any:
    """One token a word: ``<s>`` is 0, ``<unk>`` is 1, and the words follow in order."""
    from mechinterp.tasks import word_tokenizer

    tokenizer = word_tokenizer(words)
    tokenizer.name_or_path = name
    return tokenizer
