"""RelP against its rules written into the transformer by hand; values untouched; what it is blind to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.errors import MetricError, ModelError
from tests.core.conftest import module_of
from tests.reference import Intervention, Reference


class Relevance(Reference):
    """The rules where they belong, with autograd for the rest."""

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[f"{name}.weight"]
        if self.is_llama:
            return x * (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt().detach() * weight
        x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config.layer_norm_epsilon).rsqrt().detach()
        return x * scale * weight + self.w[f"{name}.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, head: int) -> Tensor:
        return super().attend(q.detach(), k.detach(), v, layer, head)

    def mlp(self, x: Tensor, layer: int, act: Callable[[Tensor], Tensor] = lambda own: own) -> Tensor:
        if not self.is_llama:
            name = f"transformer.h.{layer}"
            before = self.norm(x, f"{name}.ln_2") @ self.w[f"{name}.mlp.c_fc.weight"] + self.w[f"{name}.mlp.c_fc.bias"]
            hidden = (torch.nn.functional.gelu(before, approximate="tanh") / before).detach() * before
            return act(hidden) @ self.w[f"{name}.mlp.c_proj.weight"] + self.w[f"{name}.mlp.c_proj.bias"]
        name = f"model.layers.{layer}"
        x = self.norm(x, f"{name}.post_attention_layernorm")
        gate, up = (x @ self.w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        opened = (torch.nn.functional.silu(gate) / gate).detach() * gate
        product = (opened * up.detach() + opened.detach() * up) / 2
        # Half of each, so that their sum is the product itself.
        return act(product) @ self.w[f"{name}.mlp.down_proj.weight"].T


@pytest.mark.parametrize("unit", ["edge", "node"])
def test_is_the_rules_written_by_hand(setting: Any, unit: Any) -> None:
    by_hand, task = Relevance(setting.model), setting.task
    leaves: dict[Any, Tensor] = {}
    metric = by_hand.metric(task, Intervention(leaves=leaves))
    torch.testing.assert_close(metric, setting.reference.metric(task))
    places = list(leaves)
    slopes = dict(zip(places, torch.autograd.grad(metric.sum(), list(leaves.values()), allow_unused=True), strict=True))
    clean, corrupt = (setting.reference.run(tokens)[1] for tokens in (task.clean, task.corrupt))
    effects = mi.attribute(setting.model, task, unit=unit, rules="relp", normalize=False)
    for label, found in zip(effects.coords[unit], effects.per_example, strict=True):
        writer, place = (label[0], (label[1], label[2])) if unit == "edge" else (label, label)
        slope = slopes[place]
        moved = corrupt[writer] - clean[writer]
        expected = torch.zeros(len(task)) if slope is None else (moved * slope).sum((1, 2)).float()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        assert (found == 0).all() or unit == "node" or label[2] not in "qk"
    assert effects.values.abs().max() > 1e-2


def test_no_value_changes(setting: Any) -> None:
    plain = mi.attribute(setting.model, setting.task, unit="edge")
    relevance = mi.attribute(setting.model, setting.task, unit="edge", rules="relp")
    assert relevance.baseline == plain.baseline
    assert relevance.provenance["method"] == "RelP"
    assert "completeness_error" not in relevance.provenance
    assert (relevance.values - plain.values).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_neuron_that_is_nothing_gets_nothing(architecture: str) -> None:
    """f(0) / 0 is told nowhere: a neuron without weights, as if nothing read it."""
    clean = torch.randint(1, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    task = mi.Task(name="random", clean=clean, corrupt=clean.flip(1), right=[1, 2], wrong=[4, 5])
    found = []
    for unread in (False, True):
        module = module_of(architecture)
        weights = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                if name.endswith(("mlp.c_fc.weight", "mlp.c_fc.bias")):
                    value[..., 0] = 0.0
                if name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")):
                    value[0] = 0.0
                if unread and name.endswith("mlp.c_proj.weight"):
                    value[0] = 0.0
                if unread and name.endswith("mlp.down_proj.weight"):
                    value[:, 0] = 0.0
        found.append(mi.attribute(mi.load(module), task, rules="relp", normalize=False).per_example)
    assert found[0].isfinite().all() and found[0].abs().max() > 1e-3
    torch.testing.assert_close(*found)


def test_parallel_models() -> None:
    model = mi.load(module_of("neox"))
    clean = torch.randint(1, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    corrupt = clean.flip(1)
    task = mi.Task(name="random", clean=clean, corrupt=corrupt, right=[1, 2, 3], wrong=[4, 5, 6])
    edges = mi.attribute(model, task, unit="edge", rules="relp", normalize=False)
    nodes = mi.attribute(model, task, rules="relp", normalize=False)
    for i, name in enumerate(nodes.coords["node"]):
        own = [j for j, edge in enumerate(edges.coords["edge"]) if edge[0] == name]
        torch.testing.assert_close(edges.per_example[own].sum(dim=0), nodes.per_example[i], atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("unchecked_types")
def test_messages(settings: Any) -> None:
    task = settings["gpt2"].task
    with pytest.raises(ModelError) as caught:
        mi.attribute(mi.load(module_of("gemma2"), name="gemma"), task, rules="relp")
    assert str(caught.value).endswith("norms what attention and MLP add, for which RelP has no rule; use 'eap-ig'")
    with pytest.raises(MetricError) as wrong:
        mi.attribute(settings["gpt2"].model, task, rules="lrp")
    assert str(wrong.value) == "rules='lrp': write one of 'gradient', 'relp', 'qk-fix', 'grad-drop', 'atp-star'"
    with pytest.raises(MetricError) as path:
        mi.attribute(settings["gpt2"].model, task, path="outputs")
    assert str(path.value) == "path='outputs': write 'inputs' or 'activations'"
