"""How good a circuit is: every number of the report by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.discovery import evaluate as module
from mechinterp.discovery.faithfulness import faithfulness
from mechinterp.discovery.running import CircuitRuns
from mechinterp.errors import MetricError
from tests.reference import copy_of


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``planted(circuits, clean, corrupt)``: what running circuits will give, whatever the model."""

    def plant(circuits: list[list[float]] | Tensor, clean: Any, corrupt: Any) -> None:
        values = torch.as_tensor(circuits)
        accuracy = torch.arange(values.numel() + values.shape[1]).reshape(-1, values.shape[1]) % 3 == 0
        runs = CircuitRuns(
            "planted", torch.as_tensor(clean), torch.as_tensor(corrupt), values, accuracy.float(), torch.as_tensor(corrupt)
        )
        monkeypatch.setattr(module, "run_circuits", lambda *args, **options: runs)

    return plant


def test_faithfulness_by_hand() -> None:
    clean, corrupt = torch.tensor([4.0, 4.0]), torch.tensor([0.0, 2.0])
    circuits = torch.tensor([[3.0, 1.0], [4.0, 4.0], [0.0, 2.0], [6.0, 5.0], [-1.0, 0.0]])
    # (mean - 1) / (4 - 1), unclamped.
    expected = torch.tensor([1 / 3, 1.0, 0.0, 4.5 / 3, -1.5 / 3])
    torch.testing.assert_close(faithfulness(circuits, clean, corrupt), expected)


def test_the_report_by_hand(setting: Any, planted: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, edges=20)
    clean, corrupt = [4.0, 4.0, 5.0, 3.0, 4.0], [0.0, 2.0, 1.0, 1.0, 1.0]
    planted([[3.0, 1.0, 4.0, 2.0, 5.0], [0.0, 2.0, 1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 9.0, 9.0]], clean, corrupt)
    report = mi.evaluate(circuit, setting.model, setting.task, seed=3, random_circuits=2)
    assert (report.clean, report.corrupt, report.circuit) == (4.0, 1.0, 3.0)
    assert report.faithfulness == pytest.approx(2 / 3)
    assert report.mean_of_ratios == pytest.approx((3 / 4 - 1 / 2 + 3 / 4 + 1 / 2 + 4 / 3) / 5)
    assert report.random_faithfulness == pytest.approx((0.0, 8 / 3))
    assert report.beats_random == 1
    # Rows of accuracy are the circuit, its rivals, and last the model: every third number, counted on.
    assert (report.circuit_accuracy, report.model_accuracy) == (pytest.approx(2 / 5), pytest.approx(2 / 5))
    assert (report.edges, report.connected, report.all_edges) == (
        len(circuit),
        circuit.n_connected,
        mi.GraphShape.of(setting.model).n_edges,
    )
    assert report.nodes == len(circuit.connected().nodes)
    assert (report.task, report.model, report.metric, report.prompts) == ("random", setting.model.name, "planted", 5)
    assert (report.seed, report.forwards, report.confidence, report.ablation) == (3, 5, 0.95, "resample")


def test_a_prompt_without_a_difference_has_no_ratio(setting: Any, planted: Any) -> None:
    planted([[1.0, 2.0, 7.0, 1.0, 1.0]], [2.0, 2.0, 3.0, 2.0, 2.0], [0.0, 0.0, 3.0, 0.0, 0.0])
    report = mi.evaluate(mi.Circuit.empty(setting.model), setting.model, setting.task, seed=0)
    assert report.mean_of_ratios == pytest.approx((0.5 + 1.0 + 0.5 + 0.5) / 4)
    assert report.caveats == ("the mean of ratios leaves out 1 of 5 prompts, on which there is no difference to divide by",)
    assert f"  caution: {report.caveats[0]}" in repr(report)
    # The ratio of means knows that prompt.
    assert report.faithfulness == pytest.approx((12 / 5 - 3 / 5) / (11 / 5 - 3 / 5))


