"""A transformer written out by hand, node by node, in float64: what the package's numbers are held against.

It takes nothing from the package but the weights. What each node writes is kept apart, so that any reader can be
given something else. `test_reference.py` shows that it is the module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Intervention", "Reference", "Written", "copy_of"]

Edge = tuple[str, str, str]
Written = dict[str, Tensor]


@dataclass
class Intervention:
    """What is changed in a run.

    Parameters
    ----------
    cut, instead
        Readers hear ``instead[u]`` where they would hear what u writes, over the edges in ``cut``. Where that maps an edge
        to a mask ``[batch pos]``, they do so at its positions alone.
    put
        A function of what a node writes that gives what it writes instead, for all its readers.
    shift
        What is added to the stream after the attention of a layer.
    neurons
        A function of the neurons of a layer's MLP that gives what its output projection reads.
    leaves
        Filled with a zero tensor for each (reader, port) and for each writer, for gradients with respect to them.
    """

    cut: Collection[Edge] | Mapping[Edge, Tensor] = ()
    instead: Mapping[str, Tensor] = field(default_factory=dict)
    put: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    shift: Mapping[int, Tensor] = field(default_factory=dict)
    neurons: Mapping[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    leaves: dict[Any, Tensor] | None = None


class Reference:
    """The weights of a GPT-2 or a Llama, and its forward pass as a graph."""

    def __init__(self, model: Any) -> None:
        cfg, self.config = model.cfg, model.hf.config
        self.n_layers, self.n_heads, self.n_kv_heads = cfg.n_layers, cfg.n_heads, cfg.n_kv_heads
        self.d_head, self.width = cfg.d_head, cfg.d_model
        self.is_llama = self.config.model_type == "llama"
        state = model.hf.state_dict()
        self.w = {name.replace("_original_component.", ""): value.detach().double() for name, value in state.items()}

    @property
    def edges(self) -> list[Edge]:
        """Every edge, as seen by a run that hears everything."""
        heard: list[Edge] = []

        def note(node: str, port: str, written: Written) -> None:
            heard.extend((writer, node, port) for writer in written)

        self.run(torch.zeros(1, 1, dtype=torch.long), listen=note)
        return heard

    # -- parts

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[f"{name}.weight"]
        if self.is_llama:
            return x * (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt() * weight
        x = x - x.mean(-1, keepdim=True)
        return x * (x.pow(2).mean(-1, keepdim=True) + self.config.layer_norm_epsilon).rsqrt() * weight + self.w[f"{name}.bias"]

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions; the angles in float32, as transformers computes them."""
        half = self.d_head // 2
        theta = 1.0 / self.config.rope_parameters["rope_theta"] ** (torch.arange(half).float() / half)
        angle = torch.arange(x.shape[1]).float()[:, None] * theta
        cos, sin = angle.cos().double(), angle.sin().double()
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def project(self, x: Tensor, layer: int, port: str, index: int) -> Tensor:
        """The query, key or value of one head or KV head."""
        span = slice(index * self.d_head, (index + 1) * self.d_head)
        if self.is_llama:
            x = self.norm(x, f"model.layers.{layer}.input_layernorm")
            out = x @ self.w[f"model.layers.{layer}.self_attn.{port}_proj.weight"][span].T
            return out if port == "v" else self.rotate(out)
        name, first = f"transformer.h.{layer}.attn.c_attn", "qkv".index(port) * self.width
        columns = slice(first + span.start, first + span.stop)
        x = self.norm(x, f"transformer.h.{layer}.ln_1")
        return x @ self.w[f"{name}.weight"][:, columns] + self.w[f"{name}.bias"][columns]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, head: int) -> Tensor:
        scores = q @ k.transpose(1, 2) / self.d_head**0.5
        n = scores.shape[-1]
        z = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1) @ v
        span = slice(head * self.d_head, (head + 1) * self.d_head)
        if self.is_llama:
            return z @ self.w[f"model.layers.{layer}.self_attn.o_proj.weight"][:, span].T
        return z @ self.w[f"transformer.h.{layer}.attn.c_proj.weight"][span]

    def mlp(self, x: Tensor, layer: int, act: Callable[[Tensor], Tensor] = lambda own: own) -> Tensor:
        """What the MLP writes; ``act`` gives other neurons in the place of its own."""
        if self.is_llama:
            name = f"model.layers.{layer}"
            x = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = (x @ self.w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            return act(torch.nn.functional.silu(gate) * up) @ self.w[f"{name}.mlp.down_proj.weight"].T
        name = f"transformer.h.{layer}"
        x = self.norm(x, f"{name}.ln_2")
        hidden = x @ self.w[f"{name}.mlp.c_fc.weight"] + self.w[f"{name}.mlp.c_fc.bias"]
        hidden = act(torch.nn.functional.gelu(hidden, approximate="tanh"))
        return hidden @ self.w[f"{name}.mlp.c_proj.weight"] + self.w[f"{name}.mlp.c_proj.bias"]

    def embed(self, tokens: Tensor) -> Tensor:
        return self.w["model.embed_tokens.weight" if self.is_llama else "transformer.wte.weight"][tokens]

    # -- a run

    def run(
        self,
        tokens: Tensor,
        change: Intervention | None = None,
        *,
        listen: Callable[[str, str, Written], None] | None = None,
        stop_mid: int | None = None,
    ) -> tuple[Tensor, Written]:
        """Logits ``[batch pos vocab]`` and what each node writes; with ``stop_mid`` the stream after that attention."""
        change = change or Intervention()
        group = self.n_heads // self.n_kv_heads
        written: Written = {}
        # What no node writes: positions and the biases of attention.
        rest = torch.zeros(*tokens.shape, self.width, dtype=torch.float64)
        if not self.is_llama:
            rest = rest + self.w["transformer.wpe.weight"][: tokens.shape[1]]

        def write(node: str, value: Tensor) -> Tensor:
            if node in change.put:
                value = change.put[node](value)
            return value if change.leaves is None else value + change.leaves.setdefault(node, leaf(value))

        def hear(node: str, port: str) -> Tensor:
            if listen is not None:
                listen(node, port, written)
            stream = rest + sum(written.values())
            for writer, value in written.items():
                if (writer, node, port) in change.cut:
                    where = change.cut[writer, node, port] if isinstance(change.cut, Mapping) else torch.ones(1)
                    stream = stream + (change.instead[writer] - value) * where[..., None]
            return stream if change.leaves is None else stream + change.leaves.setdefault((node, port), leaf(stream))

        written["embed"] = write("embed", self.embed(tokens))
        for layer in range(self.n_layers):
            shared: dict[tuple[int, str], Tensor] = {}
            new = {}
            for head in range(self.n_heads):
                name, kv = f"a{layer}.h{head}", head // group
                q = self.project(hear(name, "q"), layer, "q", head)
                for port in "kv":
                    if (kv, port) not in shared:
                        node = f"a{layer}.kv{kv}" if self.n_kv_heads < self.n_heads else name
                        shared[kv, port] = self.project(hear(node, port), layer, port, kv)
                new[name] = write(name, self.attend(q, shared[kv, "k"], shared[kv, "v"], layer, head))
            written |= new
            if not self.is_llama:
                rest = rest + self.w[f"transformer.h.{layer}.attn.c_proj.bias"]
            if stop_mid == layer:
                return rest + sum(written.values()), written
            rest = rest + change.shift.get(layer, torch.zeros(()))
            written[f"m{layer}"] = write(
                f"m{layer}", self.mlp(hear(f"m{layer}", "in"), layer, change.neurons.get(layer, lambda own: own))
            )
        final = self.norm(hear("logits", "in"), "model.norm" if self.is_llama else "transformer.ln_f")
        return final @ self.w["lm_head.weight"].T, written

    # -- measures of a task

    def metric(self, task: Any, change: Intervention | None = None, *, tokens: Tensor | None = None) -> Tensor:
        """The logit difference ``[batch]`` of the clean prompts, or of other tokens."""
        logits, _ = self.run(task.clean if tokens is None else tokens, change)
        rows = torch.arange(len(logits))
        answer = logits[rows, task.answer_pos]
        return answer[rows, task.right[:, 0]] - answer[rows, task.wrong[:, 0]]

    def slopes(
        self, task: Any, edges: Iterable[Edge], *, base: Written | None = None, size: float = 1e-4, where: Tensor | None = None
    ) -> dict[Edge, Tensor]:
        """How the metric changes ``[batch]`` as one edge moves towards the corrupt value, by central differences.

        ``base`` puts other token embeddings in the place of the clean ones: a point of a path between the prompts. ``where``
        ``[batch pos]``: it moves at these positions alone.
        """
        clean, corrupt = self.run(task.clean)[1], self.run(task.corrupt)[1]
        put = {} if base is None else {"embed": lambda value: base["embed"]}
        here = self.run(task.clean, Intervention(put=put))[1]
        found = {}
        for edge in edges:
            writer = edge[0]
            ends = []
            for sign in (1, -1):
                instead = {writer: here[writer] + sign * size * (corrupt[writer] - clean[writer])}
                cut: Any = {edge} if where is None else {edge: where}
                ends.append(self.metric(task, Intervention(cut=cut, instead=instead, put=put)))
            found[edge] = (ends[0] - ends[1]) / (2 * size)
        return found


def leaf(value: Tensor) -> Tensor:
    return torch.zeros_like(value, requires_grad=True)


def copy_of(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A `Model` around another module with the same weights, which nobody else sees or leaves hooks on."""
    import mechinterp

    module = type(model.hf)(model.hf.config).eval()
    state = {name.replace("_original_component.", ""): value for name, value in model.hf.state_dict().items()}
    missing = module.load_state_dict(state, strict=False).missing_keys
    assert not missing, missing
    return mechinterp.load(module.to(dtype or model.dtype), name=f"copy of {model.name}")
