"""Patterns that name sets of activations."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from mechinterp.core.select import Selection, resolve_position, select
from mechinterp.core.sites import Site
from mechinterp.errors import SelectorError, SiteError


@dataclass(frozen=True)
class Shape:
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 4
    d_model: int = 8
    d_head: int = 2
    d_mlp: int = 16


GQA = Shape(n_kv_heads=2)


def texts(pattern: object, cfg: Shape = GQA) -> list[str]:
    return [str(site) for site in select(pattern, cfg)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("L0.mlp_out", ["L0.mlp_out"]),
        ("L*.mlp_out", ["L0.mlp_out", "L1.mlp_out", "L2.mlp_out"]),
        ("L-1.mlp_out", ["L2.mlp_out"]),
        ("L0-1.mlp_out", ["L0.mlp_out", "L1.mlp_out"]),
        ("L2,0.mlp_out", ["L2.mlp_out", "L0.mlp_out"]),
        ("L0,1-2,-1.mlp_out", ["L0.mlp_out", "L1.mlp_out", "L2.mlp_out"]),
        ("L 0 - 1 .mlp_out", None),
        (" L0 , 1 .mlp_out ", ["L0.mlp_out", "L1.mlp_out"]),
        ("L1.H*.z", ["L1.H0.z", "L1.H1.z", "L1.H2.z", "L1.H3.z"]),
        ("L1.z", ["L1.z"]),
        ("L1.KV*.k", ["L1.KV0.k", "L1.KV1.k"]),
        ("L1.H-1.q_in[-1]", ["L1.H3.q_in[-1]"]),
        ("L1.N0-2.mlp_post", ["L1.N0.mlp_post", "L1.N1.mlp_post", "L1.N2.mlp_post"]),
        ("L1.N-1.resid_pre", ["L1.N7.resid_pre"]),
        ("L1.H2.N1.z", ["L1.H2.N1.z"]),
        ("embed | logits", ["embed", "logits"]),
        ("embed|embed", ["embed"]),
        ("L0.z[2:5]", ["L0.z[2]", "L0.z[3]", "L0.z[4]"]),
        ("L0.z[2-4]", ["L0.z[2]", "L0.z[3]", "L0.z[4]"]),
        ("L0.z[0,-1,S2]", ["L0.z[0]", "L0.z[-1]", "L0.z[S2]"]),
        ("L0.z[S1+1]", ["L0.z[S1+1]"]),
        ("L0.H1.pattern[end]", ["L0.H1.pattern[end]"]),
    ],
)
def test_patterns(pattern: str, found: list[str] | None) -> None:
    if found is None:
        with pytest.raises(SelectorError, match="cannot read '0 - 1' as a layer"):
            select(pattern, GQA)
    else:
        assert texts(pattern) == found


def test_count_of_a_whole_model() -> None:
    cfg = Shape(n_layers=12, n_heads=12, n_kv_heads=12)
    assert len(select("L*.H*.z | L*.mlp_out", cfg)) == 12 * 12 + 12
    assert len(select("L*.H*.z[0:5]", cfg)) == 12 * 12 * 5


def test_text_is_read_back() -> None:
    # What is printed is a pattern, for every kind of site and every part of it.
    for pattern in ("L*.H*.z[-1]", "L*.KV*.k[S2]", "L0.N*.mlp_post", "embed[3]", "L2.H1.N0.z[0]"):
        chosen = select(pattern, GQA)
        assert select([str(site) for site in chosen], GQA) == chosen
        assert select(chosen, GQA) == chosen


def test_many_kinds_of_where() -> None:
    assert texts([Site("z", 0, head=1), "L1.mlp_out"]) == ["L0.H1.z", "L1.mlp_out"]
    assert texts(Site("z", -1, head=-1)) == ["L2.H3.z"]
    assert texts(site for site in ("embed", "logits")) == ["embed", "logits"]


def test_heads_without_grouped_queries() -> None:
    # There a KV head is a head, and both letters are understood.
    assert texts("L0.H1.k", Shape()) == ["L0.KV1.k"]
    assert texts("L0.KV1.q", Shape()) == ["L0.H1.q"]


def test_algebra() -> None:
    one, other = select("L0-1.mlp_out", GQA), select("L1-2.mlp_out", GQA)
    assert texts(one | other) == ["L0.mlp_out", "L1.mlp_out", "L2.mlp_out"]
    assert texts(one & other) == ["L1.mlp_out"]
    assert texts(one - other) == ["L0.mlp_out"]
    assert Site("mlp_out", 1) in one
    assert "L1.mlp_out" not in one
    assert len(one) == 2


def test_repr() -> None:
    assert repr(select("L0-1.z", GQA)) == "Selection(L0.z, L1.z)"
    assert repr(select("L*.H*.z", GQA)) == ("Selection(L0.H0.z, L0.H1.z, L0.H2.z, L0.H3.z, L1.H0.z, L1.H1.z, ... 12 sites)")


REFUSED = [
    ("", "cannot read '' in ''; write it like 'L0-5.H*.z', 'L9.H6.z[-1]' or 'L*.mlp_out'"),
    ("L0.z |", "cannot read '' in 'L0.z |'; write it like 'L0-5.H*.z', 'L9.H6.z[-1]' or 'L*.mlp_out'"),
    ("L0..z", "cannot read 'L0..z' in 'L0..z'; write it like 'L0-5.H*.z', 'L9.H6.z[-1]' or 'L*.mlp_out'"),
    ("L0.z[", "cannot read 'L0.z[' in 'L0.z['; write it like 'L0-5.H*.z', 'L9.H6.z[-1]' or 'L*.mlp_out'"),
    ("z", "'z' needs a layer: write 'L*.z' for all, or 'L0.z' for the first"),
    ("L0.embed", "'embed' has no layers: write 'embed', not 'L0.embed'"),
    ("L3.z", "there is no layer 3 in 'L3.z': this model has layers 0 to 2"),
    ("L-4.z", "there is no layer -4 in 'L-4.z': this model has layers 0 to 2"),
    ("L0-3.z", "there is no layer 3 in 'L0-3.z': this model has layers 0 to 2"),
    ("L2-1.z", "the range 2-1 in 'L2-1.z' is empty; write the smaller layer first"),
    ("Lx.z", "cannot read 'x' as a layer in 'Lx.z'; write *, 3, -1, 0-5 or 1,3"),
    ("L0.H4.z", "there is no head 4 in 'L0.H4.z': this model has heads 0 to 3"),
    ("L0.KV2.k", "there is no KV head 2 in 'L0.KV2.k': this model has KV heads 0 to 1"),
    ("L0.H1.k", "'k' has 2 KV heads on this model: write KV0 to KV1, not H1"),
    ("L0.KV1.z", "'z' has 4 query heads on this model: write H0 to H3, not KV1"),
    (
        "L0.H1.mlp_out",
        "'mlp_out' is not split by head in 'L0.H1.mlp_out'; per head there are: q, k, v, scores, pattern, z, "
        "head_out, q_in, k_in, v_in",
    ),
    ("L0.N16.mlp_post", "there is no neuron 16 in 'L0.N16.mlp_post': this model has neurons 0 to 15"),
    ("L0.N1.pattern", "'pattern' has no neurons in 'L0.N1.pattern'; use 'mlp_post' or 'mlp_pre'"),
    ("N3.logits", "'logits' has no neurons in 'N3.logits'; use 'mlp_post' or 'mlp_pre'"),
    ("L0.z[*]", "cannot read position '*' in 'L0.z[*]'; write -1, 3, 2:5, 1,3 or a named position"),
    ("L0.z[1:]", "cannot read position '1:' in 'L0.z[1:]'; write -1, 3, 2:5, 1,3 or a named position"),
    ("L0.z[ ]", "cannot read position '' in 'L0.z[ ]'; write -1, 3, 2:5, 1,3 or a named position"),
    ("L0.z[4:4]", "the range 4:4 in 'L0.z[4:4]' is empty; write the smaller position first"),
    ("L0.z['a'b]", "cannot read position \"'a'b\" in \"L0.z['a'b]\"; write -1, 3, 2:5, 1,3 or a named position"),
    ("L0.z['a'#x]", "cannot read position \"'a'#x\" in \"L0.z['a'#x]\"; write -1, 3, 2:5, 1,3 or a named position"),
    ("L0.z['a]", 'cannot read position "\'a" in "L0.z[\'a]"; write -1, 3, 2:5, 1,3 or a named position'),
    ("L0.z[4-3]", "the range 4-3 in 'L0.z[4-3]' is empty; write the smaller position first"),
]


@pytest.mark.parametrize(("pattern", "message"), REFUSED, ids=[pattern for pattern, _ in REFUSED])
def test_refused(pattern: str, message: str) -> None:
    with pytest.raises(SelectorError, match=f"^{re.escape(message)}$"):
        select(pattern, GQA)


def test_unknown_name_says_in_which_term() -> None:
    with pytest.raises(
        SiteError, match=r"^in 'L0.mlp_outs': there is no site 'mlp_outs'. Did you mean 'mlp_out' or 'mlp_post'\?$"
    ):
        select("embed | L0.mlp_outs", GQA)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ([], "an empty list selects nothing; name at least one site, such as 'L*.resid_post'"),
        (Selection(()), "an empty selection selects nothing; was it an intersection or a difference?"),
        (Site("z", 7), "there is no layer 7 in 'L7.z': this model has layers 0 to 2"),
        (Site("z"), "'z' needs a layer: write 'L*.z' for all, or 'L0.z' for the first"),
        (
            Site("mlp_out", 0, head=1),
            "'mlp_out' is not split by head in 'L0.H1.mlp_out'; per head there are: q, k, v, "
            "scores, pattern, z, head_out, q_in, k_in, v_in",
        ),
        # A site is one activation: the first position alone would be a silent surprise.
        (
            Site("z", 0, pos="2-4"),
            "Site(name='z', layer=0, head=None, pos='2-4', neuron=None) holds '2-4', which names 3 "
            "positions; a Site has one, a pattern may have many",
        ),
        (Selection((Site("z", 0), Site("z", 9))), "there is no layer 9 in 'L9.z': this model has layers 0 to 2"),
    ],
)
def test_refused_values(where: object, message: str) -> None:
    with pytest.raises(SelectorError, match=f"^{re.escape(message)}$"):
        select(where, GQA)  # type: ignore[arg-type]


def test_positions() -> None:
    site = Site("z", 0)
    assert resolve_position(-1, 7, {}, site) == 6
    assert resolve_position(6, 7, {}, site) == 6
    assert resolve_position("S2", 7, {"S2": 1}, site) == "S2"
    with pytest.raises(SelectorError, match=r"^L0.z: there is no position 7; the prompts have positions 0 to 6$"):
        resolve_position(7, 7, {}, site)
    with pytest.raises(SelectorError, match=r"^L0.z: there is no position -8; the prompts have positions 0 to 6$"):
        resolve_position(-8, 7, {}, site)
    with pytest.raises(SelectorError, match=r"^L0.z: there is no position named 'ent'. Did you mean 'end'\?$"):
        resolve_position("ent", 7, ["S1", "S2", "end"], site)
    with pytest.raises(SelectorError, match=r"^L0.z: there is no position named 'S3'. There are none.$"):
        resolve_position("S3", 7, [], site)