def test_the_interval_is_that_of_the_ratio_of_means(setting: Any, planted: Any) -> None:
    """Against the delta method, on many prompts; and it narrows with the confidence asked for."""
    generator = torch.Generator().manual_seed(11)
    n = 400
    corrupt = torch.randn(n, generator=generator)
    clean = corrupt + 3 + torch.randn(n, generator=generator)
    circuit = corrupt + 0.6 * (clean - corrupt) + 0.5 * torch.randn(n, generator=generator)
    planted(circuit[None], clean, corrupt)
    task = setting.task[[0] * n]
    over, under = circuit - corrupt, clean - corrupt
    ratio = over.mean() / under.mean()
    error = ((over - ratio * under).std() / under.mean() / math.sqrt(n)).item()
    empty = mi.Circuit.empty(setting.model)
    for confidence, normal in ((0.95, 1.96), (0.68, 0.994)):
        report = mi.evaluate(empty, setting.model, task, seed=0, confidence=confidence)
        low, high = report.faithfulness_interval
        assert (low + high) / 2 == pytest.approx(ratio.item(), abs=0.3 * error)
        assert high - low == pytest.approx(2 * normal * error, rel=0.1)
    same = mi.evaluate(empty, setting.model, task, seed=0, confidence=0.68)
    assert same.faithfulness_interval == report.faithfulness_interval
    other = mi.evaluate(empty, setting.model, task, seed=1, confidence=0.68)
    assert other.faithfulness_interval != report.faithfulness_interval
    few = mi.evaluate(empty, setting.model, task, seed=0, confidence=0.68, resamples=10)
    assert few.faithfulness_interval != report.faithfulness_interval


def test_resamples_without_a_difference_are_left_out(setting: Any, planted: Any) -> None:
    """Of two prompts, a quarter of all draws holds only the one on which clean equals corrupt."""
    planted([[1.0, 3.0]], [2.0, 3.0], [0.0, 3.0])
    report = mi.evaluate(mi.Circuit.empty(setting.model), setting.model, setting.task[:2], seed=0)
    assert report.faithfulness_interval == (0.5, 0.5)


def test_one_prompt_has_no_spread(setting: Any, planted: Any) -> None:
    planted([[1.0]], [2.0], [0.0])
    report = mi.evaluate(mi.Circuit.empty(setting.model), setting.model, setting.task[0], seed=0)
    assert report.faithfulness_interval == (0.5, 0.5)
    assert report.caveats == ("the interval is over 1 prompt, which is too few to mean much",)


def test_a_difference_within_its_own_error_is_said(setting: Any, planted: Any) -> None:
    planted([[1.0, 2.0, 0.0, 1.0, 1.0]], [2.0, -2.0, 3.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.5])
    report = mi.evaluate(mi.Circuit.empty(setting.model), setting.model, setting.task, seed=0)
    gaps = torch.tensor([2.0, -2.0, 3.0, -2.0, -0.5])
    error = float(gaps.std()) / 5**0.5
    assert report.caveats == (
        f"the model and everything ablated differ by 0.100, less than twice its standard error ({error:.3f}): "
        "faithfulness divides by that",
    )


def test_float64(setting: Any) -> None:
    model = copy_of(setting.model, torch.float64)
    report = mi.evaluate(mi.Circuit.full(model), model, setting.task, seed=0, random_circuits=1)
    assert report.faithfulness == pytest.approx(1.0, abs=1e-6)


# -- with circuits that are run


def test_the_two_ends(setting: Any) -> None:
    full = mi.evaluate(mi.Circuit.full(setting.model), setting.model, setting.task, seed=0)
    assert full.faithfulness == pytest.approx(1.0, abs=1e-4)
    assert full.faithfulness_interval == pytest.approx((1.0, 1.0), abs=1e-3)
    # The only circuit of that size is the model itself, which is not better than itself.
    assert full.random_faithfulness == pytest.approx((1.0,) * 5, abs=1e-4)
    assert full.beats_random == 0
    assert full.circuit_accuracy == full.model_accuracy
    assert full.kl == pytest.approx(0.0, abs=1e-5)
    empty = mi.evaluate(mi.Circuit.empty(setting.model), setting.model, setting.task, seed=0)
    assert empty.faithfulness == pytest.approx(0.0, abs=1e-4)
    assert (empty.random_faithfulness, empty.random_interval, empty.beats_random, empty.forwards) == ((), None, 0, 3)
    assert "no random circuits beside it" in repr(empty)
    runs = mi.run_circuits(setting.model, setting.task, mi.Circuit.empty(setting.model), metric="kl")
    assert empty.kl == pytest.approx(float(runs.circuits.mean()), abs=1e-5)
    assert f"; KL from the model {empty.kl:.3f}" in repr(empty)


