"""Numbers with named axes: arithmetic, tables, pictures, and labels."""

from __future__ import annotations

import builtins
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.errors import EditError, MissingExtraError


def grid(values: Tensor | None = None, **provenance: Any) -> mi.Effects:
    """Two layers, three heads, four prompts."""
    numbers = torch.arange(24.0).reshape(2, 3, 4) - 12 if values is None else values
    coords: dict[str, tuple[Any, ...]] = {"layer": (0, 1), "head": (0, 1, 2)}
    return mi.Effects(
        "patching z", ("layer", "head"), coords, numbers, {"clean": 1.0, "corrupt": -1.0}, {"site": "z", **provenance}
    )


def edges() -> mi.Effects:
    names = (("embed", "a0.h0", "q"), ("a0.h0", "m0", "in"), ("m0", "logits", "in"))
    return mi.Effects("EAP", ("edge",), {"edge": names}, torch.tensor([[1.0, 3.0], [-5.0, -3.0], [0.0, 0.5]]))


def test_values_are_means_over_prompts() -> None:
    found = grid()
    assert torch.equal(found.values, found.per_example.mean(-1))
    torch.testing.assert_close(found.standard_error, found.per_example.std(-1) / 2)
    # In float32, whatever the model computes in.
    half = mi.Effects("x", ("layer",), {"layer": (0,)}, torch.tensor([[60000.0, 60000.0]], dtype=torch.float16))
    assert float(half.values) == 60000


def test_one_prompt_has_no_standard_error(recwarn: pytest.WarningsRecorder) -> None:
    found = grid(torch.ones(2, 3, 1))
    assert torch.isnan(found.standard_error).all()
    assert found.standard_error.shape == (2, 3)
    assert not recwarn.list
    assert found.to_frame()["value"].tolist() == [1.0] * 6


def test_top_is_by_absolute_value() -> None:
    assert grid().top(2) == [("L0.H0.z", -10.5), ("L1.H2.z", 9.5)]
    assert len(grid().top()) == 6
    values = torch.zeros(2, 3, 4)
    values[0, 1] = torch.nan
    values[1, 1] = 0.5
    assert grid(values).top(1) == [("L1.H1.z", 0.5)]
    # Not a number is last, not first.
    assert grid(values).top(6)[-1][0] == "L0.H1.z"


