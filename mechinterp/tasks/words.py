"""What tasks ask of a tokenizer: ids of a prompt, ids of a word inside a sentence, text of an id.

Any Hugging Face tokenizer will do. Special tokens are never left to the tokenizer's own template: a BOS token
comes in front when it has one and `bos` is true, and nothing else is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Protocol, runtime_checkable

from mechinterp.errors import TaskError

__all__ = ["Tokenizer", "encode", "single_token_words", "spell", "tokenizer_name"]


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that tasks use."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """The text of ids."""
        ...


def encode(tokenizer: Tokenizer, text: str, *, bos: bool) -> list[int]:
    """The token ids of a prompt, with the BOS token in front if asked for and there is one."""
    ids = plain(tokenizer, text)
    return [tokenizer.bos_token_id, *ids] if bos and tokenizer.bos_token_id is not None else ids


def check_tokenizer(tokenizer: object) -> None:
    """Refuse a tokenizer's name, or the None of a model that was loaded without one."""
    # Not by encode alone: every str has a method of that name.
    if not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "bos_token_id")):
        raise TaskError(
            f"a {type(tokenizer).__name__} was given where a tokenizer is needed: pass model.tokenizer, "
            "or a Hugging Face tokenizer."
        )


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text, nothing added; a word that the tokenizer does not know is an error."""
    check_tokenizer(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    unknown: str | None = getattr(tokenizer, "unk_token", None)
    # Byte-level tokenizers call some special token their unknown one; it occurs only where a text spells it.
    if unknown is not None and getattr(tokenizer, "unk_token_id", None) in ids and unknown not in text:
        raise TaskError(f"the tokenizer does not know a word of {text!r}: use words of its vocabulary.")
    return ids


def single_token_words(tokenizer: Tokenizer, words: Iterable[str]) -> dict[str, int]:
    """Which words are one token in the middle of a sentence, and its id.

    Asked as what a space and the word add to a sentence, since many tokenizers have one token for `` Mary``
    and two for ``Mary`` at the start.
    """
    check_tokenizer(tokenizer)
    context = "to the"
    try:
        before = plain(tokenizer, context)
    except TaskError:
        context, before = "", []
    found: dict[str, int] = {}
    for word in dict.fromkeys(words):
        try:
            ids = plain(tokenizer, f"{context} {word}")
        except TaskError:
            continue
        if len(ids) == len(before) + 1 and ids[:-1] == before and ids[-1] not in found.values():
            found[word] = ids[-1]
    return found


def spell(tokenizer: Tokenizer, ids: Iterable[int]) -> Mapping[int, str]:
    """The text of every id that occurs, the space in front included."""
    return {token: tokenizer.decode([token]) for token in sorted(set(ids)) if token >= 0}


def tokenizer_name(tokenizer: Any) -> str:
    """The tokenizer's name for provenance; of a local folder only its last part."""
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    return PurePath(name).name if PurePath(name).is_absolute() else name
