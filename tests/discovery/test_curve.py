"""Faithfulness over size: areas by hand, and sizes that are those of networkx."""

from __future__ import annotations

import json
from typing import Any

import networkx as nx
import pytest
import torch

import mechinterp as mi
from mechinterp.discovery.curve import MIB_FRACTIONS, SizeCurve
from mechinterp.discovery.faithfulness import interval_of, mean_of_ratios
from mechinterp.errors import GraphError, MetricError

ORIGIN = {"task": "t", "model": "m", "ablation": "resample", "selection": "top"}


def by_hand(fractions: tuple[float, ...], connected: tuple[int, ...], values: list[float]) -> SizeCurve:
    """A curve with these faithfulnesses, of a graph of 100 edges."""
    clean, empty = torch.tensor([3.0, 5.0]), torch.tensor([1.0, -1.0])
    circuits = empty + torch.tensor(values)[:, None] * (clean - empty)
    asked = tuple(int(100 * share) for share in fractions)
    return SizeCurve(fractions, asked, connected, 100, circuits, clean, empty, (0.5,) * len(values), ORIGIN)


def test_areas_on_four_points_by_hand() -> None:
    curve = by_hand((0.1, 0.2, 0.5, 1.0), (0, 10, 40, 100), [0.0, 0.5, 1.4, 1.0])
    assert curve.faithfulness.tolist() == pytest.approx([0.0, 0.5, 1.4, 1.0])
    # Widths 0.1, 0.3, 0.5; heights the means of neighbours; distances from 1 are 1, 0.5, 0.4, 0.
    assert curve.cpr == pytest.approx(0.1 * 0.25 + 0.3 * 0.95 + 0.5 * 1.2)
    assert curve.cmd == pytest.approx(0.1 * 0.75 + 0.3 * 0.45 + 0.5 * 0.2)
    # On connected shares 0, 0, .1, .4, 1 the curve begins at no edges and 0: widths 0, 0.1, 0.3, 0.6.
    assert curve.area("connected") == (
        pytest.approx(0.1 * 0.25 + 0.3 * 0.95 + 0.6 * 1.2),
        pytest.approx(0.1 * 0.75 + 0.3 * 0.45 + 0.6 * 0.2),
    )
    assert curve.complete
    assert "CPR 0.910, CMD 0.310 over edges asked for (top)\n" in repr(curve)


def test_over_connected_edges_a_curve_begins_at_none() -> None:
    curve = by_hand((0.5, 1.0), (40, 100), [0.5, 1.0])
    assert curve.area("connected") == (pytest.approx(0.4 * 0.25 + 0.6 * 0.75), pytest.approx(0.4 * 0.75 + 0.6 * 0.25))
    assert curve.area() == (pytest.approx(0.5 * 0.75), pytest.approx(0.5 * 0.25))


def test_intervals_draw_prompts_with_their_own_ends() -> None:
    """Prompts of very different size, all with the same ratio: whichever are drawn, it is that."""
    clean, empty = torch.tensor([1.0, 10.0, 100.0, 3.0]), torch.tensor([0.0, 2.0, -50.0, 1.0])
    circuits = torch.stack([empty + 0.3 * (clean - empty), empty])
    curve = SizeCurve((0.5, 1.0), (50, 100), (50, 100), 100, circuits, clean, empty, (1.0, 1.0), ORIGIN)
    for ends, expected in zip(zip(*curve.interval(seed=0), strict=True), (0.3, 0.0), strict=True):
        assert [float(end) for end in ends] == pytest.approx([expected] * 2, abs=1e-5)


def test_each_size_is_told_once() -> None:
    curve = by_hand((0.001, 0.002, 0.005, 0.2, 1.0), (0, 0, 0, 20, 100), [0.0, 0.0, 0.0, 0.5, 1.0])
    assert repr(curve).splitlines()[-1] == "  faithfulness by connected edges of 100: 0: 0.000, 20: 0.500, 100: 1.000"


def test_a_curve_that_ends_early_says_so() -> None:
    curve = by_hand((0.1, 0.2), (10, 20), [0.5, 0.5])
    assert not curve.complete
    assert curve.cpr == pytest.approx(0.05)
    assert "; up to 0.2 of the edges, so not comparable with whole curves" in repr(curve)


