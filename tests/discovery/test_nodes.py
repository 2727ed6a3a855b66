"""Circuits of nodes: the scores are those of attribute and patch, the edges all that join the nodes taken."""

from __future__ import annotations

from typing import Any

import pytest

import mechinterp as mi
from mechinterp.discovery.choosing import node_scores
from mechinterp.errors import GraphError
from mechinterp.graph.graph import edges_among

TOYS = ["induction", "gqa_induction", "copy", "memory"]


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("method", ["exact", "eap-ig"])
def test_finds_the_planted_nodes(name: str, method: str) -> None:
    toy = mi.toys.build(name)
    truth = toy.truth["resample"]
    planted = {edge.src for edge in truth.edges} - {"embed"}
    circuit = mi.discover(toy.model, toy.task, method=method, unit="node", nodes=len(planted))
    assert set(circuit.provenance["selection"]["nodes"]) == planted
    assert set(truth.edges) <= set(circuit.edges)
    assert set(circuit.edges) == set(edges_among(circuit.shape, planted))


def test_edges_are_all_those_among_the_nodes(setting: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, unit="node", nodes=3, steps=2)
    said = circuit.provenance["selection"]
    scores = node_scores(mi.attribute(setting.model, setting.task, steps=2))
    ranked = sorted((node for node in scores if node != "embed"), key=lambda node: -abs(scores[node]))
    assert said["nodes"] == ranked[:3]
    assert said["node_scores"] == {node: scores[node] for node in ranked[:3]}
    kv = {circuit.shape.kv_node(node) for node in ranked[:3]}
    ends = {"embed", "logits", *ranked[:3], *kv}
    every = mi.Circuit.full(setting.model).edges
    assert set(circuit.edges) == {edge for edge in every if edge.src in ends and edge.dst in ends}
    assert set(circuit.scores.values()) == {None}


def test_exact_nodes_are_what_patching_measures(setting: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, method="exact", unit="node", threshold=0.0)
    measured = mi.patch(setting.model, setting.task, "L*.H*.z", direction="noise")
    scores = circuit.provenance["selection"]["node_scores"]
    for layer in range(2):
        for head in range(4):
            assert scores[f"a{layer}.h{head}"] == pytest.approx(float(measured.values[layer, head]), abs=1e-6)
    assert {"m0", "m1"} < scores.keys()
    assert len(circuit) == circuit.shape.n_edges


def test_a_budget_of_edges_is_kept(setting: Any) -> None:
    for budget in (0, 1, 10, 40):
        circuit = mi.discover(setting.model, setting.task, method="eap", unit="node", edges=budget)
        # The embedding's edge to the logits is there with no node at all.
        assert len(circuit) <= max(1, budget)
        taken = circuit.provenance["selection"]["nodes"]
        scores = node_scores(mi.attribute(setting.model, setting.task))
        ranked = sorted((node for node in scores if node != "embed"), key=lambda node: -abs(scores[node]))
        assert taken == ranked[: len(taken)]
        assert len(edges_among(circuit.shape, set(ranked[: len(taken) + 1]))) > budget


def test_node_scores_come_from_nodes(setting: Any) -> None:
    with pytest.raises(GraphError) as caught:
        node_scores(mi.attribute(setting.model, setting.task, unit="edge"))
    assert str(caught.value) == ("these effects are over ('edge',); nodes come from mi.attribute(model, task, unit='node')")
