"""Edits as values: what they do to a tensor, how they print, what they refuse, how they travel."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.edits import Edit
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


@pytest.mark.parametrize(
    "edit",
    [mi.Zero(Z), mi.Scale(Z, 2.0), mi.Add(Z, torch.ones(8)), mi.Project(Z, torch.ones(8)), mi.Call(Z, lambda v, s: v.mul_(0))],
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
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_json_round_trip(edit: Edit) -> None:
    again = mi.edit_from_json(json.loads(json.dumps(edit.to_json())))
    assert type(again) is type(edit)
    for each in dataclasses.fields(edit):
        one, other = getattr(edit, each.name), getattr(again, each.name)
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        elif each.name == "at":
            assert other == (" | ".join(map(str, one)) if isinstance(one, Selection) else str(one))
        else:
            assert one == other


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"edit": "Zro", "at": "L0.z"}, "there is no edit 'Zro' that can be read from JSON. Did you mean 'Zero'?"),
        ({"at": "L0.z"}, "there is no edit None that can be read from JSON. There are: Replace, Add, Scale, Zero, Project."),
        (
            {"edit": "Call", "at": "L0.z"},
            "there is no edit 'Call' that can be read from JSON. There are: Replace, Add, Scale, Zero, Project.",
        ),
        ({"edit": "Scale", "at": "L0.z", "factr": 2.0}, "Scale has no field 'factr'. Did you mean 'factor'?"),
        ({"edit": "Scale", "at": "L0.z"}, "Scale needs factor; there is only at"),
        ({"edit": "Zero"}, "Zero needs at; there is only nothing"),
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
    with pytest.raises(EditError, match=r"^Replace with a mapping of values is not written to JSON; write one Replace per site$"):
        mi.Replace(Z, {Z: torch.ones(8)}).to_json()
