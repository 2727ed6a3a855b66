"""Does a circuit's file still tell the truth? What it claims, measured again, value by value."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from mechinterp.core.ablation import Ablation
from mechinterp.core.arguments import check_model
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.discovery.discover import score_again
from mechinterp.discovery.evaluate import evaluate
from mechinterp.errors import FileFormatError, MetricError, TaskError
from mechinterp.graph import Circuit, check_circuit
from mechinterp.graph.certificate import Certificate
from mechinterp.tasks import METRICS, TASKS, Task

__all__ = ["Check", "Verification", "rebuild_task", "verify"]

# Other machines and versions round differently; what was drawn by chance is drawn by the same seed.
RELATIVE, ABSOLUTE = 2e-3, 1e-3
RANDOM = ("random_faithfulness", "random_interval", "beats_random")
OF_SCORES = ("curve", "stability")
# Of words to draw from a provenance tells what there was, not the words: where others were given, the two differ.
WORDS = ("tokenizer", "templates", "names", "nouns", "verbs", "words")
COUNTS = ("prompts", "edges", "connected", "all_edges", "nodes", "neurons")


@dataclass(frozen=True)
class Check:
    """One claim: what the file says, what was found, and how far apart they may be."""

    name: str
    claimed: float | str
    found: float | str
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the claim was found again."""
        if isinstance(self.claimed, str) or isinstance(self.found, str):
            return self.claimed == self.found
        return math.isclose(self.claimed, self.found, rel_tol=0, abs_tol=self.tolerance)


