"""What a circuit *is*: which heads, attending from where to where, writing to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.core.run import run
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.graph import Circuit, Edge, check_circuit, parse_node
from mechinterp.patching.activation import patch
from mechinterp.patching.attribution import attribute
from mechinterp.tasks import Task

__all__ = ["HeadStory", "describe"]

# Edges that are told of a head.
_SHOWN = 4


@dataclass(frozen=True)
class HeadStory:
    """What one head of a circuit does on a task.

    Parameters
    ----------
    node
        ``a23.h3``.
    effect
        Normalised effect of replacing its output by the corrupt prompt's, measured (positive: it helps the answer).
    at
        Where in the prompt its output matters most, and the share of its effect that comes from there.
    attends_to
        Where it looks from there, strongest first, with mean attention.
    reads, writes
        Its strongest edges in the circuit; none of many without scores, as in circuits of nodes and neurons.
    role
        A word for what this pattern is usually called, or ``""``. A description of attention, not a proof.
    error
        Standard error of ``effect`` over prompts; nan for a single prompt.
    """

    node: str
    effect: float
    at: tuple[str, float]
    attends_to: tuple[tuple[str, float], ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    role: str
    error: float = 0.0

    @property
    def clear(self) -> bool:
        """Whether the effect is at least twice its standard error, and at least 1 % of the whole difference."""
        return abs(self.effect) >= 0.01 and not abs(self.effect) < 2 * self.error

    def __str__(self) -> str:
        looks = ", ".join(f"{where} ({share:.0%})" for where, share in self.attends_to)
        name = f" [{self.role}]" if self.role else ""
        writes = f"; writes to {', '.join(self.writes)}" if self.writes else ""
        return f"{self.node}{name}: {self.effect:+.2f}; at {self.at[0]} attends to {looks}{writes}"


def describe(circuit: Circuit, model: Model, task: Task, *, heads: int = 12) -> tuple[HeadStory, ...]:
    """Which heads make this circuit, where do they look, and what do they pass on?

    Parameters
    ----------
    circuit
        From `mechinterp.discover`.
    model, task
        What it was found on.
    heads
        How many heads.

    Returns
    -------
    tuple of HeadStory
        Strongest first. Attention is the mean over the clean prompts. Edges with spans are told with the two strongest.

    Notes
    -----
    Cost: 8 forward and 3 backward passes, and one forward for each head. Heads are chosen, and the position where each
    matters is found, by integrated gradients; the effect is measured by patching.
    """
    check_circuit(circuit)
    check_model_and_task(model, task)
    effects = attribute(model, task, "L*.H*.z", over=("layer", "head", "pos"), steps=3)
    words, onehot = _places(task)
    # Named positions move from prompt to prompt, so effects and attention are gathered by name before averaging.
    by_place = torch.einsum("lhpb,bpw->lhw", effects.per_example.float(), onehot) / len(task)
    total = effects.values.sum(dim=-1)
    inside = [name for name in circuit.connected().nodes if parse_node(name).kind == "head"]
    ranked = sorted(inside, key=lambda name: -abs(float(total[_index(name)])))[:heads]
    if not ranked:
        return ()
    sites = Selection(tuple(Site("z", layer, head) for layer, head in map(_index, ranked)))
    exact = patch(model, task, sites, over=("layer", "head"), direction="noise")
    effect_of = dict(zip(ranked, _in_order(exact, exact.values, sites), strict=True))
    error_of = dict(zip(ranked, _in_order(exact, exact.standard_error, sites), strict=True))
    attention = _attention(model, task, ranked, onehot)
    stories, plain = [], circuit.everywhere()
    for name in sorted(ranked, key=lambda name: -abs(effect_of[name])):
        effect = effect_of[name]
        shares = by_place[_index(name)].abs()
        place = int(shares.argmax())
        looked = attention[name][place]
        order = looked.argsort(descending=True)[:3].tolist()
        looks = tuple((words[i], float(looked[i])) for i in order if i == order[0] or float(looked[i]) >= 0.1)
        writes = _strongest([edge for edge in circuit.edges if edge.src == name], circuit, outgoing=True)
        inputs = _inputs(circuit, name)
        reads = _strongest([edge for edge in circuit.edges if edge.dst in inputs], circuit, outgoing=False)
        at = (words[place], float(shares[place] / shares.sum().clamp(min=1e-12)))
        # Names of roles go by where a head writes, at whichever span.
        role = _role(
            at[0], looks[0], _strongest([edge for edge in plain.edges if edge.src == name], plain, outgoing=True), effect
        )
        stories.append(HeadStory(name, effect, at, looks, reads, writes, role, error_of[name]))
    return tuple(stories)


def _in_order(effects: Effects, numbers: Tensor, sites: Selection) -> list[float]:
    """The number of each site, in the order of the sites."""
    if effects.axes == ("site",):
        found = dict(zip(effects.coords["site"], numbers.tolist(), strict=True))
        return [found[str(site)] for site in sites]
    rows, columns = effects.coords["layer"], effects.coords["head"]
    return [float(numbers[rows.index(site.layer), columns.index(site.head)]) for site in sites]


def _index(name: str) -> tuple[int, int]:
    node = parse_node(name)
    return node.layer or 0, node.head or 0


def _inputs(circuit: Circuit, name: str) -> set[str]:
    shape = circuit.shape
    return {name, str(shape.kv_node(name))} if shape.grouped else {name}


def _attention(model: Model, task: Task, heads: Sequence[str], onehot: Tensor) -> dict[str, Tensor]:
    """Mean attention ``[place place]`` of each head on the clean prompts, from query place to key place."""
    wanted = Selection(tuple(dict.fromkeys(Site("pattern", _index(name)[0]) for name in heads)))
    total: dict[str, Tensor] = {}
    # A query place that several positions of a prompt fall into counts once a position.
    count = onehot.sum(dim=(0, 1)).clamp(min=1)
    for first in range(0, len(task), 16):
        part, where = task[first : first + 16].to(model.device), onehot[first : first + 16]
        out = run(model, part, capture=wanted, keep=[0])
        for name in heads:
            layer, head = _index(name)
            pattern = out[Site("pattern", layer)][:, head].float().cpu()
            gathered = torch.einsum("bqk,bqw,bkv->wv", pattern, where, where) / count[:, None]
            total[name] = total.get(name, torch.zeros_like(gathered)) + gathered
    return total


def _places(task: Task) -> tuple[list[str], Tensor]:
    """The words for positions, and ``[batch pos word]`` which position has which word in which prompt."""
    batch, length = task.clean.shape
    words = [*task.positions, "start", *(f"position {pos}" for pos in range(length))]
    at = {word: i for i, word in enumerate(words)}
    index = torch.tensor([[at["start"], *(at[f"position {pos}"] for pos in range(1, length))]] * batch)
    rows = torch.arange(batch)
    for name in reversed(list(task.positions)):
        index[rows, task.positions[name].cpu()] = at[name]
    onehot = torch.nn.functional.one_hot(index, len(words)).float()
    # Padding is no place.
    return words, onehot if task.mask is None else onehot * task.mask.cpu()[:, :, None]


def _strongest(edges: list[Edge], circuit: Circuit, *, outgoing: bool) -> tuple[str, ...]:
    if len(edges) > _SHOWN and not any(circuit.scores[edge] for edge in edges):
        # Of edges without scores none is the strongest.
        return ()
    ranked = sorted(edges, key=lambda edge: -abs(circuit.scores[edge] or 0.0))[:_SHOWN]

    def at(edge: Edge) -> str:
        spans = circuit.spans.get(edge, {})
        return f" at {', '.join(sorted(spans, key=lambda span: -abs(spans[span] or 0.0))[:2])}" if spans else ""

    if outgoing:
        return tuple(edge.dst + (f"<{edge.port}>" if edge.port != "in" else "") + at(edge) for edge in ranked)
    return tuple(f"{edge.src}<{edge.port}>{at(edge)}" for edge in ranked)


def _role(at: str, looks: tuple[str, float], writes: Sequence[str], effect: float) -> str:
    """The usual word for a pattern of attention, where there is one and the attention is strong."""
    where, strength = looks
    # What a head at the end does is told by whom it writes to.
    if strength < 0.2 or (at == "end" and not writes):
        return ""
    if at == "end" and "logits" in writes and where == "target" and effect > 0:
        return "induction"
    if at == "end" and "logits" in writes and where == "IO":
        return "name mover" if effect > 0 else "negative name mover"
    if at == "end" and "logits" in writes and where == "C" and effect > 0:
        return "argument mover"
    if at == "end" and where == "S2" and writes[:1] == ("logits",):
        return "copy suppression"
    usual = {
        ("end", "S2"): "S-inhibition",
        ("S2", "S1"): "duplicate token",
        ("S2", "S1+1"): "induction",
        ("S1+1", "S1"): "previous token",
        ("target", "earlier"): "previous token",
    }
    return usual.get((at, where), "")
