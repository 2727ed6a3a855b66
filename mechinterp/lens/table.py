"""The picture of a lens: a table of likeliest tokens, sites up and positions across, coloured by how sure they are."""

from __future__ import annotations

from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mechinterp.errors import SelectorError, did_you_mean, missing_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mechinterp.lens.reading import LensReading

__all__ = ["draw_table", "html_table"]

# More than these make no table that anybody reads; what is left out is said.
_ROWS, _COLUMNS = 64, 32
_PAD = "padding:2px 6px"
_LABEL = f"{_PAD};font-weight:400"
_COLOURS = {"prob": ("probability of the likeliest token", "Blues"), "entropy": ("entropy in nats", "Blues_r"),
            "kl": ("KL(final || lens) in nats", "Blues_r")}  # fmt: skip


def shown(text: str) -> str:
    """A token as it can be read in a cell: without the space in front, line ends and what has no width visible."""
    inner = text.strip(" ") or text.replace(" ", "·")
    inner = inner.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in inner)


def html_table(reading: LensReading, example: int) -> str:
    """The table of one prompt as HTML: nothing to load, and on hovering the likeliest tokens with their probabilities."""
    columns = _columns(reading, example)
    rows = list(range(len(reading.sites)))[::-1]
    head = "".join(f"<th style='{_PAD}'>{_cell(reading, reading.tokens[example, j])}</th>" for j in columns[0])
    numbers = "".join(f"<th style='{_LABEL};color:#777'>{escape(str(reading.pos[j]))}</th>" for j in columns[0])
    body = []
    for i in rows[:_ROWS]:
        cells = "".join(_coloured(reading, i, example, j) for j in columns[0])
        body.append(f"<tr><th style='text-align:right;{_LABEL}'>{escape(reading.sites[i])}</th>{cells}</tr>")
    notes = [columns[1]] if columns[1] else []
    if len(rows) > _ROWS:
        notes.append(f"{len(rows) - _ROWS} more sites")
    if len(reading.tokens) > 1:
        notes.append(f"prompt {example} of {len(reading.tokens)}; .plot(example) draws another")
    foot = f"<div style='color:#777'>{escape('; '.join(notes))}</div>" if notes else ""
    return (
        f"<div style='font:12px sans-serif'><div>{escape(repr(reading))}</div>"
        "<table style='border-collapse:collapse;font:11px monospace;margin:4px 0'>"
        f"<tr><th></th>{head}</tr>{''.join(body)}<tr><th></th>{numbers}</tr></table>{foot}</div>"
    )


def _columns(reading: LensReading, example: int) -> tuple[list[int], str]:
    """The positions that are no padding, as many as fit, and what to say of the others."""
    if not 0 <= example < len(reading.tokens):
        raise SelectorError(f"there is no prompt {example}: the lens read {len(reading.tokens)}, from 0")
    real = (reading.tokens[example] >= 0).nonzero().flatten().tolist()
    # What a prompt ends with is what it is about.
    return real[-_COLUMNS:], f"{len(real) - _COLUMNS} positions before these" if len(real) > _COLUMNS else ""


def _cell(reading: LensReading, token: Tensor) -> str:
    return escape(shown(reading.string(int(token))))


def _coloured(reading: LensReading, i: int, example: int, j: int) -> str:
    probs = reading.top_log_probs[i, example, j].exp().tolist()
    tokens = reading.top[i, example, j].tolist()
    told = ", ".join(f"{reading.string(token)!r} {prob:.3f}" for token, prob in zip(tokens, probs, strict=True))
    colour = tuple(round(255 + (dark - 255) * min(1.0, probs[0])) for dark in (33, 102, 172))
    ink = "#fff" if probs[0] > 0.55 else "#000"
    # The model's own token in bold.
    bold = "font-weight:700;" if tokens[0] == int(reading.final[example, j]) else ""
    return (
        f"<td title='{escape(told, quote=True)}' style='padding:2px 6px;text-align:center;white-space:pre;{bold}"
        f"color:{ink};background:rgb{colour}'>{_cell(reading, reading.top[i, example, j, 0])}</td>"
    )


def draw_table(reading: LensReading, example: int, by: str) -> Figure:
    """The same table as a matplotlib figure, coloured by probability, entropy or KL."""
    try:
        from matplotlib.figure import Figure as MplFigure
    except ImportError:
        raise missing_extra("a plot", "matplotlib", "draw") from None
    if by not in _COLOURS:
        raise SelectorError(f"cannot colour by {by!r}. {did_you_mean(by, _COLOURS)}")
    columns, note = _columns(reading, example)
    first = max(0, len(reading.sites) - _ROWS)
    values = {"prob": reading.top_log_probs[..., 0].exp(), "entropy": reading.entropy, "kl": reading.kl}[by]
    grid = values[first:, example, columns].float()
    rows = len(grid)
    figure: Any = MplFigure(figsize=(2.4 + 0.78 * len(columns), 1.5 + 0.235 * rows), layout="constrained")
    axes = figure.add_subplot()
    top = 1.0 if by == "prob" else max(float(grid.max()), 1e-6)
    image = axes.imshow(
        grid.numpy(), cmap=_COLOURS[by][1], vmin=0, vmax=top, aspect="auto", origin="lower", interpolation="nearest"
    )
    for i in range(rows):
        for k, j in enumerate(columns):
            token = int(reading.top[first + i, example, j, 0])
            dark = (grid[i, k] / top > 0.55) == (by == "prob")
            own = token == int(reading.final[example, j])
            axes.text(k, i, _short(shown(reading.string(token))), ha="center", va="center", fontsize=7, parse_math=False,
                      color="white" if bool(dark) else "black", fontweight="bold" if own else "normal")  # fmt: skip
    axes.set_yticks(range(rows), reading.sites[first:], fontsize=7)
    axes.set_xticks(range(len(columns)), [_short(shown(reading.string(int(reading.tokens[example, j])))) for j in columns],
                    rotation=45, ha="right", fontsize=8, parse_math=False)  # fmt: skip
    lens, model = reading.provenance.get("lens", "lens"), reading.provenance.get("model", "")
    what = "What each part adds, read alone" if reading.provenance.get("contributions") else "The likeliest next token"
    title = f"{what}, through the {lens} of {model} (bold: the model's own)"
    # As wide as the figure: constrained layout does not break titles.
    lines = wrap(title, max(24, int(14 * figure.get_figwidth()))) + ([note] if note else [])
    figure.suptitle("\n".join(lines), fontsize=9)
    axes.set_xlabel("token read", fontsize=8)
    figure.colorbar(image, ax=axes, label=_COLOURS[by][0], pad=0.01)
    return figure


def _short(text: str, most: int = 11) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
