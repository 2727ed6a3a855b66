"""The command line from end to end on a toy, and what it says when it cannot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

import mechinterp as mi
from mechinterp import cli
from tests.commands import call, refused

COMMANDS = ("discover", "evaluate", "verify", "draw", "patch", "tasks", "models")


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
    chance = re.match(r"faithfulness +1\.000 \(1\.000 to 1\.000\), random circuits (-?0\.\d{3})$", lines[4])
    # Twelve edges of the same kinds hold the three that matter now and then.
    assert chance and float(chance[1]) <= 0.4
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


def test_circuits_of_edges_at_positions(tmp_path: Path) -> None:
    run = ("discover", "induction", "--model", "toy:induction", "--edges", 5, "--n", 16, "--out", tmp_path, "--positions")
    told = call(*run)
    circuit = mi.Circuit.load(tmp_path)
    assert f"{circuit.n_pairs} pairs of edge and span on {len(circuit)} connected edges of 257" in told
    report = (tmp_path / "report.md").read_text()
    assert f"of 257 edges, at some spans of the prompts ({circuit.n_pairs} pairs of edge and span), carry" in report
    assert "| pairs of edge and span asked for | 5 (" in report
    assert f"| pairs of edge and span, connected | {circuit.n_pairs} |" in report
    assert "a1.h5" in report and "logits at end" in report
    fresh = call("evaluate", tmp_path, "--seed", 5, "--n", 8, "--random-circuits", 1)
    assert f"{circuit.n_pairs} connected pairs of edge and span" in fresh


def test_circuits_of_neurons(tmp_path: Path) -> None:
    told = call("discover", "toy", "--model", "toy:memory", "--unit", "neuron", "--nodes", 14, "--out", tmp_path)
    circuit = mi.Circuit.load(tmp_path)
    assert circuit.n_neurons == 12 and set(circuit.heads()) == {"a0.h1", "a0.h2"}
    assert re.match(
        r"circuit +12 neurons in the place of whole MLPs, 18 connected edges of 110, 6 nodes \(eap-ig, neurons\)", told
    )
    report = (tmp_path / "report.md").read_text()
    assert "18 of 110 edges, with 12 neurons in the place of whole MLPs, carry" in report
    assert "| heads and neurons asked for | 14 (edges among nodes) |" in report and "| neurons, of 2 MLPs | 12 |" in report
    assert "Random circuits of the same size, of as many heads, MLPs and neurons, carry" in report
    assert "12 neurons in the place of whole MLPs" in call("evaluate", tmp_path, "--random-circuits", 1)
    assert "holds  neurons" in call("verify", tmp_path) and "neurons</text>" in (tmp_path / "diagram.svg").read_text()
    nodes = call("discover", "toy", "--model", "toy:memory", "--unit", "node", "--nodes", 4, "--out", tmp_path, "--thorough")
    assert re.match(r"circuit +18 connected edges of 110, 6 nodes", nodes)
    assert "| heads and MLPs asked for | 4 (edges among nodes) |" in (tmp_path / "report.md").read_text()


def test_neurons_are_not_judged_thoroughly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("discover", "toy", "--model", "toy:memory", "--unit", "neuron", "--thorough")
    assert refused(monkeypatch, capsys, *words) == (
        "mechinterp: --thorough knows whole MLPs alone; leave out --unit neuron, or --thorough"
    )


def test_positions_are_not_judged_thoroughly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("discover", "induction", "--model", "toy:induction", "--positions", "--thorough")
    assert refused(monkeypatch, capsys, *words) == (
        "mechinterp: --thorough knows edges at all positions alone; leave out --positions, or --thorough"
    )


def test_discover_says_where_another_number_was_found_than_asked_for(tmp_path: Path, found: tuple[Path, str]) -> None:
    told = call("discover", "toy", "--model", "toy:copy", "--method", "acdc", "--edges", 12, "--n", 8, "--out", tmp_path)
    circuit = mi.Circuit.load(tmp_path)
    selection = circuit.provenance["selection"]
    assert (selection["n"], selection["found"]) == (12, len(circuit)) and len(circuit) < 12
    assert f" nodes (acdc; 12 asked for, {len(circuit)} found)\n" in told
    assert "asked for" not in found[1].splitlines()[0]


def test_discover_takes_pairs_of_ones_own(tmp_path: Path) -> None:
    toy = mi.toys.induction(n=6)
    pairs = jsonl_of(toy.task, tmp_path / "pairs.jsonl")
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


def test_evaluate_thoroughly(found: tuple[Path, str]) -> None:
    told = call("evaluate", found[0], "--n", 4, "--random-circuits", 0, "--thorough")
    for words in (
        "incompleteness 0.000 with nothing removed",
        "minimality, ",
        "faithfulness under other ablations: ",
    ):
        assert f"\n  {words}" in told
    assert "\n  hypotheses of an ideal circuit: equivalence p " in told


def test_evaluate_under_an_unknown_ablation(
    found: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(monkeypatch, capsys, "evaluate", found[0] / "circuit.json", "--n", 8, "--ablation", "men")
    assert "mechinterp: there is no ablation 'men'. Did you mean 'mean'?" in told


def test_evaluate_never_judges_on_the_prompts_that_found_it(
    found: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(monkeypatch, capsys, "evaluate", found[0], "--seed", 0) == (
        "mechinterp: --seed 0 made the prompts that this circuit was found on, and it is judged on new ones; "
        "give another, such as --seed 1"
    )
    # One more than the finding seed is what it takes by itself.
    own, one = (call("evaluate", found[0], "--n", 4, "--random-circuits", 0, *more) for more in ((), ("--seed", 1)))
    assert [line for line in own.splitlines() if "passes" not in line] == [
        line for line in one.splitlines() if "passes" not in line
    ]


def jsonl_of(task: mi.Task, path: Path) -> Path:
    """The pairs of a toy as a file of one's own; the tokenizer puts the first token in front by itself."""
    assert task.token_strings and task.corrupt_token_strings
    lines = [
        {
            "clean": " ".join(clean[1:]),
            "corrupt": " ".join(corrupt[1:]),
            "right": f" {task.string(int(right[0]))}",
            "wrong": f" {task.string(int(wrong[0]))}",
        }
        for clean, corrupt, right, wrong in zip(
            task.token_strings, task.corrupt_token_strings, task.right, task.wrong, strict=True
        )
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_pairs_are_judged_on_the_other_side_of_the_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = mi.toys.induction(n=12)
    pairs = jsonl_of(toy.task, tmp_path / "pairs.jsonl")
    model = ("--model", "toy:induction", "--edges", 5, "--random-circuits", 0)
    call("discover", "mine", "--pairs", pairs, *model, "--n", 10, "--seed", 3, "--out", tmp_path / "c")
    circuit = mi.Circuit.load(tmp_path / "c")
    assert (circuit.provenance["prompts"], circuit.provenance["task_provenance"]["sample"]) == (5, 10)
    seen: list[mi.Task] = []
    evaluate = mi.evaluate

    def spy(circuit: mi.Circuit, model: mi.Model, task: mi.Task, **options: Any) -> mi.Report:
        seen.append(task)
        return evaluate(circuit, model, task, **options)

    monkeypatch.setattr(mi, "evaluate", spy)
    whole = mi.Task.from_jsonl(pairs, toy.model.tokenizer).sample(10, seed=3)
    held_out = whole.split(seed=3)[1]
    # With the file named or not, from the folder or from the file.
    call("evaluate", tmp_path / "c", "--random-circuits", 0)
    call("evaluate", tmp_path / "c" / "circuit.json", "--random-circuits", 0, "--pairs", pairs)
    call("evaluate", tmp_path / "c", "--random-circuits", 0, "--n", 3)
    assert [task.clean.tolist() for task in seen[:2]] == [held_out.clean.tolist()] * 2
    assert len(seen[2]) == 3 and all(row in held_out.clean.tolist() for row in seen[2].clean.tolist())
    # Other pairs are all new.
    call(
        "evaluate",
        tmp_path / "c",
        "--random-circuits",
        0,
        "--pairs",
        jsonl_of(mi.toys.induction(n=6, seed=9).task, tmp_path / "o"),
    )
    assert len(seen[3]) == 6
    pairs.unlink()
    assert refused(monkeypatch, capsys, "evaluate", tmp_path / "c") == (
        f"mechinterp: the circuit was found on pairs of {pairs}, which is not here; pass --pairs FILE"
    )


def test_pairs_that_were_all_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    toy = mi.toys.induction(n=4)
    pairs = jsonl_of(toy.task, tmp_path / "pairs.jsonl")
    circuit = mi.discover(toy.model, mi.Task.from_jsonl(pairs, toy.model.tokenizer), edges=5)
    file = circuit.save(tmp_path / "c.json")
    assert refused(monkeypatch, capsys, "evaluate", file, "--pairs", pairs) == (
        "mechinterp: the circuit was found on these pairs, and which of them were held out is not recorded; "
        "pass --pairs with others"
    )


def test_a_sample_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = jsonl_of(mi.toys.induction(n=6).task, tmp_path / "pairs.jsonl")
    options = ("mine", "L0.H3.z", "--model", "toy:induction", "--pairs", pairs)
    call("patch", *options, "--n", 2)
    assert refused(monkeypatch, capsys, "patch", *options, "--n", 7) == (
        "mechinterp: 7 pairs were asked of task 'mine', which has 6: ask for 1 to 6."
    )


def test_a_folder_is_not_taken_from_another_circuit(
    found: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "c"
    run = ("--edges", 5, "--n", 8, "--random-circuits", 0, "--out", folder)
    call("discover", "induction", "--model", "toy:induction", *run)
    call("discover", "induction", "--model", "toy:induction", *run)
    other = ("discover", "toy", "--model", "toy:copy", *run)
    assert refused(monkeypatch, capsys, *other) == (
        f"loading toy:copy mechinterp: {folder} holds the circuit of induction in toy:induction; "
        "choose another --out, or write over it with --force"
    )
    call(*other, "--force")
    assert mi.Circuit.load(folder).provenance["task"] == "copy"
    assert "is a file; --out names a folder" in refused(monkeypatch, capsys, *other[:-1], folder / "report.md")


def test_a_folder_stands_for_its_circuit(
    found: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("draw", found[0]).strip() == str(found[0] / "diagram.svg")
    assert refused(monkeypatch, capsys, "draw", tmp_path) == (
        f"mechinterp: {tmp_path} is a folder without a circuit.json. Give the file that Circuit.save() wrote."
    )


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
    assert [line.split()[0] for line in call("tasks").splitlines()] == [*mi.tasks.TASKS, "toy", "any"]
    models = {line.split()[0]: line.rpartition("Tasks: ")[2] for line in call("models").splitlines()}
    assert models == {
        "smollm2": "ioi, greater_than, induction, agreement, gender, docstring",
        "toy:induction": "induction, toy",
        "toy:gqa_induction": "induction, toy",
        "toy:copy": "toy",
        "toy:memory": "toy",
        "toy:trained": "induction, toy",
    }


def test_how_well_a_model_does_the_tasks() -> None:
    lines = call("tasks", "--model", "toy:induction", "--n", 16).splitlines()
    assert lines[0].startswith("| task | prompts | tokens | accuracy | on corrupt prompts | first choice |")
    assert lines[2].startswith("| induction | 16 | 19 | 1.000 (0.806 to 1.000) | 0.000 | 1.000 | logit_diff | +")
    assert lines[3].startswith("| toy | 16 | ") and len(lines) == 4


@pytest.mark.parametrize("name", mi.toys.NAMES)
def test_every_toy_does_its_own_task(name: str, tmp_path: Path) -> None:
    told = call("discover", "toy", "--model", f"toy:{name}", "--edges", 9, "--random-circuits", 0, "--out", tmp_path)
    task = mi.toys.build(name).task.name
    assert f"{task} on toy:{name}" in told
    # On new prompts of that task, or where there are no others on the half that was held out.
    report = call("evaluate", tmp_path, "--random-circuits", 0)
    assert report.startswith(f"Report: {task} on toy:{name}, {30 if name == 'memory' else 32} prompts")


@pytest.mark.parametrize("name", cli.REPEATING)
def test_toys_that_repeat_do_induction(name: str) -> None:
    """What `mechinterp models` says: the right answer beats the wrong one on most prompts of that task."""
    model = mi.load(f"toy:{name}")
    task = mi.tasks.induction(model.tokenizer, n=32, seed=0)
    outs = mi.run_circuits(model, task, mi.Circuit.full(model))
    assert float(outs.accuracy[-1].mean()) > 0.9


def test_version() -> None:
    assert call("--version") == f"mechinterp {mi.__version__}\n"


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
        ("discover mine --model nothing --pairs missing.jsonl", "there is no file of pairs missing.jsonl; give JSON lines"),
        # What can be said before a model is loaded is: none of these is there.
        ("discover ioy --model nothing", "there is no task 'ioy'. Did you mean 'ioi'?"),
        ("discover ioi --model nothing --metric accuracy", "'accuracy' has a zero gradient almost everywhere"),
        ("discover ioi --model nothing --metric kl --method eap", "'kl' is at its minimum in the clean run"),
        ("discover ioi --model nothing --method eap-gi", "there is no method 'eap-gi'. Did you mean 'eap-ig'"),
        ("patch ioi --model nothing --metric kll", "there is no metric 'kll'. Did you mean 'kl'?"),
        ("discover toy --model nothing", "the task 'toy' belongs to the toys, and nothing is none"),
        ("discover ioi --model toy:copy", "toy:copy cannot do the task 'ioi': it was made for 'toy', its own"),
        ("discover ioi --model toy:trained", "cannot do the task 'ioi': it was made for 'induction' or 'toy', its own"),
        ("discover induction --model toy:induction --edges 258", "258 edges were asked for, and only 257 have a score. Ask for"),
        ("discover induction --model toy:induction --n 1", "Invalid value for '--n'"),
        ("discover induction --model toy:induction --selection best", "'best' is not one of"),
        ("discover", "Missing argument"),
        ("discovr induction", "No such command 'discovr'"),
        ("evaluate missing.json", "there is no missing.json; give the circuit.json that `mechinterp discover` wrote"),
        ("draw missing.json", "there is no missing.json; give the circuit.json that `mechinterp discover` wrote"),
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