def test_numbers_are_those_of_running_the_circuit(setting: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, edges=25)
    report = mi.evaluate(circuit, setting.model, setting.task, seed=4, random_circuits=3, metric="prob_diff")
    rivals = [mi.random_edges(circuit, seed=4 + i) for i in range(3)]
    assert [rival.n_connected for rival in rivals] == [circuit.n_connected] * 3
    runs = mi.run_circuits(setting.model, setting.task, [circuit, *rivals], metric="prob_diff")
    gap = (runs.clean - runs.corrupt).mean()
    shares = ((runs.circuits - runs.corrupt).mean(dim=1) / gap).tolist()
    assert report.faithfulness == pytest.approx(shares[0], abs=1e-4)
    assert report.random_faithfulness == pytest.approx(tuple(shares[1:]), abs=1e-4)
    assert report.beats_random == sum(shares[0] > share for share in shares[1:])
    assert report.forwards == 6
    assert len(set(report.random_faithfulness)) == 3


def test_the_seed_decides_everything_that_is_drawn(setting: Any) -> None:
    circuit, state = mi.discover(setting.model, setting.task, edges=25), torch.get_rng_state()
    first, again, other = (mi.evaluate(circuit, setting.model, setting.task, seed=seed) for seed in (1, 1, 2))
    drawn = [(each.random_faithfulness, each.random_interval, each.faithfulness_interval) for each in (first, again, other)]
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    assert drawn[0][2] != drawn[2][2]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError):
        mi.evaluate(circuit, setting.model, setting.task)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["induction", "memory"])
def test_the_planted_circuit_beats_chance(name: str) -> None:
    toy = mi.toys.build(name)
    report = mi.evaluate(toy.truth["resample"], toy.model, toy.task, seed=0, random_circuits=10)
    assert report.faithfulness == pytest.approx(1.0, abs=1e-3)
    # Some may hold the last edges of the true circuit, which are enough where the values alone differ: of the kinds of
    # edges that the circuit has, there are few in a toy.
    assert report.beats_random >= 7
    assert sum(report.random_faithfulness) / 10 < 0.7


def test_prompts_that_found_the_circuit_are_said() -> None:
    toy = mi.toys.induction(n=12)
    found_on, held_out = toy.task.split(seed=0)
    circuit = mi.discover(toy.model, found_on, edges=5, method="eap")
    said = {
        name: any("was found on some or all of these prompts" in caveat for caveat in report.caveats)
        for name, report in {
            "found_on": mi.evaluate(circuit, toy.model, found_on, seed=0, random_circuits=0),
            "held_out": mi.evaluate(circuit, toy.model, held_out, seed=0, random_circuits=0),
            "both": mi.evaluate(circuit, toy.model, toy.task, seed=0, random_circuits=0),
            "fresh": mi.evaluate(circuit, toy.model, mi.toys.induction(n=12, seed=1).task, seed=0, random_circuits=0),
        }.items()
    }
    assert said == {"found_on": True, "held_out": False, "both": True, "fresh": False}


def test_no_difference_to_explain(setting: Any) -> None:
    task = setting.task
    same = mi.Task(name="same", clean=task.clean, corrupt=task.clean, right=task.right, wrong=task.wrong)
    with pytest.raises(MetricError) as caught:
        mi.evaluate(mi.Circuit.full(setting.model), setting.model, same, seed=0)
    assert str(caught.value).startswith("logit_diff is ")
    assert str(caught.value).endswith(
        "on clean and corrupt prompts of task 'same': faithfulness is undefined. Use other corrupt prompts or another metric"
    )


# -- what it looks like


