"""The command line: ``mechinterp discover|evaluate|verify|draw|patch|tasks|models``, the same as ``python -m mechinterp``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mechinterp.asking import REPEATING, check_names, generator_options, task_of, task_options
from mechinterp.errors import MechInterpError, did_you_mean

__all__ = ["main"]

PLOTS = (".png", ".svg", ".pdf")

PAIR = '{"clean": "...", "corrupt": "...", "right": " a", "wrong": " b"}'

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Option(help="smollm2, toy:induction, a hub name, a local folder or a .gguf file.")]
TaskName = Annotated[str, typer.Argument(help="A task of `mechinterp tasks`, or a name for your --pairs.")]
TaskFile = Annotated[Path | None, typer.Option("--pairs", help="Your own pairs as JSON lines, instead of a named task.")]
TaskOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option", help="NAME=VALUE of the task's generator, such as order=ABBA or corruption=swap; may be given again."
    ),
]
# Gradients need a slope, which accuracy has none of.
SlopedMetric = Annotated[
    str | None, typer.Option("--metric", help="logit_diff, prob_diff, log_prob, kl (with eap-ig). Default: the task's own.")
]
AnyMetric = Annotated[
    str | None, typer.Option("--metric", help="logit_diff, prob_diff, log_prob, accuracy, kl. Default: the task's own.")
]
Thorough = Annotated[
    bool,
    typer.Option(
        "--thorough",
        help="Also completeness, minimality, other ablations, tests of hypotheses (some 200 passes); where a circuit is "
        "found by scores, its size curve and stability.",
    ),
]
ThoroughPrompts = Annotated[int, typer.Option(min=1, help="On how many of the prompts, with --thorough.")]


def _version(asked: bool | None) -> bool:
    if asked:
        import mechinterp

        print(f"mechinterp {mechinterp.__version__}")
        raise typer.Exit()
    return False


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Say which version this is, and stop.")
    ] = False,
) -> None:
    """Find, judge and draw the circuits of a language model.

    Try: mechinterp discover induction --model toy:induction --edges 20 --out circuits/toy
    """


# --- prompts


def _fresh(circuit: Any, model: Any, name: str | None, pairs: Path | None, n: int | None, seed: int) -> Any:
    """Prompts to judge a circuit on: never those that found it."""
    from mechinterp.tasks import resolve_task

    origin = circuit.provenance
    made = origin.get("task_provenance", {})
    same = name is None or name == origin.get("task")
    if same and pairs is None and made.get("generator") == "from_jsonl":
        pairs = Path(made.get("path", made["file"]))
        if not pairs.is_file():
            raise MechInterpError(f"the circuit was found on pairs of {pairs}, which is not here; pass --pairs FILE")
    if pairs is not None:
        whole = task_of(model, name or origin.get("task", pairs.stem), pairs, None, seed=seed, usual=0)
        if whole.provenance["sha256"] == made.get("sha256"):
            whole = _other_side(whole, origin)
        return whole if n is None else whole.sample(n, seed=seed)
    own = same and made.get("generator") == "toys"
    if own and "seed" not in made:
        whole = _other_side(task_of(model, "toy", None, None, seed=seed, usual=0), origin)
        return whole if n is None else whole.sample(n, seed=seed)
    if same and seed == made.get("seed"):
        raise MechInterpError(
            f"--seed {seed} made the prompts that this circuit was found on, and it is judged on new ones; "
            f"give another, such as --seed {seed + 1}"
        )
    source = "toy" if own else name or origin["task"]
    options = {key: made[key] for key in generator_options(resolve_task(source)) if key in made} if same and not own else {}
    return task_of(model, source, None, n, seed=seed, usual=32, options=options)


def _other_side(whole: Any, origin: Mapping[str, Any]) -> Any:
    """The pairs of a file that were held out when the circuit was found."""
    made = origin["task_provenance"]
    if "sample" in made:
        whole = whole.sample(made["sample"], seed=made["sample_seed"])
    if "split_seed" in made:
        found_on, held_out = whole.split(made["split_held_out"], seed=made["split_seed"])
        if made["split"] == "held_out":
            found_on, held_out = held_out, found_on
        if len(found_on) == origin["prompts"]:
            _say(f"the {len(held_out)} pairs that were held out when the circuit was found")
            return held_out
    raise MechInterpError(
        "the circuit was found on these pairs, and which of them were held out is not recorded; pass --pairs with others"
    )


# --- files


def _circuit(file: Path) -> Any:
    from mechinterp.graph import Circuit

    if not file.exists():
        raise MechInterpError(f"there is no {file}; give the circuit.json that `mechinterp discover` wrote, or its folder")
    return Circuit.load(file)


def _check_folder(folder: Path, task: str, model: str, force: bool) -> None:
    """Refuse to write over the circuit of another task or model."""
    from mechinterp.graph import Circuit

    if folder.exists() and not folder.is_dir():
        raise MechInterpError(f"{folder} is a file; --out names a folder, into which circuit.json and the rest are written")
    if force or not (folder / "circuit.json").exists():
        return
    origin = Circuit.load(folder).provenance
    if (origin.get("task"), origin.get("model")) != (task, model):
        raise MechInterpError(
            f"{folder} holds the circuit of {origin.get('task')} in {origin.get('model')}; choose another --out, "
            "or write over it with --force"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@app.command()
def discover(
    task: TaskName,
    model: Model = "smollm2",
    edges: Annotated[
        int | None, typer.Option(min=1, help="How many connected edges to keep. Default: 200, or all in a smaller model.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for circuit.json, diagram.svg, diagram.html, report.md. Default: circuits/TASK-MODEL."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="A method of mi.discover: eap, eap-ig, relp, acdc, exact, mask and others.")
    ] = "eap-ig",
    selection: Annotated[Literal["connected", "top", "greedy"], typer.Option(help="How edges are chosen.")] = "connected",
    steps: Annotated[int, typer.Option(min=1, help="Points of the path for eap-ig.")] = 5,
    positions: Annotated[
        bool, typer.Option("--positions", help="Choose edges at each span of the prompts; --edges counts pairs of edge and span.")
    ] = False,
    unit: Annotated[
        Literal["edge", "node", "neuron"],
        typer.Option(help="What is chosen: edges, or heads and MLPs (neuron: single neurons), with all edges among them."),
    ] = "edge",
    nodes: Annotated[int | None, typer.Option(min=1, help="How many to keep, with --unit node or neuron.")] = None,
    n: Annotated[
        int | None,
        typer.Option(min=2, help="How many pairs: half find the circuit, half judge it. Default: 64; all of --pairs."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts (or which of --pairs), the split, random circuits, bootstrap.")] = 0,
    metric: SlopedMetric = None,
    pairs: TaskFile = None,
    option: TaskOptions = None,
    random_circuits: Annotated[int, typer.Option(min=0, help="Random circuits of equal size to compare with.")] = 5,
    heads: Annotated[int, typer.Option(min=1, help="How many heads the report describes.")] = 12,
    thorough: Thorough = False,
    thorough_prompts: ThoroughPrompts = 16,
    force: Annotated[bool, typer.Option("--force", help="Write over the circuit of another task or model.")] = False,
) -> None:
    """Find the circuit of a task, judge it on held-out prompts, and write graph, diagrams and report."""
    import mechinterp as mi
    from mechinterp.discovery.choosing import Search
    from mechinterp.discovery.discover import METHODS, check_choices, check_method, find
    from mechinterp.discovery.report import save_all, summary

    started = time.perf_counter()
    check_choices(method, selection)
    if positions and thorough:
        raise MechInterpError("--thorough knows edges at all positions alone; leave out --positions, or --thorough")
    if unit == "neuron" and thorough:
        raise MechInterpError("--thorough knows whole MLPs alone; leave out --unit neuron, or --thorough")
    check_names(model, task, pairs, metric)
    options = task_options(task, pairs, option)
    if metric is not None:
        check_method(method, mi.tasks.METRICS[metric], steps=steps)
    _say(f"loading {model}")
    loaded = mi.load(model)
    prompts = task_of(loaded, task, pairs, n, seed=seed, usual=64, options=options)
    folder = out or Path("circuits") / f"{prompts.name}-{loaded.name}".replace(":", "-").replace("/", "-")
    _check_folder(folder, prompts.name, loaded.name, force)
    found_on, held_out = prompts.split(seed=seed)
    _say(f"{prompts!r}; {len(found_on)} to find the circuit, {len(held_out)} to judge it")
    search = Search(
        model=loaded,
        task=found_on,
        unit=unit,
        edges=edges,
        nodes=nodes,
        selection=selection,
        steps=steps,
        metric=metric,
        seed=seed if METHODS[method].drawn else None,
        positions=positions,
        progress=True,
    )
    circuit, scores = find(search, method)
    judged: dict[str, Any] = {"random_circuits": random_circuits, "metric": metric, "seed": seed, "progress": True}
    judged |= {"thorough": thorough, "thorough_prompts": thorough_prompts}
    judged["scores"] = scores if thorough and unit == "edge" else None
    report = mi.evaluate(circuit, loaded, held_out, **judged)
    stories = mi.describe(circuit, loaded, found_on, heads=heads)
    command = ["mechinterp", *sys.argv[1:]]
    paths = save_all(folder, circuit, report, stories, command=command, seconds=time.perf_counter() - started)
    print(summary(circuit, report, stories))
    print(f"time           {time.perf_counter() - started:.0f} s")
    print(f"report         {paths[-1]}")
    print(f"diagrams       {paths[1]}, {paths[2]}")


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="A circuit.json, or the folder that `mechinterp discover` wrote.")],
    task: Annotated[str | None, typer.Option(help="Default: the task that the file was found on.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: the model that the file was found on.")] = None,
    n: Annotated[
        int | None, typer.Option(min=2, help="How many fresh pairs. Default: 32; all of --pairs that did not find the circuit.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the fresh prompts, random circuits, bootstrap. Default: one more than the seed that found it."),
    ] = None,
    metric: AnyMetric = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Your own pairs as JSON lines. Default, where the circuit was found on such: the held-out ones."),
    ] = None,
    random_circuits: Annotated[int, typer.Option(min=0, help="Random circuits of equal size to compare with.")] = 5,
    ablation: Annotated[
        str, typer.Option(help="What edges outside carry: zero, mean, mean-pos, resample, resample-shuffled, optimal.")
    ] = "resample",
    thorough: Thorough = False,
    thorough_prompts: ThoroughPrompts = 16,
) -> None:
    """Judge a saved circuit on prompts that did not find it."""
    import mechinterp as mi

    circuit = _circuit(file)
    origin = circuit.provenance
    source = model or origin.get("model")
    name = task or origin.get("task")
    if not isinstance(source, str) or not isinstance(name, str):
        raise MechInterpError(f"{file} does not say its model and task; pass --model and --task")
    if task is not None or metric is not None or pairs is not None:
        check_names(source, task or "induction", pairs, metric)
    made = origin.get("task_provenance", {})
    first = made.get("seed", made.get("split_seed", 0))
    seed = first + 1 if seed is None else seed
    loaded = mi.load(source)
    prompts = _fresh(circuit, loaded, task, pairs, n, seed)
    chosen: dict[str, Any] = {"ablation": ablation, "random_circuits": random_circuits, "metric": metric, "thorough": thorough}
    chosen["thorough_prompts"] = thorough_prompts
    print(mi.evaluate(circuit, loaded, prompts, seed=seed, progress=True, **chosen))


@app.command()
def verify(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Circuit files, or their folders. Default: every one in ./circuits.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Without random circuits and thorough tests; it says what was not checked.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Default: the model that the file names.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Where the pairs lie now, if the prompts came from a file.")] = None,
) -> None:
    """Measure again what circuit files claim, and say what still holds. Exits with 1 where something does not."""
    import mechinterp as mi
    from mechinterp.verifying import verify as verify_circuit

    chosen = files or sorted(Path("circuits").glob("*/circuit.json"))
    if not chosen:
        raise MechInterpError("there is no circuit in ./circuits; give a circuit.json, or its folder")
    broken = False
    for file in chosen:
        circuit = _circuit(file)
        certificate = circuit.certificate
        if certificate is None:
            raise MechInterpError(
                f"{file} carries no evaluation to verify; `mechinterp discover` writes one, and in Python: "
                "circuit.with_report(report).save(...), with report = mi.evaluate(circuit, ...)"
            )
        loaded = mi.load(model or certificate.model)
        found = verify_circuit(circuit, loaded, quick=quick, pairs=pairs, progress=True)
        print(f"{file}\n{found!r}", flush=True)
        broken = broken or not found.holds
    if broken:
        raise typer.Exit(1)


@app.command()
def draw(
    file: Annotated[Path, typer.Argument(help="A circuit.json, or the folder that `mechinterp discover` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="A .svg, .png, .pdf, .dot or .html file. Default: diagram.svg beside it.")
    ] = None,
    max_edges: Annotated[int, typer.Option(min=1, help="Draw at most so many edges, the strongest.")] = 40,
    title: Annotated[str | None, typer.Option(help="Default: task, model and method.")] = None,
) -> None:
    """Draw a saved circuit."""
    import mechinterp as mi

    target = out or (file if file.is_dir() else file.parent) / "diagram.svg"
    print(mi.draw(_circuit(file), max_edges=max_edges, title=title).save(target))


@app.command()
def patch(
    task: TaskName,
    at: Annotated[str, typer.Argument(help="A selector, such as 'L*.H*.z' or 'L*.resid_post'.")] = "L*.H*.z",
    model: Model = "smollm2",
    n: Annotated[int | None, typer.Option(min=1, help="How many pairs of prompts. Default: 8; all of --pairs.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts, or of which of --pairs are taken.")] = 0,
    metric: AnyMetric = None,
    direction: Annotated[
        Literal["denoise", "noise"], typer.Option(help="Clean into corrupt, or corrupt into clean.")
    ] = "denoise",
    pairs: TaskFile = None,
    option: TaskOptions = None,
    out: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf for the plot.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the strongest sites to print.")] = 12,
) -> None:
    """Measure exactly which activations matter, by patching each one."""
    import mechinterp as mi

    if out is not None and out.suffix not in PLOTS:
        raise MechInterpError(f"{out} does not end like a plot that can be drawn. {did_you_mean(out.suffix, PLOTS)}")
    check_names(model, task, pairs, metric)
    options = task_options(task, pairs, option)
    loaded = mi.load(model)
    prompts = task_of(loaded, task, pairs, n, seed=seed, usual=8, options=options)
    effects = mi.patch(loaded, prompts, at, metric=metric, direction=direction, progress=True)
    print(f"{effects.quantity}; clean {effects.baseline['clean']:.3f}, corrupt {effects.baseline['corrupt']:.3f}")
    for name, value in effects.top(top):
        print(f"{name:<16} {value:+.3f}")
    if out is not None:
        effects.plot().savefig(out)
        print(out)


@app.command()
def tasks(
    model: Annotated[str | None, typer.Option(help="Say how well this model does each: accuracy and metric.")] = None,
    n: Annotated[int, typer.Option(min=1, help="How many pairs, with --model.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the prompts, with --model.")] = 0,
) -> None:
    """List the tasks; with --model, how well the model does them, before anything is discovered."""
    from mechinterp.tasks import describe_tasks

    if model is not None:
        for line in _abilities(model, n, seed):
            print(line)
        return
    for name, line in describe_tasks().items():
        print(f"{name:<14} {line}")
    print(f"{'toy':<14} What was this toy made for? The own task of a model `toy:...`, see `mechinterp models`")
    print(f"{'any name':<14} with --pairs FILE, your own: a line holds {PAIR}")


def _abilities(source: str, n: int, seed: int) -> Iterator[str]:
    """A table of how well a model does the tasks, in Markdown; those that cannot be asked of it say why."""
    import mechinterp as mi
    from mechinterp.errors import TaskError

    loaded = mi.load(source)
    yield "| task | prompts | tokens | accuracy | on corrupt prompts | first choice | metric | clean | corrupt |"
    yield "| --- | ---: | ---: | --- | ---: | ---: | --- | ---: | ---: |"
    for name in fitting(source):
        try:
            found = mi.check_task(loaded, task_of(loaded, name, None, None if name == "toy" else n, seed=seed, usual=n))
        except TaskError as error:
            yield f"| {name} | | | {error} | | | | | |"
            continue
        low, high = found.interval
        yield (
            f"| {name} | {found.prompts} | {found.tokens} | {found.accuracy:.3f} ({low:.3f} to {high:.3f}) | "
            f"{found.corrupt_accuracy:.3f} | {found.first:.3f} | {found.metric} | {found.clean:+.3f} | {found.corrupt:+.3f} |"
        )


def fitting(model: str) -> tuple[str, ...]:
    """The tasks that a model can be asked: a toy those that it was made for, any other all that have a name."""
    from mechinterp.tasks import TASKS

    name = model.removeprefix("toy:")
    if name == model:
        return tuple(TASKS)
    return ("induction", "toy") if name in REPEATING else ("toy",)


@app.command()
def models() -> None:
    """List the models that need no hub, and the tasks that fit them."""
    from mechinterp.zoo import describe_models

    for name, line in describe_models().items():
        print(f"{name:<22} {line}. Tasks: {', '.join(fitting(name))}")


def main() -> None:
    """Run the command line; errors that say what to do are printed without a traceback."""
    try:
        app()
    except (MechInterpError, OSError) as error:
        _say(f"mechinterp: {error}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
