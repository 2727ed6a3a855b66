"""Files of circuits tell the truth, and a lie is found."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import mechinterp as mi
from mechinterp import cli
from mechinterp.errors import FileFormatError, GraphError, MechInterpError, MetricError, ModelError, TaskError
from mechinterp.verifying import Check, Verification, rebuild_task

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "circuits").glob("*/circuit.json"))


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    return result.exit_code, result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("found") / "c"
    options = ("--model", "toy:induction", "--edges", 6, "--n", 8, "--random-circuits", 2, "--out", out)
    assert run("discover", "induction", *options)[0] == 0
    return out


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_what_the_files_claim_holds(file: Path, smollm2: mi.Model) -> None:
    """Without random circuits, which take most of the time; `make verify` measures them too."""
    circuit = mi.Circuit.load(file)
    assert circuit.certificate is not None and circuit.certificate.command[:1] == ("mechinterp",)
    model = smollm2 if circuit.certificate.model == "smollm2" else mi.load(circuit.certificate.model)
    found = mi.verify(circuit, model, quick=True)
    assert found.holds, repr(found)
    assert {"faithfulness", "circuit", "clean", "connected", "circuit_accuracy"} <= {check.name for check in found.checks}


def test_there_are_files_to_verify() -> None:
    assert FILES


def test_a_file_just_written_holds(folder: Path) -> None:
    code, told = run("verify", folder)
    assert code == 0, told
    lines = told.splitlines()
    assert lines[0] == str(folder)
    kept = sum(line.startswith("  holds ") for line in lines)
    assert lines[1] == f"Verification: induction on toy:induction: {kept} of {kept} claims hold"
    assert any("random_faithfulness[1]" in line for line in lines)
    certificate = mi.Circuit.load(folder).certificate
    assert certificate is not None and certificate.command[:1] == ("mechinterp",)
    assert lines[-1] == f"  not checked: that its command finds the same edges again; run it: {shlex.join(certificate.command)}"
    code, told = run("verify", folder / "circuit.json", "--quick")
    assert code == 0 and "  not checked: random_faithfulness (--quick)\n" in told


@pytest.mark.parametrize(
    ("name", "lie"),
    [("faithfulness", 0.9), ("circuit_accuracy", 0.4), ("connected", 7), ("faithfulness_interval", [0.1, 1.0]), ("prompts", 5)],
)
def test_a_lie_is_found(folder: Path, tmp_path: Path, name: str, lie: Any) -> None:
    content = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))
    content["report"][name] = lie
    (tmp_path / "circuit.json").write_text(json.dumps(content), encoding="utf-8")
    code, told = run("verify", tmp_path, "--quick")
    assert code == 1
    assert f"  BROKEN {name}" in told


def test_an_edge_taken_away_is_found(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))
    del content["edges"]["a1.h5->logits"]
    (tmp_path / "circuit.json").write_text(json.dumps(content), encoding="utf-8")
    code, told = run("verify", tmp_path, "--quick")
    assert code == 1
    assert "  BROKEN faithfulness " in told and "  BROKEN edges" in told and "  holds  clean" in told


def test_thorough_claims_are_measured_again() -> None:
    toy = mi.toys.induction(n=4)
    truth = toy.truth["zero"]
    report = mi.evaluate(truth, toy.model, toy.task, seed=0, random_circuits=0, ablation="zero", thorough=True)
    assert set(report.further) == {"prompts", "completeness", "minimality", "without", "hypotheses", "ablations"}
    assert report.further["completeness"]["worst"] < 1e-3 and report.further["hypotheses"]["rejected"] == []
    assert "hypotheses of an ideal circuit: equivalence p 1" in repr(report)
    assert "incompleteness 0.000 with nothing removed" in repr(report)
    found = mi.verify(truth.with_report(report.to_json()), toy.model)
    assert found.holds, repr(found)
    names = {check.name for check in found.checks}
    assert {"further.completeness.worst", "further.ablations.resample", "kl", "further.hypotheses.p.minimality"} <= names
    assert json.loads(json.dumps(found.to_json()))["holds"]


def test_curve_and_stability_are_measured_again(tmp_path: Path) -> None:
    options = ("--model", "toy:induction", "--edges", 6, "--n", 8, "--random-circuits", 0, "--thorough", "--thorough-prompts", 3)
    assert run("discover", "induction", *options, "--out", tmp_path)[0] == 0
    circuit = mi.Circuit.load(tmp_path)
    assert circuit.certificate is not None
    further = circuit.certificate.claims["further"]
    assert further["prompts"] == 3 and further["stability"]["prompts"] == 4
    # The whole graph is the model.
    assert further["curve"]["faithfulness"][-1] == pytest.approx(1) and further["curve"]["asked"][-1] == circuit.shape.n_edges
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "What follows was asked on 3 of the prompts." in page and "Chosen again from 4 resampled prompts: Jaccard" in page
    found = mi.verify(circuit, mi.load("toy:induction"))
    assert found.holds, repr(found)
    assert {"further.curve.cmd", "further.stability.jaccard", "further.without"} <= {check.name for check in found.checks}
    # Nobody can score again by a method that the file does not name.
    strange = replace(circuit, provenance={**circuit.provenance, "method": "mine"})
    found = mi.verify(strange, mi.load("toy:induction"))
    assert found.holds, repr(found)
    assert "stability (how its edges were scored cannot be told from the file)" in found.unchecked


def test_prompts_are_made_again(tmp_path: Path) -> None:
    toy = mi.toys.induction(n=10)
    tasks = [
        toy.task.split(seed=4)[1],
        toy.task.sample(6, seed=1).split(0.3, seed=2)[0],
        mi.tasks.induction(toy.model.tokenizer, n=4, seed=5, length=6, corruption="key"),
    ]
    for task in tasks:
        made = json.loads(json.dumps(dict(task.provenance)))
        again = rebuild_task(toy.model, made, task.name)
        assert again.clean.tolist() == task.clean.tolist() and again.corrupt.tolist() == task.corrupt.tolist()
    with pytest.raises(TaskError, match="the prompts cannot be made again: the file says length 7, and making them gives"):
        rebuild_task(toy.model, {**toy.task.provenance, "length": 7}, "induction")
    with pytest.raises(TaskError, match=r"does not say how the prompts of task 'x' were made \(generator 'None'\)"):
        rebuild_task(toy.model, {}, "x")
    with pytest.raises(TaskError, match=r"a file of pairs nowhere\.jsonl, which is not here; say where: --pairs FILE"):
        rebuild_task(toy.model, {"generator": "from_jsonl", "file": "nowhere.jsonl"}, "x")


@pytest.mark.parametrize("name", mi.tasks.TASKS)
def test_prompts_of_every_task_are_made_again(name: str, smollm2: mi.Model) -> None:
    task = mi.tasks.TASKS[name](smollm2.tokenizer, n=8, seed=3).split(seed=1)[1]
    again = rebuild_task(smollm2, json.loads(json.dumps(dict(task.provenance))), name)
    assert again.clean.tolist() == task.clean.tolist() and again.right.tolist() == task.right.tolist()


def test_prompts_of_other_words_are_not_made_again(smollm2: mi.Model) -> None:
    task = mi.tasks.agreement(smollm2.tokenizer, n=4, seed=0, verbs=[("is", "are")])
    with pytest.raises(TaskError, match=r"the file says verbs \['is/are'\], and making them gives \['is/are', 'was/were', 'has/"):
        rebuild_task(smollm2, dict(task.provenance), "agreement")


def test_what_cannot_be_verified() -> None:
    toy = mi.toys.induction(n=4)
    truth = toy.truth["zero"]
    with pytest.raises(FileFormatError) as caught:
        mi.verify(truth, toy.model)
    assert str(caught.value) == (
        f"{truth!r} carries no evaluation to verify; add one: circuit.with_report(report), with report = "
        "mi.evaluate(circuit, ...)"
    )
    report = mi.evaluate(truth, toy.model, toy.task, seed=0, random_circuits=0).to_json()
    with pytest.raises(MetricError, match="was judged by 'mine', a metric without a name here"):
        mi.verify(truth.with_report(report | {"metric": "mine"}), toy.model)
    with pytest.raises(TaskError, match="under the ablation 'mean, over x, 3 prompts', whose reference prompts are not in the"):
        mi.verify(truth.with_report(report | {"ablation": "mean, over x, 3 prompts"}), toy.model)


def test_a_circuit_is_verified_once_it_is_saved_with_its_report(tmp_path: Path) -> None:
    toy = mi.toys.induction(n=4)
    truth = toy.truth["zero"]
    file = truth.save(tmp_path / "c1.json")
    with pytest.raises(MechInterpError) as caught:
        run("verify", file)
    assert str(caught.value) == (
        f"{file} carries no evaluation to verify; `mechinterp discover` writes one, and in Python: "
        "circuit.with_report(report).save(...), with report = mi.evaluate(circuit, ...)"
    )
    report = mi.evaluate(truth, toy.model, toy.task, seed=0, random_circuits=0, ablation="zero")
    truth.with_report(report).save(file)
    assert truth.with_report(report).report == truth.with_report(report.to_json()).report
    code, told = run("verify", file)
    assert code == 0 and "BROKEN" not in told
    assert told.splitlines()[-1] == "  not checked: that the same edges are found again: no command is recorded"
    # The file's name is as good as the circuit in it.
    for name in (file, str(file)):
        assert repr(mi.verify(name, toy.model)) == repr(mi.verify(mi.Circuit.load(file), toy.model))


@pytest.mark.usefixtures("unchecked_types")
def test_verify_takes_a_circuit_and_then_a_model() -> None:
    toy = mi.toys.induction(n=4)
    with pytest.raises(GraphError) as refused:
        mi.verify(toy.model, toy.model)  # type: ignore[arg-type]
    assert str(refused.value) == "a Model was given where a circuit belongs: the circuit or its file comes first, then the model"
    with pytest.raises(ModelError, match="the name 'smollm2' was given where a model is needed; load it first"):
        mi.verify(toy.truth["zero"], "smollm2")  # type: ignore[arg-type]


def test_tolerances() -> None:
    assert Check("a", 1.0, 1.0009, 1e-3).holds and not Check("a", 1.0, 1.0011, 1e-3).holds
    assert Check("a", "x", "x", 0.0).holds and not Check("a", "x", 1.0, 0.0).holds
    assert not Check("a", 1.0, float("nan"), 1.0).holds


def test_counts_are_said_in_full() -> None:
    toy = mi.toys.induction(n=4)
    report = mi.evaluate(toy.truth["zero"], toy.model, toy.task, seed=0, random_circuits=0)
    certificate = toy.truth["zero"].with_report(report).certificate
    assert certificate is not None
    checks = (
        Check("all_edges", 70651.0, 70652.0, 0.0),
        Check("clean", 5.32886, -1.25e-5, 1e-3),
        Check("x", "a", math.nan, 0.0),
    )
    assert repr(Verification(certificate, checks, ())).splitlines()[1:] == [
        "  BROKEN all_edges                        claimed      70651  found      70652",
        "  BROKEN clean                            claimed      5.329  found  -1.25e-05",
        "  BROKEN x                                claimed          a  found        nan",
    ]


def test_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mi.MechInterpError, match=r"there is no circuit in ./circuits; give a circuit.json, or its folder"):
        run("verify")


def test_every_circuit_can_be_made_again_by_its_command() -> None:
    """`make circuits` runs what the files record; the commands are read here, and their options are real ones."""
    spec = importlib.util.spec_from_file_location("rebuild_circuits", ROOT / "scripts" / "rebuild_circuits.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.commands()
    assert sorted(found) == FILES
    for file, words in found.items():
        assert words[0] == "discover"
        # It writes where the file lies.
        assert words[words.index("--out") + 1] == f"circuits/{file.parent.name}"
        known = run("discover", "--help")[1]
        assert all(word in known for word in words if word.startswith("--"))
