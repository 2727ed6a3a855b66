"""The command line: ``mechinterp discover|evaluate|draw|patch|tasks|models``, the same as ``python -m mechinterp``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mechinterp.errors import MechInterpError, did_you_mean

__all__ = ["main"]

PLOTS = (".png", ".svg", ".pdf")

app = typer.Typer(
    help="Find, judge and draw the circuits of a language model.\n\n"
    "Try: mechinterp discover induction --model toy:induction --edges 20 --out circuits/toy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Option(help="smollm2, toy:induction, a hub name, a local folder or a .gguf file.")]
TaskFile = Annotated[Path | None, typer.Option("--pairs", help="Your own pairs as JSON lines, instead of a named task.")]
Count = Annotated[int, typer.Option(min=2, help="How many pairs of prompts; half of them are held out.")]
Seed = Annotated[int, typer.Option(help="Of the prompts, the split, the random circuits and the bootstrap.")]
MetricName = Annotated[str | None, typer.Option(help="logit_diff, prob_diff, log_prob, kl. Default: the task's own.")]


def _task(model: Any, name: str, pairs: Path | None, n: int, seed: int) -> Any:
    from mechinterp import tasks

    if pairs is not None:
        return tasks.Task.from_jsonl(pairs, _tokenizer(model), name=name)
    make = tasks.resolve_task(name)
    if name == "induction":
        return make(model.tokenizer or model.cfg.d_vocab, n=n, seed=seed)
    return make(_tokenizer(model), n=n, seed=seed)


def _tokenizer(model: Any) -> Any:
    if model.tokenizer is None:
        raise MechInterpError(
            f"{model.name} has no tokenizer, which this task needs; use --model smollm2, or the task 'induction'"
        )
    return model.tokenizer


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@app.command()
def discover(
    task: Annotated[str, typer.Argument(help="A task of `mechinterp tasks`, or a name for your --pairs.")],
    model: Model = "smollm2",
    edges: Annotated[int, typer.Option(min=1, help="How many connected edges to keep.")] = 200,
    out: Annotated[Path | None, typer.Option(help="Folder for circuit.json, diagram.svg, diagram.html, report.md.")] = None,
    method: Annotated[str, typer.Option(help="eap or eap-ig.")] = "eap-ig",
    selection: Annotated[Literal["connected", "top", "greedy"], typer.Option(help="How edges are chosen.")] = "connected",
    steps: Annotated[int, typer.Option(min=1, help="Points of the path for eap-ig.")] = 5,
    n: Count = 64,
    seed: Seed = 0,
    metric: MetricName = None,
    pairs: TaskFile = None,
    random_circuits: Annotated[int, typer.Option(min=0, help="Random circuits of equal size to compare with.")] = 5,
    heads: Annotated[int, typer.Option(min=1, help="How many heads the report describes.")] = 12,
) -> None:
    """Find the circuit of a task, judge it on held-out prompts, and write graph, diagrams and report."""
    import mechinterp as mi
    from mechinterp.discovery.report import save_all

    started = time.perf_counter()
    _say(f"loading {model}")
    loaded = mi.load(model)
    prompts = _task(loaded, task, pairs, n, seed)
    found_on, held_out = prompts.split(seed=seed)
    _say(f"{prompts!r}; {len(found_on)} to find the circuit, {len(held_out)} to judge it")
    circuit = mi.discover(
        loaded,
        found_on,
        method=method,
        edges=min(edges, mi.GraphShape.of(loaded).n_edges),
        selection=selection,
        steps=steps,
        metric=metric,
        progress=True,
    )
    report = mi.evaluate(circuit, loaded, held_out, seed=seed, random_circuits=random_circuits, metric=metric, progress=True)
    stories = mi.describe(circuit, loaded, found_on, heads=heads)
    folder = out or Path("circuits") / f"{task}-{loaded.name}".replace(":", "-").replace("/", "-")
    command = ["mechinterp", *sys.argv[1:]]
    paths = save_all(folder, circuit, report, stories, command=command, seconds=time.perf_counter() - started)
    low, high = report.faithfulness_interval
    chance = sum(report.random_faithfulness) / max(1, len(report.random_faithfulness))
    roles = ", ".join(f"{story.node} {story.effect:+.2f}" for story in stories[:5] if abs(story.effect) >= 0.005)
    print(
        f"circuit        {report.connected} connected edges of {report.all_edges}, {report.nodes} nodes ({method}, {selection})"
    )
    print(f"task           {report.task} on {report.model}, {len(found_on)} prompts to find it, {report.prompts} held out")
    print(f"{report.metric:<14} clean {report.clean:.3f}, corrupt {report.corrupt:.3f}, circuit {report.circuit:.3f}")
    print(f"accuracy       model {report.model_accuracy:.3f}, circuit {report.circuit_accuracy:.3f}")
    print(f"faithfulness   {report.faithfulness:.3f} ({low:.3f} to {high:.3f}), random circuits {chance:.3f}")
    print(f"heads          {roles}")
    print(
        f"cost           {circuit.provenance['forwards'] + report.forwards} forward, "
        f"{circuit.provenance['backwards']} backward passes"
    )
    print(f"time           {time.perf_counter() - started:.0f} s")
    print(f"report         {paths[-1]}")
    print(f"diagrams       {paths[1]}, {paths[2]}")


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="A circuit.json.")],
    task: Annotated[str | None, typer.Option(help="Default: the task that the file was found on.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: the model that the file was found on.")] = None,
    n: Count = 32,
    seed: Annotated[int, typer.Option(help="Of the prompts: other than the one that found it, so that they are new.")] = 1,
    metric: MetricName = None,
    pairs: TaskFile = None,
    random_circuits: Annotated[int, typer.Option(min=0, help="Random circuits of equal size to compare with.")] = 5,
    ablation: Annotated[
        str, typer.Option(help="What edges outside carry: zero, mean, mean-pos, resample, resample-shuffled, optimal.")
    ] = "resample",
) -> None:
    """Judge a saved circuit on fresh prompts."""
    import mechinterp as mi

    circuit = mi.Circuit.load(file)
    origin = circuit.provenance
    source = model or origin.get("model")
    name = task or origin.get("task")
    if not isinstance(source, str) or not isinstance(name, str):
        raise MechInterpError(f"{file} does not say its model and task; pass --model and --task")
    loaded = mi.load(source)
    prompts = _task(loaded, name, pairs, n, seed)
    chosen: dict[str, Any] = {"ablation": ablation, "random_circuits": random_circuits, "metric": metric}
    print(mi.evaluate(circuit, loaded, prompts, seed=seed, progress=True, **chosen))


@app.command()
def draw(
    file: Annotated[Path, typer.Argument(help="A circuit.json.")],
    out: Annotated[
        Path | None, typer.Option(help="A .svg, .png, .pdf, .dot or .html file. Default: diagram.svg beside it.")
    ] = None,
    max_edges: Annotated[int, typer.Option(min=1, help="Draw at most so many edges, the strongest.")] = 100,
    title: Annotated[str | None, typer.Option(help="Default: task, model and method.")] = None,
) -> None:
    """Draw a saved circuit."""
    import mechinterp as mi

    target = out or file.with_name("diagram.svg")
    print(mi.draw(mi.Circuit.load(file), max_edges=max_edges, title=title).save(target))


@app.command()
def patch(
    task: Annotated[str, typer.Argument(help="A task of `mechinterp tasks`, or a name for your --pairs.")],
    at: Annotated[str, typer.Argument(help="A selector, such as 'L*.H*.z' or 'L*.resid_post'.")] = "L*.H*.z",
    model: Model = "smollm2",
    n: Count = 8,
    seed: Seed = 0,
    metric: MetricName = None,
    direction: Annotated[
        Literal["denoise", "noise"], typer.Option(help="Clean into corrupt, or corrupt into clean.")
    ] = "denoise",
    pairs: TaskFile = None,
    out: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf for the plot.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the strongest sites to print.")] = 12,
) -> None:
    """Measure exactly which activations matter, by patching each one."""
    import mechinterp as mi

    if out is not None and out.suffix not in PLOTS:
        raise MechInterpError(f"{out} does not end like a plot that can be drawn. {did_you_mean(out.suffix, PLOTS)}")
    loaded = mi.load(model)
    effects = mi.patch(loaded, _task(loaded, task, pairs, n, seed), at, metric=metric, direction=direction, progress=True)
    print(f"{effects.quantity}; clean {effects.baseline['clean']:.3f}, corrupt {effects.baseline['corrupt']:.3f}")
    for name, value in effects.top(top):
        print(f"{name:<16} {value:+.3f}")
    if out is not None:
        effects.plot().savefig(out)
        print(out)


@app.command()
def tasks() -> None:
    """List the tasks."""
    from mechinterp.tasks import describe_tasks

    for name, line in describe_tasks().items():
        print(f"{name:<14} {line}")


@app.command()
def models() -> None:
    """List the models that need no hub."""
    from mechinterp.zoo import describe_models

    for name, line in describe_models().items():
        print(f"{name:<22} {line}")


def main() -> None:
    """Run the command line; errors that say what to do are printed without a traceback."""
    try:
        app()
    except (MechInterpError, OSError) as error:
        _say(f"mechinterp: {error}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
