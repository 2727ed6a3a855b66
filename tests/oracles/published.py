"""The committed numbers of other people's code, under the names that this package uses. See README.md beside it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import mechinterp as mi

HERE = Path(__file__).parent
Edge = tuple[str, str, str]


@cache
def model() -> mi.Model:
    """The tiny GPT-2 that the numbers are about."""
    return mi.load(str(HERE / "tiny-gpt2"), name="tiny-gpt2")


@cache
def model64() -> mi.Model:
    """The same in float64, as the numbers were made."""
    from transformers import GPT2LMHeadModel

    return mi.load(GPT2LMHeadModel.from_pretrained(HERE / "tiny-gpt2").double(), name="tiny-gpt2 in float64")


@cache
def task() -> mi.Task:
    pairs = json.loads((HERE / "pairs.json").read_text())
    return mi.Task(name="oracle", **{key: pairs[key] for key in ("clean", "corrupt", "right", "wrong")})


@cache
def eapig() -> dict[str, Any]:
    return json.loads((HERE / "eapig_tiny_gpt2.json").read_text())


@cache
def autocircuit() -> dict[str, Any]:
    return json.loads((HERE / "autocircuit_tiny_gpt2.json").read_text())


def eapig_node(name: str) -> str:
    return "embed" if name == "input" else name


def eapig_edges(edges: list[list[str | None]]) -> list[Edge]:
    return [(eapig_node(src), eapig_node(dst), port or "in") for src, dst, port in edges]  # type: ignore[arg-type]


def eapig_scores(column: str) -> dict[Edge, float]:
    """A column as the mean over the six pairs of the change of the metric when the edge is corrupted."""
    stored = eapig()["edge_scores"][column]
    names = eapig_edges([row[:3] for row in stored["edges"]])
    return dict(zip(names, (row[3] * stored["scale_to_batch_mean"] for row in stored["edges"]), strict=True))


def autocircuit_edges() -> list[Edge]:
    """Its edges in its order: ``['MLP 2->Resid End', 'MLP 2', 'Resid End', 'in', ...]`` is ``('m2', 'logits', 'in')``."""

    def node(name: str) -> str:
        words = name.split()
        if words[0] == "MLP":
            return f"m{words[1]}"
        if words[0] == "Resid":
            return "embed" if words[1] == "Start" else "logits"
        layer, head = words[0].removeprefix("A").split(".")[:2]
        return f"a{layer}.h{head}"

    return [(node(row[1]), node(row[2]), row[3].lower()) for row in autocircuit()["edges"]]
