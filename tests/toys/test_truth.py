"""The planted circuits against a brute force that knows nothing of the package: plain matrices, node by node.

`Graph` computes a module's logits from its weights alone, keeping what each node writes apart, so that any
edge can carry something else. It is first shown to give the module's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from mechinterp import toys
from mechinterp.graph import Circuit, GraphShape
from mechinterp.toys import Toy

HAND_SET = ("induction", "gqa_induction", "copy", "memory")
Values = dict[str, Tensor]
Edge = tuple[str, str, str]


@cache
def toy_of(name: str) -> Toy:
    """With few prompts: a brute force takes its time."""
    toy = toys.build(name)
    # Of the memory's 60 pairs, one for each fact.
    return replace(toy, task=toy.task[::5] if name == "memory" else toy.task[:10])


@cache
def plain_module(name: str) -> Any:
    """The same weights in a Hugging Face module that nothing has wrapped, in float64."""
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    wrapped = toy_of(name).model.hf
    make = GPT2LMHeadModel if wrapped.config.model_type == "gpt2" else LlamaForCausalLM
    config = type(wrapped.config)(**wrapped.config.to_dict())
    config._attn_implementation = "eager"
    module = make(config).eval()
    state = {key.replace("_original_component.", ""): value for key, value in wrapped.state_dict().items()}
    result = module.load_state_dict(state, strict=False)
    assert not result.missing_keys
    return module.double()


class Graph:
    """A module as a graph of nodes; ``ablated(...)`` are its last logits with some edges changed."""

    def __init__(self, module: Any, shape: GraphShape) -> None:
        self.shape = shape
        self.config = module.config
        self.w = {name: value.detach() for name, value in module.state_dict().items()}
        self.is_llama = module.config.model_type == "llama"
        self.d_head = module.config.head_dim if self.is_llama else module.config.n_embd // shape.n_heads

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[f"{name}.weight"]
        if self.is_llama:
            return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * weight
        x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config.layer_norm_epsilon).sqrt()
        return x / scale * weight + self.w[f"{name}.bias"]

    def rotate(self, x: Tensor) -> Tensor:
        half = self.d_head // 2
        base = self.config.rope_parameters["rope_theta"]
        theta = base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * theta
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def project(self, x: Tensor, layer: int, port: str, index: int) -> Tensor:
        """Norm, then the query, key or value of one head or KV head."""
        span = slice(index * self.d_head, (index + 1) * self.d_head)
        if self.is_llama:
            x = self.norm(x, f"model.layers.{layer}.input_layernorm")
            out = x @ self.w[f"model.layers.{layer}.self_attn.{port}_proj.weight"][span].T
            return out if port == "v" else self.rotate(out)
        x = self.norm(x, f"transformer.h.{layer}.ln_1")
        width = self.config.n_embd
        columns = slice("qkv".index(port) * width + span.start, "qkv".index(port) * width + span.stop)
        name = f"transformer.h.{layer}.attn.c_attn"
        return x @ self.w[f"{name}.weight"][:, columns] + self.w[f"{name}.bias"][columns]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, head: int) -> Tensor:
        scores = q @ k.transpose(1, 2) / self.d_head**0.5
        n = scores.shape[-1]
        z = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1) @ v
        span = slice(head * self.d_head, (head + 1) * self.d_head)
        if self.is_llama:
            return z @ self.w[f"model.layers.{layer}.self_attn.o_proj.weight"][:, span].T
        return z @ self.w[f"transformer.h.{layer}.attn.c_proj.weight"][span]

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        name = f"transformer.h.{layer}"
        x = self.norm(x, f"{name}.ln_2")
        hidden = x @ self.w[f"{name}.mlp.c_fc.weight"] + self.w[f"{name}.mlp.c_fc.bias"]
        return gelu(hidden, approximate="tanh") @ self.w[f"{name}.mlp.c_proj.weight"] + self.w[f"{name}.mlp.c_proj.bias"]

    def embed(self, tokens: Tensor) -> Tensor:
        if self.is_llama:
            return self.w["model.embed_tokens.weight"][tokens]
        return self.w["transformer.wte.weight"][tokens] + self.w["transformer.wpe.weight"][: tokens.shape[1]]

    def run(self, tokens: Tensor, read: Callable[[str, str, Values], Tensor]) -> tuple[Tensor, Values]:
        """Logits at the last position and every writer's output; `read(node, port, written)` is what a node hears."""
        shape, written = self.shape, {"embed": self.embed(tokens)}
        group = shape.n_heads // shape.n_kv_heads
        for layer in range(shape.n_layers):
            new = {}
            for head in range(shape.n_heads):
                name, shared = f"a{layer}.h{head}", f"a{layer}.kv{head // group}"
                source = shared if shape.grouped else name
                q = self.project(read(name, "q", written), layer, "q", head)
                k, v = (self.project(read(source, port, written), layer, port, head // group) for port in "kv")
                new[name] = self.attend(q, k, v, layer, head)
            written |= new
            if not shape.attn_only:
                written[f"m{layer}"] = self.mlp(read(f"m{layer}", "in", written), layer)
        final = self.norm(read("logits", "in", written)[:, -1], "model.norm" if self.is_llama else "transformer.ln_f")
        return final @ self.w["lm_head.weight"].T, written

    def plain(self, tokens: Tensor) -> tuple[Tensor, Values]:
        return self.run(tokens, lambda node, port, written: sum_of(written))

    def ablated(self, tokens: Tensor, instead: Values, cuts: list[set[Edge]]) -> Tensor:
        """Logits [cut batch vocab], each with other edges carrying the values of `instead`."""

        def read(node: str, port: str, written: Values) -> Tensor:
            heard = sum_of(written).unflatten(0, (len(cuts), -1))
            for row, cut in enumerate(cuts):
                for u in written:
                    if (u, node, port) in cut:
                        heard[row] += instead[u] - written[u].unflatten(0, (len(cuts), -1))[row]
            return heard.flatten(0, 1)

        return self.run(tokens.repeat(len(cuts), 1), read)[0].unflatten(0, (len(cuts), -1))


def sum_of(values: Values) -> Tensor:
    return sum(values.values(), torch.zeros(()))


def difference(logits: Tensor, toy: Toy) -> float:
    rows = torch.arange(len(toy.task))
    return (logits[rows, toy.task.right[:, 0]] - logits[rows, toy.task.wrong[:, 0]]).mean().item()


@cache
def graph_of(name: str) -> Graph:
    return Graph(plain_module(name), GraphShape.of(toy_of(name).model))


def instead_of(name: str, kind: str) -> Values:
    toy, graph = toy_of(name), graph_of(name)
    other = graph.plain(toy.task.corrupt)[1]
    if kind == "resample":
        return other
    clean = graph.plain(toy.task.clean)[1]
    return {u: torch.zeros_like(x) if kind == "zero" else x.mean(0, keepdim=True).expand_as(x) for u, x in clean.items()}


@cache
def exact_effects(name: str, kind: str) -> Mapping[Edge, float]:
    """How much each single edge's ablation in the clean run takes away, as a share of clean minus corrupt."""
    toy, graph = toy_of(name), graph_of(name)
    instead = instead_of(name, kind)
    clean = difference(graph.plain(toy.task.clean)[0], toy)
    corrupt = difference(graph.plain(toy.task.corrupt)[0], toy)
    edges = [tuple(edge) for edge in Circuit.full(toy.model)]
    effects = {}
    for first in range(0, len(edges), 16):
        part = edges[first : first + 16]
        logits = graph.ablated(toy.task.clean, instead, [{edge} for edge in part])
        effects |= {
            edge: (clean - difference(of_one, toy)) / (clean - corrupt) for edge, of_one in zip(part, logits, strict=True)
        }
    return effects


@pytest.mark.parametrize("name", HAND_SET)
def test_the_brute_force_is_the_module(name: str) -> None:
    tokens = toy_of(name).task.clean
    with torch.no_grad():
        expected = plain_module(name)(tokens).logits[:, -1]
    # transformers computes rotary angles in float32.
    torch.testing.assert_close(graph_of(name).plain(tokens)[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(toy_of(name).model(tokens)[:, -1].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ("resample", "mean", "zero"))
@pytest.mark.parametrize("name", HAND_SET)
def test_exactly_the_planted_edges_matter(name: str, kind: str) -> None:
    effects, truth = exact_effects(name, kind), {tuple(edge) for edge in toy_of(name).truth[kind]}
    assert truth <= effects.keys()
    assert min(abs(effects[edge]) for edge in truth) > 0.1
    assert max(abs(value) for edge, value in effects.items() if edge not in truth) < 1e-6


@pytest.mark.parametrize("kind", ("resample", "mean", "zero"))
@pytest.mark.parametrize("name", HAND_SET)
def test_the_planted_edges_are_enough(name: str, kind: str) -> None:
    toy, graph = toy_of(name), graph_of(name)
    truth = {tuple(edge) for edge in toy.truth[kind]}
    rest = {tuple(edge) for edge in Circuit.full(toy.model)} - truth
    alone = graph.ablated(toy.task.clean, instead_of(name, kind), [rest])[0]
    whole = graph.plain(toy.task.clean)[0]
    assert difference(alone, toy) == pytest.approx(difference(whole, toy), rel=1e-6)


@pytest.mark.parametrize("kind", ("resample", "mean", "zero"))
@pytest.mark.parametrize("name", HAND_SET)
def test_every_planted_edge_is_on_a_path(name: str, kind: str) -> None:
    truth = toy_of(name).truth[kind]
    assert truth.n_connected == len(truth)


@pytest.mark.parametrize("name", HAND_SET)
def test_the_heads_of_every_truth_are_the_same(name: str) -> None:
    toy = toy_of(name)
    assert {circuit.heads() for circuit in toy.truth.values()} == {toy.heads}
    assert len(toy.heads) == 2


@pytest.mark.parametrize("direction", ("noise", "denoise"))
@pytest.mark.parametrize("name", HAND_SET)
def test_gradients_see_the_planted_edges_and_no_others(name: str, direction: str) -> None:
    """By autograd on the brute force: no planted edge is so saturated that its gradient vanishes."""
    toy, graph = toy_of(name), graph_of(name)
    here, there = (toy.task.clean, toy.task.corrupt)[:: 1 if direction == "noise" else -1]
    ours, others = graph.plain(here)[1], graph.plain(there)[1]
    leaves: dict[tuple[str, str], Tensor] = {}

    def read(node: str, port: str, written: Values) -> Tensor:
        heard = sum_of(written)
        # Heads of a group read K and V through one node: one leaf for all of them.
        leaf = leaves.setdefault((node, port), torch.zeros_like(heard, requires_grad=True))
        return heard + leaf

    logits = graph.run(here, read)[0]
    rows = torch.arange(len(toy.task))
    metric = (logits[rows, toy.task.right[:, 0]] - logits[rows, toy.task.wrong[:, 0]]).mean()
    gradients = dict(zip(leaves, torch.autograd.grad(metric, list(leaves.values())), strict=True))
    clean, corrupt = (difference(graph.plain(tokens)[0], toy) for tokens in (toy.task.clean, toy.task.corrupt))
    scores = {
        tuple(edge): ((others[edge.src] - ours[edge.src]) * gradients[edge.dst, edge.port]).sum().item() / (clean - corrupt)
        for edge in Circuit.full(toy.model)
    }
    truth = {tuple(edge) for edge in toy.truth["resample"]}
    assert min(abs(scores[edge]) for edge in truth) > 0.02
    assert max(abs(value) for edge, value in scores.items() if edge not in truth) < 1e-6
