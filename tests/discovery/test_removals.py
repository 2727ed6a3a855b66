"""Taking parts away: beside circuits run one by one, and on toys where the answer is known."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import GraphError


@pytest.fixture(scope="module")
def one(settings: dict[str, Any]) -> Any:
    """Grouped queries: the harder of the two."""
    return settings["llama"]


@pytest.fixture(scope="module")
def circuit(one: Any) -> mi.Circuit:
    return mi.discover(one.model, one.task, edges=25, method="eap")


def share(one: Any, circuit: mi.Circuit) -> float:
    """F of one circuit, run alone."""
    runs = mi.run_circuits(one.model, one.task, circuit)
    low = runs.corrupt.mean()
    return float((runs.circuits[0].mean() - low) / (runs.clean.mean() - low))


def test_minimality_is_running_the_circuit_without_the_edge(one: Any, circuit: mi.Circuit) -> None:
    drops = mi.minimality(circuit, one.model, one.task)
    assert drops.coords["edge"] == tuple(tuple(edge) for edge in circuit.connected())
    whole = share(one, circuit)
    assert drops.provenance["faithfulness"] == pytest.approx(whole, abs=1e-4)
    for i in (0, 7, len(circuit) - 1):
        edge = mi.Edge(*drops.coords["edge"][i])  # type: ignore[misc]
        less = share(one, circuit - mi.Circuit.from_edges(one.model, [edge]))
        assert float(drops.values[i]) == pytest.approx(whole - less, abs=1e-4)
    some = mi.minimality(circuit, one.model, one.task, sample=4, seed=1)
    known = dict(zip(drops.coords["edge"], drops.values.tolist(), strict=True))
    assert len(some.coords["edge"]) == 4
    drawn = {mi.minimality(circuit, one.model, one.task, sample=4, seed=seed).coords["edge"] for seed in (1, 2, 3)}
    assert some.coords["edge"] in drawn and len(drawn) > 1
    assert some.values.tolist() == pytest.approx([known[edge] for edge in some.coords["edge"]], abs=1e-4)


@pytest.mark.parametrize("unit", ["edge", "node"])
def test_incompleteness_is_both_run_without_the_subset(one: Any, circuit: mi.Circuit, unit: Any) -> None:
    found = mi.completeness(circuit, one.model, one.task, seed=2, unit=unit, subsets=3, greedy=1, steps=2, candidates=3)
    assert [removal.how for removal in found.removals] == ["nothing", "random", "random", "random", "greedy"]
    full = mi.Circuit.full(one.model)
    for removal in found.removals:
        gone = set(removal.parts)
        kept = [
            [e for e in each if (str(e) not in gone if unit == "edge" else e.src not in gone and e.dst not in gone)]
            for each in (circuit, full)
        ]
        both = [share(one, mi.Circuit.from_edges(one.model, edges)) for edges in kept]
        assert (removal.circuit, removal.model) == (pytest.approx(both[0], abs=1e-4), pytest.approx(both[1], abs=1e-4))
        assert removal.gap == abs(removal.circuit - removal.model)
    # Two runs, and circuit and model without each of the nothing and three sets; twice the same for three candidates.
    assert found.provenance["forwards"] == (2 + 2 * 4) + 2 * (2 + 2 * 3)
    assert found.removals[0].model == pytest.approx(1.0, abs=1e-4)
    assert found.worst.gap == max(removal.gap for removal in found.removals)
    assert found.mean() == pytest.approx(sum(removal.gap for removal in found.removals[1:4]) / 3)
    again = mi.completeness(circuit, one.model, one.task, seed=2, unit=unit, subsets=3, greedy=1, steps=2, candidates=3)
    assert again.removals == found.removals
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    assert f"sets K of {unit}s of the circuit" in repr(found)


def test_the_greedy_search_takes_the_worst_of_its_candidates() -> None:
    """Of the truth without one edge, the model does without what the circuit then needs: a search over all finds that set."""
    toy = mi.toys.induction()
    truth = toy.truth["resample"]
    whole = mi.completeness(truth, toy.model, toy.task, seed=0, subsets=4, steps=1, candidates=9)
    assert whole.worst.gap < 1e-3
    half = truth - mi.Circuit.from_edges(toy.model, [edge for edge in truth if edge.dst == "logits"])
    half = half | mi.Circuit.from_edges(toy.model, ["embed->logits"])
    broken = mi.completeness(half, toy.model, toy.task, seed=0, unit="edge", subsets=0, steps=1, candidates=9)
    assert broken.removals[0].gap == pytest.approx(1.0, abs=1e-3)


def test_the_greedy_search_keeps_the_worst_of_its_steps(one: Any, circuit: mi.Circuit) -> None:
    """All parts are candidates in each step, so that nothing is drawn: by hand, step by step."""
    full = mi.Circuit.full(one.model)
    parts = [name for name in circuit.connected().nodes if name not in ("embed", "logits")]
    taken: list[str] = []
    gaps: list[float] = []
    for _ in parts:
        rest = [name for name in parts if name not in taken]
        rows = [each.only(e for e in each if not {e.src, e.dst} & {*taken, name}) for name in rest for each in (circuit, full)]
        runs = mi.run_circuits(one.model, one.task, rows)
        left = (runs.circuits.mean(1) - runs.corrupt.mean()) / (runs.clean.mean() - runs.corrupt.mean())
        gap = (left[::2] - left[1::2]).abs()
        taken.append(rest[int(gap.argmax())])
        gaps.append(float(gap.max()))
    found = mi.completeness(circuit, one.model, one.task, seed=0, subsets=0, steps=len(parts), candidates=len(parts))
    assert len(found.removals) == 2 and found.removals[1].how == "greedy"
    assert found.removals[1].gap == pytest.approx(max(gaps), abs=1e-4)
    assert len(found.removals[1].parts) == gaps.index(max(gaps)) + 1 < len(parts)


def test_the_share_is_that_of_parts_taken_away(one: Any, circuit: mi.Circuit) -> None:
    parts = {name for name in circuit.connected().nodes if name not in ("embed", "logits")}
    sizes = {}
    for chance in (0.0, 0.2, 1.0):
        found = mi.completeness(circuit, one.model, one.task, seed=0, subsets=8, share=chance, greedy=0)
        sizes[chance] = [len(removal.parts) for removal in found.removals if removal.how == "random"]
    assert sizes[0.0] == [0] * 8 and sizes[1.0] == [len(parts)] * 8
    assert 0 < sum(sizes[0.2]) / 8 < 0.45 * len(parts)


def test_every_edge_of_a_planted_circuit_is_needed() -> None:
    toy = mi.toys.induction()
    idle = mi.Edge.parse("a0.h0->logits")
    more = toy.truth["resample"] | mi.Circuit.from_edges(toy.model, [idle, "embed->a0.h0<v>"])
    drops = mi.minimality(more, toy.model, toy.task)
    known = {mi.Edge(*edge): value for edge, value in drops.as_dict().items()}  # type: ignore[misc]
    assert abs(known[idle]) < 1e-3
    assert all(known[edge] > 0.1 for edge in toy.truth["resample"])


def test_passes_are_as_said() -> None:
    """A row for each prompt: two runs, the circuit, without each edge, and under other ablations with everything ablated."""
    toy = mi.toys.induction(n=4)
    rows: list[int] = []
    for kind, more in (("resample", 0), ("zero", 1)):
        truth = toy.truth[kind]
        drops = mi.minimality(truth, toy.model, toy.task, ablation=kind)
        assert drops.provenance["forwards"] == 2 + 1 + len(truth) + more
        found = mi.completeness(truth, toy.model, toy.task, seed=0, subsets=2, steps=2, candidates=2, ablation=kind)
        # Nothing and two sets; two steps, of which the second has one of the two heads left.
        assert found.provenance["forwards"] == (2 + 2 * 3 + more) + (2 + 2 * 2 + more) + (2 + 2 * 1 + more)
        for call, said in ((mi.minimality, drops), (mi.completeness, found)):
            options = {"seed": 0, "subsets": 2, "steps": 2, "candidates": 2} if said is found else {}
            rows.clear()
            handle = toy.model.block(1).register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
            try:
                call(truth, toy.model, toy.task, ablation=kind, **options)  # type: ignore[operator]
            finally:
                handle.remove()
            assert sum(rows) == said.provenance["forwards"] * len(toy.task)


@pytest.mark.usefixtures("unchecked_types")
def test_refusals(one: Any, circuit: mi.Circuit) -> None:
    empty = mi.Circuit.empty(one.model)
    with pytest.raises(GraphError, match="has no connected edge to take away"):
        mi.minimality(empty, one.model, one.task)
    with pytest.raises(GraphError, match=r"sample=2 of \d+ edges are drawn by chance: give a seed, minimality\(..., seed=0\)"):
        mi.minimality(circuit, one.model, one.task, sample=2)
    with pytest.raises(GraphError, match="has no connected node to take away"):
        mi.completeness(empty, one.model, one.task, seed=0)
    with pytest.raises(GraphError, match=r"there is no unit 'edges'. Did you mean 'edge'\?"):
        mi.completeness(circuit, one.model, one.task, seed=0, unit="edges")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="share=2: give a number between 0 and 1"):
        mi.completeness(circuit, one.model, one.task, seed=0, share=2)


def test_hooks_are_left_alone(one: Any, circuit: mi.Circuit) -> None:
    def census() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in one.model.hf.modules()]

    before = census()

    def failing(logits: torch.Tensor, task: mi.Task) -> torch.Tensor:
        raise KeyboardInterrupt

    for call in (mi.minimality, mi.completeness, mi.check_hypotheses, mi.compare_ablations):
        with pytest.raises(KeyboardInterrupt):
            call(circuit, one.model, one.task, seed=0, metric=failing)  # type: ignore[operator]
        assert census() == before


def test_ablations_side_by_side(one: Any, circuit: mi.Circuit) -> None:
    names = ("zero", "mean", "resample", mi.Ablation("optimal", steps=1))
    table = mi.compare_ablations(circuit, one.model, one.task, seed=0, ablations=names)
    assert list(table.reports) == ["zero", "mean", "resample", "optimal, 1 steps"]
    for name in ("zero", "resample"):
        alone = mi.evaluate(circuit, one.model, one.task, seed=0, ablation=name, random_circuits=0)
        assert table[name].faithfulness == pytest.approx(alone.faithfulness, abs=1e-5)
        assert table[name].faithfulness_interval == pytest.approx(alone.faithfulness_interval, abs=1e-5)
    lines = repr(table).splitlines()
    assert lines[1].split()[:3] == ["ablation", "empty", "circuit"] and len(lines) == 6
    assert table._repr_html_().count("<tr>") == 5
    assert json.loads(json.dumps(table.to_json())) == table.to_json()


def test_an_ablation_that_changes_nothing_is_said() -> None:
    toy = mi.toys.induction()
    task = toy.task
    same = mi.Task(name="same", clean=task.clean, corrupt=task.clean, right=task.right, wrong=task.wrong)
    truth = toy.truth["zero"]
    table = mi.compare_ablations(truth, toy.model, same, seed=0, ablations=("zero", "resample"))
    assert list(table.reports) == ["zero"]
    assert "faithfulness is undefined" in table.undefined["resample"]
    assert "resample: undefined, logit_diff is" in repr(table)
    with pytest.raises(mi.MechInterpError, match="faithfulness is undefined"):
        mi.compare_ablations(truth, toy.model, same, seed=0, ablations=("resample",))