@pytest.mark.parametrize("which", ["full", "empty"])
def test_a_report_travels_in_a_circuits_file(setting: Any, which: str, tmp_path: Path) -> None:
    circuit = getattr(mi.Circuit, which)(setting.model)
    report = mi.evaluate(circuit, setting.model, setting.task, seed=0)
    plain = report.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["faithfulness"] == report.faithfulness
    again = mi.Circuit.load(circuit.with_report(plain).save(tmp_path / "circuit.json"))
    assert dict(again.report) == plain


def test_the_report_prints_itself(setting: Any, planted: Any) -> None:
    planted([[3.0] * 5, [1.0] * 5], [5.0] * 5, [1.0] * 5)
    task = mi.Task(
        name="<b>bold</b>",
        clean=setting.task.clean,
        corrupt=setting.task.corrupt,
        right=setting.task.right,
        wrong=setting.task.wrong,
    )
    circuit = mi.Circuit.full(setting.model)
    report = mi.evaluate(circuit, setting.model, task, seed=0, random_circuits=1)
    lines = repr(report).splitlines()
    n, nodes = len(circuit), len(circuit.nodes)
    assert lines[:-1] == [
        f"Report: <b>bold</b> on {setting.model.name}, 5 prompts, resample ablation",
        "  planted: clean 5.000, corrupt 1.000, circuit 3.000",
        "  faithfulness 0.500 (95% interval 0.500 to 0.500); mean of ratios 0.500",
        "  1 random circuit of equal size: mean 0.000 (0.000 to 0.000); beaten 1",
        "  accuracy: model 0.200, circuit 0.400",
        f"  {n} edges, {n} connected, of {n}; {nodes} nodes",
    ]
    assert lines[-1].startswith("  4 forward passes over the prompts, ")
    assert "<b>bold" not in report._repr_html_()
    assert "&lt;b&gt;bold" in report._repr_html_()


def test_the_report_in_a_notebook_is_one_element_that_shows_where_circuits_lie() -> None:
    toy = mi.toys.induction()
    html = mi.evaluate(toy.truth["resample"], toy.model, toy.task, seed=0)._repr_html_()
    # Well-formed: an XML parser reads it.
    page = ElementTree.fromstring(html)
    named = {row[0].text: row[1].text for row in page.iter("tr") if row[0].tag == "td"}
    assert named["faithfulness"] == "1.000 (95% interval 1.000 to 1.000)"
    assert named["5 random circuits"].endswith("beaten 5 of 5")
    svg = "{http://www.w3.org/2000/svg}"
    circle, *others = page.iter(f"{svg}circle")
    nothing, whole, interval = (line for line in page.iter(f"{svg}line"))
    assert circle.get("cx") == whole.get("x1") == interval.get("x1") == interval.get("x2")
    assert len(others) == 5
    assert all(float(nothing.get("x1")) <= float(each.get("cx")) < float(whole.get("x1")) for each in others)
    alone = mi.evaluate(toy.truth["resample"], toy.model, toy.task, seed=0, random_circuits=0)._repr_html_()
    assert "random" not in alone


def test_a_circuit_that_carries_nothing_says_so(setting: Any, planted: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, edges=4, method="eap")
    more = "keep more, or try another method"
    for values, told in (
        ([1.0, 1.2, 0.9, 1.1, 0.8], f"the circuit cannot be told from everything ablated: {more}"),
        ([0.5, 0.6, 0.5, 0.4, 0.5], f"the circuit is worse than everything ablated: {more}"),
    ):
        planted([values], [5.0] * 5, [1.0] * 5)
        assert mi.evaluate(circuit, setting.model, setting.task, seed=0, random_circuits=0).caveats == (told,)
    planted([[3.0, 3.2, 2.9, 3.1, 2.8]], [5.0] * 5, [1.0] * 5)
    assert mi.evaluate(circuit, setting.model, setting.task, seed=0, random_circuits=0).caveats == ()
    dangling = circuit.only([edge for edge in circuit.edges if edge.dst != "logits"])
    planted([[1.0] * 5], [5.0] * 5, [1.0] * 5)
    assert mi.evaluate(dangling, setting.model, setting.task, seed=0).caveats == (
        "no edge lies on a path from the embedding to the logits: this is as good as the empty circuit",
    )
