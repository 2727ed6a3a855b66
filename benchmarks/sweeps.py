"""How much faster are sweeps than transformer_lens's, on the same work in one process? ``make bench`` runs this.

Each pair is timed in turns (ours, theirs, ours, ...), so that a busy machine slows both; the ratio of medians is given.
Both measure every cell of the same sweep on the same prompts; the largest difference between their numbers is given too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens import patching as lens
from transformers import GPT2Config, GPT2LMHeadModel

import mechinterp as mi
from mechinterp.tasks import logit_diff


def gpt2(n_layers: int, d_model: int) -> mi.Model:
    """GPT-2 of this size, with random weights."""
    torch.manual_seed(0)
    heads = 12
    config = GPT2Config(n_layer=n_layers, n_embd=d_model, n_head=heads, attn_implementation="eager")
    return mi.load(GPT2LMHeadModel(config), name=f"random GPT-2, {n_layers} layers, d_model {d_model}")


def random_pairs(vocabulary: int, length: int, first_difference: int) -> mi.Task:
    """Eight pairs of random tokens that are the same before ``first_difference``."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(0, vocabulary, (8, length), generator=generator)
    corrupt = clean.clone()
    corrupt[:, first_difference:] = torch.randint(0, vocabulary, (8, length - first_difference), generator=generator)
    return mi.Task(name="random", clean=clean, corrupt=corrupt, right=[5] * 8, wrong=[6] * 8)


def seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """One timed call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def in_turns(
    runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device, *, warm: bool = True
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each call in each round, and the last results. With ``warm`` one round before them is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for turn in range(rounds + warm):
        for name, run in runs.items():
            took, results[name] = seconds(run, device)
            if turn or not warm:
                times[name].append(took)
    return times, results


def head_sweep(model: mi.Model, task: mi.Task, rounds: int) -> dict[str, Any]:
    """Every head's z at all positions, clean into corrupt."""
    task = task.to(model.device)
    rows = torch.arange(len(task), device=model.device)
    model.bridge.eval()

    def metric(logits: Tensor) -> Tensor:
        return logit_diff(logits[rows, task.answer_pos], task)

    def ours() -> Tensor:
        return mi.patch(model, task, "L*.H*.z", normalize=False).per_example

    def theirs() -> Tensor:
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(task.clean)
            found = lens.get_act_patch_attn_head_out_all_pos(model.bridge, task.corrupt, cache, metric, reduce="none")
            return (found.values - metric(model(task.corrupt))).cpu()

    def one_by_one() -> None:
        """One full forward pass for each head, without any hook: the least that a sweep without short cuts can take."""
        with torch.no_grad():
            for _ in range(model.cfg.n_layers * model.cfg.n_heads):
                model(task.corrupt)

    times, results = in_turns({"mechinterp": ours, "transformer_lens": theirs, "forwards": one_by_one}, rounds, model.device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "model": model.name,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "work": f"{model.cfg.n_layers * model.cfg.n_heads} heads, {len(task)} pairs of {task.clean.shape[1]} tokens that first "
        f"differ at {int(task.first_difference.min())}",
        "plan": repr(mi.plan(model, task, "L*.H*.z")),
        "seconds": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "transformer_lens / mechinterp": round(medians["transformer_lens"] / medians["mechinterp"], 2),
        "one full forward each / mechinterp": round(medians["forwards"] / medians["mechinterp"], 2),
        "largest difference": float((results["mechinterp"] - results["transformer_lens"]).abs().max()),
    }


CASES: dict[str, Callable[[], tuple[mi.Model, mi.Task]]] = {
    "gpt2-small": lambda: (gpt2(12, 768), random_pairs(50257, 15, 0)),
    "gpt2-small-suffix": lambda: (gpt2(12, 768), random_pairs(50257, 15, 10)),
    "tiny": lambda: (gpt2(12, 48), random_pairs(50257, 15, 0)),
    "tiny-suffix": lambda: (gpt2(12, 48), random_pairs(50257, 17, 12)),
    "smollm2": lambda: (model := mi.load("smollm2"), mi.tasks.ioi(model.tokenizer, n=8, seed=0)),
}


def keep(file: Path, name: str, found: dict[str, Any]) -> None:
    """Write a case at once, with how it was made, and leave the others in the file as they are."""
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    made = {"command": "python " + " ".join(sys.argv), "machine": platform.machine(), "torch": torch.__version__}
    results[name] = made | found
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure_cases(
    parser: argparse.ArgumentParser, cases: Iterable[str], rounds: int, find: Callable[[str, argparse.Namespace], dict[str, Any]]
) -> None:
    """Measure the cases that the command line names; print each, and write it down at once."""
    names = list(cases)
    parser.add_argument("cases", nargs="*", default=names, help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    for name in arguments.cases:
        found = find(name, arguments)
        sys.stdout.write(f"{name}: {json.dumps(found, indent=2)}\n")
        sys.stdout.flush()
        if arguments.out:
            keep(arguments.out, name, found)


def main() -> None:
    """Time the cases that were named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")

    def find(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
        model, task = CASES[name]()
        model.hf.to(arguments.device)
        return head_sweep(model, task, arguments.rounds)

    measure_cases(parser, CASES, 3, find)


if __name__ == "__main__":
    main()
