"""Circuits of resampled prompts: by hand, and where nothing or everything depends on the prompts."""

from __future__ import annotations

import json

import pytest
import torch

import mechinterp as mi
from mechinterp.core.resampling import draws
from mechinterp.errors import GraphError, MetricError
from mechinterp.graph import scored_edges

SHAPE = mi.GraphShape(n_layers=1, n_heads=1, attn_only=True)
EDGES = scored_edges(SHAPE)


def effects(per_example: torch.Tensor) -> mi.Effects:
    return mi.Effects("x", ("edge",), {"edge": tuple(tuple(edge) for edge in EDGES)}, per_example)


def test_by_hand() -> None:
    """Two of five edges; the second place goes to the third or the fourth, depending on which prompts were drawn."""
    table = torch.tensor([[0.0] * 3, [0.0] * 3, [9.0] * 3, [3.0, 0.0, 0.0], [1.1, 1.1, 1.1]])
    found = mi.stability(effects(table), SHAPE, edges=2, selection="top", resamples=50, seed=4)
    assert [str(edge) for edge in found.circuit] == [str(EDGES[2]), str(EDGES[4])]
    # The mean of the fourth beats 1.1 if its prompt is drawn twice of three times.
    often = sum(int((row == 0).sum()) >= 2 for row in draws(3, resamples=50, seed=4))
    assert 0 < often < 50
    assert sorted(found.jaccard) == pytest.approx([1 / 3] * often + [1.0] * (50 - often))
    assert found.frequency[EDGES[3]] == pytest.approx(often / 50)
    assert found.mean == pytest.approx((often / 3 + 50 - often) / 50)
    assert found.core().edges == (EDGES[2],)
    assert found.interval[0] == pytest.approx(1 / 3, abs=1e-6)
    plain = found.to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["edges"], plain["core"], plain["asked"], plain["seed"]) == (2, 1, 2, 4)
    # The most frequent first.
    assert list(plain["frequency"].items()) == [(str(edge), share) for edge, share in found.frequency.items()]
    assert list(found.frequency.values()) == sorted(found.frequency.values(), reverse=True) and len(found.frequency) == 3
    assert found.core(0.2).provenance["chosen_again"] == 0.2
    assert repr(found).endswith("of 50 circuits chosen again from 3 resampled prompts; 1 of 2 edges are in 95% of them")


def test_scores_that_are_the_same_on_all_prompts_choose_the_same() -> None:
    table = torch.arange(5.0)[:, None].expand(5, 4)
    found = mi.stability(effects(table), SHAPE, edges=3, seed=0, resamples=10, selection="greedy")
    assert set(found.jaccard) == {1.0} and set(found.frequency.values()) == {1.0}
    assert len(found.core(1.0)) == len(found.circuit)


def test_options() -> None:
    table = torch.tensor([[0.0] * 3, [0.0] * 3, [-9.0] * 3, [3.0, 0.0, 0.0], [1.1, 1.1, 1.1]])
    signed = mi.stability(effects(table), SHAPE, edges=1, selection="top", signed=True, resamples=50, seed=4, confidence=0.5)
    assert EDGES[2] not in signed.frequency and set(signed.frequency) == {EDGES[3], EDGES[4]}
    assert signed.confidence == signed.to_json()["confidence"] == 0.5
    wide = mi.stability(effects(table), SHAPE, edges=1, selection="top", signed=True, resamples=50, seed=4)
    assert wide.confidence == 0.95 and wide.jaccard == signed.jaccard
    assert mi.stability(effects(table), SHAPE, edges=1, selection="top", resamples=5, seed=0).circuit.edges == (EDGES[2],)


@pytest.mark.usefixtures("unchecked_types")
def test_refusals() -> None:
    with pytest.raises(MetricError, match="the scores are of one prompt, which cannot be resampled"):
        mi.stability(effects(torch.ones(5, 1)), SHAPE, edges=2, seed=0)
    with pytest.raises(MetricError, match="resamples=0: give at least 1"):
        mi.stability(effects(torch.ones(5, 2)), SHAPE, edges=2, seed=0, resamples=0)
    with pytest.raises(GraphError, match=r"there is no selection 'best'"):
        mi.stability(effects(torch.ones(5, 2)), SHAPE, edges=2, seed=0, selection="best")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="6 edges were asked for, and only 5 have a score"):
        mi.stability(effects(torch.ones(5, 2)), SHAPE, edges=6, seed=0)
    with pytest.raises(GraphError, match=r"the scores are a GraphShape; edges come from mi.attribute"):
        mi.stability(SHAPE, SHAPE, edges=2, seed=0)  # type: ignore[arg-type]
