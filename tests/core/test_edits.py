"""Edits as values: what they do to a tensor, how they print, what they refuse, how they travel."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.edit import Edit
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import EditError

Z = Site("z", 0, head=1)


@pytest.fixture
def value() -> Tensor:
    return torch.randn(3, 7, 8)


def test_arithmetic(value: Tensor) -> None:
    other, vector = torch.randn(3, 7, 8), torch.randn(8)
    assert torch.equal(mi.Replace(Z, other).apply(value, Z), other)
    assert torch.equal(mi.Replace(Z, {Z: other}).apply(value, Z), other)
    assert torch.equal(mi.Zero(Z).apply(value, Z), torch.zeros(3, 7, 8))
    assert torch.equal(mi.Scale(Z, -2.0).apply(value, Z), value * -2)
    assert torch.equal(mi.Add(Z, vector).apply(value, Z), value + vector)
    assert torch.equal(mi.Add(Z, other, scale=0.5).apply(value, Z), value + 0.5 * other)
    assert torch.equal(mi.Call(Z, lambda value, site: value + site.layer).apply(value, Z), value)
    # Whole numbers are numbers.
    assert torch.equal(mi.Scale(Z, 2).apply(value, Z), value + value)
    assert torch.equal(mi.Add(Z, vector, scale=2).apply(value, Z), value + 2 * vector)


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.7), (None, 0.0), (0, None), (0.25, 0.25)])
def test_clamping(value: Tensor, low: float | None, high: float | None) -> None:
    found = mi.Clamp(Z, low=low, high=high).apply(value, Z).flatten().tolist()
    for one, other in zip(found, value.flatten().tolist(), strict=True):
        expected = other if low is None else max(other, low)
        assert one == pytest.approx(expected if high is None else min(expected, high), abs=1e-7)


# -- means and recorded values ---------------------------------------------------------------------

MEANS: list[tuple[Site, list[int], list[int], list[int]]] = [
    # The site, the part that it names, the value, and the value's shape among all axes of the part.
    (Z, [3, 7, 8], [8], [1, 1, 8]),
    (Z, [3, 7, 8], [7, 8], [1, 7, 8]),
    (Z, [3, 7, 8], [1, 1, 8], [1, 1, 8]),
    (Z, [3, 7, 8], [1, 7, 8], [1, 7, 8]),
    (Z, [3, 7, 8], [3, 7, 8], [3, 7, 8]),
    (Z.whole, [3, 7, 4, 8], [4, 8], [1, 1, 4, 8]),
    (Z.at(-1), [3, 8], [8], [1, 8]),
    (Site("mlp_post", 0, neuron=3), [3, 7], [], [1, 1]),
    (Site("mlp_post", 0, neuron=3), [3, 7], [7], [1, 7]),
    (Site("pattern", 0), [3, 4, 7, 7], [4, 1, 7], [1, 4, 1, 7]),
    (Site("pattern", 0, head=1), [3, 7, 7], [7, 7], [1, 7, 7]),
]


@pytest.mark.parametrize(("site", "part", "shape", "among"), MEANS, ids=lambda value: str(value))
def test_a_mean_is_for_all_rows_and_positions(site: Site, part: list[int], shape: list[int], among: list[int]) -> None:
    old, mean = torch.randn(part), torch.randn(shape)
    expected = mean.reshape(among).expand(part)
    assert torch.equal(mi.Mean(site, mean).apply(old, site), expected)
    assert torch.equal(mi.Mean(site, {site: mean}).apply(old, site), expected)


@pytest.mark.parametrize(
    ("site", "part", "shape"),
    # A head for all heads, a position for a coordinate, one number for all, too many axes.
    [(Z.whole, [3, 7, 4, 8], [8]), (Z, [3, 7, 8], [7, 1]), (Z, [3, 7, 8], []), (Z.at(2), [3, 8], [1, 1, 8])],
)
def test_a_mean_is_not_spread_over_other_axes(site: Site, part: list[int], shape: list[int]) -> None:
    message = f"Mean at {site}: the value has shape {shape}, but the activation there has {part}; expand it explicitly"
    with pytest.raises(EditError, match=f"^{re.escape(message)}"):
        mi.Mean(site, torch.randn(shape)).apply(torch.zeros(part), site)


@pytest.mark.parametrize("at", ["L*.attn_out | L*.mlp_out", "L*.H2.z | L1.mlp_out[2]", "L0.resid_post[changed]"])
def test_a_frozen_run_is_that_run(setting: Any, at: str) -> None:
    """Of another prompt: every writer frozen gives its logits, some of them exactly what a patch of them gives."""
    model, task = setting.model, setting.task
    other = mi.run(model, mi.Task("other", task.corrupt, task.corrupt, task.right, task.wrong, positions=task.positions),
                   capture="L*.attn_out | L*.mlp_out | L*.z | L*.resid_post | L0.resid_pre")  # fmt: skip
    found = mi.run(model, task, edits=[mi.Freeze(at, other.cache)], capture=at)
    for site in mi.select(at, model.cfg):
        assert torch.equal(found[site], other.cache[site])
    one_by_one = [mi.Replace(site, other.cache[site]) for site in mi.select(at, model.cfg)]
    assert torch.equal(found.logits, mi.run(model, task, edits=one_by_one).logits)
    assert not torch.equal(found.logits, mi.run(model, task).logits)
    whole = mi.run(model, task, edits=[mi.Freeze("L0.resid_pre | L*.attn_out | L*.mlp_out", other.cache)])
    assert torch.equal(whole.logits, other.logits)


def test_rows_of_a_frozen_run(setting: Any) -> None:
    model, task = setting.model, setting.task
    other = mi.run(model, task.corrupt, capture="L1.mlp_out")
    all_rows = mi.run(model, task, edits=[mi.Freeze("L1.mlp_out", other.cache)]).logits
    plain = mi.run(model, task).logits
    found = mi.run(model, task, edits=[mi.Freeze("L1.mlp_out", other.cache, rows=(1, 3))]).logits
    assert torch.equal(found[1:3], all_rows[1:3])
    assert torch.equal(found[[0, 3, 4]], plain[[0, 3, 4]])
    few = mi.run(model, task.corrupt[1:3], capture="L1.mlp_out")
    part = mi.run(model, task, edits=[mi.Freeze("L1.mlp_out", few.cache, rows=(1, 3))]).logits
    torch.testing.assert_close(part, found, atol=2e-6, rtol=0)
    message = "Freeze at L1.mlp_out: the value has shape [2, 8, 32], but the activation there has [5, 8, 32]"
    with pytest.raises(EditError, match=f"^{re.escape(message)}"):
        mi.run(model, task, edits=[mi.Freeze("L1.mlp_out", few.cache)])
    with pytest.raises(EditError, match=r"^Freeze at L0.mlp_out: no value was given for it. Did you mean 'L1.mlp_out'\?$"):
        mi.run(model, task, edits=[mi.Freeze("L0.mlp_out", other.cache)])


@pytest.mark.parametrize(
    "edit",
    [
        mi.Zero(Z),
        mi.Scale(Z, 2.0),
        mi.Add(Z, torch.ones(8)),
        mi.Project(Z, torch.ones(8)),
        mi.Call(Z, lambda v, s: v.mul_(0)),
        mi.Clamp(Z, low=0.0),
        mi.Mean(Z, torch.ones(8)),
        mi.Noise(Z, 1.0, seed=0),
        mi.Resample(Z, seed=0),
        mi.Swap(Z, pairs=((0, 2),)),
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_what_is_given_stays_as_it_was(value: Tensor, edit: Edit) -> None:
    before = value.clone()
    edit.apply(value, Z)
    assert torch.equal(value, before)


def test_a_function_may_work_in_place(value: Tensor) -> None:
    def halve(value: Tensor, site: Site) -> None:
        value *= 0.5

    assert torch.equal(mi.Call(Z, halve).apply(value, Z), value * 0.5)
    assert torch.equal(mi.Call(Z, lambda value, site: None).apply(value, Z), value)


# -- projection ------------------------------------------------------------------------------------


def least_squares(value: Tensor, directions: Tensor) -> Tensor:
    """The nearest point of the span, by another road than an orthonormal basis."""
    rows = torch.atleast_2d(directions).double()
    return (value.double() @ torch.linalg.pinv(rows) @ rows).float()


@pytest.mark.parametrize(
    "directions",
    [
        torch.randn(8, generator=torch.Generator().manual_seed(1)),
        torch.randn(3, 8, generator=torch.Generator().manual_seed(2)),
        torch.tensor([[2.0, 0, 0, 0, 0, 0, 0, 0], [1.0, 1, 0, 0, 0, 0, 0, 0]]),
        # One direction twice spans one dimension, and a zero none.
        torch.stack([torch.arange(8.0), torch.arange(8.0) * 3, torch.zeros(8)]),
        torch.randn(12, 8, generator=torch.Generator().manual_seed(3)),
    ],
    ids=["one", "three", "oblique", "dependent", "more than there are axes"],
)
def test_projection_is_that_of_least_squares(value: Tensor, directions: Tensor) -> None:
    along = least_squares(value, directions)
    torch.testing.assert_close(mi.Project(Z, directions, onto=True).apply(value, Z), along, atol=1e-5, rtol=0)
    torch.testing.assert_close(mi.Project(Z, directions).apply(value, Z), value - along, atol=1e-5, rtol=0)


def test_projection_in_double_precision(value: Tensor) -> None:
    direction = torch.randn(8, dtype=torch.float64)
    left = mi.Project(Z, direction).apply(value.double(), Z)
    assert left.dtype == torch.float64
    assert float((left @ direction).abs().max()) < 1e-14


# -- refusals --------------------------------------------------------------------------------------

N = Site("mlp_post", 0, neuron=3)
REFUSED = [
    (
        mi.Replace(Z, torch.ones(8)),
        Z,
        "Replace at L0.H1.z: the value has shape [8], but the activation there has [3, 7, 8]; "
        "expand it explicitly if one value is meant for all",
    ),
    (
        mi.Replace(Z, torch.ones(1, 7, 8)),
        Z,
        "Replace at L0.H1.z: the value has shape [1, 7, 8], but the activation there has "
        "[3, 7, 8]; expand it explicitly if one value is meant for all",
    ),
    (
        mi.Replace(Z, torch.ones(3, 7, 8, dtype=torch.float64)),
        Z,
        "Replace at L0.H1.z: the value is torch.float64 on cpu, the "
        "activation torch.float32 on cpu; convert it with .to(model.device, model.dtype)",
    ),
    (
        mi.Replace(Z, torch.ones(3, 7, 8, device="meta")),
        Z,
        "Replace at L0.H1.z: the value is torch.float32 on meta, the "
        "activation torch.float32 on cpu; convert it with .to(model.device, model.dtype)",
    ),
    (
        mi.Replace(Z, {Site("z", 0, head=2): torch.ones(3, 7, 8)}),
        Z,
        "Replace at L0.H1.z: no value was given for it. Did you mean 'L0.H2.z'?",
    ),
    (
        mi.Add(Z, torch.ones(7)),
        Z,
        "Add at L0.H1.z: the value has shape [7], but the activation there has [3, 7, 8]; expand it "
        "explicitly if one value is meant for all",
    ),
    (
        mi.Add(Z, torch.ones(8, dtype=torch.float16)),
        Z,
        "Add at L0.H1.z: the value is torch.float16 on cpu, the activation "
        "torch.float32 on cpu; convert it with .to(model.device, model.dtype)",
    ),
    (
        mi.Add(Z, torch.tensor(1.0)),
        Z,
        "Add at L0.H1.z: the value has shape [], but the activation there has [3, 7, 8]; expand it "
        "explicitly if one value is meant for all",
    ),
    (
        mi.Project(Z, torch.ones(7)),
        Z,
        "Project at L0.H1.z: the directions have shape [7], not [d] or [n d] with the activation's last axis, d = d_head",
    ),
    (
        mi.Project(Z, torch.ones(1, 1, 8)),
        Z,
        "Project at L0.H1.z: the directions have shape [1, 1, 8], not [d] or [n d] with the activation's last axis, d = d_head",
    ),
    (mi.Project(Z, torch.zeros(2, 8)), Z, "Project at L0.H1.z: the directions are all zero, so they span nothing"),
    (
        mi.Call(Z, lambda value, site: value[:1]),
        Z,
        "Call at L0.H1.z: the value has shape [1, 7, 8], but the activation there has "
        "[3, 7, 8]; expand it explicitly if one value is meant for all",
    ),
    (
        mi.Call(Z, lambda value, site: value.double()),
        Z,
        "Call at L0.H1.z: the value is torch.float64 on cpu, the activation "
        "torch.float32 on cpu; convert it with .to(model.device, model.dtype)",
    ),
    (mi.Call(Z, lambda value, site: 0.0), Z, "Call at L0.H1.z: the function gave float, not a tensor"),  # type: ignore[arg-type, return-value]
    (Edit(Z), Z, "Edit does not say what to do; use one of its subclasses, such as Zero"),
]


@pytest.mark.parametrize(("edit", "site", "message"), REFUSED)
def test_refused(value: Tensor, edit: Edit, site: Site, message: str) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        edit.apply(value, site)


def test_of_one_neuron_a_vector_is_no_direction() -> None:
    # [batch pos] is what is left: 7 numbers would be put along the positions of every prompt.
    with pytest.raises(
        EditError, match=r"^Add at L0.N3.mlp_post: the value has shape \[7\], but the activation there has \[3, 7\]"
    ):
        mi.Add(N, torch.ones(7)).apply(torch.zeros(3, 7), N)
    with pytest.raises(EditError, match=r"the directions have shape \[7\].* d = d_mlp \(one neuron is not enough\)$"):
        mi.Project(N, torch.ones(7)).apply(torch.zeros(3, 7), N)
    assert torch.equal(mi.Add(N, torch.ones(3, 7)).apply(torch.zeros(3, 7), N), torch.ones(3, 7))


# -- values ----------------------------------------------------------------------------------------

SHOWN = [
    (mi.Zero("L0.z"), "Zero('L0.z')"),
    (mi.Zero(Z, rows=(0, 2), priority=1), "Zero(L0.H1.z, rows=(0, 2), priority=1)"),
    (mi.Scale(Selection((Z,)), 0.5), "Scale(Selection(L0.H1.z), factor=0.5)"),
    (mi.Add("L0.z", torch.ones(8)), "Add('L0.z', value=<[8]>)"),
    (mi.Add("L0.z", torch.ones(8), scale=2.0), "Add('L0.z', value=<[8]>, scale=2.0)"),
    (mi.Replace("L0.z", {Z: torch.ones(8)}), "Replace('L0.z', value=<1 values>)"),
    (mi.Project("L0.z", torch.ones(2, 8), onto=True), "Project('L0.z', directions=<[2, 8]>, onto=True)"),
    (mi.Freeze("L0.z", {Z: torch.ones(8)}), "Freeze('L0.z', values=<1 values>)"),
    (mi.Mean("L0.z", torch.ones(8)), "Mean('L0.z', value=<[8]>)"),
    (mi.Clamp("L0.z", low=0), "Clamp('L0.z', low=0)"),
    (mi.Swap("L0.z"), "Swap('L0.z')"),
    (mi.Swap("L0.z", pairs=((0, 1),)), "Swap('L0.z', pairs=((0, 1),))"),
    (mi.Resample("L0.z", seed=3), "Resample('L0.z', seed=3)"),
    (mi.Noise("L0.z", 0.5, seed=3), "Noise('L0.z', sigma=0.5, seed=3)"),
]


@pytest.mark.parametrize(("edit", "text"), SHOWN, ids=[text for _, text in SHOWN])
def test_repr(edit: Edit, text: str) -> None:
    assert repr(edit).replace("rows=(0, 2), priority=1", "@").replace("priority=1, rows=(0, 2)", "@") == text.replace(
        "rows=(0, 2), priority=1", "@"
    )


@pytest.mark.parametrize("edit", [edit for edit, _ in SHOWN], ids=lambda edit: type(edit).__name__)
def test_frozen(edit: Edit) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.at = "L1.z"  # type: ignore[misc]


@pytest.mark.parametrize(
    "edit",
    [
        mi.Zero("L0.z", rows=(1, 2), priority=3),
        mi.Scale(Z, 0.5),
        mi.Replace(Selection((Z, Site("embed", pos="S2"))), torch.randn(2, 3)),
        mi.Replace("L0.z", torch.randn(2, 3, dtype=torch.float64)),
        mi.Replace("L0.z", torch.randn(2, 3).bfloat16()),
        mi.Add("L0.z", torch.randn(8), scale=-1.5),
        mi.Project("L0.z", torch.randn(2, 8), onto=True),
        mi.Replace("L0.z", {Z: torch.randn(2, 3), Site("k", 11, head=1, pos=-1): torch.randn(4).bfloat16()}),
        mi.Freeze("L0.z", {Site("resid_pre", 0, pos="S2"): torch.randn(2, 3), Site("mlp_post", 2, neuron=5): torch.randn(3)}),
        mi.Mean("L0.z", {Z: torch.randn(8), Site("embed"): torch.randn(4)}),
        mi.Clamp("L0.z", low=-1, high=0.1),
        mi.Swap("L0.z", pairs=((0, 3), (2, 1)), rows=(0, 4)),
        mi.Swap("L0.z"),
        mi.Resample("L0.z", seed=7, priority=-1),
        mi.Noise("embed[S1]", 0.3, seed=7, first_row=16),
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_json_round_trip(edit: Edit) -> None:
    again = mi.edit_from_json(json.loads(json.dumps(edit.to_json())))
    assert type(again) is type(edit)
    assert again == edit
    assert hash(again) == hash(edit)
    assert again.to_json() == edit.to_json()
    for each in dataclasses.fields(edit):
        one, other = getattr(edit, each.name), getattr(again, each.name)
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        elif isinstance(one, dict):
            assert [str(site) for site in one] == [str(site) for site in other]
            assert all(torch.equal(one[site], other[site]) and one[site].dtype == other[site].dtype for site in one)
        elif each.name == "at":
            assert other == (" | ".join(map(str, one)) if isinstance(one, Selection) else str(one))
        else:
            assert one == other


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"edit": "Zro", "at": "L0.z"}, "there is no edit 'Zro' that can be read from JSON. Did you mean 'Zero'?"),
        (
            {"at": "L0.z"},
            "there is no edit None that can be read from JSON. Did you mean 'Noise'?",
        ),
        (
            {"edit": "Call", "at": "L0.z"},
            "there is no edit 'Call' that can be read from JSON. "
            "There are: Replace, Freeze, Mean, Zero, Resample, Swap, Add, Noise, Scale, Clamp, Project.",
        ),
        ({"edit": "Scale", "at": "L0.z", "factr": 2.0}, "Scale has no field 'factr'. Did you mean 'factor'?"),
        ({"edit": "Scale", "at": "L0.z"}, "Scale needs factor; there is only at"),
        ({"edit": "Zero"}, "Zero needs at; there is only nothing"),
        ({"edit": "Noise", "at": "L0.z", "sigma": 1.0}, "Noise needs seed; there is only at, sigma"),
        (
            {"edit": "Add", "at": "L0.z", "value": {"tensor": [1.0], "dtype": "load"}},
            "there is no dtype 'load'; write one of torch's, such as 'float32'",
        ),
    ],
)
def test_json_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        mi.edit_from_json(data)


def test_not_written() -> None:
    with pytest.raises(
        EditError, match=r"^Call holds a Python function and cannot be written to a file; use one of the named edits$"
    ):
        mi.Call(Z, lambda value, site: value).to_json()
    message = (
        "Mean holds 1000008 numbers, too many for JSON (at most 1000000); write its tensors with "
        "safetensors.torch.save_file and make the edit anew from what load_file gives"
    )
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        mi.Mean("L0.z", {Z: torch.ones(8), Z.whole: torch.ones(1000, 1000)}).to_json()


def test_equal_by_what_they_do() -> None:
    ones = torch.ones(2, 3)
    same = [
        (mi.Replace("L0.H1.z", ones), mi.Replace(Z, ones.clone())),
        (mi.Zero(Selection((Z, Z.whole))), mi.Zero("L0.H1.z | L0.z")),
        (mi.Mean("L0.z", {Z: ones}), mi.Mean("L0.z", {Z: ones.clone()})),
        (mi.Scale(Z, 2), mi.Scale(Z, 2.0)),
    ]
    for one, other in same:
        assert one == other
        assert len({one, other}) == 1
    edits = [
        mi.Replace(Z, ones),
        mi.Replace(Z, ones + 1),
        mi.Replace(Z, ones.double()),
        mi.Replace(Z, ones[0]),
        mi.Replace(Z, {Z: ones}),
        mi.Replace(Z, {Z: ones + 1}),
        mi.Replace(Z, {Z.whole: ones}),
        mi.Replace("L0.z", ones),
        mi.Replace(Z, ones, rows=(0, 1)),
        mi.Replace(Z, ones, priority=1),
        mi.Mean(Z, ones),
        mi.Noise(Z, 1.0, seed=0),
        mi.Noise(Z, 1.0, seed=1),
        mi.Noise(Z, 2.0, seed=0),
    ]
    assert [[one == other for other in edits] for one in edits] == torch.eye(len(edits)).bool().tolist()
    assert len(set(edits)) == len(edits)
    assert mi.Zero(Z) != "Zero(L0.H1.z)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mi.Clamp(Z), "Clamp has no bounds; give low=, high= or both"),
        (lambda: mi.Clamp(Z, low=1, high=0.5), "Clamp: nothing is between low=1 and high=0.5"),
    ],
)
def test_bounds_that_mean_nothing(make: Callable[[], Edit], message: str) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        make()
