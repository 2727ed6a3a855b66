"""The picture of a lens: a table of tokens, escaped, with nothing to load, and the same as a figure."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import SelectorError
from mechinterp.lens.reading import LensReading
from mechinterp.lens.table import html_table, shown


def reading(sites: int = 3, positions: int = 4, **more: Any) -> LensReading:
    """Two prompts; the second ends one position early. Token 1 is the model's own, likelier with every site."""
    probs = torch.linspace(0.1, 0.9, sites)[:, None, None].expand(-1, 2, positions).clone()
    top = torch.full((sites, 2, positions), 2)
    top[-1] = 1
    tokens = torch.arange(positions).repeat(2, 1) + 3
    tokens[1, -1] = -1
    probs[:, 1, -1] = torch.nan
    return LensReading(
        sites=tuple(f"L{i}.resid_post" for i in range(sites)),
        pos=tuple(range(positions)),
        tokens=tokens,
        top=torch.stack([top, torch.full_like(top, 0)], dim=-1),
        top_log_probs=torch.stack([probs, (1 - probs) / 2], dim=-1).log(),
        entropy=1 - probs,
        kl=2 * (0.9 - probs),
        final=torch.ones(2, positions, dtype=torch.long),
        strings={0: "<b>", 1: " $own$", 2: "\n", 3: " one", **{i: f"w{i}" for i in range(4, 60)}},
        provenance={"model": "m", "lens": "logit lens"},
        **more,
    )


def test_the_table_as_html() -> None:
    html = html_table(reading(), 0)
    # Well-formed, and nothing from elsewhere; tokens are text, whatever they look like.
    root = ET.fromstring(html)
    assert not re.search(r"https?:|<script|<b>", html)
    rows = root.findall(".//tr")
    assert [row[0].text for row in rows] == [None, "L2.resid_post", "L1.resid_post", "L0.resid_post", None]
    assert [cell.text for cell in rows[0]][1:] == ["one", "w4", "w5", "w6"]
    assert [cell.text for cell in rows[-1]][1:] == ["0", "1", "2", "3"]
    first = rows[1][1]
    assert first.text == "$own$"
    assert first.get("title") == "' $own$' 0.900, '<b>' 0.050"
    # The model's own token is bold, and a sure one is dark with light letters.
    assert "font-weight:700" in str(first.get("style"))
    assert "background:rgb(55, 117, 180)" in str(first.get("style"))
    assert "color:#fff" in str(first.get("style"))
    assert "color:#000" in str(rows[3][1].get("style"))
    assert rows[3][1].text == "⏎"
    assert "prompt 0 of 2; .plot(example) draws another" in html
    # Padding has no column.
    assert len(ET.fromstring(html_table(reading(), 1)).findall(".//tr")[0]) == 1 + 3


def test_long_tables_say_what_they_leave_out() -> None:
    html = html_table(reading(sites=70, positions=40), 0)
    rows = ET.fromstring(html).findall(".//tr")
    assert len(rows) == 64 + 2
    assert len(rows[0]) == 32 + 1
    # The last sites and positions are those that are kept.
    assert rows[1][0].text == "L69.resid_post"
    assert rows[-1][-1].text == "39"
    assert "8 positions before these; 6 more sites" in html


@pytest.mark.parametrize(("by", "label"), [("prob", "probability"), ("entropy", "entropy in nats"), ("kl", "KL(final || lens)")])
def test_the_table_as_a_figure(by: str, label: str) -> None:
    figure = reading().plot(0, by=by)
    axes, bar = figure.axes
    assert label in bar.get_ylabel()
    assert [each.get_text() for each in axes.get_yticklabels()] == ["L0.resid_post", "L1.resid_post", "L2.resid_post"]
    assert [each.get_text() for each in axes.get_xticklabels()] == ["one", "w4", "w5", "w6"]
    cells = [each for each in axes.texts if each.get_text() == "$own$"]
    assert len(cells) == 4
    assert all(each.get_fontweight() == "bold" for each in cells)
    title = "The likeliest next token, through the logit lens of m (bold: the model's own)"
    assert figure.get_suptitle().replace("\n", " ") == title
    # Dark cells have light letters, whichever end of the colours is dark.
    light = {each.get_color() for each in cells}
    assert light == {"white"}
    assert {each.get_color() for each in axes.texts if each.get_text() == "⏎" and each.get_position()[1] == 0} == {"black"}


def test_a_title_is_no_wider_than_its_figure() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    one = reading()
    narrow = dataclasses.replace(
        one, pos=one.pos[:1], tokens=one.tokens[:, :1], final=one.final[:, :1], top=one.top[:, :, :1],
        top_log_probs=one.top_log_probs[:, :, :1], entropy=one.entropy[:, :, :1], kl=one.kl[:, :, :1],
    )  # fmt: skip
    for figure in (narrow.plot(), one.plot()):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = figure._suptitle.get_window_extent(canvas.get_renderer())  # type: ignore[attr-defined]
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(SelectorError, match=r"^there is no prompt 2: the lens read 2, from 0$"):
        reading().plot(2)
    with pytest.raises(SelectorError, match=r"^cannot colour by 'probs'. Did you mean 'prob'\?$"):
        reading().plot(by="probs")


def test_tokens_can_be_read() -> None:
    assert [shown(text) for text in (" Mary", "\n\n", "  ", "a\tb", "\r")] == ["Mary", "⏎⏎", "··", "a⇥b", "␍"]
    assert [shown(text) for text in ("\u200b", " \x1b", "é")] == ["\\u200b", "\\x1b", "é"]


def test_settled_is_for_good() -> None:
    one = reading(sites=4)
    one.top[1, 0, 0, 0] = 1
    # Likeliest at site 1 as well, but not at site 2.
    assert one.settled.tolist() == [[3] * 4, [3] * 4]
    one.top[2, 0, 0, 0] = 1
    assert int(one.settled[0, 0]) == 1
    one.top[3, 0, 1, 0] = 2
    assert int(one.settled[0, 1]) == 4


def test_a_picture_of_a_model() -> None:
    toy = mi.toys.memory()
    found = mi.logit_lens(toy.model, toy.task[:2], at="L0.resid_pre | L*.resid_mid | L*.resid_post")
    ET.fromstring(found._repr_html_())
    assert len(found.plot().axes[0].texts) == found.tokens.shape[1] * 5
