"""How many forward calls does ACDC take, and how long, beside the loop that tests one edge after another?

Three ways to the same circuit are timed in turns, so that a busy machine slows all of them: `mechinterp.acdc`; the same with
``ahead=1``, which asks for one test at a time, as the plain loop does (its runs are replayed from the reader on all the same);
and one full forward pass of the bare model for each test, without any hook: the least that a loop without short cuts can take.
Calls are counted: an edge is one test, and the plain loop calls the model once for each. ``python benchmarks/acdc.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from sweeps import gpt2, in_turns, measure_cases, random_pairs

import mechinterp as mi

# A model, pairs, and a threshold in units of the difference between clean and corrupt.
Case = tuple[mi.Model, mi.Task, float]


def toy() -> Case:
    """A circuit that is known, of 5 edges in 257."""
    toy = mi.toys.induction(n=8)
    return toy.model, toy.task, 0.01


def random_gpt2() -> Case:
    """Random weights, 12 heads in each of 4 layers: every edge does a little, few do much."""
    return gpt2(4, 96), random_pairs(50257, 15, 10)[:4], 0.06


CASES: dict[str, Callable[[], Case]] = {"induction": toy, "random-gpt2": random_gpt2}


def case(model: mi.Model, task: mi.Task, threshold: float, rounds: int) -> dict[str, Any]:
    """Calls, seconds, and whether all found the same."""
    answer = task.answer_pos.unique().tolist()
    n_edges = mi.GraphShape.of(model).n_edges

    def one_by_one() -> None:
        with torch.no_grad():
            for _ in range(n_edges):
                model(task.clean, keep=answer)

    runs: dict[str, Callable[[], Any]] = {
        "mi.acdc": lambda: mi.acdc(model, task, threshold)[0],
        "mi.acdc(ahead=1)": lambda: mi.acdc(model, task, threshold, ahead=1)[0],
        "one full forward each": one_by_one,
    }
    mi.acdc(model, task[:1], 1e6)  # the check of replay runs once, and is not part of it
    times, results = in_turns(runs, rounds, model.device, warm=False)
    fast, plain = results["mi.acdc"], results["mi.acdc(ahead=1)"]

    def ratios(slow: str) -> list[float]:
        return [round(theirs / ours, 2) for theirs, ours in zip(times[slow], times["mi.acdc"], strict=True)]

    return {
        "model": model.name,
        "threads": torch.get_num_threads(),
        "work": f"{n_edges} edges, {len(task)} pairs of {task.clean.shape[1]} tokens that first differ at "
        f"{int(task.first_difference.min())}, threshold {threshold}",
        "edges that stay": len(fast),
        "share that stays": round(len(fast) / n_edges, 4),
        "the same edges one by one": set(fast) == set(plain),
        "calls": {"mi.acdc": fast.provenance["calls"], "one by one": fast.provenance["tests"]},
        "times fewer calls": round(fast.provenance["tests"] / fast.provenance["calls"], 1),
        "rows in these calls": fast.provenance["rows"],
        "seconds": {name: [round(value, 2) for value in values] for name, values in times.items()},
        "ahead=1 / mi.acdc, each round": ratios("mi.acdc(ahead=1)"),
        "one full forward each / mi.acdc, each round": ratios("one full forward each"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    measure_cases(parser, CASES, 1, lambda name, arguments: case(*CASES[name](), arguments.rounds))
