"""Which heads are of a known sort: each score beside what it is compared with, and how often chance would do that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp.core.arguments import check_model
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.core.picture import table_of
from mechinterp.core.prompts import Runnable, batch_of
from mechinterp.core.resampling import adjusted
from mechinterp.errors import SelectorError, TaskError, did_you_mean, missing_extra
from mechinterp.graph import parse_node
from mechinterp.graph.nodes import Node
from mechinterp.lens.detectors import DETECTORS
from mechinterp.lens.looking import look, said_twice
from mechinterp.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HeadScores", "head_scores"]

# The more telling name takes the place of these.
_IMPLIED = {"induction": ("prefix_matching", "copying"), "name_mover": ("copying",)}


@dataclass(frozen=True, eq=False)
class HeadScores:
    """How much every head is of each known sort.

    Parameters
    ----------
    scores, nulls
        For each detector (see `mechinterp.lens.detectors.DETECTORS`) its numbers, and those that they are compared with: axes
        ``layer head``, one number for each prompt.
    p_values
        ``[layer head]`` for each detector: the one-sided sign test of score over null, prompt by prompt. Not corrected.
    distance
        ``[layer head]``: the distance of ``positional``.
    provenance
        Model, prompts, seed.
    """

    scores: Mapping[str, Effects]
    nulls: Mapping[str, Effects]
    p_values: Mapping[str, Tensor]
    distance: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, detector: str) -> Effects:
        """The numbers of one detector, which draw themselves as a heat map."""
        if detector not in self.scores:
            raise SelectorError(f"there is no detector {detector!r} here. {did_you_mean(detector, self.scores)}")
        return self.scores[detector]

    def adjusted(self, correction: str = "holm") -> dict[str, Tensor]:
        """P-values ``[layer head]`` corrected for the number of heads and detectors together; see `Effects.p_values`."""
        names = list(self.p_values)
        flat = adjusted(torch.cat([self.p_values[name].flatten() for name in names]), correction)
        shape = self.distance.shape
        return {name: part.reshape(shape) for name, part in zip(names, torch.split(flat, shape.numel()), strict=True)}

    def named(self, *, alpha: float = 0.01, least: float = 0.2, correction: str = "holm") -> dict[str, tuple[str, ...]]:
        """The sorts of each head that is of any: score of ``least``, and a corrected p-value below ``alpha``.

        What another sort implies is left out: prefix matching and copying of an induction head, copying of a name mover, and the
        sink of all that are more than that.

        Returns
        -------
        dict
            ``{"a5.h1": ("induction",)}``, strongest heads first, those that are nothing but a sink behind all others.
        """
        p, found = self.adjusted(correction), {}
        for layer, head in torch.cartesian_prod(*(torch.arange(size) for size in self.distance.shape)).tolist():
            sorts = {
                name: score
                for name, effects in self.scores.items()
                if (score := float(effects.values[layer, head])) >= least and float(p[name][layer, head]) < alpha
            }
            implied = {each for name in sorts for each in _IMPLIED.get(name, ())}
            # Attention that finds nothing to look at rests on the first token, in heads of every sort.
            implied |= {"bos_sink"} if len(sorts) > 1 else set()
            sorts = {name: score for name, score in sorts.items() if name not in implied}
            if sorts:
                found[str(Node("head", layer, head))] = sorts
        # There are many of these, and they say least.
        ranked = sorted(found, key=lambda node: ("bos_sink" in found[node], -max(found[node].values())))
        return {node: tuple(sorted(found[node], key=lambda name: -found[node][name])) for node in ranked}

    def labels(self, *, alpha: float = 0.01, least: float = 0.2, correction: str = "holm", sinks: bool = False) -> dict[str, str]:
        """The same as words for diagrams: ``mi.draw(circuit, labels=scores.labels())``.

        Heads that are nothing but a BOS sink (in many models most of them) have no label, unless ``sinks=True``.
        """
        named = self.named(alpha=alpha, least=least, correction=correction)
        return {
            node: ", ".join(self._word(node, name) for name in sorts)
            for node, sorts in named.items()
            if sinks or sorts != ("bos_sink",)
        }

    def _word(self, node: str, name: str) -> str:
        if name != "positional":
            return DETECTORS[name].label
        layer, head = _index(node)
        return f"{int(self.distance[layer, head])} tokens back"

    def to_frame(self) -> pd.DataFrame:
        """A table: ``layer head detector score null p_value adjusted``."""
        try:
            import pandas as pd
        except ImportError:
            raise missing_extra("a table", "pandas", "frames") from None
        corrected, parts = self.adjusted(), []
        for name, effects in self.scores.items():
            columns = {"null": self.nulls[name].values, "p_value": self.p_values[name], "adjusted": corrected[name]}
            part = effects.to_frame(**columns).rename(columns={"value": "score"}).drop(columns="standard_error")
            part.insert(2, "detector", name)
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def _rows(self) -> list[tuple[str, str, str, str, str, str]]:
        corrected, rows = self.adjusted(), []
        for node, sorts in self.named().items():
            at = _index(node)
            for name in sorts:
                score, null = (each[name].values[at] for each in (self.scores, self.nulls))
                p = float(corrected[name][at])
                rows.append((node, self._word(node, name), f"{score:.2f}", f"{null:.2f}", f"{p:.1e}", DETECTORS[name].null))
        return rows

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for sorts in self.named().values():
            for name in sorts:
                counts[DETECTORS[name].label] = counts.get(DETECTORS[name].label, 0) + 1
        sink = DETECTORS["bos_sink"].label
        ranked = sorted(counts.items(), key=lambda item: (item[0] == sink, -item[1]))
        found = ", ".join(f"{count} {label}" for label, count in ranked)
        about = self.provenance
        many = f"{about.get('prompts')} prompt{'' if about.get('prompts') == 1 else 's'}"
        return f"HeadScores: {about.get('model')}, {many}; {found or 'no head of a known sort'}"

    def _repr_html_(self) -> str:
        heads = ("head", "sort", "score", "null", "p (Holm)", "null is")
        return table_of(repr(self), heads, ([escape(text) for text in row] for row in self._rows()[:100]))


def head_scores(
    model: Model, prompts: Runnable | None = None, *, seed: int | None = None, n: int = 32, length: int | None = None
) -> HeadScores:
    """Which heads look at the previous token, at duplicates, are induction heads, copy, suppress, or are a sink?

    Without prompts: on random tokens said twice, and on the same ones without repetition. With prompts: on these; of a `Task`
    the heads that move the answer are found as well.

    ==================== ======================================================= =============================================
    detector             score of a prompt                                       null of the same prompt
    ==================== ======================================================= =============================================
    ``previous_token``   attention to the token before                           the other distance with most attention
    ``duplicate_token``  attention to earlier copies of the token                the same places, where nothing is repeated
    ``prefix_matching``  attention to what followed those copies                 the same places, where nothing is repeated
    ``induction``        prefix matching, times copying of what is found         both that and 0; the larger p-value
    ``copying``          attention, times copying of what is attended to         0: tokens exchanged
    ``copy_suppression`` the same with the sign turned                           0: tokens exchanged
    ``name_mover``       attention from the answer's position to the answer,     the other token that it moves most
                         times copying of it (tasks only)
    ``positional``       attention at the best distance of 2 or more             the next best distance
    ``bos_sink``         attention of the second half to the first position      the other position with most attention
    ==================== ======================================================= =============================================

    *Copying* of a token is 1 if what the head moves from it (its value there, through W_O, the final norm's weight and the
    unembedding) raises its own logit above those of all other tokens of the prompt, -1 if below all, 0 if it is anywhere.
    *Where nothing is repeated*: for random tokens the second half after other random tokens; for prompts of yours the mean
    of the other prompts at those places (so they should differ in where they repeat).

    p-values: the sign test, in how many prompts is the score above its null; exact and free of assumptions on sizes. The smallest
    is 2^-n, so that 32 prompts can carry thousands of tests. A score says how much, a p-value how surely; `HeadScores.named`
    asks for both.

    Parameters
    ----------
    model
        From `mechinterp.load`.
    prompts
        Tokens, texts or a task, of 4 tokens and more. Several, and different: each one is a trial.
    seed
        Decides the random tokens; needed without prompts.
    n
        How many random prompts.
    length
        How many tokens are said twice; default 24, or as many as context and vocabulary allow.

    Returns
    -------
    HeadScores
        ``.labels()`` for diagrams, ``["induction"]`` for one detector, ``.to_frame()`` for all numbers.

    Raises
    ------
    TaskError
        No seed, too few tokens to draw from, or prompts that are too short.

    Notes
    -----
    Attention is described, not proved to matter: measure that with `mechinterp.patch`. On prompts of one form a head that looks
    at a place cannot be told from one that looks at what stands there. Cost: two forward passes over n prompts of
    ``2 length`` tokens, or one over the given prompts. Memory: patterns and values of one batch.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> scores = mi.head_scores(toy.model, seed=0)
    >>> scores.labels()["a1.h5"]
    'induction'

    References
    ----------
    Olsson et al. 2022 (2209.11895), prefix matching and copying; Wang et al. 2022 (2211.00593), name movers; McDougall et al.
    2023 (2310.04625), copy suppression. Theirs have no null.
    """
    check_model(model, prompts)
    if prompts is None:
        plain, repeated = said_twice(model, n=n, length=length, seed=seed)
        about = {"prompts": n, "seed": seed, "length": repeated.tokens.shape[1] // 2}
    else:
        if seed is not None or length is not None:
            raise TaskError("seed= and length= are for random tokens; leave them out with prompts of your own")
        plain = repeated = batch_of(model, prompts)
        about = {"prompts": len(plain.tokens), "task": getattr(prompts, "name", None)}
        shortest = plain.tokens.shape[1] if plain.lengths is None else int(plain.lengths.min())
        if shortest < 4:
            raise TaskError(f"a prompt has {shortest} tokens; heads are told apart on prompts of 4 and more")
    task = prompts if isinstance(prompts, Task) else None
    seen = look(model, plain, repeated, task)
    scores, nulls, p_values = {}, {}, {}
    for name, (score, null, p) in seen.found().items():
        coords = {"layer": tuple(range(model.cfg.n_layers)), "head": tuple(range(model.cfg.n_heads))}
        said = {"model": model.name, "metric": "score", **about}
        axes = ("layer", "head")
        scores[name] = Effects(f"{DETECTORS[name].label}: {DETECTORS[name].score}", axes, coords, score, {}, said)
        nulls[name] = Effects(f"{DETECTORS[name].label}, null: {DETECTORS[name].null}", axes, coords, null, {}, said)
        p_values[name] = p
    return HeadScores(scores, nulls, p_values, seen.distance(), {"model": model.name, **about})


def _index(node: str) -> tuple[int, int]:
    layer, head = parse_node(node)[1:]
    return layer or 0, head or 0
