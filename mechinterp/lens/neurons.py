"""Neurons: the tokens that drive them, over a corpus of any length, and what each writes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp.core.arguments import check_model
from mechinterp.core.model import Model
from mechinterp.core.picture import table_of
from mechinterp.core.plan import rows_per_forward
from mechinterp.core.prompts import Batch, Prompts, Runnable, batch_of
from mechinterp.core.run import run
from mechinterp.core.select import Selection, select
from mechinterp.core.sites import Site
from mechinterp.errors import SelectorError, TaskError, missing_extra

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Activating", "TopTokens", "spelled", "top_tokens"]

# Prompts that are read from a corpus before they are run; sorted by nothing, padded to the longest.
_AT_ONCE = 64


def spelled(model: Model, ids: Iterable[int]) -> list[str]:
    """The text of each token id; the number where the model has no tokenizer."""
    decode = getattr(model.tokenizer, "decode", None)
    return [str(each) if decode is None else decode([each]) for each in ids]


@dataclass(frozen=True, order=True)
class Activating:
    """One place in a corpus and how active a neuron is there.

    Parameters
    ----------
    value
        The activation.
    prompt, pos
        Which prompt of the corpus, and which of its tokens.
    window
        The ids around it.
    at
        Which of the window it is.
    """

    value: float
    prompt: int = field(compare=False)
    pos: int = field(compare=False)
    window: tuple[int, ...] = field(compare=False)
    at: int = field(compare=False)


@dataclass(frozen=True, eq=False)
class TopTokens:
    """What drives neurons most, over a corpus.

    Parameters
    ----------
    model
        What was run; its tokenizer spells the tokens.
    sites
        The neurons.
    found
        For each the strongest places, strongest first.
    mean, active
        ``[neuron]``: mean activation, and share of tokens at which it is above 0.
    tokens, prompts
        How much was read.
    """

    model: Model
    sites: tuple[Site, ...]
    found: tuple[tuple[Activating, ...], ...]
    mean: Tensor
    active: Tensor
    tokens: int
    prompts: int

    def __getitem__(self, neuron: Site | str) -> tuple[Activating, ...]:
        """The strongest places of one neuron, ``top["L3.N17.mlp_post"]``."""
        (site,) = select(neuron, self.model.cfg).sites
        if site not in self.sites:
            raise SelectorError(f"{site} was not watched; watched are {', '.join(map(str, self.sites[:6]))}")
        return self.found[self.sites.index(site)]

    def _rows(self) -> Iterator[tuple[str, Activating, list[str]]]:
        for site, places in zip(self.sites, self.found, strict=True):
            for place in places:
                yield str(site), place, spelled(self.model, place.window)

    def to_frame(self) -> pd.DataFrame:
        """A table: ``neuron value token prompt pos text``."""
        try:
            import pandas as pd
        except ImportError:
            raise missing_extra("a table", "pandas", "frames") from None
        columns = ["neuron", "value", "token", "prompt", "pos", "text"]
        rows = [(name, p.value, words[p.at], p.prompt, p.pos, "".join(words)) for name, p, words in self._rows()]
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        name, place, words = next(self._rows())
        many = f"{len(self.sites)} neurons" if len(self.sites) > 1 else "1 neuron"
        return (
            f"TopTokens: {many} over {self.tokens} tokens of {self.prompts} prompts; {name} is {place.value:.3g} at "
            f"{words[place.at]!r}"
        )

    def _repr_html_(self) -> str:
        body = []
        for number, (name, place, words) in enumerate(self._rows()):
            if number == 200:
                break
            marked = "".join(
                f'<span style="background:#fde2c4;font-weight:bold">{escape(word)}</span>' if i == place.at else escape(word)
                for i, word in enumerate(words)
            )
            where = f"{place.prompt}:{place.pos}"
            body.append((escape(name), f"{place.value:.3g}", marked, where))
        return table_of(repr(self), ("neuron", "activation", "text", "prompt:token"), body, spaces=True)


def top_tokens(
    model: Model,
    corpus: Runnable | Iterable[Any],
    neurons: str | Site | Selection,
    *,
    k: int = 10,
    window: int = 8,
    skip_first: bool = True,
) -> TopTokens:
    """At which tokens of a corpus is a neuron most active?

    Parameters
    ----------
    model
        From `mechinterp.load`.
    corpus
        Prompts: tokens, a task, or anything that gives texts or lists of ids one after another, such as a generator over files;
        it is read once, and never held.
    neurons
        Neurons of ``mlp_post``, or single coordinates of any activation with ``pos``: ``"L3.N17.mlp_post"``,
        ``"L3.N*.mlp_post | L0.N5.resid_post"``.
    k
        How many places for each neuron.
    window
        How many tokens before the place, and how many behind it, are kept to be read.
    skip_first
        The first token of each prompt does not count: many neurons are huge there, whatever it is.

    Returns
    -------
    TopTokens
        ``top["L3.N17.mlp_post"]`` lists the places; it shows itself as a table.

    Raises
    ------
    SelectorError
        What is named is no single neurons, or has a position or head.
    TaskError
        The corpus has no token to look at.

    Notes
    -----
    Memory does not grow with the corpus: one batch of activations, and k places for each neuron. Of places that are equally
    active any is kept. Cost: one forward pass over the corpus, up to the last layer that is named.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.memory()
    >>> mi.top_tokens(toy.model, toy.task, "L0.N5.mlp_post", k=2)
    TopTokens: 1 neuron over 300 tokens of 60 prompts; L0.N5.mlp_post is 0.936 at 'is'
    """
    check_model(model, corpus)
    sites = select(neurons, model.cfg).sites
    for site in sites:
        if site.neuron is None or site.pos is not None or site.kind.axes[:2] != ("batch", "pos") or len(site.kind.axes) != 3:
            raise SelectorError(f"{site} is no neuron; write 'L3.N17.mlp_post', or 'L3.N*.mlp_post' for all of a layer")
    if k < 1:
        raise SelectorError(f"k={k}: give the number of places for each neuron, 1 or more")
    if window < 0:
        raise SelectorError(f"window={window}: give the number of tokens to keep on each side, 0 or more")
    wholes = Selection(tuple(dict.fromkeys(site.whole for site in sites)))
    best: list[list[tuple[float, int, Activating]]] = [[] for _ in sites]
    # A neuron's place in its activation, so that those of one activation are looked at together.
    columns = {whole: [i for i, site in enumerate(sites) if site.whole == whole] for whole in wholes}
    total, above = torch.zeros(len(sites), dtype=torch.float64), torch.zeros(len(sites), dtype=torch.float64)
    tokens = prompts = 0
    for batch in _batches(model, corpus):
        width = batch.tokens.shape[1]
        lengths = torch.full((len(batch.tokens),), width) if batch.lengths is None else batch.lengths.cpu()
        real = torch.arange(width) < lengths[:, None]
        real[:, 0] &= not skip_first
        seen = run(model, batch.tokens, capture=wholes, logits=False).cache.whole
        for whole, members in columns.items():
            chosen = seen[whole][..., [sites[i].neuron for i in members]].float().cpu()
            values = chosen[real]
            total[members] += values.double().sum(dim=0)
            above[members] += (values > 0).double().sum(dim=0)
            masked = chosen.masked_fill(~real[..., None], -torch.inf).flatten(0, 1)
            strongest, where = masked.topk(min(k, len(masked)), dim=0)
            for column, i in enumerate(members):
                for value, flat in zip(strongest[:, column].tolist(), where[:, column].tolist(), strict=True):
                    row, pos = divmod(flat, width)
                    # The heap's least is its weakest and, among equals, its latest.
                    key = (value, -((prompts + row) * model.cfg.n_ctx + pos))
                    if value == -torch.inf or (len(best[i]) == k and key <= best[i][0][:2]):
                        continue
                    first, last = max(0, pos - window), min(int(lengths[row]), pos + window + 1)
                    ids = tuple(batch.tokens[row, first:last].tolist())
                    entry = (*key, Activating(value, prompts + row, pos, ids, pos - first))
                    (heapq.heappush if len(best[i]) < k else heapq.heappushpop)(best[i], entry)
        tokens += int(real.sum())
        prompts += len(batch.tokens)
    if not tokens:
        raise TaskError("the corpus has no token to look at" + ("; the first of each prompt is skipped" if skip_first else ""))
    found = tuple(tuple(place for *_, place in sorted(each, reverse=True)) for each in best)
    return TopTokens(model, sites, found, total / tokens, above / tokens, tokens, prompts)


def _batches(model: Model, corpus: Any) -> Iterator[Batch]:
    """The corpus in batches that one forward pass holds."""
    for whole in _read(model, corpus):
        at_once = min(_AT_ONCE, rows_per_forward(model, whole.tokens.shape[1]))
        for first in range(0, len(whole.tokens), at_once):
            yield whole[first : first + at_once]


def _read(model: Model, corpus: Any) -> Iterator[Batch]:
    if isinstance(corpus, Tensor | Prompts | str):
        yield batch_of(model, corpus)
        return
    source = iter(corpus)
    while waiting := list(islice(source, _AT_ONCE)):
        yield batch_of(model, waiting)
