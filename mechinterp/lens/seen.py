"""Attention as a value: indexed by head, tabulated, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp.core.picture import svg_of, white_blue
from mechinterp.errors import SelectorError, did_you_mean, missing_extra

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Attention"]

# More panels than this are no picture any more, and more tokens have no readable names.
_PANELS, _NAMED = 12, 48
# Of the strongest panel; less cannot be seen beside it.
_BLANK = 0.02


@dataclass(frozen=True, eq=False)
class Attention:
    """A number for each head (or layer), query and key, of each prompt or on average.

    Parameters
    ----------
    quantity
        What the numbers are, in words.
    names
        ``"L9.H6"`` for heads, ``"L9"`` for layers.
    values
        ``[batch name q_pos k_pos]``; zero at padding. A batch of 1 where averaged.
    words
        The tokens of each prompt.
    rows
        The query positions, where they are not all of them.
    provenance
        Model, options, number of prompts.
    """

    quantity: str
    names: tuple[str, ...]
    values: Tensor
    words: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """``[batch q_pos k_pos]`` of one head or layer."""
        if name not in self.names:
            raise SelectorError(f"there is no {name!r} here. {did_you_mean(name, self.names)}")
        return self.values[:, self.names.index(name)]

    def strongest(self, k: int = 10, *, prompt: int = 0) -> list[tuple[str, str, str, float]]:
        """The places with the largest numbers of one prompt: name, query, key and value."""
        flat = self.values[prompt].flatten()
        found = []
        for index in flat.abs().argsort(descending=True, stable=True)[:k].tolist():
            name, q, key = (int(i) for i in torch.unravel_index(torch.tensor(index), self.values.shape[1:]))
            found.append(
                (self.names[name], self._label(prompt, self._row(prompt, q)), self._label(prompt, key), float(flat[index]))
            )
        return found

    def to_frame(self) -> pd.DataFrame:
        """A table: ``prompt name q_pos k_pos q k value``, of what is not zero."""
        try:
            import pandas as pd
        except ImportError:
            raise missing_extra("a table", "pandas", "frames") from None
        rows = []
        for prompt, name, q, k in self.values.nonzero().tolist():
            at = self._row(prompt, q)
            both = self._word(prompt, at), self._word(prompt, k)
            rows.append((prompt, self.names[name], at, k, *both, float(self.values[prompt, name, q, k])))
        return pd.DataFrame(rows, columns=["prompt", "name", "q_pos", "k_pos", "q", "k", "value"])

    def plot(self, *names: str, prompt: int = 0) -> Figure:
        """Queries down, keys across, one panel for each of these names (default: the twelve that differ most from their mean).

        All panels have one scale; blue is positive, orange negative.
        """
        try:
            from matplotlib.figure import Figure as MplFigure
        except ImportError:
            raise missing_extra("a plot", "matplotlib", "draw") from None
        shown = names or self._telling(prompt)
        panels = [self[name][prompt] for name in shown]
        n = len(self.words[prompt])
        single = len(shown) == 1
        columns = min(4, len(shown))
        lines = -(-len(shown) // columns)
        tall = min(1.0, panels[0].shape[0] / n + 0.25)
        wide = min(8.0, 1.8 + 0.2 * n) if single else 2.3
        figure = MplFigure(figsize=(wide * columns + 0.9, max(1.9, wide * tall * lines + 0.5)), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        largest = max(float(panel.abs().max()) for panel in panels) or 1.0
        signed = any(bool((panel < 0).any()) for panel in panels)
        image: Any = None
        for axes, name, panel in zip(grid.flat, shown, panels, strict=False):
            low = -largest if signed else 0.0
            drawn = panel[: len(panel) if self.rows else n, :n].numpy()
            image = axes.imshow(drawn, cmap=white_blue(signed), vmin=low, vmax=largest, interpolation="nearest", aspect="auto")
            axes.set_title(name, fontsize=9)
            self._name_axes(axes, prompt, named=single and n <= _NAMED)
        for axes in list(grid.flat)[len(shown) :]:
            axes.set_axis_off()
        figure.colorbar(image, ax=grid, label=self.quantity, shrink=0.7 if lines > 1 else 1.0)
        figure.suptitle(self._title(prompt, len(shown)), fontsize=9)
        return figure

    def _name_axes(self, axes: Any, prompt: int, *, named: bool) -> None:
        n = len(self.words[prompt])
        rows = [self._row(prompt, i) for i in range(len(self.rows))] if self.rows else list(range(n))
        step = 1 if named else max(1, -(-n // 5))
        keys = list(range(0, n, step))
        down = [i for i in range(len(rows)) if i % step == 0]
        texts = [self._label(prompt, k) if named else str(k) for k in keys]
        axes.set_xticks(keys, texts, rotation=90 if named else 0, fontsize=7)
        axes.set_yticks(down, [self._label(prompt, rows[i]) if named or self.rows else str(rows[i]) for i in down], fontsize=7)

    def _telling(self, prompt: int) -> tuple[str, ...]:
        """The panels that have most to show: those that are least like the average panel, and not nearly blank."""
        if len(self.names) <= _PANELS:
            return self.names
        each = self.values[prompt]
        apart, size = (each - each.mean(dim=0)).flatten(1).norm(dim=1), each.flatten(1).norm(dim=1)
        best = apart.argsort(descending=True, stable=True)[:_PANELS].tolist()
        return tuple(self.names[i] for i in sorted(best) if float(size[i]) >= _BLANK * float(size.max()))

    def _title(self, prompt: int, shown: int) -> str:
        many = int(self.provenance.get("prompts", len(self.values)))
        over = f"mean over {many} prompts" if self.provenance.get("average") else f"prompt {prompt} of {many}"
        left = f", {shown} of {len(self.names)}" if shown < len(self.names) else ""
        return f"{self.quantity} of {self.provenance.get('model', 'the model')}, {over}{left}"

    def _row(self, prompt: int, index: int) -> int:
        """Which position of the prompt a row is."""
        return index if self.rows is None else self.rows[index] % len(self.words[prompt])

    def _word(self, prompt: int, pos: int) -> str:
        return self.words[prompt][pos] if pos < len(self.words[prompt]) else ""

    def _label(self, prompt: int, pos: int) -> str:
        word = self._word(prompt, pos)
        # Dollar signs would be read as formulas, and line breaks would push the picture apart.
        plain = repr(word)[1:-1].replace("$", r"\$")
        return plain if word == f"[{pos}]" else f"{plain} {pos}"

    def _repr_svg_(self) -> str | None:
        return svg_of(self.plot()) if find_spec("matplotlib") is not None else None

    def _repr_html_(self) -> str | None:
        # The picture alone where there is one.
        if find_spec("matplotlib") is not None:
            return None
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}<td>{value:+.4f}</td></tr>"
            for *cells, value in self.strongest(20)
        )
        return f"<pre>{escape(repr(self))}</pre><table>{rows}</table>"

    def __repr__(self) -> str:
        batch, _, q, k = self.values.shape
        kind = "head" if "." in self.names[0] else "layer"
        many = f"{len(self.names)} {kind}{'s' if len(self.names) > 1 else ''}" if self.names != ("flow",) else "one position"
        over = (
            f"mean over {self.provenance.get('prompts')} prompts"
            if self.provenance.get("average")
            else f"{batch} prompt{'' if batch == 1 else 's'}"
        )
        return f"Attention: {self.quantity}; {many}, {over}, {q} x {k} positions"
