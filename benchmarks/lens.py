"""Lenses on SmolLM2-135M: is the last layer the model, do the parts sum, what does a tuned lens gain, and what does it cost?

python benchmarks/lens.py                                                       # a minute: logit lens, direct logit attribution
python benchmarks/lens.py --steps 16 --positions 112 --lr 3e-3 --out FILE.json  # and a tuned lens of every layer: minutes

The lens is fitted on the text of Python's own help pages, and judged on pages that took no part: neither in the fit nor in the
choice of its best step.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mechinterp as mi


def pages(model: Any, length: int, n: int) -> torch.Tensor:
    """Rows ``[n length]`` of the language reference that comes with Python (`pydoc_data`), each beginning with BOS."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(model.tokenizer(text[: 12 * n * length], add_special_tokens=False)["input_ids"])
    # Rows from all over the text, not its first pages.
    rows = ids[: len(ids) // (length - 1) * (length - 1)].reshape(-1, length - 1)
    rows = rows[torch.linspace(0, len(rows) - 1, n).long()]
    return torch.cat([torch.full((n, 1), model.tokenizer.bos_token_id), rows], dim=1)


def say(text: str) -> None:
    """A line of the results."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def peak() -> float:
    """The most memory that this process has had, in GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def keep(file: Path | None, name: str, found: dict[str, Any]) -> None:
    """Write a case at once, with how it was made, and leave the others in the file as they are."""
    if file is None:
        return
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    made = {"command": "python " + " ".join(sys.argv), "machine": platform.machine(), "torch": torch.__version__,
            "model": "SmolLM2-135M", "device": "CPU, 1 thread"}  # fmt: skip
    results[name] = made | found
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def readings(model: mi.Model, task: mi.Task) -> dict[str, Any]:
    """The logit lens and direct logit attribution: seconds, memory, and how far they are from the model's own numbers."""
    start = time.perf_counter()
    reading = mi.logit_lens(model, task)
    answers = torch.cat([task.right, task.wrong], dim=1)
    found: dict[str, Any] = {
        "logit lens": {
            "work": f"30 layers, {task.clean.numel()} positions",
            "seconds": round(time.perf_counter() - start, 2),
            "peak GiB": peak(),
        }
    }
    with torch.no_grad():
        whole = model(task.clean)
    logits = whole.gather(2, answers[:, None].expand(-1, task.clean.shape[1], -1))
    assert reading.logits is not None
    found["logit lens"]["last layer - model"] = float((reading.logits[-1] - logits).abs().max())
    rows = torch.arange(len(task))
    at_answer = whole[rows, task.answer_pos]
    difference = at_answer[rows, task.right[:, 0]] - at_answer[rows, task.wrong[:, 0]]
    for by in ("component", "head", "neuron", "path"):
        start = time.perf_counter()
        parts = mi.direct_logits(model, task, by=by)
        found[f"direct_logits by {by}"] = {
            "seconds": round(time.perf_counter() - start, 2),
            "peak GiB": peak(),
            "largest error": parts.provenance["largest_error"],
            "strongest": {name: round(value, 2) for name, value in parts.top(5)},
        }
        if by == "component":
            found[f"direct_logits by {by}"]["parts - model"] = float((parts.per_example.sum(0) - difference).abs().max())
    return found


def tuned(model: mi.Model, given: argparse.Namespace) -> dict[str, Any]:
    """A tuned lens, and KL(final || lens) on fresh pages for each layer, in nats."""
    text = pages(model, given.length, given.prompts + given.fresh)
    apart = torch.zeros(len(text), dtype=torch.bool)
    apart[torch.linspace(0, len(text) - 1, given.fresh).long()] = True
    layers = sorted({*range(0, model.cfg.n_layers, given.every), model.cfg.n_layers - 1})
    start, cpu = time.perf_counter(), time.process_time()
    lens = mi.fit_tuned_lens(
        model, text[~apart], seed=0, steps=given.steps, positions=given.positions, check_every=max(1, given.steps // 2),
        check_positions=384, lr=given.lr, resume=given.resume, progress=True, layers=layers,
    )  # fmt: skip
    took, cpu = time.perf_counter() - start, time.process_time() - cpu
    if given.save:
        lens.save(given.save)
    at = ",".join(map(str, layers))
    kl = [mi.logit_lens(model, text[apart], at=f"L{at}.resid_pre", lens=each).kl.mean((1, 2)).tolist() for each in (None, lens)]
    return {
        "work": f"{len(layers)} layers, {given.steps} steps of {given.positions} positions",
        "seconds": round(took),
        # Less than seconds where others used the machine as well.
        "CPU seconds": round(cpu),
        "peak GiB": peak(),
        "judged on": f"{int(apart.sum()) * given.length} positions of pages that took no part",
        "mean KL, logit lens": round(sum(kl[0]) / len(layers), 3),
        "mean KL, tuned lens": round(sum(kl[1]) / len(layers), 3),
        "layers": {
            layer: {"logit lens": round(before, 3), "tuned lens": round(after, 3), "best step": step}
            for layer, before, after, step in zip(layers, *kl, lens.provenance["best_step"], strict=True)
        },
    }


def main() -> None:
    """Measure, and say what was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=0, help="of the tuned lens; 0 fits none")
    options.add_argument("--positions", type=int, default=128)
    options.add_argument("--prompts", type=int, default=200)
    options.add_argument("--fresh", type=int, default=8, help="pages that only judge")
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--every", type=int, default=1, help="fit every so many layers, and the last")
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--resume", default=None)
    options.add_argument("--save", default=None)
    options.add_argument("--out", type=Path, help="a JSON file")
    given = options.parse_args()
    torch.set_num_threads(1)
    model = mi.load("smollm2")
    found = readings(model, mi.tasks.ioi(model.tokenizer, n=16, seed=0))
    say(json.dumps(found, indent=2))
    keep(given.out, "readings", found)
    if given.steps:
        found = tuned(model, given)
        say(json.dumps(found, indent=2))
        keep(given.out, "tuned lens", found)


if __name__ == "__main__":
    main()
