"""Names of activations."""

from __future__ import annotations

import dataclasses

import pytest

from mechinterp.core.sites import KINDS, Site, kind_of
from mechinterp.errors import SiteError

NAMES = [
    "embed",
    "pos_embed",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_in",
    "mlp_pre",
    "mlp_post",
    "mlp_out",
    "q",
    "k",
    "v",
    "scores",
    "pattern",
    "z",
    "head_out",
    "q_in",
    "k_in",
    "v_in",
    "final_norm",
    "logits",
]


def test_the_kinds_that_the_design_names() -> None:
    assert sorted(KINDS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_axes_are_words_of_the_vocabulary(name: str) -> None:
    known = {"batch", "pos", "q_pos", "k_pos", "head", "kv_head", "d_model", "d_head", "d_mlp", "vocab"}
    kind = KINDS[name]
    assert kind.name == name
    assert kind.axes[0] == "batch"
    assert set(kind.axes) <= known
    assert kind.meaning


def test_kinds_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        KINDS["mine"] = KINDS["z"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "head_axis", "pos_axis", "per_layer"),
    [
        ("z", "head", 1, True),
        ("k", "kv_head", 1, True),
        ("pattern", "head", 2, True),
        ("mlp_post", None, 1, True),
        ("embed", None, 1, False),
        ("pos_embed", None, 1, False),
        ("final_norm", None, 1, False),
        ("logits", None, 1, False),
    ],
)
def test_what_a_kind_says(name: str, head_axis: str | None, pos_axis: int, per_layer: bool) -> None:
    kind = kind_of(name)
    assert (kind.head_axis, kind.pos_axis, kind.per_layer) == (head_axis, pos_axis, per_layer)


@pytest.mark.parametrize(
    ("site", "text"),
    [
        (Site("z", 9, head=6, pos=-1), "L9.H6.z[-1]"),
        (Site("k", 0, head=1), "L0.KV1.k"),
        (Site("v_in", 0, head=1), "L0.KV1.v_in"),
        (Site("q_in", 0, head=1), "L0.H1.q_in"),
        (Site("mlp_post", 3, neuron=17, pos="S2"), "L3.N17.mlp_post[S2]"),
        (Site("embed"), "embed"),
        (Site("logits", pos=0), "logits[0]"),
        (Site("resid_pre", 0), "L0.resid_pre"),
    ],
)
def test_shown_as_researchers_write_it(site: Site, text: str) -> None:
    assert str(site) == text


def test_parts_of_an_activation() -> None:
    site = Site("z", 9, head=6, pos=-1, neuron=3)
    assert site.whole == Site("z", 9)
    assert site.everywhere == Site("z", 9, head=6, neuron=3)
    assert site.at("S2") == Site("z", 9, head=6, pos="S2", neuron=3)
    assert len({site, site.whole, site.at(-1)}) == 2


def test_sites_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Site("z", 0).layer = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("mlp_outs", "there is no site 'mlp_outs'. Did you mean 'mlp_out' or 'mlp_post'?"),
        ("hook_z", "there is no site 'hook_z'. There are: embed, pos_embed, resid_pre, resid_mid, resid_post, attn_out, "
         "mlp_in, mlp_pre, mlp_post, mlp_out, q, k, ..."),
    ],
)  # fmt: skip
def test_unknown_name(asked: str, message: str) -> None:
    with pytest.raises(SiteError) as error:
        kind_of(asked)
    assert str(error.value) == message
    assert isinstance(error.value, KeyError)
    with pytest.raises(SiteError) as error:
        _ = Site(asked, 0).kind
    assert str(error.value) == message