@dataclass(frozen=True)
class Verification:
    """What still holds of a file, and what was not looked at. Made by `verify`."""

    certificate: Certificate
    checks: tuple[Check, ...]
    unchecked: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether everything that was checked holds."""
        return all(check.holds for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = [{"name": c.name, "claimed": c.claimed, "found": c.found, "holds": c.holds} for c in self.checks]
        return {"holds": self.holds, "checks": rows, "unchecked": list(self.unchecked)}

    def __repr__(self) -> str:
        origin, kept = self.certificate, sum(check.holds for check in self.checks)
        lines = [f"Verification: {origin.task} on {origin.model}: {kept} of {len(self.checks)} claims hold"]
        for check in self.checks:
            mark = "holds " if check.holds else "BROKEN"
            lines.append(f"  {mark} {check.name:<32} claimed {_shown(check.claimed):>10}  found {_shown(check.found):>10}")
        lines += [f"  not checked: {name}" for name in self.unchecked]
        return "\n".join(lines)


def verify(
    circuit: Circuit | str | os.PathLike[str],
    model: Model,
    *,
    quick: bool = False,
    pairs: Path | None = None,
    progress: bool = False,
) -> Verification:
    """Which claims of this circuit's certificate hold on this model?

    The prompts that judged it are made again as the file says, the circuit is evaluated on them with the same seed and ablation,
    and every number is compared: counts exactly, shares of prompts within one prompt, others within 0.002 of their size or 0.001.

    Parameters
    ----------
    circuit
        Saved with a report; or its file, or the file's folder.
    model
        The model that it names.
    quick
        Leave out random circuits and what a thorough evaluation added; the result says so.
    pairs
        Where the file of pairs lies now, if the prompts came from one.

    Raises
    ------
    GraphError
        It is neither a circuit nor the name of a file.
    FileFormatError
        The circuit carries no evaluation.
    TaskError, MetricError
        The prompts cannot be made again, or the metric has no name here.

    Notes
    -----
    Cost: that of `mechinterp.evaluate`; ``quick`` 3 forward passes over the prompts. Where a size curve or stability is claimed,
    edges are scored again on the prompts that found the circuit. That the recorded command finds these very edges again is not
    checked: run the command.
    """
    if isinstance(circuit, str | os.PathLike):
        circuit = Circuit.load(circuit)
    check_circuit(circuit, "the circuit or its file comes first, then the model")
    check_model(model)
    certificate = circuit.certificate
    if certificate is None:
        raise FileFormatError(
            f"{circuit!r} carries no evaluation to verify; add one: circuit.with_report(report), with report = "
            "mi.evaluate(circuit, ...)"
        )
    if certificate.metric not in METRICS:
        raise MetricError(f"the circuit was judged by {certificate.metric!r}, a metric without a name here; evaluate it yourself")
    task = rebuild_task(model, certificate.prompts, certificate.task, pairs=pairs)
    further = {} if quick else dict(certificate.claims.get("further", {}))
    scores = _scores(circuit, model, further, pairs, progress)
    lost: tuple[str, ...] = ()
    if scores is None:
        lost = tuple(name for name in OF_SCORES if further.pop(name, None) is not None)
    again = evaluate(
        circuit,
        model,
        task,
        seed=certificate.seed,
        ablation=_ablation(certificate.ablation),
        random_circuits=0 if quick else certificate.random_circuits,
        resamples=certificate.resamples,
        confidence=certificate.confidence,
        thorough=bool(further),
        thorough_prompts=further.get("prompts", len(task)),
        scores=scores,
        metric=certificate.metric,
        progress=progress,
    ).to_json()
    skipped = (*RANDOM, "further") if quick else ()
    known = {name: value for name, value in certificate.claims.items() if name not in skipped}
    if further:
        known["further"] = further
    found = {label: value for name in known for label, value in _leaves(name, again[name])}
    checks = [Check("model", certificate.model, model.name, 0.0)]
    for name, claimed in known.items():
        for label, value in _leaves(name, claimed):
            checks.append(Check(label, value, found.get(label, "nothing"), _tolerance(label, value, len(task))))
    unchecked = [f"{name} (--quick)" for name in skipped if name in certificate.claims]
    unchecked += [f"{name} (how its edges were scored cannot be told from the file)" for name in lost]
    if certificate.command:
        unchecked.append(f"that its command finds the same edges again; run it: {shlex.join(certificate.command)}")
    else:
        unchecked.append("that the same edges are found again: no command is recorded")
    return Verification(certificate, tuple(checks), tuple(unchecked))


def _scores(circuit: Circuit, model: Model, further: Mapping[str, Any], pairs: Path | None, progress: bool) -> Effects | None:
    """The scores that the circuit was chosen by, if the file claims something of them."""
    if not set(OF_SCORES) & set(further):
        return None
    origin = circuit.provenance
    found_on = rebuild_task(model, origin["task_provenance"], origin["task"], pairs=pairs)
    return score_again(circuit, model, found_on, progress=progress)


def rebuild_task(model: Model, made: Mapping[str, Any], name: str, *, pairs: Path | None = None) -> Task:
    """The prompts that a provenance describes: generated by the same seed, then sampled and split as it says.

    Raises
    ------
    TaskError
        It does not say enough, or what is made is something else than it says.
    """
    generator = str(made.get("generator"))
    if generator == "toys":
        task = _of_toy(model.name.removeprefix("toy:"), made)
    elif generator == "from_jsonl":
        file = pairs or Path(str(made.get("path", made.get("file"))))
        if not file.is_file():
            raise TaskError(f"the prompts came from a file of pairs {file}, which is not here; say where: --pairs FILE")
        task = Task.from_jsonl(file, model.tokenizer, name=name)
    elif generator in TASKS:
        make = TASKS[generator]
        options = {key: made[key] for key in signature(make).parameters if key in made and key not in WORDS}
        task = make(model.tokenizer or model.cfg.d_vocab, **options)
    else:
        raise TaskError(
            f"the file does not say how the prompts of task {name!r} were made (generator {generator!r}), so that they "
            "cannot be made again; evaluate the circuit on prompts of your own"
        )
    for key in made:
        if key == "sample":
            task = task.sample(made["sample"], seed=made["sample_seed"])
        elif key == "split_seed":
            found_on, held_out = task.split(made["split_held_out"], seed=made["split_seed"])
            task = held_out if made["split"] == "held_out" else found_on
    task = replace(task, name=name)
    got = json.loads(json.dumps(dict(task.provenance), default=str))
    # Where a file lies, and under which name, is no property of the prompts.
    differs = [key for key in made if key not in ("path", "file", "tokenizer") and got.get(key) != made[key]]
    if differs:
        raise TaskError(
            f"the prompts cannot be made again: the file says {differs[0]} {made[differs[0]]!r}, and making them gives "
            f"{got.get(differs[0])!r}"
        )
    return task


def _of_toy(name: str, made: Mapping[str, Any]) -> Task:
    from mechinterp import toys

    if name not in toys.NAMES:
        raise TaskError(f"the prompts are a toy's own, and {name!r} is no toy; give the model that the file names")
    make = getattr(toys, name)
    takes = signature(make).parameters
    task: Task = make(**{key: made[key] for key in ("n", "seed") if key in made and key in takes}).task
    return task


def _ablation(text: str) -> Ablation | str:
    """The ablation that a report names; over prompts of its own it cannot be had again."""
    if " over " in f" {text}":
        raise TaskError(f"the circuit was judged under the ablation {text!r}, whose reference prompts are not in the file")
    kind = text.split(",")[0]
    seed, steps = re.search(r"seed (\d+)", text), re.search(r"(\d+) steps", text)
    if kind == "optimal" and steps:
        return Ablation(kind, steps=int(steps[1]))
    return Ablation(kind, seed=int(seed[1])) if seed else kind


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float | str]]:
    """Each number or word with its name."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(f"{name}.{key}", each)
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _leaves(f"{name}[{i}]", each)
    else:
        yield name, value if isinstance(value, str) else math.nan if value is None else float(value)


def _tolerance(name: str, claimed: float | str, prompts: int) -> float:
    if isinstance(claimed, str) or name in COUNTS:
        return 0.0
    if name.endswith("_accuracy"):
        return 1 / prompts + 1e-9
    # How many of few: a near tie may fall on the other side.
    if name == "beats_random" or name.endswith((".no_drop", ".needless")):
        return 1.0
    # Scores that are nearly equal may be ranked the other way: of many edges a few.
    if name.endswith(".core") or name.startswith("further.curve.connected"):
        return max(1.0, 0.02 * float(claimed))
    if name.startswith("further.stability."):
        return 0.01
    return max(ABSOLUTE, RELATIVE * abs(claimed))


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    # A count is said in full, however large.
    return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
