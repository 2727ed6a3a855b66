"""A small tokenizer that needs no download: for examples, for tests, and for models made by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mechinterp.tasks.agreement import NOUNS as PAIRS
from mechinterp.tasks.agreement import PREPOSITIONS, VERBS
from mechinterp.tasks.docstring import ARGUMENTS
from mechinterp.tasks.gender import FEMALE, MALE, ROLES
from mechinterp.tasks.greater_than import NOUNS, TEMPLATE
from mechinterp.tasks.ioi import NAMES, OBJECTS, PLACES, TEMPLATES

__all__ = ["word_tokenizer"]


def word_tokenizer(words: Iterable[str] | None = None) -> Any:
    """A tokenizer with one token a word, punctuation mark or digit, and BOS ``<s>`` as id 0.

    Parameters
    ----------
    words
        Its vocabulary. Default: every word that the built-in tasks use, so that each of them can be made
        with it.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        With ``<s>`` (id 0), ``<unk>`` (id 1), then the words in the order given.

    Examples
    --------
    >>> tokenizer = word_tokenizer(["Mary", "sings"])
    >>> tokenizer.encode("Mary sings", add_special_tokens=False)
    [2, 3]
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<s>", "<unk>", *(_task_words() if words is None else words)]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(known))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    inner.decoder = decoders.Fuse()
    make: Any = PreTrainedTokenizerFast  # untyped upstream
    return make(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", name_or_path="words")


def _task_words() -> list[str]:
    templates = " ".join([*TEMPLATES, TEMPLATE])
    plain = "".join(letter if letter.isalpha() else " " for letter in templates).split()
    return [
        *".,0123456789",
        *(word for word in plain if word not in ("A", "B", "S", "noun", "year", "century", "place", "object")),
        "year",
        *NAMES,
        *PLACES,
        *OBJECTS,
        *NOUNS,
        *(word for pair in (*PAIRS, *VERBS) for word in pair),
        *PREPOSITIONS,
        *FEMALE,
        *MALE,
        *ROLES,
        *["So", "is", "a", "really", "great", "isn", "'", "t", "she", "he"],
        # As they are cut: at every change between letters and other marks.
        *["def", "self", "param", "(", ":", "):", '"""'],
        *ARGUMENTS,
    ]
