"""The command line from end to end on a toy, and what it says when it cannot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
from typer.testing import CliRunner

import mechinterp as mi
from mechinterp import cli

COMMANDS = ("discover", "evaluate", "draw", "patch", "tasks", "models")


def call(*words: object) -> str:
    result = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a call that has to fail says on the error stream, in one line."""
    monkeypatch.setattr(sys, "argv", ["mechinterp", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in told
    return " ".join(told.split())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that ``discover`` wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("found") / "deep" / "circuit"
    told = call("discover", "induction", "--model", "toy:induction", "--edges", 12, "--n", 16, "--out", folder)
    return folder, told


# --- discover


def test_discover_sums_up_in_ten_lines(found: tuple[Path, str]) -> None:
    folder, told = found
    lines = told.splitlines()
    assert [line.split()[0] for line in lines] == (
        ["circuit", "task", "logit_diff", "accuracy", "faithfulness", "heads", "cost", "time", "report", "diagrams"]
    )
    assert re.match(r"circuit +12 connected edges of 257, \d+ nodes \(eap-ig, connected\)", lines[0])
    assert "8 prompts to find it, 8 held out" in lines[1]
    assert re.match(r"faithfulness +1\.000 \(1\.000 to 1\.000\), random circuits -?0\.000", lines[4])
    # The planted heads, and no others.
    assert lines[5].split(maxsplit=1)[1] == "a0.h3 +1.00, a1.h5 +1.00"
    assert str(folder / "report.md") in lines[8]


def test_discover_writes_graph_diagrams_and_report(found: tuple[Path, str]) -> None:
    folder, _ = found
    assert {path.name for path in folder.iterdir()} == {"circuit.json", "diagram.svg", "diagram.html", "report.md"}
    circuit = mi.Circuit.load(folder / "circuit.json")
    # The pairs of the task move the key alone: neither the query nor the value at the target differs.
    assert all(edge in circuit for edge in ("embed->a0.h3<v>", "a0.h3->a1.h5<k>", "a1.h5->logits"))
    assert circuit.n_connected == 12
    assert isinstance(circuit.graph, nx.MultiDiGraph)
    report = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))["report"]
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert f"{report['faithfulness']:.3f}" in page
    assert "**induction**: `a1.h5` attends from end to target." in page
    for name in ("diagram.svg", "diagram.html"):
        text = (folder / name).read_text(encoding="utf-8")
        addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text))
        assert {address for address in addresses if not address.startswith("http://www.w3.org/")} == set()


def test_the_same_seed_gives_the_same_circuit(found: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = found
    call("discover", "induction", "--model", "toy:induction", "--edges", 12, "--n", 16, "--out", tmp_path)
    first, second = (mi.Circuit.load(path / "circuit.json") for path in (folder, tmp_path))
    assert first.scores == second.scores


def test_discover_takes_pairs_of_ones_own(tmp_path: Path) -> None:
    toy = mi.toys.induction(n=6)
    task = toy.task
    assert task.token_strings and task.corrupt_token_strings
    lines = [
        {
            # The tokenizer puts the first token in front by itself.
            "clean": " ".join(clean[1:]),
            "corrupt": " ".join(corrupt[1:]),
            "right": f" {task.string(int(right[0]))}",
            "wrong": f" {task.string(int(wrong[0]))}",
        }
        for clean, corrupt, right, wrong in zip(
            task.token_strings, task.corrupt_token_strings, task.right, task.wrong, strict=True
        )
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    told = call("discover", "mine", "--pairs", pairs, "--model", "toy:induction", "--edges", 5, "--out", tmp_path / "c")
    assert "mine on toy:induction" in told
    circuit = mi.Circuit.load(tmp_path / "c" / "circuit.json")
    assert circuit.iou(toy.truth["resample"]) == 1.0


# --- what is done with a circuit


def test_evaluate_knows_model_and_task_of_the_file(found: tuple[Path, str]) -> None:
    told = call("evaluate", found[0] / "circuit.json", "--n", 8, "--random-circuits", 2)
    assert told.startswith("Report: induction on toy:induction, 8 prompts")
    assert "faithfulness 1.000" in told
    assert "2 random circuits of equal size" in told


def test_evaluate_under_another_ablation(found: tuple[Path, str]) -> None:
    told = call("evaluate", found[0] / "circuit.json", "--n", 8, "--random-circuits", 0, "--ablation", "mean-pos")
    assert "8 prompts, mean-pos ablation\n" in told
    assert re.search(r"corrupt -?[\d.]+, everything ablated -?[\d.]+, circuit", told)
    drawn = call("evaluate", found[0] / "circuit.json", "--n", 8, "--random-circuits", 0, "--ablation", "resample-shuffled")
    assert "8 prompts, resample-shuffled, seed 1 ablation\n" in drawn


def test_evaluate_under_an_unknown_ablation(
    found: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(monkeypatch, capsys, "evaluate", found[0] / "circuit.json", "--n", 8, "--ablation", "men")
    assert "mechinterp: there is no ablation 'men'. Did you mean 'mean'?" in told


def test_evaluate_asks_for_what_the_file_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = mi.Circuit.from_edges(mi.toys.induction().model, ["embed->logits"]).save(tmp_path / "c.json")
    told = refused(monkeypatch, capsys, "evaluate", file)
    assert told == f"mechinterp: {file} does not say its model and task; pass --model and --task"


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".dot", b"digraph"), (".html", b"<!")]
)
def test_draw_says_where_the_picture_is(found: tuple[Path, str], tmp_path: Path, suffix: str, start: bytes) -> None:
    target = tmp_path / f"picture{suffix}"
    assert call("draw", found[0] / "circuit.json", "--out", target, "--title", "mine").split() == [str(target)]
    assert target.read_bytes()[:30].lower().lstrip().startswith(start.lower()), target.read_bytes()[:30]