@pytest.mark.parametrize(
    ("axes", "coords", "site", "labels"),
    [
        (("layer", "head"), ((5, 7), (0, 2)), "z", ["L5.H0.z", "L5.H2.z", "L7.H0.z", "L7.H2.z"]),
        (("layer", "pos"), ((5,), (0, "S2")), "resid_pre", ["L5.resid_pre[0]", "L5.resid_pre[S2]"]),
        (("layer", "kv_head"), ((5,), (1,)), "k", ["L5.KV1.k"]),
        (("layer", "neuron"), ((5,), (17,)), "mlp_post", ["L5.N17.mlp_post"]),
        (("layer", "head", "pos"), ((5,), (1,), (2, 3)), "z", ["L5.H1.z[2]", "L5.H1.z[3]"]),
        (("layer",), ((5, 6),), "mlp_out", ["L5.mlp_out", "L6.mlp_out"]),
        (("layer", "head"), ((5,), (1,)), "", ["L5.H1"]),
        (("site",), (("L0.z", "embed"),), "", ["L0.z", "embed"]),
        (("node",), (("a0.h1", "m3"),), "", ["a0.h1", "m3"]),
        (("edge",), ((("embed", "a0.h0", "q"), ("a0.h0", "m0", "in")),), "", ["embed->a0.h0<q>", "a0.h0->m0"]),
        (("edge", "pos"), ((("embed", "m0", "in"),), (0, 2)), "", ["embed->m0[0]", "embed->m0[2]"]),
        (("step",), ((3,),), "", ["step 3"]),
        (("sender", "receiver"), (("L0.H1.z",), ("L1.H0.q", "logits")), "", ["L0.H1.z -> L1.H0.q", "L0.H1.z -> logits"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_labels(axes: Any, coords: Any, site: str, labels: list[str]) -> None:
    shape = [len(each) for each in coords]
    found = mi.Effects("x", axes, dict(zip(axes, coords, strict=True)), torch.zeros(*shape, 2), {}, {"site": site})
    assert [found.label(i) for i in range(len(labels))] == labels


def test_difference() -> None:
    one, other = grid(method="exact"), grid(torch.ones(2, 3, 4), method="estimate")
    found = one - other
    assert torch.equal(found.per_example, one.per_example - 1)
    assert found.quantity == "patching z minus patching z"
    assert found.provenance["minuend"]["method"] == "exact"
    assert found.provenance["subtrahend"]["method"] == "estimate"
    assert found.axes == one.axes


def test_what_cannot_be_subtracted() -> None:
    with pytest.raises(
        EditError, match=r"^cannot subtract effects over \('edge',\) from effects over \('layer', 'head'\) with other labels$"
    ):
        grid(torch.ones(2, 3, 2)) - edges()
    # One prompt against four: torch would spread the one over all.
    with pytest.raises(EditError, match=r"^cannot subtract effects on 1 prompts from effects on 4$"):
        grid() - grid(torch.ones(2, 3, 1))


def test_shapes_are_checked() -> None:
    with pytest.raises(EditError, match=r"^values of shape \[3, 2, 4\] do not fit axes \('layer', 'head'\) of sizes \[2, 3\]$"):
        grid(torch.ones(3, 2, 4))
    with pytest.raises(EditError, match=r"^axis 'head' has no labels; coords has layer$"):
        mi.Effects("x", ("layer", "head"), {"layer": (0,)}, torch.ones(1, 1, 2))


def test_dictionary() -> None:
    assert edges().as_dict() == {("embed", "a0.h0", "q"): 2.0, ("a0.h0", "m0", "in"): -4.0, ("m0", "logits", "in"): 0.25}
    with pytest.raises(EditError, match=r"^effects over \('layer', 'head'\) have no single label per cell; use to_frame\(\)$"):
        grid().as_dict()


def test_tables() -> None:
    frame = grid().to_frame()
    assert list(frame.columns) == ["layer", "head", "value", "standard_error"]
    assert frame[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert frame["value"].tolist() == grid().values.flatten().tolist()
    frame = edges().to_frame()
    assert list(frame.columns) == ["src", "dst", "port", "value", "standard_error"]
    assert frame.iloc[1].tolist()[:4] == ["a0.h0", "m0", "in", -4.0]
    assert frame["standard_error"].tolist() == pytest.approx([1.0, 1.0, 0.25])


def test_repr() -> None:
    assert repr(grid()) == (
        "Effects: patching z; 2 layers x 3 heads, 4 prompts; strongest L0.H0.z -10.500, L1.H2.z +9.500, L0.H1.z -6.500"
    )
    assert repr(edges()) == (
        "Effects: EAP; 3 edges, 2 prompts; strongest a0.h0->m0 -4.000, embed->a0.h0<q> +2.000, m0->logits +0.250"
    )
    one = mi.Effects("x", ("site", "pos"), {"site": ("L0.z",), "pos": (0, 1)}, torch.ones(1, 2, 1))
    assert repr(one).startswith("Effects: x; 1 site x 2 pos, 1 prompt; strongest ")


# -- pictures --------------------------------------------------------------------------------------


def texts(figure: Any) -> str:
    axes = figure.axes[0]
    return "\n".join([axes.get_title(), axes.get_xlabel(), axes.get_ylabel()])


def test_heat_map() -> None:
    figure = grid(task="ioi", model="gpt2", normalized=True).plot()
    axes, bar = figure.axes
    image = axes.get_images()[0]
    assert image.get_array().tolist() == grid().values.tolist()
    # Zero is in the middle of the colours.
    assert image.get_clim() == (-10.5, 10.5)
    assert texts(figure) == "patching z\nioi on gpt2, 4 prompts\nhead\nlayer"
    assert bar.get_ylabel() == "normalised effect"
    low, middle, high = (image.cmap(x) for x in (0.0, 0.5, 1.0))
    assert low[0] > low[2]  # orange
    assert high[2] > high[0]  # blue
    assert min(middle[:3]) > 0.95  # white


def test_bars() -> None:
    figure = edges().plot()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["m0->logits", "embed->a0.h0<q>", "a0.h0->m0"]
    assert [bar.get_width() for bar in axes.patches] == [0.25, 2.0, -4.0]
    assert axes.get_xlabel() == "effect"


def test_all_zero_and_not_a_number_can_be_drawn() -> None:
    for values in (torch.zeros(2, 3, 4), torch.full((2, 3, 4), torch.nan)):
        assert grid(values).plot().axes[0].get_images()[0].get_clim() == (-1.0, 1.0)


@pytest.mark.parametrize("effects", [grid(), edges()], ids=["heat map", "bars"])
def test_shows_itself_without_the_network(effects: mi.Effects) -> None:
    picture = effects._repr_svg_()
    assert picture is not None
    assert picture.startswith("<svg ")
    ET.fromstring(picture)
    # Namespaces are names; nothing is fetched.
    assert not re.search(r"(src|href)=\"(?!#|data:)|@import|url\((?!#)", picture)
    # Viewers that prefer HTML drop the SVG inside of it, so there is none.
    assert effects._repr_html_() is None


def test_the_same_numbers_give_the_same_picture() -> None:
    assert grid()._repr_svg_() == grid()._repr_svg_()
    assert grid()._repr_svg_() != (grid() - grid(torch.ones(2, 3, 4)))._repr_svg_()


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    honest = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return honest(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pandas")
    with pytest.raises(MissingExtraError, match=r"^a table needs pandas. Run: pip install 'mechinterp-hooks\[frames\]'$"):
        grid().to_frame()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "matplotlib")
    with pytest.raises(MissingExtraError, match=r"^a plot needs matplotlib. Run: pip install 'mechinterp-hooks\[draw\]'$"):
        grid().plot()
    # A notebook still shows the strongest cells, and what comes from outside is escaped.
    monkeypatch.setattr("mechinterp.core.effects.find_spec", lambda name: None)
    page = grid()._repr_html_()
    assert page is not None
    assert page.startswith("<pre>Effects: patching z;")
    found = mi.Effects("<script>x</script>", ("site",), {"site": ("<b>",)}, torch.ones(1, 2))._repr_html_()
    assert found is not None
    assert "<script>x" not in found
    assert "<td>&lt;b&gt;</td>" in found
    assert "<tr><td>L0.H0.z</td><td>-10.5000</td></tr>" in page
    assert grid()._repr_svg_() is None
