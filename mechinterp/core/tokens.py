"""Positions named by the text of the token that stands there, looked up when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.model import Model
from mechinterp.core.select import is_token_text
from mechinterp.errors import SelectorError

__all__ = ["TokenPositions", "token_positions"]

_TEXT = re.compile(r"""(?P<quote>['"])(?P<text>.+)(?P=quote)(?:\#(?P<nth>-?\d+))?""", re.DOTALL)


class TokenPositions(Mapping[str, Tensor]):
    """Named positions ``[batch]`` of these prompts, and as many more as there are token texts; see `token_positions`."""

    def __init__(self, model: Model, tokens: Tensor, named: Mapping[str, Tensor], lengths: Tensor | None = None) -> None:
        self.model, self.ids, self.named, self.lengths = model, tokens, named, lengths
        self._found: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.named or not is_token_text(name):
            return self.named[name]
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self.named or (isinstance(name, str) and is_token_text(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.named)

    def __len__(self) -> int:
        return len(self.named)

    def _find(self, name: str) -> Tensor:
        match = _TEXT.fullmatch(name)
        if match is None:
            raise SelectorError(f"cannot read the token {name}; write it like 'Mary' or 'Mary'#0")
        text, tokenizer = match["text"], self.model.tokenizer
        if tokenizer is None:
            raise SelectorError(
                f"{self.model.name} has no tokenizer, so no token has a text: give positions as numbers, or "
                "mi.load(..., tokenizer=tokenizer)"
            )
        ids = [each for each in set(self.ids.flatten().tolist()) if _is(tokenizer.decode([each]), text)]
        there = torch.isin(self.ids, torch.tensor(ids, dtype=self.ids.dtype, device=self.ids.device))
        if self.lengths is not None:
            # Padding repeats tokens, and is no place.
            there &= torch.arange(self.ids.shape[1], device=there.device) < self.lengths.to(there.device)[:, None]
        counts = there.sum(dim=1)
        nth = None if match["nth"] is None else int(match["nth"])
        least = 1 if nth is None else (nth + 1 if nth >= 0 else -nth)
        if bool((counts < least).any()):
            short = (counts < least).nonzero().flatten().tolist()
            often = "" if least == 1 else f" {least} times"
            raise SelectorError(f"the token {text!r} is not{often} in {self._prompts(short)}.{_parts(tokenizer, text)}")
        if nth is None and bool((counts > 1).any()):
            several = (counts > 1).nonzero().flatten().tolist()
            where = there[several[0]].nonzero().flatten().tolist()
            raise SelectorError(
                f"the token {text!r} is more than once in {self._prompts(several)} (in the first of them at positions "
                f"{', '.join(map(str, where))}); write '{text}'#0 for the first, '{text}'#-1 for the last"
            )
        wanted = 0 if nth is None else nth
        return torch.stack([row.nonzero().flatten()[wanted] for row in there])

    def _prompts(self, rows: list[int]) -> str:
        numbers = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        start = self.model.tokenizer.decode(self.ids[rows[0]].tolist())[:60]
        return f"prompt{'s' if len(rows) > 1 else ''} {numbers} of {len(self.ids)} ({start!r})"


def token_positions(model: Model, tokens: Tensor, positions: Mapping[str, Tensor] | None = None) -> TokenPositions:
    """Where does a token stand in each prompt, given its text?

    Parameters
    ----------
    model
        Its tokenizer is asked.
    tokens
        ``[batch pos]`` ids.
    positions
        Further named positions ``[batch]``, such as ``task.positions``.

    Returns
    -------
    TokenPositions
        A mapping from names to ``[batch]`` positions. ``["'Mary'"]`` is where the token ``Mary`` (or `` Mary``, with a space)
        stands; ``["'Mary'#0"]`` the first of several, ``["'Mary'#-1"]`` the last. `mechinterp.run` makes one by itself.

    Raises
    ------
    SelectorError
        When a name is looked up: the token is missing in some prompts, or there more than once. The message names them.

    Notes
    -----
    Cost: no forward pass.

    Examples
    --------
    >>> import torch
    >>> from types import SimpleNamespace
    >>> import mechinterp as mi
    >>> letters = SimpleNamespace(decode=lambda ids: "".join(chr(97 + i) for i in ids))
    >>> model = mi.load(mi.load("toy:induction"), tokenizer=letters)
    >>> mi.token_positions(model, torch.tensor([[0, 1, 2], [2, 0, 1]]))["'c'"]
    tensor([2, 0])
    """
    return TokenPositions(model, tokens, positions or {})


def _is(token: str, text: str) -> bool:
    # Most tokenizers write the space in front of a word into its token.
    return token == text or (not text.startswith(" ") and token.removeprefix(" ") == text)


def _parts(tokenizer: Any, text: str) -> str:
    """A hint where the text is no single token."""
    if not callable(tokenizer):
        return ""
    ids = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, f" {text.lstrip()}")]
    if any(len(each) == 1 for each in ids):
        return ""
    return f" It is {len(ids[0])} tokens: {', '.join(repr(tokenizer.decode([each])) for each in ids[0])}; name one of them"
