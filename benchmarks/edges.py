"""What exact edge effects and running circuits cost, by count and by the clock: ``python benchmarks/edges.py``.

Operations are counted by torch; seconds are taken in turns with the forward passes that they are compared with, so that a busy
machine slows both, and medians are given. A full forward pass is counted twice: unembedding all positions (what a plain call
does), and unembedding the one position where the answer is read (the least that a full forward pass can do).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sweeps import gpt2, in_turns, measure_cases, random_pairs, seconds
from torch.utils.flop_counter import FlopCounterMode

import mechinterp as mi


def operations(run: Callable[[], Any]) -> int:
    """Floating-point operations of one call, counted by torch (matrix products)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def every_nth(model: mi.Model, n: int) -> list[mi.Edge]:
    """About ``n`` edges, evenly spaced in the order of their readers: of each layer its share."""
    shape = mi.GraphShape.of(model)
    place = {node: i for i, node in enumerate(shape.nodes)}
    ordered = sorted(mi.Circuit.full(model).edges, key=lambda edge: (place[edge.dst], edge.port, place[edge.src]))
    return ordered[len(ordered) // n // 2 :: max(1, len(ordered) // n)]


def edges(model: mi.Model, task: mi.Task, sample: int, rounds: int) -> dict[str, Any]:
    """The plan for all edges; operations and seconds for each edge of a sample, beside full forward passes."""
    chosen, answer = every_nth(model, sample), task.answer_pos.unique().tolist()
    plan = mi.plan_edges(model, task)
    all_positions, one_position = operations(lambda: model(task.clean)), operations(lambda: model(task.clean, keep=answer))
    # One edge takes the two runs and the recording too, which all edges of a call share.
    mi.edge_effects(model, task, chosen[:1])
    first = operations(lambda: mi.edge_effects(model, task, chosen[:1]))
    counted = (operations(lambda: mi.edge_effects(model, task, chosen)) - first) / (len(chosen) - 1)
    forwards, packed_rows = max(1, len(chosen) // 5), 16
    packed = task.clean.repeat(packed_rows, 1)

    def one_by_one() -> None:
        with torch.no_grad():
            for _ in range(forwards):
                model(task.clean, keep=answer)

    def in_packs() -> None:
        with torch.no_grad():
            for _ in range(max(1, forwards // packed_rows)):
                model(packed, keep=answer)

    runs = {
        "edge": lambda: mi.edge_effects(model, task, chosen),
        "full forward": one_by_one,
        f"full forward, {packed_rows} to a pass": in_packs,
    }
    times, _ = in_turns(runs, rounds, model.device)
    done = dict(zip(runs, (len(chosen), forwards, packed_rows * max(1, forwards // packed_rows)), strict=True))
    each = {name: statistics.median(times[name]) / done[name] for name in runs}
    return {
        "model": model.name,
        "work": f"{plan.cells} edges, {len(task)} pairs of {task.clean.shape[1]} tokens that first differ at "
        f"{int(task.first_difference.min())}; sample of {len(chosen)} edges, evenly over readers",
        "plan": repr(plan),
        "operations of a full forward, all positions unembedded": all_positions,
        "operations of a full forward, one position unembedded": one_position,
        "planned, all edges / full forward each, all positions unembedded": round(plan.flops / plan.cells / all_positions, 3),
        "planned, all edges / full forward each, one position unembedded": round(plan.flops / plan.cells / one_position, 3),
        "counted, sample / full forward each, all positions unembedded": round(counted / all_positions, 3),
        "counted, sample / full forward each, one position unembedded": round(counted / one_position, 3),
        "seconds": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "milliseconds each": {name: round(1000 * value, 2) for name, value in each.items()},
        "times as fast as a full forward each": {
            name: round(value / each["edge"], 2) for name, value in each.items() if name != "edge"
        },
        "hours for all edges at this speed": round(each["edge"] * plan.cells / 3600, 3),
    }


def every_edge(model: mi.Model, task: mi.Task) -> dict[str, Any]:
    """Seconds of all edges, measured to the end, beside a full forward pass for each, timed on a sample before and after."""
    answer, forwards = task.answer_pos.unique().tolist(), 100

    def one_by_one() -> None:
        with torch.no_grad():
            for _ in range(forwards):
                model(task.clean, keep=answer)

    one_by_one()
    before, _ = seconds(one_by_one, model.device)
    took, effects = seconds(lambda: mi.edge_effects(model, task), model.device)
    after, _ = seconds(one_by_one, model.device)
    n, each = len(effects.values), (before + after) / 2 / forwards
    return {
        "model": model.name,
        "work": f"all {n} edges, {len(task)} pairs of {task.clean.shape[1]} tokens that first differ at "
        f"{int(task.first_difference.min())}",
        "threads": torch.get_num_threads(),
        "seconds": round(took, 1),
        "milliseconds for each edge": round(1000 * took / n, 2),
        "milliseconds of a full forward pass (before, after)": [round(1000 * value / forwards, 1) for value in (before, after)],
        "times as fast as a full forward pass for each": round(each * n / took, 2),
    }


def plan_only(model: mi.Model, task: mi.Task) -> dict[str, Any]:
    """The plan for all edges, and how long planning took."""
    started = time.perf_counter()
    plan = mi.plan_edges(model, task)
    return {
        "model": model.name,
        "work": f"{len(task)} pairs of {task.clean.shape[1]} tokens that first differ at {int(task.first_difference.min())}",
        "plan": repr(plan),
        "seconds to plan": round(time.perf_counter() - started, 2),
    }


def circuits(model: mi.Model, task: mi.Task, n: int, rounds: int, memory: str | None) -> dict[str, Any]:
    """Seconds of one circuit of several sizes, and of many in one call, in units of one forward pass over the same prompts."""
    every, generator = mi.Circuit.full(model).edges, random.Random(0)
    answer = task.answer_pos.unique().tolist()
    sizes = {"100 edges": 100, "1000 edges": 1000, "half of all edges": len(every) // 2}
    drawn = {name: mi.Circuit.from_edges(model, generator.sample(every, size)) for name, size in sizes.items()}
    many = [mi.Circuit.from_edges(model, generator.sample(every, 1000)) for _ in range(n)]

    def forward() -> None:
        with torch.no_grad():
            model(task.clean, keep=answer)

    runs: dict[str, Callable[[], Any]] = {"forward": forward}
    runs |= {name: lambda circuit=circuit: mi.run_circuits(model, task, circuit) for name, circuit in drawn.items()}
    times, _ = in_turns(runs, rounds, model.device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    together, _ = in_turns(
        {"forward": forward, "packed": lambda: mi.run_circuits(model, task, many, memory=memory)}, 1, model.device
    )
    unit, packed = statistics.median(times["forward"] + together["forward"]), statistics.median(together["packed"])
    counted = operations(lambda: mi.run_circuits(model, task, drawn["1000 edges"])) / operations(forward) - 2
    return {
        "model": model.name,
        "work": f"{len(task)} prompts of {task.clean.shape[1]} tokens that first differ at {int(task.first_difference.min())}",
        "seconds": {
            name: [round(value, 3) for value in values] for name, values in (times | {f"{n} packed": together["packed"]}).items()
        },
        "forwards for one circuit beyond its clean and corrupt runs": {
            name: round(medians[name] / unit - 2, 2) for name in drawn
        },
        "the same by operations": round(counted, 2),
        f"forwards for each of {n} circuits of 1000 edges, beyond the clean and corrupt runs": round((packed / unit - 2) / n, 2),
    }


def smollm2() -> tuple[mi.Model, mi.Task]:
    """The real model on eight pairs of indirect object identification."""
    model = mi.load("smollm2")
    return model, mi.tasks.ioi(model.tokenizer, n=8, seed=0)


def small() -> tuple[mi.Model, mi.Task]:
    """GPT-2 small's shape with random weights, on eight random pairs of 15 tokens."""
    return gpt2(12, 768), random_pairs(50257, 15, 0)


def main() -> None:
    """Time the cases that were named."""
    parser = argparse.ArgumentParser(description=__doc__)
    cases: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "edges-gpt2-small": lambda args: edges((case := small())[0], case[1][:1], args.sample, args.rounds),
        "every-edge-gpt2-small": lambda args: every_edge((case := small())[0], case[1][:1]),
        "circuits-gpt2-small": lambda args: circuits(*small(), args.circuits, args.rounds, args.memory),
        "circuits-smollm2": lambda args: circuits(*smollm2(), args.circuits, args.rounds, args.memory),
        "plan-smollm2": lambda args: plan_only(*smollm2()),
    }
    parser.add_argument("--sample", type=int, default=300, help="edges timed")
    parser.add_argument("--circuits", type=int, default=64, help="circuits in one call")
    parser.add_argument("--memory", help="for the packed circuits, such as '256 MiB'; what run_circuits takes by default")
    measure_cases(parser, cases, 3, lambda name, arguments: cases[name](arguments))


if __name__ == "__main__":
    main()
