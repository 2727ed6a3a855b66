"""What a circuit is said to be: heads, places, attention and edges, each against a computation by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.discovery.describe import HeadStory, _role


def test_the_planted_induction_circuit() -> None:
    for toy in (mi.toys.induction(), mi.toys.gqa_induction()):
        last, first = mi.describe(toy.truth["resample"], toy.model, toy.task)
        assert {first.node, last.node} == set(toy.heads)
        key = "kv0" if toy.name == "gqa_induction" else "h5"
        # The later head attends from the end to the target, which it finds by its key: what came before it.
        assert last.node.startswith("a1.")
        assert last.effect == pytest.approx(1.0, abs=1e-2)
        assert (last.at[0], last.attends_to[0][0], last.writes) == ("end", "target", ("logits",))
        assert (first.at[0], first.attends_to[0][0], first.writes) == ("target", "earlier", (f"a1.{key}<k>",))
        assert min(last.at[1], first.at[1]) > 0.95
        assert min(last.attends_to[0][1], first.attends_to[0][1]) > 0.9
        assert set(last.reads) == {f"{first.node}<k>", "embed<q>", "embed<v>"}
        assert first.reads == ("embed<v>",)


def test_effects_are_measured_and_ordered(setting: Any) -> None:
    full = mi.discover(setting.model, setting.task, edges=40)
    stories = mi.describe(full, setting.model, setting.task, heads=5)
    exact = mi.patch(setting.model, setting.task, "L*.H*.z", direction="noise")
    assert len(stories) == 5
    for story in stories:
        layer, head = (int(part) for part in story.node[1:].split(".h"))
        assert story.effect == pytest.approx(exact.values[layer, head].item(), abs=1e-4)
    sizes = [abs(story.effect) for story in stories]
    assert sizes == sorted(sizes, reverse=True)
    assert {story.node for story in stories} <= set(full.heads())
    every = mi.describe(full, setting.model, setting.task)
    assert {story.node for story in every} == set(full.heads())


def test_place_and_attention_by_hand(setting: Any) -> None:
    """The place of largest effect, named where the task has a name for it; attention averaged over the prompts."""
    model, task = setting.model, setting.task
    circuit = mi.discover(model, task, edges=40)
    by_pos = mi.attribute(model, task, "L*.H*.z", over=("layer", "head", "pos"), steps=3).per_example
    patterns = {layer: mi.run(model, task, capture=f"L{layer}.pattern")[f"L{layer}.pattern"] for layer in (0, 1)}

    def word(row: int, pos: int) -> str:
        if task.positions["changed"][row] == pos:
            return "changed"
        return "start" if pos == 0 else f"position {pos}"

    for story in mi.describe(circuit, model, task):
        layer, head = (int(part) for part in story.node[1:].split(".h"))
        shares: dict[str, float] = {}
        for row in range(5):
            for pos in range(8):
                shares[word(row, pos)] = shares.get(word(row, pos), 0.0) + by_pos[layer, head, pos, row].item() / 5
        place = max(shares, key=lambda name: abs(shares[name]))
        total = sum(abs(value) for value in shares.values())
        assert story.at == (place, pytest.approx(abs(shares[place]) / total, abs=1e-3))
        looked: dict[str, float] = {}
        queries = [(row, pos) for row in range(5) for pos in range(8) if word(row, pos) == place]
        for row, query in queries:
            for pos in range(8):
                weight = patterns[layer][row, head, query, pos].item()
                looked[word(row, pos)] = looked.get(word(row, pos), 0.0) + weight / len(queries)
        expected = sorted(looked.items(), key=lambda pair: -pair[1])[:3]
        expected = [pair for i, pair in enumerate(expected) if i == 0 or pair[1] >= 0.1]
        assert [name for name, _ in story.attends_to] == [name for name, _ in expected]
        assert [share for _, share in story.attends_to] == pytest.approx([share for _, share in expected], abs=1e-3)


def test_edges_are_the_strongest_of_the_circuit(setting: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, edges=40)
    for story in mi.describe(circuit, setting.model, setting.task):
        own = {story.node, circuit.shape.kv_node(story.node)}
        out = sorted((e for e in circuit.edges if e.src == story.node), key=lambda e: -abs(circuit.scores[e] or 0.0))[:4]
        into = sorted((e for e in circuit.edges if e.dst in own), key=lambda e: -abs(circuit.scores[e] or 0.0))[:4]
        assert story.writes == tuple(e.dst + (f"<{e.port}>" if e.port != "in" else "") for e in out)
        assert story.reads == tuple(f"{e.src}<{e.port}>" for e in into)


def test_more_prompts_than_one_part(setting: Any) -> None:
    """Attention is averaged over all prompts, however many are run at once."""
    circuit = mi.discover(setting.model, setting.task, edges=40)
    few = mi.describe(circuit, setting.model, setting.task)
    many = mi.describe(circuit, setting.model, setting.task[[0, 1, 2, 3, 4] * 8])
    for one, other in zip(few, many, strict=True):
        assert (one.node, one.at[0], one.reads) == (other.node, other.at[0], other.reads)
        assert [share for _, share in one.attends_to] == pytest.approx([share for _, share in other.attends_to], abs=1e-4)


def test_a_circuit_without_heads(setting: Any) -> None:
    assert mi.describe(mi.Circuit.empty(setting.model), setting.model, setting.task) == ()
    direct = mi.Circuit.from_edges(setting.model, ["embed->m0", "m0->logits"])
    assert mi.describe(direct, setting.model, setting.task) == ()
    # A head on no path from embed to logits is no part of it.
    dangling = mi.Circuit.from_edges(setting.model, ["embed->m0", "m0->logits", "embed->a1.h0<q>"])
    assert mi.describe(dangling, setting.model, setting.task) == ()


def test_a_circuit_without_scores(setting: Any) -> None:
    stories = mi.describe(mi.Circuit.full(setting.model), setting.model, setting.task)
    assert len(stories) == 8
    assert all(len(story.writes) <= 4 for story in stories)


@pytest.mark.parametrize(
    ("at", "looks", "writes", "effect", "role"),
    [
        ("end", ("IO", 0.5), ("logits",), 0.3, "name mover"),
        ("end", ("target", 0.5), ("logits",), 0.3, "induction"),
        ("end", ("target", 0.5), ("logits",), -0.3, ""),
        ("end", ("IO", 0.5), ("m5", "logits"), -0.3, "negative name mover"),
        ("end", ("IO", 0.5), ("m5",), 0.3, ""),
        ("end", ("IO", 0.1), ("logits",), 0.3, ""),
        ("end", ("S2", 0.5), ("a9.h1<q>",), 0.3, "S-inhibition"),
        ("S2", ("S1", 0.5), ("a9.h1<q>",), 0.3, "duplicate token"),
        ("S2", ("S1+1", 0.5), ("a9.h1<q>",), 0.3, "induction"),
        ("S1+1", ("S1", 0.5), ("a9.h1<k>",), 0.3, "previous token"),
        ("target", ("earlier", 0.5), ("a9.h1<k>",), 0.3, "previous token"),
        ("end", ("C", 0.5), ("a9.h1<q>", "logits"), 0.3, "argument mover"),
        ("end", ("C", 0.5), ("logits",), -0.3, ""),
        ("position 3", ("position 2", 0.9), ("logits",), 0.3, ""),
    ],
)
def test_the_usual_words(at: str, looks: tuple[str, float], writes: tuple[str, ...], effect: float, role: str) -> None:
    assert _role(at, looks, writes, effect) == role


def test_a_story_in_one_line() -> None:
    story = HeadStory(
        node="a9.h6",
        effect=0.254,
        at=("end", 0.9),
        attends_to=(("IO", 0.61), ("start", 0.2)),
        reads=("a5.h1<q>",),
        writes=("logits", "a10.h7<q>"),
        role="name mover",
    )
    assert str(story) == "a9.h6 [name mover]: +0.25; at end attends to IO (61%), start (20%); writes to logits, a10.h7<q>"


def test_the_model_is_left_alone(setting: Any) -> None:
    def census() -> list[tuple[int, int]]:
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in setting.model.hf.modules()]

    before, state = census(), torch.get_rng_state()
    mi.describe(mi.Circuit.full(setting.model), setting.model, setting.task, heads=2)
    assert census() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in setting.model.hf.parameters())
