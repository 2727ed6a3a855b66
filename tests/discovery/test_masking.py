"""Gates: their gradient against finite differences, the planted circuit, the same twice, and the size asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.core.ablation import Ablation
from mechinterp.discovery import masking
from mechinterp.discovery.masking import _misses, _open, _stretched
from mechinterp.discovery.packing import Packing


def test_gates_slope_is_that_of_finite_differences(setting: Any) -> None:
    packing = Packing.of(setting.model, setting.task, Ablation("resample"), None, None)
    pack = packing.pack(packing.parts[0])
    gates = torch.linspace(0.1, 0.9, len(pack.layout.edges))
    value, slope = _misses(pack, gates.clone().requires_grad_(), 1.0)
    assert value > 0
    for i in (0, 17, 40, len(gates) - 1):
        ends = []
        for size in (1e-2, -1e-2):
            moved = gates.clone()
            moved[i] += size
            ends.append(_misses(pack, moved.requires_grad_(), 1.0)[0])
        assert float(slope[i]) == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=5e-3, rel=0.02)


def test_whole_gates_are_circuits(setting: Any) -> None:
    """Gates of 0 and 1, with a gradient or without, are what running the circuit gives."""
    packing = Packing.of(setting.model, setting.task, Ablation("resample"), None, None)
    pack = packing.pack(packing.parts[0])
    gates = (torch.arange(len(pack.layout.edges)) % 3 == 0).float()
    circuit = mi.Circuit.from_edges(setting.model, [edge for edge, gate in zip(pack.layout.edges, gates, strict=True) if gate])
    runs = mi.run_circuits(setting.model, setting.task, circuit)
    value, _ = _misses(pack, gates.requires_grad_(), 1.0)
    assert value == pytest.approx(float((runs.circuits[0] - runs.clean).abs().sum()), abs=1e-4)


def test_five_rounds_by_hand(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise, gates, the falling target, descent for the gates and ascent for the size, from the formulas."""
    monkeypatch.setattr(masking, "_ROUNDS", 5)
    model, task = setting.model, setting.task
    found = mi.discover(model, task, method="mask", threshold=0.0, seed=7)
    packing = Packing.of(model, task, Ablation("resample"), None, None)
    (part,) = packing.parts
    pack, n = packing.pack(part), found.shape.n_edges
    assert len(found) == n
    unit = abs(found.provenance["baseline"]["clean"] - found.provenance["baseline"]["corrupt"])
    draw = torch.Generator().manual_seed(7)
    place, weights = torch.full((n,), 3.0, requires_grad=True), torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([place, weights], lr=0.4)
    for fallen in (0.4, 0.8, 1.0, 1.0, 1.0):
        noise = torch.rand(n, generator=draw).clamp(1e-6, 1 - 1e-6)
        gates = (1.2 * ((noise.log() - (1 - noise).log() + place) / (2 / 3)).sigmoid() - 0.1).clamp(0, 1)
        off, slope = _misses(pack, gates.detach().requires_grad_(), unit * len(task))
        more = (place + 2 / 3 * math.log(11)).sigmoid().mean() - (1 - fallen * (1 - (n // 5) / n))
        loss = (gates * slope).sum() + weights[0] * more + weights[1] * more**2
        place.grad, up = torch.autograd.grad(loss, [place, weights])
        weights.grad = -up
        adam.step()
    chances = (place + 2 / 3 * math.log(11)).sigmoid()
    torch.testing.assert_close(torch.tensor(list(found.scores.values())), chances.detach(), atol=1e-4, rtol=0)
    assert chances.max() - chances.min() > 0.01
    # The gradients of several packs add up.
    parts = mi.discover(model, task, method="mask", threshold=0.0, seed=7, memory=1)
    assert dict(parts.scores) == pytest.approx(dict(found.scores), abs=1e-4)
    said = found.provenance
    assert said["loss"] == pytest.approx(off, abs=1e-4)
    assert said["size_off_target"] == pytest.approx(float(more.detach()), abs=1e-4)


def test_the_same_seed_gives_the_same_circuit_of_the_size_asked_for() -> None:
    toy = mi.toys.build("gqa_induction")
    options: dict[str, Any] = {"method": "mask", "selection": "top"}
    one, two = (mi.discover(toy.model, toy.task[:4], edges=5, seed=3, **options) for _ in range(2))
    assert dict(one.scores) == dict(two.scores)
    assert set(one.edges) == set(toy.truth["resample"].edges)
    said = one.provenance
    assert (said["seed"], said["forwards"], said["backwards"]) == (3, 102, 100)
    assert said["loss"] < 0.05
    assert abs(said["size_off_target"]) < 0.1
    chosen = mi.discover(toy.model, toy.task[:4], threshold=0.9, seed=3, **options)
    assert set(one.edges) <= set(chosen.edges)
    assert all(score is not None and score >= 0.9 for score in chosen.scores.values())


def test_the_chance_of_a_gate_is_how_often_it_is_open() -> None:
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    logits = noise.log() - (1 - noise).log()
    for location in (-3.0, -1.0, 0.0, 2.0):
        gates = _stretched((logits + location) / (2 / 3))
        assert gates.min() == 0 and gates.max() == 1
        assert float(_open(torch.tensor(location))) == pytest.approx(float((gates > 0).float().mean()), abs=4e-3)
