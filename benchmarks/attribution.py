"""What estimating every edge costs beside its own two forward passes and one backward pass: ``python benchmarks/attribution.py``.

Seconds are taken in turns, so that a busy machine slows both, and medians are given. The passes beside it are bare: the model's
forward on the corrupt prompts without a graph, its forward on the clean ones with one from the embeddings on, and the backward
pass of the metric, all of them unembedding the one position where the answer is read. Peak memory is that of all tensors but
the weights, which were there before.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from sweeps import gpt2, in_turns, measure_cases, random_pairs
from torch.profiler import ProfilerActivity, profile

import mechinterp as mi


def passes(model: mi.Model, task: mi.Task) -> Callable[[], None]:
    """Two forwards and one backward, and nothing else."""
    answer, rows = task.answer_pos.unique().tolist(), torch.arange(len(task))
    embedding = model.hf.get_input_embeddings()

    def run() -> None:
        with torch.no_grad():
            model(task.corrupt, keep=answer)
        leaf = embedding(task.clean).detach().requires_grad_()
        keep = torch.tensor(answer)
        logits = model.hf(inputs_embeds=leaf, use_cache=False, logits_to_keep=keep).logits[:, 0]
        metric = logits[rows, task.right[:, 0]] - logits[rows, task.wrong[:, 0]]
        torch.autograd.grad(metric.sum(), leaf)

    return run


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that a call's tensors took at once, by the allocator's own account (on a CPU)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def case(model: mi.Model, task: mi.Task, rounds: int) -> dict[str, Any]:
    """Seconds of both, and the ratio of each round; peak memory of estimates with more and more steps."""
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    runs = {"passes": passes(model, task), "EAP": lambda: mi.attribute(model, task, unit="edge")}
    times, _ = in_turns(runs, rounds, model.device)
    ratios = [eap / bare for eap, bare in zip(times["EAP"], times["passes"], strict=True)]
    peaks = {steps: peak_bytes(lambda steps=steps: mi.attribute(model, task, unit="edge", steps=steps)) for steps in (0, 1, 2, 5)}
    return {
        "model": model.name,
        "threads": torch.get_num_threads(),
        "edges": mi.GraphShape.of(model).n_edges,
        "work": f"{len(task)} pairs of {task.clean.shape[1]} tokens that first differ at {int(task.first_difference.min())}",
        "seconds": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "times its passes, each round": [round(ratio, 2) for ratio in ratios],
        "times its passes, median": round(statistics.median(ratios), 3),
        "MiB of tensors at most, beside the weights": {f"{steps} steps": round(size / 2**20) for steps, size in peaks.items()},
    }


CASES: dict[str, Callable[[], tuple[mi.Model, mi.Task]]] = {
    "gpt2-small": lambda: (gpt2(12, 768), random_pairs(50257, 15, 0)),
    "gpt2-small-suffix": lambda: (gpt2(12, 768), random_pairs(50257, 15, 10)),
    "smollm2": lambda: (model := mi.load("smollm2"), mi.tasks.ioi(model.tokenizer, n=8, seed=0)),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    measure_cases(parser, CASES, 7, lambda name, arguments: case(*CASES[name](), arguments.rounds))