def test_the_two_means_differ() -> None:
    """A ratio of means weighs prompts by their difference, a mean of ratios does not; neither is clamped."""
    clean, empty = torch.tensor([1.0, 9.0]), torch.tensor([0.0, 0.0])
    curve = SizeCurve((1.0,), (100,), (100,), 100, torch.tensor([[-2.0, 18.0]]), clean, empty, (1.0,), ORIGIN)
    assert curve.faithfulness.tolist() == pytest.approx([1.6])
    assert curve.mean_of_ratios.tolist() == pytest.approx([0.0])


def test_what_is_undefined_counts_for_nothing() -> None:
    circuit, clean, empty = (
        torch.tensor([1.0, 5.0, 0.0, 3.0]),
        torch.tensor([2.0, 1.0, 1.0, 4.0]),
        torch.tensor([0.0, 1.0, 1.0, 0.0]),
    )
    # 1/2, 4/0 and -1/0 and 3/4.
    assert mean_of_ratios(circuit, clean, empty) == pytest.approx(0.625)
    drawn = torch.cat([torch.linspace(0, 1, 101), torch.tensor([torch.nan, torch.inf])])
    assert interval_of(drawn, 0.9) == (pytest.approx(0.05), pytest.approx(0.95))


def mib_of(scores: mi.Effects, setting: Any) -> tuple[list[float], float, float]:
    """The benchmark's own arithmetic: int(share * edges) best by absolute value, pruned, areas over the shares."""
    known = scores.as_dict()
    ranked = sorted(known, key=lambda edge: -abs(known[edge]))
    sizes = [int(share * len(known)) for share in MIB_FRACTIONS]
    circuits = [mi.Circuit.from_edges(setting.model, ranked[:n]).connected() for n in sizes]
    runs = mi.run_circuits(setting.model, setting.task, circuits)
    low, high = runs.corrupt.mean().item(), runs.clean.mean().item()
    f = [(m - low) / (high - low) for m in runs.circuits.mean(dim=1).tolist()]
    under = away = 0.0
    for i in range(len(f) - 1):
        width = MIB_FRACTIONS[i + 1] - MIB_FRACTIONS[i]
        under += width * (f[i] + f[i + 1]) / 2
        away += width * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
    return f, under, away


def test_the_benchmark_s_numbers(setting: Any) -> None:
    scores = mi.attribute(setting.model, setting.task, unit="edge", steps=3)
    curve = mi.size_curve(scores, setting.model, setting.task)
    f, cpr, cmd = mib_of(scores, setting)
    assert curve.fractions == MIB_FRACTIONS
    assert curve.faithfulness.tolist() == pytest.approx(f, abs=1e-4)
    assert (curve.cpr, curve.cmd) == (pytest.approx(cpr, abs=1e-4), pytest.approx(cmd, abs=1e-4))
    assert curve.faithfulness[-1].item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("selection", ["top", "greedy", "connected"])
def test_sizes_are_those_of_networkx(setting: Any, selection: Any) -> None:
    """Best-scored edges alone leave some that lead nowhere: both numbers are told, the second as networkx counts it."""
    scores = mi.attribute(setting.model, setting.task, unit="edge", steps=2)
    known = {mi.Edge(*edge): score for edge, score in scores.as_dict().items()}  # type: ignore[misc]
    curve = mi.size_curve(scores, setting.model, setting.task, edges=[8, 20, 45], selection=selection)
    rules = {"top": "top_edges", "greedy": "greedy_edges", "connected": "connected_edges"}
    import mechinterp.graph as graph

    for asked, connected in zip(curve.asked, curve.connected, strict=True):
        chosen = getattr(graph, rules[selection])(setting.model, known, asked).graph
        reached = nx.descendants(chosen, "embed") | {"embed"}
        back = nx.ancestors(chosen, "logits") | {"logits"}
        live = [e for e in chosen.edges(data="kind") if e[2] == "scored" and e[0] in reached and e[1] in back]
        assert connected == len(live)
    assert curve.asked == (8, 20, 45)
    if selection == "top":
        assert curve.connected[0] < 8
    if selection == "connected":
        assert all(there >= wanted for there, wanted in zip(curve.connected, curve.asked, strict=True))


def test_a_circuit_s_own_scores_reach_so_far(setting: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, edges=20)
    curve = mi.size_curve(circuit, setting.model, setting.task)
    assert curve.asked[-1] == len(circuit) and not curve.complete
    assert curve.fractions[-1] == pytest.approx(len(circuit) / circuit.shape.n_edges)
    alone = mi.evaluate(circuit, setting.model, setting.task, seed=0, random_circuits=0)
    assert curve.faithfulness[-1].item() == pytest.approx(alone.faithfulness, abs=1e-4)
    with pytest.raises(
        GraphError, match=r"edges were asked for, and only 20 of \d+ have a score; ask for fewer, or give the scores"
    ):
        mi.size_curve(circuit, setting.model, setting.task, edges=[30])


