"""Circuits whose edges carry at some spans alone: run, scored, chosen and judged, against a transformer written out by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.errors import GraphError
from mechinterp.graph import scored_edges
from tests.reference import Intervention, Reference

MIXED = ["..changed", "changed", "changed..late", "late", "late.."]


@pytest.fixture
def named(settings: dict[str, Any]) -> mi.Task:
    """Two names at places of their own in each prompt, the answer's position another one."""
    return replace(settings["gpt2"].task, positions={"changed": [2, 3, 2, 4, 3], "late": [4, 5, 6, 6, 7]})


def drawn(model: mi.Model, spans: tuple[str, ...], share: float, seed: int) -> mi.Circuit:
    """Each edge at each span with some chance, and some edges everywhere."""
    generator = random.Random(seed)
    found, everywhere = {}, []
    for edge in scored_edges(model):
        some = [span for span in spans if generator.random() < share]
        if generator.random() < 0.2:
            everywhere.append(edge)
        elif some:
            found[edge] = dict.fromkeys(some)
    return mi.Circuit(mi.GraphShape.of(model), dict.fromkeys([*found, *everywhere]), spans=found)


def cuts(reference: Reference, task: mi.Task, circuit: mi.Circuit) -> dict[Any, Tensor]:
    """``[batch pos]`` of each edge: where it is not in the circuit."""
    index, names = task.spans.index, task.spans.names
    cut = {}
    for edge in reference.edges:
        found = mi.Edge(*edge)
        kept = circuit.spans.get(found, names if found in circuit else ())
        cut[edge] = torch.stack([index != names.index(span) for span in kept] or [index >= -1]).all(dim=0).double()
    return cut


def by_hand(reference: Reference, task: mi.Task, circuit: mi.Circuit) -> Tensor:
    return reference.metric(task, Intervention(cut=cuts(reference, task, circuit), instead=reference.run(task.corrupt)[1]))


# -- running


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_circuits_with_spans_equal_a_brute_force(setting: Any, named: mi.Task, share: float) -> None:
    circuits = [drawn(setting.model, named.spans.names, share, seed) for seed in range(3)]
    found = mi.run_circuits(setting.model, named, circuits).circuits
    for circuit, row in zip(circuits, found, strict=True):
        torch.testing.assert_close(row.double(), by_hand(setting.reference, named, circuit), atol=2e-5, rtol=0)
    # They are other circuits than those of the same edges.
    assert (found - mi.run_circuits(setting.model, named, [each.everywhere() for each in circuits]).circuits).abs().max() > 1e-3


def test_all_spans_are_no_spans_and_circuits_of_both_kinds_run_together(setting: Any, named: mi.Task) -> None:
    model, names = setting.model, named.spans.names
    some = drawn(model, names, 0.5, 1)
    edges = some.everywhere()
    whole, full = (replace(each, spans={edge: dict.fromkeys(names) for edge in each}) for each in (edges, mi.Circuit.full(model)))
    runs = mi.run_circuits(model, named, [whole, edges, some, full, mi.Circuit.empty(model)])
    torch.testing.assert_close(runs.circuits[0], runs.circuits[1], atol=2e-6, rtol=0)
    torch.testing.assert_close(runs.circuits[3], runs.clean, atol=2e-6, rtol=0)
    torch.testing.assert_close(runs.circuits[4], runs.corrupt, atol=2e-5, rtol=0)
    torch.testing.assert_close(runs.circuits[2], mi.run_circuits(model, named, some).circuits[0], atol=2e-6, rtol=0)
    # In few passes or many.
    few = mi.run_circuits(model, named, [whole, edges, some, full], memory=1 << 16).circuits
    torch.testing.assert_close(few, runs.circuits[:4], atol=2e-6, rtol=0)
