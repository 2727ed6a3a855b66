"""Shares of what readers read, against the definition on the transformer written out by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import ModelError
from mechinterp.patching.flow import flow
from tests.core.conftest import Plain, module_of
from tests.reference import copy_of


def test_is_the_definition(setting: Any) -> None:
    reference, task, expected = setting.reference, setting.task, {}
    config = setting.model.hf.config
    rest = torch.zeros(())
    if config.model_type == "gpt2":
        # What no node writes is part of what is read: positions (in the embedding's part here) and biases of attention.
        rest = reference.w["transformer.wpe.weight"][: task.clean.shape[1]]

    def listen(node: str, port: str, written: dict[str, torch.Tensor]) -> None:
        layer = 2 if node == "logits" else int(node[1])
        biases = [
            reference.w[f"transformer.h.{i}.attn.c_proj.bias"] for i in range(layer + (node[0] == "m")) if i < 2 and rest.ndim
        ]
        parts = {name: value + rest if name == "embed" else value for name, value in written.items()}
        x = sum(parts.values()) + sum(biases)
        near = {name: (x.abs().sum(-1) - (x - part).abs().sum(-1)).clamp(min=0) for name, part in parts.items()}
        total = sum(near.values())
        expected.update({(name, node, port): (each / total).mean(-1) for name, each in near.items()})

    reference.run(task.clean, listen=listen)
    effects = flow(setting.model, task)
    for label, found in zip(effects.coords["edge"], effects.per_example, strict=True):
        torch.testing.assert_close(found, expected[label].float(), atol=1e-4, rtol=1e-4)


def test_shares_sum_to_one_and_need_no_counterfactual(setting: Any) -> None:
    task = setting.task
    effects = flow(setting.model, task)
    sums: dict[tuple[str, str], float] = {}
    for (_, *reader), value in effects.as_dict().items():
        sums[tuple(reader)] = sums.get(tuple(reader), 0.0) + value  # type: ignore[index]
    assert all(abs(total - 1) < 1e-5 for total in sums.values())
    other = mi.Task(name="same", clean=task.clean, corrupt=task.clean, right=task.right, wrong=task.wrong)
    assert torch.equal(flow(setting.model, other).per_example, effects.per_example)
    parts = flow(setting.model, task, memory=1)
    torch.testing.assert_close(parts.per_example, effects.per_example, atol=1e-6, rtol=0)


def test_padding_does_not_count(setting: Any) -> None:
    task = setting.task
    mask = torch.ones(5, 11, dtype=torch.bool)
    mask[:, 8:] = False
    wide = [torch.cat([tokens, torch.full((5, 3), 17)], dim=1) for tokens in (task.clean, task.corrupt)]
    padded = mi.Task(name="padded", clean=wide[0], corrupt=wide[1], right=task.right, wrong=task.wrong, mask=mask)
    torch.testing.assert_close(flow(setting.model, padded).per_example, flow(setting.model, task).per_example, atol=1e-5, rtol=0)


def test_heads_that_are_summed_and_normed_have_their_part_of_what_comes_out() -> None:
    """Gemma 2: written out with the weights of the module, at the scale of the sum."""
    module = module_of("gemma2")
    plain = Plain("gemma2", copy.deepcopy(module))
    model = mi.load(module)
    clean = torch.randint(1, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    task = mi.Task(name="random", clean=clean, corrupt=clean, right=[1, 2, 3], wrong=[4, 5, 6])
    parts: dict[str, torch.Tensor] = {}
    for layer in range(2):
        seen, norm = plain.values(clean, layer), plain.parts(layer).attn_end
        if not layer:
            parts["embed"] = seen["resid_pre"]
        total = seen["head_out"].sum(dim=2)
        size = (total.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt()
        for head in range(4):
            parts[f"a{layer}.h{head}"] = (seen["head_out"][:, :, head] * size * (1 + norm.weight)).detach()
        parts[f"m{layer}"] = seen["mlp_out"]
    read = seen["resid_post"]
    torch.testing.assert_close(sum(parts.values()), read, atol=1e-4, rtol=1e-4)
    near = {name: (read.abs().sum(-1) - (read - part).abs().sum(-1)).clamp(min=0) for name, part in parts.items()}
    whole = sum(near.values())
    effects = flow(model, task)
    found = dict(zip(effects.coords["edge"], effects.per_example, strict=True))
    for name, each in near.items():
        torch.testing.assert_close(found[name, "logits", "in"], (each / whole).mean(-1), atol=1e-4, rtol=1e-3)


def test_a_stream_of_nothing_is_made_up_of_nothing(setting: Any) -> None:
    model = copy_of(setting.model)
    with torch.no_grad():
        for weights in model.hf.parameters():
            weights.zero_()
    effects = flow(model, setting.task)
    assert (effects.per_example == 0).all()


def test_other_architectures() -> None:
    clean = torch.randint(1, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    task = mi.Task(name="random", clean=clean, corrupt=clean, right=[1, 2], wrong=[3, 4])
    for name in ("gemma2", "neox"):
        model = mi.load(module_of(name))
        circuit = mi.discover(model, task, method="flow", edges=10)
        assert circuit.n_connected >= 10
        assert (circuit.provenance["ablation"], circuit.provenance["forwards"]) == ("none", 1)


def test_a_norm_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechinterp.patching.flow.linear_norm", lambda module, x: None)
    clean = torch.randint(1, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    task = mi.Task(name="random", clean=clean, corrupt=clean, right=[1, 2], wrong=[3, 4])
    with pytest.raises(ModelError) as caught:
        flow(mi.load(module_of("gemma2"), name="gemma"), task)
    assert str(caught.value).endswith(
        "of gemma is no LayerNorm or RMSNorm, so that heads have no part of their own in what it gives; use 'eap-ig'"
    )