def test_a_circuit_of_just_a_share_has_that_size_once(setting: Any) -> None:
    every = mi.GraphShape.of(setting.model).n_edges
    circuit = mi.discover(setting.model, setting.task, edges=int(0.2 * every), steps=1, selection="top")
    curve = mi.size_curve(circuit, setting.model, setting.task)
    assert curve.asked[-1] == len(circuit) == int(0.2 * every) and curve.asked.count(len(circuit)) == 1
    assert curve.fractions[-2:] == (0.1, len(circuit) / every)


def test_edges_by_value(setting: Any) -> None:
    scores = mi.attribute(setting.model, setting.task, unit="edge", steps=2)
    known = {mi.Edge(*edge): score for edge, score in scores.as_dict().items()}  # type: ignore[misc]
    chosen = [mi.graph.top_edges(setting.model, known, 40, signed=signed) for signed in (False, True)]
    runs = mi.run_circuits(setting.model, setting.task, chosen).circuits
    assert (runs[0] - runs[1]).abs().max() > 1e-3
    for signed, row in zip((False, True), runs, strict=True):
        curve = mi.size_curve(scores, setting.model, setting.task, edges=[40], signed=signed)
        torch.testing.assert_close(curve.circuits[0], row, atol=1e-5, rtol=0)
        assert curve.provenance["selection"] == ("top, signed" if signed else "top")


def test_other_ablations_and_metrics(setting: Any) -> None:
    scores = mi.attribute(setting.model, setting.task, unit="edge", steps=2)
    curve = mi.size_curve(scores, setting.model, setting.task, edges=[0, 30], ablation="zero", metric="prob_diff")
    assert curve.provenance["ablation"] == "zero" and curve.provenance["metric"] == "prob_diff"
    assert curve.faithfulness[0].item() == pytest.approx(0.0, abs=1e-5)


def test_it_travels_and_is_drawn(setting: Any) -> None:
    scores = mi.attribute(setting.model, setting.task, unit="edge", steps=2)
    curve = mi.size_curve(scores, setting.model, setting.task, edges=[0, 10, 40])
    plain = curve.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["cpr"] == curve.cpr and plain["connected"] == list(curve.connected)
    (axes,) = curve.plot().axes
    line = axes.lines[0]
    # No edge at all is not on a logarithmic axis.
    assert list(line.get_xdata()) == [n for n in curve.connected if n]
    assert "<table>" in curve._repr_html_()
    low, high = curve.interval(seed=0)
    assert (low <= curve.faithfulness + 1e-5).all() and (high >= curve.faithfulness - 1e-5).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"edges": [3, 2]}, r"sizes \[3, 2\] of \d+ edges: give one or more, increasing, between none and all of them"),
        ({"edges": []}, r"sizes \[\] of"),
        ({"fractions": [0.5, 2.0]}, "give one or more, increasing"),
        ({"fractions": [0.5], "edges": [3]}, "fractions= and edges= are two ways to give sizes; give one of them"),
    ],
)
def test_refusals(setting: Any, options: dict[str, Any], says: str) -> None:
    scores = mi.attribute(setting.model, setting.task, unit="edge", steps=1)
    with pytest.raises(GraphError, match=says):
        mi.size_curve(scores, setting.model, setting.task, **options)


@pytest.mark.usefixtures("unchecked_types")
def test_an_unknown_word(setting: Any) -> None:
    curve = by_hand((0.1, 0.2), (10, 20), [0.5, 0.5])
    with pytest.raises(GraphError, match=r"there is no axis 'conected' of sizes. Did you mean 'connected'\?"):
        curve.area("conected")  # type: ignore[arg-type]
    scores = mi.attribute(setting.model, setting.task, unit="edge", steps=1)
    with pytest.raises(GraphError, match=r"there is no selection 'tops'. Did you mean 'top'\?"):
        mi.size_curve(scores, setting.model, setting.task, selection="tops")  # type: ignore[arg-type]


def test_no_difference_no_curve(setting: Any) -> None:
    scores = mi.attribute(setting.model, setting.task, unit="edge", steps=1)
    task = setting.task
    same = mi.Task(name="same", clean=task.clean, corrupt=task.clean, right=task.right, wrong=task.wrong)
    with pytest.raises(MetricError, match="faithfulness is undefined"):
        mi.size_curve(scores, setting.model, same, edges=[5])
