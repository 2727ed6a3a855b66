"""What a registry and captures cost on top of the wrapped model's own forward pass: paired, interleaved, medians of ratios.

``make bench`` runs this; seconds are never a test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mechinterp as mi
from mechinterp.core.sites import Site


def ratio(one: Callable[[], object], base: Callable[[], object], *, rounds: int) -> float:
    """Median of the ratios of neighbouring runs, which share whatever else the machine is doing."""
    found = []
    for i in range(rounds + 2):
        seconds = {}
        # Who comes first alternates.
        for call in (one, base) if i % 2 else (base, one):
            start = time.perf_counter()
            call()
            seconds[call] = time.perf_counter() - start
        found.append(seconds[one] / seconds[base])
    return statistics.median(found[2:])


def overhead(*, rounds: int = 60) -> dict[str, float]:
    """Seconds of each way to run, over those of the bare model; GPT-2 small's shape, random weights, 8 prompts of 15 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = mi.load(GPT2LMHeadModel(GPT2Config()), name="gpt2-small-random")
    tokens = torch.randint(0, 50257, (8, 15), generator=torch.Generator().manual_seed(1))
    residual = mi.select("L*.resid_pre | L*.resid_mid | L*.resid_post", model.cfg)
    idle = mi.HookRegistry(model)

    def bare() -> None:
        model.hf(input_ids=tokens, use_cache=False)

    def registered() -> None:
        with idle:
            bare()

    def capturing() -> None:
        kept: dict[Site, torch.Tensor] = {}
        registry = mi.HookRegistry(model)
        registry.capture(residual, kept)
        with registry:
            bare()

    def run() -> None:
        mi.run(model, tokens, capture=residual)

    with torch.no_grad():
        return {
            "idle registry": ratio(registered, bare, rounds=rounds),
            "capturing all residual sites": ratio(capturing, bare, rounds=rounds),
            "mi.run with the same captures": ratio(run, bare, rounds=rounds),
            "the bare model against itself": ratio(lambda: bare(), bare, rounds=rounds),
        }


def main() -> None:
    """Measure, print, and write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    found = {name: round(value, 3) for name, value in overhead(rounds=arguments.rounds).items()}
    sys.stdout.write("".join(f"{name}: {value} of the bare forward pass\n" for name, value in found.items()))
    if arguments.out:
        content = {"command": "python " + " ".join(sys.argv), "threads": torch.get_num_threads(), "results": found}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
