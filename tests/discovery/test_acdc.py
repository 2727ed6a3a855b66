"""ACDC: the plain loop edge by edge, another project's runs, the planted circuits, and far fewer calls."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import GraphError
from tests.oracles import published
from tests.reference import Intervention

Edge = tuple[str, str, str]


def naive(setting: Any, order: list[Edge], tau: float, signed: bool) -> tuple[dict[Edge, float], float]:
    """The loop of the paper on the transformer written out by hand; and how close any test came to the threshold."""
    reference, task = setting.reference, setting.task
    instead = reference.run(task.corrupt)[1]
    clean, corrupt = (float(reference.metric(task, tokens=tokens).mean()) for tokens in (task.clean, task.corrupt))
    removed: set[Edge] = set()
    kept, before, margin = {}, clean, 1.0
    for edge in order:
        now = float(reference.metric(task, Intervention(cut=removed | {edge}, instead=instead)).mean())
        move = (now - before) / (corrupt - clean)
        size = move if signed else abs(move)
        margin = min(margin, abs(size - tau))
        if size < tau:
            removed.add(edge)
            before = now
        else:
            kept[edge] = move
    return kept, margin


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("tau", [0.15, 0.6])
def test_is_the_plain_loop(setting: Any, signed: bool, tau: float) -> None:
    order = [tuple(edge) for edge in reversed(mi.Circuit.full(setting.model).edges)]
    expected, margin = naive(setting, order, tau, signed)  # type: ignore[arg-type]
    assert margin > 1e-6
    for ahead in (None, 1) if tau == 0.6 else (None,):
        (circuit,) = mi.acdc(setting.model, setting.task, tau, signed=signed, ahead=ahead)
        assert {tuple(edge) for edge in circuit.edges} == expected.keys()
        assert (circuit.provenance["rows"] == circuit.provenance["tests"]) == (ahead == 1)
        for edge, score in circuit.scores.items():
            assert score == pytest.approx(expected[tuple(edge)], abs=1e-4)  # type: ignore[index]
    assert 0 < len(expected) < len(order)


@pytest.mark.parametrize("number", range(6))
def test_equals_auto_circuit(number: int) -> None:
    """Its runs on KL divergence, in its order of edges; two orders."""
    edges = published.autocircuit_edges()
    stored = published.autocircuit()
    run = [each for each in stored["acdc"] if each["faithfulness_target"] == "kl_div"][number]
    order = edges if run["order"] == "A" else [edges[i] for i in stored["edge_order_B"]]
    (circuit,) = mi.acdc(
        published.model64(), published.task(), run["tau"], metric="kl", signed=True, normalize=False, order=order
    )
    assert {tuple(edge) for edge in circuit.edges} == {edges[i] for i in run["kept"]}
    assert len(circuit) == run["n_kept"]


@pytest.mark.parametrize("name", ["induction", "gqa_induction", "copy", "memory"])
def test_finds_the_planted_circuit(name: str) -> None:
    toy = mi.toys.build(name)
    (circuit,) = mi.acdc(toy.model, toy.task[:8], 0.01)
    assert circuit.iou(toy.truth["resample"]) == 1.0
    said = circuit.provenance
    assert said["tests"] == circuit.shape.n_edges
    if name == "induction":
        # Where 2 % of the edges stay: ten times fewer calls than the plain loop, which calls once for each test.
        assert said["calls"] * 10 <= said["tests"]


@pytest.mark.parametrize(("kind", "ablation"), [("mean", "mean-pos"), ("zero", "zero")])
def test_finds_the_planted_circuit_under_other_ablations(kind: str, ablation: str) -> None:
    toy = mi.toys.build("copy")
    (circuit,) = mi.acdc(toy.model, toy.task, 0.001, ablation=ablation)
    assert circuit.iou(toy.truth[kind]) == 1.0
    assert circuit.provenance["ablation"] == ablation


def test_a_sweep_is_one_search_for_each_threshold(setting: Any) -> None:
    taus = [0.3, 0.01, 0.05]
    together = mi.acdc(setting.model, setting.task, taus)
    alone = [mi.acdc(setting.model, setting.task, tau)[0] for tau in taus]
    assert [set(circuit.edges) for circuit in together] == [set(circuit.edges) for circuit in alone]
    assert [circuit.provenance["threshold"] for circuit in together] == taus
    assert len(together[0]) < len(together[2]) < len(together[1])
    assert {circuit.provenance["tests"] for circuit in together} == {3 * together[0].shape.n_edges}
    # Rows of all thresholds share the passes.
    assert together[0].provenance["calls"] < sum(circuit.provenance["calls"] for circuit in alone)


def test_without_normalizing_scores_are_in_units_of_the_metric(setting: Any) -> None:
    (share,) = mi.acdc(setting.model, setting.task, 0.1, signed=True)
    gap = abs(share.provenance["baseline"]["corrupt"] - share.provenance["baseline"]["clean"])
    (plain,) = mi.acdc(setting.model, setting.task, 0.1 * gap, signed=True, normalize=False)
    assert dict(plain.scores) == pytest.approx({edge: (score or 0.0) * gap for edge, score in share.scores.items()}, abs=1e-5)
    assert abs(gap - 1) > 0.01 and len(plain) > 0


def test_calls_are_as_said(setting: Any) -> None:
    calls: list[int] = []
    handle = setting.model.block(1).register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    try:
        (circuit,) = mi.acdc(setting.model, setting.task, 0.1)
    finally:
        handle.remove()
    said = circuit.provenance
    # The two runs, and each pass.
    assert len(calls) == 2 + said["calls"]
    assert sum(calls[2:]) == said["rows"] * len(setting.task)
    assert said["forwards"] == 2 + said["rows"]
    assert said["tests"] == circuit.shape.n_edges


def test_memory_changes_nothing(setting: Any) -> None:
    (whole,) = mi.acdc(setting.model, setting.task, 0.05)
    (parts,) = mi.acdc(setting.model, setting.task, 0.05, memory=1)
    assert parts.edges == whole.edges
    assert parts.provenance["prompts"] == whole.provenance["prompts"] == 5
    assert parts.provenance["calls"] == 5 * parts.provenance["rows"] > whole.provenance["calls"]


def test_orders(setting: Any) -> None:
    full = mi.Circuit.full(setting.model).edges
    early = [tuple(edge) for edge in full]
    by_reader: dict[tuple[str, str], list[Any]] = {}
    for edge in early:
        by_reader.setdefault(edge[1:], []).append(edge)  # type: ignore[arg-type]
    listed = [edge for edges in list(by_reader.values())[::-1] for edge in edges]
    (named,) = mi.acdc(setting.model, setting.task, 0.1, order="early-first")
    (given,) = mi.acdc(setting.model, setting.task, 0.1, order=listed)
    (late,) = mi.acdc(setting.model, setting.task, 0.1)
    assert named.edges == given.edges != late.edges
    assert [each.provenance["order"] for each in (named, given, late)] == ["early-first", "as given", "late-first"]
    # An order in which later readers come after earlier ones: passes then start where they must.
    random.Random(0).shuffle(listed)
    (mixed,) = mi.acdc(setting.model, setting.task, 0.1, order=listed)
    expected, _ = naive(setting, listed, 0.1, False)
    assert {tuple(edge) for edge in mixed.edges} == expected.keys()


def test_discover_takes_a_threshold_or_a_size(setting: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, method="acdc", threshold=0.05)
    (direct,) = mi.acdc(setting.model, setting.task, 0.05)
    assert dict(circuit.scores) == dict(direct.scores)
    assert (circuit.provenance["method"], circuit.provenance["estimator"]) == ("acdc", "ACDC")
    sized = mi.discover(setting.model, setting.task, method="acdc", edges=20)
    said = sized.provenance["selection"]
    assert (said["n"], said["found"]) == (20, len(sized))
    assert sized.provenance["forwards"] == 2 + sized.provenance["rows"]
    assert said["threshold"] in said["tried"]
    sizes = {tau: len(each) for tau, each in zip(said["tried"], mi.acdc(setting.model, setting.task, said["tried"]), strict=True)}
    nearest = min(abs(size - 20) for size in sizes.values())
    assert abs(len(sized) - 20) == nearest
    # Of equally near ones the largest threshold; what all sweeps cost, of which the first is of six.
    assert said["threshold"] == max(tau for tau, size in sizes.items() if abs(size - 20) == nearest)
    first = [tau for tau in said["tried"] if any(tau == 1e-4 * 5000 ** (i / 5) for i in range(6))]
    assert len(first) == 6
    # Three sweeps, unless an earlier one has it.
    assert (len(said["tried"]) == 6) == (20 in {sizes[tau] for tau in first})
    assert len(sized) == 20 or len(said["tried"]) > 12
    rows = mi.acdc(setting.model, setting.task, first)[0].provenance["rows"]
    assert (sized.provenance["rows"] > rows) == (len(said["tried"]) > 6)
    # Each sweep lies between the two of the last one that enclose the size.
    larger, smaller = (sorted(t for t in first if (sizes[t] > 20) == more) for more in (True, False))
    assert all(max(larger) <= tau <= min(smaller) for tau in said["tried"] if tau not in first)


def test_post_norm_and_parallel_models() -> None:
    """Against circuits run one at a time; the first passes its heads' sum through a norm."""
    from tests.core.conftest import module_of

    clean = torch.randint(1, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    corrupt = clean.clone()
    corrupt[:, 3] = (clean[:, 3] + 5) % 60 + 1
    task = mi.Task(name="random", clean=clean, corrupt=corrupt, right=[1, 2, 3], wrong=[4, 5, 6])
    for architecture in ("gemma2", "neox"):
        model = mi.load(module_of(architecture))
        (circuit,) = mi.acdc(model, task, 0.05)
        inside = set(mi.Circuit.full(model).edges)
        runs = mi.run_circuits(model, task, mi.Circuit.full(model))
        before, unit = float(runs.circuits.mean()), float(runs.corrupt.mean() - runs.clean.mean())
        for edge in reversed(mi.Circuit.full(model).edges):
            now = float(mi.run_circuits(model, task, mi.Circuit.from_edges(model, inside - {edge})).circuits.mean())
            if abs(now - before) / abs(unit) < 0.05:
                inside, before = inside - {edge}, now
        assert set(circuit.edges) == inside


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": 0.0}, "threshold=0.0: give a positive number, such as 0.01 of the difference to explain"),
        ({"thresholds": []}, "no thresholds were given; pass one, or a list such as [0.01, 0.03, 0.1]"),
        ({"thresholds": 0.1, "ahead": 0}, "ahead=0: give the number of tests to run at once, from 1 on"),
        (
            {"thresholds": 0.1, "order": "random"},
            "order='random': write 'late-first', 'early-first', or give all edges in the order to test them",
        ),
        (
            {"thresholds": 0.1, "order": [("embed", "logits", "in")]},
            "order= has 1 of the 110 edges in 1; give each one once",
        ),
    ],
)
def test_messages(settings: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError) as caught:
        mi.acdc(settings["gpt2"].model, settings["gpt2"].task, **options)
    assert str(caught.value) == message
