"""Circuits whose edges carry at some spans alone: run, scored, chosen and judged, against a transformer written out by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.discovery.methods import METHODS
from mechinterp.errors import GraphError, MechInterpError, TaskError
from mechinterp.graph import best_pairs, connected_edges_of, random_pairs, scored_edges
from tests.core.conftest import ARCHITECTURES, module_of
from tests.reference import Intervention, Reference

NOT_X = {"..x": None, "x..": None}


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
    assert (
        not 0.01 < share < 0.99
        or (found - mi.run_circuits(setting.model, named, [each.everywhere() for each in circuits]).circuits).abs().max() > 1e-3
    )


def test_few_pairs_and_all_but_few_equal_a_brute_force(setting: Any, named: mi.Task) -> None:
    """What is missed is summed over what is cut, or over what is kept, whichever is shorter."""
    model, names, shape = setting.model, named.spans.names, mi.GraphShape.of(setting.model)
    values = shape.kv_node("a0.h0") or "a0.h0"
    path = {
        mi.Edge("embed", values, "v"): ("changed", "late"),
        mi.Edge("a0.h0", "m1", "in"): ("late", "late.."),
        mi.Edge("m1", "logits", "in"): ("late", "late.."),
        mi.Edge("a0.h0", "logits", "in"): ("changed..late", "late.."),
    }
    few = mi.Circuit(shape, dict.fromkeys(path), spans={edge: dict.fromkeys(at) for edge, at in path.items()})
    most = replace(mi.Circuit.full(model), spans={edge: dict.fromkeys(set(names) - set(at)) for edge, at in path.items()})
    for circuit in (few, most):
        runs = mi.run_circuits(model, named, circuit)
        torch.testing.assert_close(runs.circuits[0].double(), by_hand(setting.reference, named, circuit), atol=2e-5, rtol=0)
        assert all((runs.circuits[0] - end).abs().max() > 1e-4 for end in (runs.clean, runs.corrupt))


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_every_architecture(architecture: str) -> None:
    model = mi.load(module_of(architecture))
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(1, 40, (2, 3, 7), generator=generator)
    corrupt[:, :2] = clean[:, :2]
    task = mi.Task(name="random", clean=clean, corrupt=corrupt, right=[3, 9, 27], wrong=[8, 5, 33], positions={"x": [2, 3, 4]})
    some = drawn(model, task.spans.names, 0.5, 0)
    whole = replace(some, spans={edge: dict.fromkeys(task.spans.names) for edge in some})
    alone = [edge for edge in scored_edges(model) if some.spans.get(edge, {}).keys() == {"x"}]
    runs = mi.run_circuits(
        model, task, [whole, some.everywhere(), *(replace(mi.Circuit.full(model), spans={edge: NOT_X}) for edge in alone[:4])]
    )
    torch.testing.assert_close(runs.circuits[0], runs.circuits[1], atol=3e-5, rtol=0)
    # One edge cut at one span is what its exact effect there is.
    effects = mi.edge_effects(model, task, alone[:4], over=("span",), normalize=False)
    torch.testing.assert_close(runs.circuits[2:] - runs.clean, effects.per_example[:, 1], atol=3e-5, rtol=0)
    assert effects.per_example[:, 1].abs().max() > 1e-4


def unequal(task: mi.Task) -> mi.Task:
    """Prompts of 8, 6, 7 tokens, the rest of a row padding."""
    lengths = torch.tensor([8, 6, 7])
    where = {"changed": [2, 3, 2], "late": [5, 4, 6]}
    mask = torch.arange(8) < lengths[:, None]
    some = task[[0, 1, 2]]
    return mi.Task("unequal", some.clean, some.corrupt, some.right, some.wrong, mask=mask, positions=where)


def test_prompts_of_unequal_length_are_their_rows_one_by_one(setting: Any) -> None:
    model, task = setting.model, unequal(setting.task)
    assert (
        repr(task.spans)
        == "Spans: ..changed (2 to 3 tokens), changed, changed..late (0 to 3 tokens), late, late.. (0 to 2 tokens)"
    )
    circuits = [drawn(model, task.spans.names, 0.6, seed) for seed in range(3)]
    runs = mi.run_circuits(model, task, circuits).circuits
    options: dict[str, Any] = {"over": ("span",), "normalize": False}
    scores = mi.attribute(model, task, unit="edge", steps=2, **options).per_example
    exact = mi.edge_effects(model, task, "embed->*", **options).per_example
    for row, length in enumerate(task.lengths.tolist()):
        one = task[row]
        at = {name: int(where) for name, where in one.positions.items()}
        short = mi.Task("one", one.clean[:, :length], one.corrupt[:, :length], one.right, one.wrong, positions=at)
        assert short.spans.names == task.spans.names
        torch.testing.assert_close(mi.run_circuits(model, short, circuits).circuits[:, 0], runs[:, row], atol=2e-5, rtol=0)
        alone = mi.attribute(model, short, unit="edge", steps=2, **options).per_example[..., 0]
        torch.testing.assert_close(alone, scores[..., row], atol=2e-6, rtol=1e-4)
        alone = mi.edge_effects(model, short, "embed->*", **options).per_example[..., 0]
        torch.testing.assert_close(alone, exact[..., row], atol=2e-5, rtol=0)


# -- scores


def test_estimates_are_slopes_at_each_span_and_sum_to_those_of_edges(setting: Any, named: mi.Task) -> None:
    model, reference = setting.model, setting.reference
    found = mi.attribute(model, named, unit="edge", over=("span",), normalize=False)
    assert found.axes == ("edge", "span") and found.coords["span"] == named.spans.names
    whole = mi.attribute(model, named, unit="edge", normalize=False)
    torch.testing.assert_close(found.per_example.sum(dim=1), whole.per_example, atol=1e-6, rtol=1e-4)
    edges = random.Random(0).sample(list(enumerate(reference.edges)), 12)
    order = {tuple(label): i for i, label in enumerate(found.coords["edge"])}  # type: ignore[arg-type]
    for span in (1, 2, 3):
        slopes = reference.slopes(named, [edge for _, edge in edges], where=(named.spans.index == span).double())
        for edge, slope in slopes.items():
            torch.testing.assert_close(found.per_example[order[edge], span].double(), slope, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3},
        {"steps": (0.0, 1.0)},
        {"steps": 2, "path": "activations"},
        {"steps": 1, "direction": "denoise"},
        {"rules": "relp"},
    ],
    ids=str,
)
def test_all_estimates_sum_over_spans_to_those_of_edges(setting: Any, named: mi.Task, options: dict[str, Any]) -> None:
    options = options | {"normalize": False}
    split = mi.attribute(setting.model, named, unit="edge", over=("span",), memory=1 << 18, **options)
    whole = mi.attribute(setting.model, named, unit="edge", **options)
    torch.testing.assert_close(split.per_example.sum(dim=1), whole.per_example, atol=1e-5, rtol=1e-4)
    assert split.provenance.get("completeness_error") == pytest.approx(whole.provenance.get("completeness_error"), abs=1e-5)


def test_exact_effects_equal_a_brute_force(setting: Any, named: mi.Task) -> None:
    model, reference = setting.model, setting.reference
    edges = random.Random(1).sample(scored_edges(model), 15)
    found = mi.edge_effects(model, named, edges, over=("span",), normalize=False)
    instead, clean = reference.run(named.corrupt)[1], reference.metric(named)
    for label, effects in zip(found.coords["edge"], found.per_example, strict=True):
        for span in range(5):
            where = (named.spans.index == span).double()
            expected = reference.metric(named, Intervention(cut={label: where}, instead=instead)) - clean  # type: ignore[dict-item]
            torch.testing.assert_close(effects[span].double(), expected, atol=2e-5, rtol=0)


# -- choosing


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.spans and name != "relp"])
def test_of_an_induction_head_the_edges_matter_where_they_were_planted(method: str) -> None:
    toy = mi.toys.induction()
    circuit = mi.discover(toy.model, toy.task, method=method, edges=5, positions=True)
    planted = {
        "embed->a0.h3<v>": "earlier",
        "embed->a1.h5<q>": "end",
        "a0.h3->a1.h5<k>": "target",
        "embed->a1.h5<v>": "target",
        "a1.h5->logits": "end",
    }
    assert {str(edge): tuple(spans) for edge, spans in circuit.spans.items()} == {edge: (span,) for edge, span in planted.items()}
    assert circuit.everywhere().iou(toy.truth["resample"]) == 1.0
    assert circuit.n_pairs == len(circuit) == circuit.n_connected == 5
    runs = mi.run_circuits(toy.model, toy.task, circuit)
    torch.testing.assert_close(runs.circuits[0], runs.clean, atol=2e-3, rtol=0)


def test_exact_values_at_each_position_of_an_induction_head() -> None:
    toy = mi.toys.induction()
    found = mi.edge_effects(toy.model, toy.task, toy.truth["resample"], over=("span",))
    assert (
        found.coords["span"]
        == toy.task.spans.names
        == ("..earlier", "earlier", "earlier..target", "target", "target..end", "end", "end..")
    )
    whole = mi.edge_effects(toy.model, toy.task, toy.truth["resample"]).values
    where = {
        ("embed", "a0.h3"): 1,
        ("embed", "a1.h5", "q"): 5,
        ("a0.h3", "a1.h5"): 3,
        ("embed", "a1.h5", "v"): 3,
        ("a1.h5", "logits"): 5,
    }
    for label, values, total in zip(found.coords["edge"], found.values, whole, strict=True):
        column = next(at for edge, at in where.items() if tuple(label)[: len(edge)] == edge)  # type: ignore[arg-type]
        # All of the edge's effect is at one span, and nothing at any other.
        expected = torch.zeros(7).index_fill(0, torch.tensor([column]), float(total))
        torch.testing.assert_close(values, expected, atol=5e-4, rtol=0)
        assert float(total) > 0.4


@pytest.mark.parametrize("seed", range(20))
def test_pairs_are_the_best_that_connect(seed: int) -> None:
    shape = mi.GraphShape(n_layers=2, n_heads=2, n_kv_heads=1 + seed % 2)
    generator = random.Random(seed)
    scores = {edge: {span: generator.gauss(0, 1) for span in "abc"} for edge in scored_edges(shape)}
    for n in (1, 5, 20):
        circuit = best_pairs(shape, scores, n=n)
        said = circuit.provenance["selection"]
        assert circuit.n_connected == len(circuit) and circuit.n_pairs >= n
        assert all(circuit.scores[edge] == pytest.approx(sum(spans.values())) for edge, spans in circuit.spans.items())  # type: ignore[arg-type]
        ranked = sorted(((abs(s), e, span) for e, at in scores.items() for span, s in at.items()), reverse=True)
        taken = ranked[: said["taken"]]
        # Nothing else than pairs of that beginning of the ranking, which is the shortest whose edges connect so many.
        assert {(edge, span) for edge, spans in circuit.spans.items() for span in spans} <= {pair[1:] for pair in taken}
        for beginning, enough in ((taken, True), (taken[:-1], False)):
            live = set(connected_edges_of(shape, {edge for _, edge, _ in beginning}))
            assert (sum(edge in live for _, edge, _ in beginning) >= n) == enough
        top = best_pairs(shape, scores, n=n, rule="top")
        assert {(edge, span) for edge, spans in top.spans.items() for span in spans} == {pair[1:] for pair in ranked[:n]}
        grown = best_pairs(shape, scores, n=n, rule="greedy")
        assert grown.n_pairs == n and all(
            edge.dst == "logits" or any(e.src == edge.dst or e.src in shape.heads_of(edge.dst) for e in grown) for edge in grown
        )
    assert best_pairs(shape, scores, threshold=1.5).n_pairs == sum(pair[0] >= 1.5 for pair in ranked)


def test_pairs_by_value_by_threshold_and_as_many_as_there_are() -> None:
    shape = mi.GraphShape(n_layers=1, n_heads=1, attn_only=True)
    query, _, value, direct, out = scored_edges(shape)
    scores = {
        direct: {"a": -3.0, "b": 0.5},
        out: {"a": 2.0, "b": -1.0},
        value: {"a": 0.1, "b": -0.2},
        query: {"a": 0.0, "b": 0.0},
    }

    def kept(**options: Any) -> dict[mi.Edge, set[str]]:
        return {edge: set(spans) for edge, spans in best_pairs(shape, scores, **options).spans.items()}

    assert kept(n=2, rule="top") == {direct: {"a"}, out: {"a"}}
    assert kept(n=2, rule="top", signed=True) == {direct: {"b"}, out: {"a"}}
    # Of equal scores the first edge's.
    assert kept(n=7, rule="top") == {direct: {"a", "b"}, out: {"a", "b"}, value: {"a", "b"}, query: {"a"}}
    assert kept(threshold=1.0) == {direct: {"a"}, out: {"a", "b"}}
    assert kept(threshold=0.1, signed=True) == {direct: {"b"}, out: {"a"}, value: {"a"}}
    assert kept(threshold=-0.2, signed=True)[value] == {"a", "b"}
    # A path changes its span at the head: its pairs are at different ones, and both are needed.
    assert kept(n=3, signed=True) == {direct: {"b"}, out: {"a"}, value: {"a"}}
    assert best_pairs(shape, scores, rule="top").provenance["selection"]["n"] == 8
    many = {edge: {str(i): 1.0 for i in range(60)} for edge in scored_edges(shape)}
    assert best_pairs(shape, many, rule="top").n_pairs == 200


def test_discover_passes_on_how_pairs_are_chosen(setting: Any, named: mi.Task) -> None:
    effects = mi.attribute(setting.model, named, unit="edge", steps=1, over=("span",))
    spans = effects.coords["span"]
    scores = {
        mi.Edge(*edge): dict(zip(spans, row, strict=True))  # type: ignore[misc]
        for edge, row in zip(effects.coords["edge"], effects.values.tolist(), strict=True)
    }
    for options in (
        {"edges": 9, "selection": "top"},
        {"edges": 9, "selection": "greedy"},
        {"edges": 9, "selection": "connected"},
        {"edges": 9, "selection": "top", "signed": True},
        {"threshold": 0.1},
        {"threshold": 0.05, "signed": True},
    ):
        found = mi.discover(setting.model, named, steps=1, positions=True, **options)  # type: ignore[arg-type]
        rule: Any = {"rule": options.get("selection", "connected")}
        direct = best_pairs(
            setting.model,
            scores,
            n=options.get("edges"),  # type: ignore[arg-type]
            threshold=options.get("threshold"),  # type: ignore[arg-type]
            signed="signed" in options,
            **rule,
        )
        assert {edge: set(at) for edge, at in found.spans.items()} == {edge: set(at) for edge, at in direct.spans.items()}


def test_a_span_that_no_prompt_has_is_no_choice(setting: Any, named: mi.Task) -> None:
    task = replace(named, positions={"changed": named.positions["changed"], "next": named.positions["changed"] + 1})
    assert "changed..next" in task.spans.names and "changed..next" not in task.spans.filled
    whole = mi.discover(setting.model, task, steps=1, positions=True, edges=len(scored_edges(setting.model)) * 4, selection="top")
    assert whole.provenance["spans"] == ["..changed", "changed", "next", "next.."]
    assert all(tuple(at) == ("..changed", "changed", "next", "next..") for at in whole.spans.values())
    n = 4 * len(scored_edges(setting.model))
    with pytest.raises(GraphError, match=f"of which there are {n}; give 0 to {n}$"):
        mi.discover(setting.model, task, steps=1, positions=True, edges=n + 1)


def test_random_circuits_have_as_many_pairs(settings: Any, named: mi.Task) -> None:
    model = settings["gpt2"].model
    like, full = drawn(model, named.spans.names, 0.1, 3).connected(), scored_edges(model)
    for seed in range(5):
        rival = random_pairs(like, seed=seed)
        assert (rival.n_connected, rival.n_pairs, len(rival.spans)) == (like.n_connected, like.n_pairs, len(like.spans))
        assert rival.iou(rival) == 1.0 and rival.edges != like.edges
        assert all(score is None for spans in rival.spans.values() for score in spans.values())
    # Also where the same edges are drawn, their spans are dealt out by chance, and without the scores of others.
    every = replace(mi.Circuit.full(model), spans={edge: {"changed" if i % 2 else "late": 1.0} for i, edge in enumerate(full)})
    dealt = [random_pairs(every, seed=seed) for seed in range(3)]
    assert all(each.edges == every.edges and each.n_pairs == every.n_pairs for each in dealt)
    pairs = {frozenset((edge, *spans) for edge, spans in each.spans.items()) for each in (every, *dealt)}
    assert len(pairs) == 4
    assert all(score is None for each in dealt for spans in each.spans.values() for score in spans.values())
    report = mi.evaluate(like, model, named, seed=0, random_circuits=2)
    assert report.pairs == like.n_pairs
    assert f"{like.n_pairs} connected pairs of edge and span" in repr(report)
    plain = like.everywhere()
    assert random_pairs(plain, seed=0) == mi.random_edges(plain, seed=0)
    assert mi.evaluate(plain, model, named, seed=0, random_circuits=0).pairs is None


def test_taking_edges_away_keeps_the_spans_of_the_others(setting: Any, named: mi.Task) -> None:
    circuit = drawn(setting.model, named.spans.names, 0.7, 4)
    edge = circuit.connected().edges[3]
    drops = mi.minimality(circuit, setting.model, named, sample=4, seed=0)
    runs = mi.run_circuits(setting.model, named, [circuit, circuit.only(e for e in circuit if e != edge)])
    [found] = mi.minimality(circuit.only(circuit.connected()), setting.model, named).per_example[[3]]
    kept = mi.run_circuits(
        setting.model, named, [circuit.connected(), circuit.connected().only(e for e in circuit.connected() if e != edge)]
    )
    gap = (runs.clean - runs.empty).mean()
    torch.testing.assert_close(found, (kept.circuits[0] - kept.circuits[1]) / gap, atol=1e-5, rtol=0)
    assert len(drops.coords["edge"]) == 4


# -- messages


@pytest.mark.usefixtures("unchecked_types")
def test_messages(setting: Any, named: mi.Task) -> None:
    model = setting.model
    n = 5 * len(scored_edges(model))
    circuit = mi.Circuit(
        mi.GraphShape.of(model), {mi.Edge("embed", "logits", "in"): None}, spans={mi.Edge("embed", "logits", "in"): {"end": None}}
    )
    everywhere = (
        "knows edges at all positions alone, and 1 edge of this circuit carries at some spans. "
        "For the bare edges: circuit.everywhere()."
    )
    cases: list[tuple[Any, type[MechInterpError], str]] = [
        (
            lambda: mi.discover(model, named, method="acdc", positions=True),
            GraphError,
            "the method 'acdc' scores edges at all positions together; for positions=True there are 'eap', 'eap-ig', "
            "'clean-corrupt', 'eap-ig-activations', 'relp', 'exact'",
        ),
        (
            lambda: mi.discover(model, named, unit="node", positions=True),
            GraphError,
            "positions=True chooses edges at spans of the prompts; leave out unit='node', or positions=True",
        ),
        (
            lambda: mi.discover(model, named, edges=n + 1, positions=True),
            GraphError,
            f"edges={n + 1}: with positions=True these are pairs of an edge and a span, of which there are {n}; give 0 to {n}",
        ),
        (
            lambda: mi.run_circuits(model, named, circuit),
            TaskError,
            "the prompts have no span 'end'; there are '..changed', 'changed', 'changed..late', 'late', 'late..'",
        ),
        (
            lambda: mi.attribute(model, named, unit="edge", over=("pos",)),
            MechInterpError,
            "over=('pos',): scores of edges can be split by ('span',), or not at all",
        ),
        (
            lambda: mi.attribute(model, named, unit="edge", rules="atp-star", over=("span",)),
            MechInterpError,
            "rules='atp-star' has no scores for each position, so over=('span',) goes with 'gradient' or 'relp'",
        ),
        (lambda: mi.evaluate(circuit, model, named, seed=0, thorough=True), GraphError, f"thorough=True {everywhere}"),
        (lambda: mi.check_hypotheses(circuit, model, named, seed=0), GraphError, f"mi.check_hypotheses {everywhere}"),
        (lambda: mi.save_mib(circuit, "x.json", d_model=8), GraphError, f"A MIB file {everywhere}"),
        (lambda: mi.edge_effects(model, named, circuit), GraphError, f"A choice of edges to measure {everywhere}"),
        (lambda: mi.size_curve(circuit, model, named), GraphError, f"A ranking of edges {everywhere}"),
        (lambda: mi.auroc(circuit, circuit.everywhere()), GraphError, f"A ranking of edges {everywhere}"),
        (lambda: mi.auroc({}, circuit), GraphError, f"mi.auroc {everywhere}"),
        (lambda: mi.compare_to_known(circuit.everywhere(), circuit), GraphError, f"mi.compare_to_known {everywhere}"),
        (
            lambda: best_pairs(model, {}, n=1),
            GraphError,
            "n=1 pairs of an edge and a span: 0 have a score. Give 0 to 0.",
        ),
        (
            lambda: best_pairs(model, {}, n=True),
            GraphError,
            "n=True pairs of an edge and a span: 0 have a score. Give 0 to 0.",
        ),
        (
            lambda: best_pairs(model, {}, n=0, rule="best"),
            GraphError,
            "There is no rule 'best'. There are: connected, top, greedy.",
        ),  # type: ignore[arg-type]
        (
            lambda: best_pairs(model, {}, threshold=-1.0),
            GraphError,
            "threshold=-1.0 is below every absolute score, so that all edges would be kept; give one from 0 on, or rank by value "
            "with signed=True",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message
