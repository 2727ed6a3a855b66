"""How well does each method tell the edges of a known circuit from all others? On the hand-set toys and on generated ones.

Writes ``docs/truth.md``. Ten minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import mechinterp as mi
from mechinterp.toys import Toy

HAND_SET = ("induction", "gqa_induction", "copy", "memory")
Scores = dict[tuple[str, str, str], float]

PAGE = """# Methods against circuits that are known

Each toy is a transformer whose circuit is known from how its weights were made: `mi.toys`. Four were set by hand, {n} are
programs drawn at random and set into weights: `mi.toys.planted(seed=...)` for seeds 0 to {last}. The truth of a drawn program
follows from what its steps read and write, and no method is run for it. A method scores every edge of a toy's graph by what
resampling it from the counterfactual prompt changes; AUROC is the chance that an edge of the truth scores above one that is not
(absolute values; ties count one half).

Made by `{command}`.

| AUROC | {names} |
| --- |{rule}
{hand_set}
| **{n} generated: median** | {median} |
| **{n} generated: worst** | {worst} |
| generated toys with AUROC below 0.95 | {below} |
| generated toys with AUROC below 1 | {imperfect} |

AUROC forgives a lot where most edges are in no circuit. Of the best-scored edges, as many as the truth has, how many are true:

| precision at the size of the truth | {names} |
| --- |{rule}
| {n} generated: mean | {precision_mean} |
| {n} generated: worst | {precision_worst} |
| true edges scored less than a tenth of their exact effect, of {n_true} | {small} |

## What the generated toys are

`exact` is `mi.edge_effects`, `EAP` is `mi.attribute(unit="edge")` with the gradient at the clean run and `EAP-IG` the same with
{steps} points on the way to the counterfactual; `EAP, QK fix` computes attention exactly where queries or keys change
(`rules="qk-fix"`). `ACDC` removes edges one after another (`mi.acdc`); an edge scores the highest threshold at which it stays,
of {thresholds}. Decoys write what nobody reads, so that their exact effect is zero:
these toys show where an estimate breaks down, not how it fares among many edges of small effect.

Mean AUROC, and how many true edges score less than a tenth of their exact effect:

| generated toys with | toys | {per_method} |
| --- | ---: |{rule}
{sorts}

- *Twins*: two heads write the same for a reader that one of them satisfies. At the clean run their gradients nearly vanish, and
  estimates are far too small. AUROC hardly shows it here, because decoys score still less. ACDC removes one twin without a loss,
  so that the other one is all that counts: what it finds is enough for the answer, and not all that has an effect.
- *A sign that does not matter* (`either`): the reader fires for one sign or the other, so that swapping the sign changes nothing.
  Each neuron still has a slope, and estimates from gradients count it: edges that are not in the truth score like those that are.

## Where a method is not perfect

Edges in brackets with their exact effect and the estimate, in units of the difference between clean and corrupt.