def test_draw_puts_the_picture_beside_the_file(found: tuple[Path, str]) -> None:
    assert call("draw", found[0] / "circuit.json").strip() == str(found[0] / "diagram.svg")


# --- patch


def test_patch_prints_the_strongest_and_plots(tmp_path: Path) -> None:
    plot = tmp_path / "heads.svg"
    told = call("patch", "induction", "--model", "toy:induction", "--n", 4, "--top", 2, "--out", plot)
    headline, *strongest, where = told.splitlines()
    assert headline.startswith("patching z (denoise); clean ")
    assert sorted(line.split() for line in strongest) == [["L0.H3.z", "+1.000"], ["L1.H5.z", "+1.000"]]
    assert where == str(plot)
    assert "<svg" in plot.read_text(encoding="utf-8")


# --- lists and help


def test_lists() -> None:
    assert [line.split()[0] for line in call("tasks").splitlines()] == list(mi.tasks.TASKS)
    assert [line.split()[0] for line in call("models").splitlines()] == (["smollm2", *(f"toy:{name}" for name in mi.toys.NAMES)])


def test_help_names_every_command_and_one_to_try() -> None:
    told = " ".join(call("--help").split())
    assert all(name in told for name in COMMANDS)
    example = re.search(r"Try: mechinterp (discover .*?) Options:", told)
    assert example
    assert example[1].split() == (["discover", "induction", "--model", "toy:induction", "--edges", "20", "--out", "circuits/toy"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name: str) -> None:
    told = call(name, "--help")
    # An option without a sentence would be followed by the next one, or by its default.
    for option, rest in re.findall(r"^  (--[a-z-]+)((?:.|\n(?!  -))*)", told, re.MULTILINE):
        words = re.sub(r"<[^>]*>|\[[^\]]*\]", "", rest).split()
        assert words, (name, option)


# --- errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("discover ioy --model toy:induction", "there is no task 'ioy'. Did you mean 'ioi'?"),
        ("discover induction --model toy:inducton", "there is no toy 'inducton'. Did you mean 'induction'"),
        ("discover induction --model smollm", "there is no model 'smollm' here. Did you mean 'smollm2'?"),
        ("discover induction --model toy:induction --method eap-gi", "there is no method 'eap-gi'. Did you mean 'eap-ig'"),
        ("discover induction --model toy:induction --metric logitdiff", "logitdiff"),
        ("discover mine --model toy:induction --pairs missing.jsonl", "missing.jsonl"),
        ("discover induction --model toy:induction --n 1", "Invalid value for '--n'"),
        ("discover induction --model toy:induction --selection best", "'best' is not one of"),
        ("discover", "Missing argument"),
        ("discovr induction", "No such command 'discovr'"),
        ("evaluate missing.json", "missing.json"),
        ("draw missing.json", "missing.json"),
        ("draw broken.json", "broken.json"),
        ("patch induction L*.H*.y --model toy:induction", "there is no site 'y'"),
        ("patch induction L7.H*.z --model toy:induction", "7"),
        ("patch induction --model toy:induction --out heads.jpq", "heads.jpq does not end like a plot"),
    ],
)
def test_errors_say_what_to_do(
    words: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{", encoding="utf-8")
    assert says in refused(monkeypatch, capsys, *words.split())
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]


def test_a_picture_of_an_unknown_kind(
    found: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(monkeypatch, capsys, "draw", found[0] / "circuit.json", "--out", tmp_path / "c.pgn")
    assert "'c.pgn' does not end like a picture that can be drawn. Did you mean '.png'?" in told


def test_python_dash_m_is_the_same(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mechinterp", "draw", "missing.json"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mechinterp: ")
    assert "missing.json" in done.stderr
    assert "Traceback" not in done.stderr
