"""Estimates beside exact effects: numbers against scipy and by hand, planted failures, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

import mechinterp as mi
from mechinterp.errors import GraphError, MetricError

SHAPE = mi.GraphShape(n_layers=2, n_heads=4)
EDGES = mi.Circuit.full(SHAPE).edges


def effects_of(values: Tensor, edges: Any = EDGES, **provenance: Any) -> mi.Effects:
    """Effects over edges, from a number for each edge and prompt."""
    labels = tuple(tuple(edge) for edge in edges[: len(values)])
    origin = {"model": "m", "task": "t", "metric": "logit_diff", "direction": "noise", "normalized": True, "forwards": 4}
    return mi.Effects("x", ("edge",), {"edge": labels}, values, {"clean": 1.0, "corrupt": 0.0}, origin | provenance)


def agreement_of(estimate: Tensor, exact: Tensor, **more: Any) -> mi.Agreement:
    """From ``[edge batch]`` numbers, as if they had been measured."""
    measured = effects_of(exact)
    return mi.Agreement(
        edges=tuple(mi.Edge(*label) for label in measured.coords["edge"]),  # type: ignore[misc]
        estimate=estimate.mean(-1),
        exact=measured,
        chosen="all of them",
        scored=len(estimate),
        top=(10,),
        rounding=1e-5,
        parts=estimate,
        provenance={"model": "m", "task": "t", "metric": "logit_diff", "direction": "noise", "estimator": "EAP", "seed": 0}
        | more,
    )


def drawn(n: int, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(n, batch, generator=generator) * torch.logspace(-4, 0, n)[:, None]
    return exact + 0.3 * torch.randn(n, batch, generator=generator) * exact.abs().mean(-1, keepdim=True), exact


@pytest.mark.parametrize("rounded", [False, True], ids=["all different", "ties"])
def test_correlations_are_those_of_scipy(rounded: bool) -> None:
    estimate, exact = drawn(40)
    if rounded:
        estimate, exact = (torch.round(values.mean(-1, keepdim=True), decimals=2) for values in (estimate, exact))
    found = agreement_of(estimate, exact)
    a, b = estimate.mean(-1).numpy(), exact.mean(-1).numpy()
    assert found.spearman == pytest.approx(spearmanr(a, b).statistic, abs=1e-6)
    assert found.spearman_abs == pytest.approx(spearmanr(abs(a), abs(b)).statistic, abs=1e-6)
    assert found.pearson == pytest.approx(pearsonr(a, b).statistic, abs=1e-6)
    assert found.pearson_abs == pytest.approx(pearsonr(abs(a), abs(b)).statistic, abs=1e-6)


def test_four_edges_by_hand() -> None:
    exact = torch.tensor([[1.0, 3.0], [-0.5, -0.5], [0.0625, 0.0625], [0.0, 0.0]])
    estimate = torch.tensor([[1.5, 1.5], [-0.25, -0.25], [-0.0625, -0.0625], [0.75, -0.25]])
    found = agreement_of(estimate, exact)
    assert found.error.tolist() == [-0.5, 0.25, -0.125, 0.25]
    # Ranks 4 1 2 3 and 4 1 3 2.
    assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert found.spearman_abs == pytest.approx(3 / math.sqrt(4.5 * 5))
    # The last has no sign to agree with.
    assert found.beyond_rounding.tolist() == [True, True, True, False]
    assert found.sign_agreement == pytest.approx(2 / 3)
    # The two strongest: of the exact ones 0 and 1, of the estimates 0 and (first of two equal ones) 1.
    assert [found.overlap(k) for k in (1, 2, 3, 4)] == [1.0, 1.0, pytest.approx(2 / 3), 1.0]
    assert [(row.low, row.high, row.n, row.exact, row.error) for row in found.by_magnitude] == [
        (1.0, 10.0, 1, 2.0, 0.5),
        (0.1, 1.0, 1, 0.5, 0.25),
        (0.01, 0.1, 1, 0.0625, 0.125),
        (0.0, 1e-5, 1, 0.0, 0.25),
    ]
    assert [row.ratio for row in found.by_magnitude[:3]] == [0.25, 0.5, 2.0]
    assert math.isnan(found.by_magnitude[3].ratio)
    # The tenth of four edges is one: by |exact| the first, by mean |estimate| the first too.
    assert not found.saturated.any()
    assert not found.cancelling.any()


def test_bins_hold_their_lower_end() -> None:
    exact = torch.tensor([[0.1], [0.01], [0.001], [1e-5], [0.0999]])
    found = agreement_of(exact, exact)
    assert [(row.low, row.n) for row in found.by_magnitude] == [(0.1, 1), (0.01, 2), (0.001, 1), (1e-5, 1)]
    assert sum(row.n for row in found.by_magnitude) == 5


def test_saturated_is_small_where_exact_is_among_the_largest_tenth() -> None:
    exact = torch.linspace(1, 20, 20)[:, None].repeat(1, 2)
    estimate = exact.clone()
    estimate[[3, 18, 19]] = torch.tensor([[0.0], [-0.2 * 19], [0.26 * 20]])
    found = agreement_of(estimate, exact)
    # Edge 3 is not large, edge 19 is not missed by enough.
    assert found.saturated.nonzero().flatten().tolist() == [18]
    assert not agreement_of(exact * 0, exact * 1e-9).saturated.any()


def test_cancelling_is_a_small_mean_of_large_parts() -> None:
    exact = torch.ones(20, 4)
    estimate = torch.ones(20, 4)
    estimate[2] = torch.tensor([5.0, -5.0, 4.0, -3.0])  # 1 of 17
    estimate[7] = torch.tensor([5.0, -5.0, 5.0, 5.0])  # 10 of 20
    estimate[9] = torch.tensor([0.5, -0.5, 0.5, -0.5])  # small parts
    found = agreement_of(estimate, exact)
    assert found.cancelling.nonzero().flatten().tolist() == [2]
    # One prompt, and scores without parts, have nothing to cancel.
    assert not agreement_of(estimate.mean(-1, keepdim=True), exact).cancelling.any()
    assert not replace(found, parts=None).cancelling.any()


def test_the_tenth_is_rounded_up_and_its_edges_are_named_from_the_largest_on() -> None:
    exact = torch.arange(1.0, 26.0)[:, None].repeat(1, 2)
    exact[23] *= -1
    found = agreement_of(exact * torch.tensor([1.0, -1.0]), exact)
    assert found.strongest(found.saturated) == found.strongest(found.cancelling) == [24, 23, 22]


def test_exact_scores_agree_in_everything(setting: Any) -> None:
    exact = mi.edge_effects(setting.model, setting.task)
    for sample in (None, 60):
        found = mi.compare_to_exact(exact, setting.model, setting.task, sample=sample, seed=0)
        measures = (found.spearman, found.spearman_abs, found.pearson, found.pearson_abs, found.sign_agreement)
        assert measures == pytest.approx([1.0] * 5, abs=1e-4)
        assert [found.overlap(k) for k in (1, 10, 20)] == [1.0, 1.0, 1.0]
        assert max(row.ratio for row in found.by_magnitude[:-1]) < 0.1
        assert not found.saturated.any()
        assert len(found.edges) == (sample or len(exact.values))
    assert found.chosen == "the 30 of largest |estimate|, and 30 of the rest, one from each of 30 strata by |estimate| (seed 0)"


def test_two_signs_flipped_and_one_edge_forgotten() -> None:
    toy = mi.toys.induction(n=8)
    exact = mi.edge_effects(toy.model, toy.task)
    truth = [tuple(edge) for edge in toy.truth["resample"].edges]
    place = {edge: i for i, edge in enumerate(exact.coords["edge"])}
    flipped = exact.per_example.clone()
    flipped[[place[edge] for edge in truth[:2]]] *= -1
    found = mi.compare_to_exact(replace(exact, per_example=flipped), toy.model, toy.task, sample=None, seed=0)
    beyond = int(found.beyond_rounding.sum())
    assert beyond == len(truth) == 5
    assert found.sign_agreement == pytest.approx((beyond - 2) / beyond)
    assert found.pearson_abs == pytest.approx(1.0, abs=1e-5)
    assert found.pearson < 0.9
    # A gradient that saw nothing of one edge.
    forgotten = exact.per_example.clone()
    forgotten[place[truth[-1]]] = 0.0
    found = mi.compare_to_exact(replace(exact, per_example=forgotten), toy.model, toy.task, sample=None, seed=0)
    assert [tuple(found.edges[i]) for i in found.strongest(found.saturated)] == [truth[-1]]
    assert "1 saturated (first a1.h5->logits: estimate +0.000, exact +1.000)" in repr(found)


def test_a_circuit_with_scores_is_compared_on_its_edges(setting: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, edges=12, direction="denoise", metric="prob_diff")
    found = mi.compare_to_exact(circuit, setting.model, setting.task, seed=0)
    assert set(found.edges) == set(circuit.edges)
    assert dict(zip(found.edges, found.estimate.tolist(), strict=True)) == pytest.approx(dict(circuit.scores))
    # Metric and direction are those of the scores.
    exact = mi.edge_effects(setting.model, setting.task, circuit, direction="denoise", metric="prob_diff")
    torch.testing.assert_close(found.exact.values, exact.values, atol=1e-5, rtol=0)
    assert (found.provenance["metric"], found.provenance["direction"]) == ("prob_diff", "denoise")
    assert found.provenance["estimator"] == "EAP-IG inputs, 5 midpoints"
    other = mi.compare_to_exact(circuit, setting.model, setting.task, seed=0, metric="logit_diff", direction="noise")
    assert (other.provenance["metric"], other.provenance["direction"]) == ("logit_diff", "noise")


def test_effects_keep_their_unit(setting: Any) -> None:
    scores = mi.attribute(setting.model, setting.task, unit="edge", normalize=False)
    found = mi.compare_to_exact(scores, setting.model, setting.task, edges="*->logits", seed=0)
    exact = mi.edge_effects(setting.model, setting.task, "*->logits", normalize=False)
    assert torch.equal(found.exact.values, exact.values)
    assert found.chosen == f"{len(found.edges)} edges that were asked for"
    values = scores.as_dict()
    assert found.estimate.tolist() == pytest.approx([values[tuple(edge)] for edge in found.edges])
    # Edges, and a circuit of them, are the same choice.
    for edges in (found.edges, mi.Circuit.from_edges(setting.model, found.edges)):
        again = mi.compare_to_exact(scores, setting.model, setting.task, edges=edges, seed=0)
        assert again.edges == found.edges


def test_effects_that_were_measured_before_are_not_measured_again(setting: Any) -> None:
    scores = mi.attribute(setting.model, setting.task, unit="edge")
    some = mi.edge_effects(setting.model, setting.task, "a0.h*->*|*->m1")
    fresh = mi.compare_to_exact(scores, setting.model, setting.task, edges="a0.h*->*|*->m1", seed=0)
    calls: list[Any] = []
    handle = setting.model.hf.register_forward_pre_hook(lambda *args: calls.append(args))
    try:
        found = mi.compare_to_exact(scores, setting.model, setting.task, sample=None, exact=some, seed=0)
        part = mi.compare_to_exact(scores, setting.model, setting.task, edges="*->m1", exact=some, seed=0)
    finally:
        handle.remove()
    assert not calls
    assert set(found.edges) == set(fresh.edges)
    order = [found.edges.index(edge) for edge in fresh.edges]
    assert torch.equal(found.exact.per_example[order], fresh.exact.per_example)
    assert torch.equal(found.estimate[order], fresh.estimate)
    assert found.parts is not None and fresh.parts is not None and torch.equal(found.parts[order], fresh.parts)
    assert part.edges == tuple(edge for edge in fresh.edges if edge.dst == "m1")


def test_the_sample_is_the_top_and_the_rest_at_all_magnitudes() -> None:
    toy = mi.toys.induction(n=4)
    n = len(mi.Circuit.full(toy.model).edges)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    scores = effects_of((1.0 + order)[:, None], mi.Circuit.full(toy.model).edges)
    found = mi.compare_to_exact(scores, toy.model, toy.task, sample=21, seed=0)
    by_rank = sorted(n - int(value) for value in found.estimate)
    assert by_rank[:11] == list(range(11))
    assert [(rank - 11) * 10 // (n - 11) for rank in by_rank[11:]] == list(range(10))
    again, other = (mi.compare_to_exact(scores, toy.model, toy.task, sample=21, seed=seed).edges for seed in (0, 1))
    assert again == found.edges != other
    assert found.top == (10,)
    assert mi.compare_to_exact(scores, toy.model, toy.task, sample=1, seed=0).chosen == "the 1 of largest |estimate|"


def test_headline_table_and_plain_data() -> None:
    estimate, exact = drawn(30)
    exact[-1], estimate[-1] = 2.0, torch.tensor([1.0, -1.0, 0.1])
    found = agreement_of(estimate, exact)
    lines = repr(found).split("\n")
    assert len(lines) == 5
    assert lines[0] == "Agreement: 30 of 30 edges, t on m, logit_diff (noise); EAP against exact"
    assert lines[3].endswith(f"beyond rounding; overlap among those compared: top 10: {found.overlap(10):.2f}")
    name = str(found.edges[-1])
    assert lines[4].startswith(f"  1 saturated (first {name}: estimate +0.033, exact +2.000), ")
    assert f"cancelling (first {name}" in lines[4]
    elsewhere = agreement_of(estimate, exact, scores={"model": "m", "task": "other"})
    assert repr(elsewhere).split("\n")[1] == "  compared: all of them; the scores are of other on m"
    assert lines[1] == "  compared: all of them"
    page = found._repr_html_()
    assert "30 of 30 edges" in page
    assert page.count("<tr>") == 1 + len(found.by_magnitude)
    frame = found.to_frame()
    columns = ["src", "dst", "port", "exact", "standard_error", "estimate", "error", "saturated", "cancelling"]
    assert list(frame.columns) == columns
    assert frame["error"].tolist() == pytest.approx((frame["estimate"] - frame["exact"]).tolist(), abs=1e-6)
    assert frame["saturated"].tolist() == found.saturated.tolist()
    plain = found.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["saturated"] == [name]
    assert plain["overlap"] == {"10": found.overlap(10)}
    assert plain["spearman"] == found.spearman
    # What is undefined is None.
    assert agreement_of(exact * 0, exact * 0).to_json()["pearson"] is None


def test_ranks_of_rounding_noise_are_said_to_be_that() -> None:
    toy = mi.toys.induction(n=8)
    scores = mi.attribute(toy.model, toy.task, unit="edge", steps=5)
    found = mi.compare_to_exact(scores, toy.model, toy.task, seed=0)
    # A perfect ranking by its own measure: the noise of those without an effect is what the ranks compare.
    assert mi.auroc(scores, toy.truth["resample"]) == 1.0
    assert (len(found.edges), int(found.beyond_rounding.sum()), found.top, found.mostly_rounding) == (200, 5, (10, 100), True)
    caution = (
        "  caution: 5 of 200 edges have an exact effect beyond rounding; the others rank by noise, so that the rank "
        "correlation, and the top k for any k above 5, say little"
    )
    assert repr(found).split("\n")[3] == caution and caution in found._repr_html_()
    # Instead of the top 10 and 100 the top of all that there is.
    assert "beyond rounding; overlap among those compared: top 5: 1.00\n" in repr(found)
    assert found.to_json()["overlap"] == {"5": 1.0}
    assert f"\nPearson {found.pearson:.2f}, same sign 1.00" in found.plot().axes[0].get_title()
    assert "overlap among those compared: top 4: " in repr(replace(found, top=(4, 5, 6)))
    assert list(replace(found, top=(4, 5, 6)).to_json()["overlap"]) == ["4", "5"]
    nothing = agreement_of(torch.ones(20, 1), torch.zeros(20, 1))
    assert "overlap among those compared: too few for a top\n" in repr(nothing) and "caution: 0 of 20 edges have" in repr(nothing)
    # Half of them are enough.
    estimate, exact = drawn(20)
    exact[10:] = 0.0
    exact[:10] += exact[:10].sign()
    half = agreement_of(estimate, exact)
    assert int(half.beyond_rounding.sum()) == 10 and "caution" not in repr(half) and "top 10: " in repr(half)
    assert "\nrank correlation " in half.plot().axes[0].get_title()
    exact[1:10] = 0.0
    assert "caution: 1 of 20 edges has an exact effect" in repr(agreement_of(estimate, exact))


def test_picture() -> None:
    estimate, exact = drawn(30)
    exact[-1], estimate[-1] = 2.0, torch.tensor([1.0, -1.0, 0.1])
    found = agreement_of(estimate, exact)
    (axes,) = found.plot().axes
    dots, saturated, cancelling = (collection.get_offsets() for collection in axes.collections)
    torch.testing.assert_close(torch.tensor(dots.data), torch.stack([found.exact.values, found.estimate], -1).double())
    assert saturated.tolist() == [pytest.approx([2.0, 0.1 / 3])]
    assert len(cancelling) == int(found.cancelling.sum()) >= 1
    assert str(found.edges[-1]) in [text.get_text() for text in axes.texts]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["saturated (1)", f"cancelling ({len(cancelling)})"]
    assert axes.get_xlabel() == "exact: normalised effect"
    # Nothing flagged, nothing to explain; and all zero is still a picture.
    assert agreement_of(exact, exact.abs()).plot().axes[0].get_legend() is None
    assert len(agreement_of(exact * 0, exact * 0).plot().axes[0].texts) >= 3


def entropy(logits: Tensor, task: mi.Task) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def test_a_metric_of_your_own_is_passed_again(setting: Any) -> None:
    scores = mi.attribute(setting.model, setting.task, unit="edge", metric=entropy)
    with pytest.raises(MetricError, match="the scores are of the metric 'entropy', which has no name here: pass it as metric="):
        mi.compare_to_exact(scores, setting.model, setting.task, seed=0)
    assert (
        mi.compare_to_exact(scores, setting.model, setting.task, sample=4, seed=0, metric=entropy).provenance["metric"]
        == "entropy"
    )


REFUSED: dict[str, tuple[Callable[[Any, mi.Effects], Any], type[Exception], str]] = {
    "nodes": (
        lambda s, scores: mi.compare_to_exact(mi.attribute(s.model, s.task), s.model, s.task, seed=0),
        GraphError,
        "these effects are over ('node',); edges come from mi.attribute(model, task, unit='edge')",
    ),
    "no scores": (
        lambda s, scores: mi.compare_to_exact(mi.toys.induction().truth["resample"], s.model, s.task, seed=0),
        GraphError,
        "has no scores to compare; mi.discover and mi.attribute(unit='edge') give them",
    ),
    "another graph": (
        lambda s, scores: mi.compare_to_exact(effects_of(torch.ones(len(DEEP), 1), DEEP), s.model, s.task, seed=0),
        GraphError,
        "has a score, and the graph of tiny-gpt2-1 has no such edge: these are scores of another model (m)",
    ),
    "undefined": (
        lambda s, scores: mi.compare_to_exact(replace(scores, per_example=scores.per_example / 0), s.model, s.task, seed=0),
        GraphError,
        "; scores have to be finite numbers",
    ),
    "sample": (
        lambda s, scores: mi.compare_to_exact(scores, s.model, s.task, seed=0, sample=0),
        MetricError,
        "sample=0: give a number of edges from 1 on, or None for all",
    ),
    "top": (
        lambda s, scores: mi.compare_to_exact(scores, s.model, s.task, seed=0, top=(10, -1)),
        MetricError,
        "top=-1: give a number of edges from 1 on",
    ),
    "pattern": (
        lambda s, scores: mi.compare_to_exact(scores, s.model, s.task, seed=0, edges="*->logits | m1->m0"),
        GraphError,
        "no edge with a score is called 'm1->m0'; edges are written like 'embed->a0.h0<q>', with * for any part",
    ),
    "no such edge": (
        lambda s, scores: mi.compare_to_exact(scores, s.model, s.task, seed=0, edges=[("m1", "m0", "in")]),
        GraphError,
        "m1->m0 has no score; 110 edges have one, such as embed->a0.h0<q>",
    ),
    "no edges": (
        lambda s, scores: mi.compare_to_exact(scores, s.model, s.task, seed=0, edges=[]),
        GraphError,
        "no edges were given; 110 edges have one, such as embed->a0.h0<q>",
    ),
    "exact of something else": (
        lambda s, scores: mi.compare_to_exact(
            scores, s.model, s.task, seed=0, exact=mi.edge_effects(s.model, s.task, "*->m1", direction="denoise")
        ),
        MetricError,
        "exact= was measured with direction 'denoise', and the comparison needs 'noise'; measure again with mi.edge_effects, "
        "or leave exact= out",
    ),
    "too many": (
        lambda s, scores: mi.compare_to_exact(scores, s.model, s.task, seed=0, sample=20).overlap(21),
        MetricError,
        "the overlap of the top 21 was asked for, and 20 edges were compared; choose a smaller k, or compare more: "
        "compare_to_exact(..., sample=...), sample=None for all",
    ),
}
DEEP = mi.Circuit.full(mi.GraphShape(n_layers=4, n_heads=4)).edges


@pytest.mark.parametrize("case", REFUSED)
def test_messages(settings: dict[str, Any], case: str) -> None:
    setting = settings["gpt2"]
    call, error, message = REFUSED[case]
    scores = mi.attribute(setting.model, setting.task, unit="edge")
    with pytest.raises(error, match=re.escape(message)):
        call(setting, scores)