{failures}
"""


def effects_of(effects: mi.Effects) -> Scores:
    """Absolute scores by edge."""
    return {tuple(edge): float(v) for edge, v in zip(effects.coords["edge"], effects.values, strict=True)}  # type: ignore[misc]


def survivors(toy: Toy) -> Scores:
    """For each edge the highest threshold at which ACDC keeps it; 0 where none does."""
    circuits = mi.acdc(toy.model, toy.task, THRESHOLDS)
    scores: Scores = {tuple(edge): 0.0 for edge in mi.Circuit.full(toy.model).edges}
    for threshold, circuit in zip(THRESHOLDS, circuits, strict=True):
        scores |= {tuple(edge): threshold for edge in circuit.edges}
    return scores


STEPS = 5
# Ascending, in units of the difference between clean and corrupt.
THRESHOLDS = [round(0.001 * 2**i, 3) for i in range(10)]
# A method is a name and what scores every edge of a toy; a search that removes edges scores them by when they went.
METHODS: dict[str, Callable[[Toy], Scores]] = {
    "exact": lambda toy: effects_of(mi.edge_effects(toy.model, toy.task)),
    "EAP": lambda toy: effects_of(mi.attribute(toy.model, toy.task, unit="edge", steps=0)),
    "EAP-IG": lambda toy: effects_of(mi.attribute(toy.model, toy.task, unit="edge", steps=STEPS)),
    "EAP, QK fix": lambda toy: effects_of(mi.attribute(toy.model, toy.task, unit="edge", rules="qk-fix")),
    "ACDC": survivors,
}


def auroc(scores: Scores, truth: set[tuple[str, str, str]]) -> float:
    """The chance that a true edge scores above another; ties count one half."""
    true = [abs(v) for edge, v in scores.items() if edge in truth]
    others = [abs(v) for edge, v in scores.items() if edge not in truth]
    won = sum((t > o) + (t == o) / 2 for t in true for o in others)
    return won / (len(true) * len(others))


def precision(scores: Scores, truth: set[tuple[str, str, str]]) -> float:
    """How many of the best-scored edges are true, of as many as the truth has."""
    best = sorted(scores, key=lambda edge: -abs(scores[edge]))[: len(truth)]
    return len(truth & set(best)) / len(truth)


def sorts_of(toy: Toy) -> Iterable[str]:
    """What could make a generated toy hard."""
    assert toy.program is not None
    steps = toy.program.steps
    hard = {
        "twins": bool(toy.program.twins),
        "a sign that does not matter": any(step.kind == "either" for step in steps),
        "a step against the answer": any(step.factor < 0 for step in steps),
    }
    return [name for name, there in hard.items() if there] or ["none of these"]


def failure(name: str, toy: Toy, method: str, scores: Scores, exact: Scores, value: float) -> str:
    """One line on a toy where a method is not perfect: the weakest true edge and the strongest other."""
    truth = {tuple(edge) for edge in toy.truth["resample"]}
    weakest = min(sorted(truth), key=lambda edge: abs(scores[edge]))
    strongest = max((edge for edge in scores if edge not in truth), key=lambda edge: abs(scores[edge]))
    said = "; ".join(
        f"{what} `{mi.Edge(*edge)}` ({exact[edge]:+.2g}, {scores[edge]:+.2g})"
        for what, edge in (("weakest true edge", weakest), ("strongest other", strongest))
    )
    return f"- {name}, {method} {value:.3f}: {toy.description}. {said}"


def main() -> None:
    """Score, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generated", type=int, default=50, help="number of generated toys")
    parser.add_argument("--n", type=int, default=8, help="pairs of prompts")
    parser.add_argument("--out", type=Path, default=Path("docs/truth.md"))
    arguments = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    precisions: dict[str, list[float]] = {method: [] for method in METHODS}
    small: dict[str, dict[str, int]] = {}
    n_true = 0
    by_sort: dict[str, list[str]] = {}
    failures: list[str] = []
    names = [*HAND_SET, *(f"planted-{seed}" for seed in range(arguments.generated))]
    started = time.monotonic()
    for name in names:
        make = mi.toys.maker(name)
        toy = make() if name == "memory" else make(n=arguments.n)
        truth = {tuple(edge) for edge in toy.truth["resample"]}
        found = {method: scored(toy) for method, scored in METHODS.items()}
        rows[name] = {method: auroc(scores, truth) for method, scores in found.items()}
        for method, scores in found.items():
            if rows[name][method] < 1:
                failures.append(failure(name, toy, method, scores, found["exact"], rows[name][method]))
            if name not in HAND_SET:
                precisions[method].append(precision(scores, truth))
                too_small = sum(abs(scores[edge]) < abs(found["exact"][edge]) / 10 for edge in truth)
                small.setdefault(name, {})[method] = too_small
        n_true += 0 if name in HAND_SET else len(truth)
        for sort in sorts_of(toy) if name not in HAND_SET else ():
            by_sort.setdefault(sort, []).append(name)
        sys.stderr.write(f"{time.monotonic() - started:6.0f} s  {name:<14} {rows[name]}\n")
    drawn = {method: [rows[name][method] for name in names if name not in HAND_SET] for method in METHODS}

    def line(numbers: Iterable[float], form: str = ".3f") -> str:
        return " | ".join(f"{number:{form}}" for number in numbers)

    page = PAGE.format(
        n=arguments.generated,
        last=arguments.generated - 1,
        command=f"python scripts/truth_table.py --generated {arguments.generated} --n {arguments.n}",
        steps=STEPS,
        thresholds=", ".join(f"{threshold:g}" for threshold in THRESHOLDS),
        names=" | ".join(METHODS),
        per_method=" | ".join(METHODS),
        rule=" ---: |" * len(METHODS),
        hand_set="\n".join(f"| `{name}` | {line(rows[name].values())} |" for name in HAND_SET),
        median=line(statistics.median(values) for values in drawn.values()),
        worst=line(min(values) for values in drawn.values()),
        below=line((sum(value < 0.95 for value in values) for values in drawn.values()), "d"),
        imperfect=line((sum(value < 1 for value in values) for values in drawn.values()), "d"),
        precision_mean=line(statistics.mean(values) for values in precisions.values()),
        precision_worst=line(min(values) for values in precisions.values()),
        small=line((sum(each[method] for each in small.values()) for method in METHODS), "d"),
        n_true=n_true,
        sorts="\n".join(
            f"| {sort} | {len(members)} | "
            + " | ".join(
                f"{statistics.mean(rows[name][m] for name in members):.3f}, {sum(small[name][m] for name in members)}"
                for m in METHODS
            )
            + " |"
            for sort, members in sorted(by_sort.items())
        ),
        failures="\n".join(failures) or "Nowhere.",
    )
    arguments.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
