"""Attention, what of it counts, rollout and flow, against plain Hugging Face models and a linear programme."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.errors import MetricError, ModelError, SelectorError, TaskError
from tests.core.conftest import ARCHITECTURES, HEADS, VOCAB, Plain, module_of

TOKENS = torch.randint(0, VOCAB, (3, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def both(request: pytest.FixtureRequest) -> tuple[Any, Plain]:
    module = module_of(request.param)
    plain = Plain(request.param, copy.deepcopy(module))
    return mi.load(module, name=f"tiny-{request.param}"), plain


def test_patterns_and_what_they_move(both: tuple[Any, Plain]) -> None:
    model, plain = both
    looked, moved = mi.attention(model, TOKENS), mi.attention(model, TOKENS, weigh="value")
    assert looked.names == tuple(f"L{layer}.H{head}" for layer in range(2) for head in range(HEADS))
    for layer in range(2):
        values = plain.values(TOKENS, layer)
        for head in range(HEADS):
            pattern = values["pattern"][:, head]
            assert torch.allclose(looked[f"L{layer}.H{head}"], pattern, atol=1e-6)
            value = values["v"][:, :, head * values["v"].shape[2] // HEADS]
            # Each token's contribution to the head's output, one by one.
            each = pattern[..., None] * (value @ plain.output_weight(layer)[head])[:, None]
            assert torch.allclose(each.sum(2), values["head_out"][:, :, head], atol=1e-5)
            assert torch.allclose(moved[f"L{layer}.H{head}"], each.norm(dim=-1), atol=1e-5)


def test_gradient_is_what_a_small_change_of_attention_does(both: tuple[Any, Plain]) -> None:
    model, plain = both
    task = mi.Task(name="t", clean=TOKENS, corrupt=TOKENS.flip(0), right=[1, 2, 3], wrong=[4, 5, 6], answer_pos=[5, 4, 5])
    found = mi.attention(model, task, "L0.H1.pattern", weigh="gradient")["L0.H1"]
    size = 2e-2

    def measured(row: int, q: int, k: int, sign: int) -> float:
        def change(pattern: Tensor) -> Tensor:
            new = pattern.clone()
            new[row, 1, q, k] *= 1 + sign * size
            return new

        logits = plain.edited(TOKENS, "pattern", 0, change)[row, task.answer_pos[row]]
        return float(logits[task.right[row, 0]] - logits[task.wrong[row, 0]])

    for row, q, k in [(0, 5, 2), (1, 3, 0), (2, 4, 4), (1, 5, 1)]:
        slope = (measured(row, q, k, 1) - measured(row, q, k, -1)) / (2 * size)
        assert float(found[row, q, k]) == pytest.approx(slope, rel=2e-3, abs=2e-3)
    # After the answer is read nothing counts.
    assert float(found[1, 5].abs().max()) == 0.0


def test_rollout_is_the_product_of_mixed_attention(both: tuple[Any, Plain]) -> None:
    model, plain = both
    found = mi.attention_rollout(model, TOKENS, residual=0.4)
    mixed = [0.6 * plain.values(TOKENS, layer)["pattern"].mean(1) + 0.4 * torch.eye(6) for layer in range(2)]
    assert torch.allclose(found["L0"], mixed[0], atol=1e-6)
    assert torch.allclose(found["L1"], mixed[1] @ mixed[0], atol=1e-6)
    assert torch.allclose(found.values.sum(-1), torch.ones(3, 2, 6), atol=1e-5)


def test_flow_is_the_optimum_of_a_linear_programme(both: tuple[Any, Plain]) -> None:
    from scipy.optimize import linprog

    model, plain = both
    found = mi.attention_flow(model, TOKENS[:1], pos=-2)
    mixed = [0.5 * plain.values(TOKENS[:1], layer)["pattern"].mean(1)[0] + 0.5 * torch.eye(6) for layer in range(2)]
    end = 4
    for source in range(6):
        # Variables: flow from (0, source) to (1, m), and from (1, m) to the end; what enters a node leaves it.
        into, out = mixed[0][:, source].numpy(), mixed[1][end].numpy()
        balance = np.concatenate([np.eye(6), -np.eye(6)], axis=1)
        bounds = [(0, float(width)) for width in (*into, *out)]
        best = linprog(np.concatenate([-np.ones(6), np.zeros(6)]), A_eq=balance, b_eq=np.zeros(6), bounds=bounds)
        assert float(found.values[0, 0, 0, source]) == pytest.approx(-best.fun, abs=1e-6)


def test_the_planted_heads_look_where_they_should() -> None:
    toy = mi.toys.induction()
    looked = mi.attention(toy.model, toy.task)
    end, target, rows = -1, toy.task.positions["target"], torch.arange(len(toy.task))
    assert float(looked["L1.H5"][rows, end, target].mean()) > 0.9
    # The look-alike decoy attends as strongly and moves something; but only the planted head counts.
    counts = mi.attention(toy.model, toy.task, "L1.H*.pattern", weigh="gradient", average=True)
    assert [name for name, *_ in counts.strongest(3)] == ["L1.H5"] * 3
    assert float(counts["L1.H2"].abs().max()) < 1e-5 * float(counts["L1.H5"].abs().max())
    name, query, key, value = looked.strongest(1)[0]
    assert name in looked.names and query.split()[1].isdigit() and key.split()[1].isdigit() and value > 0.9


def test_padding_is_left_out_and_averages_are_over_real_tokens() -> None:
    model = mi.load(module_of("llama"), name="m")
    rows = [TOKENS[0].tolist(), TOKENS[1, :4].tolist()]
    found, mean = mi.attention(model, rows), mi.attention(model, rows, average=True)
    alone = [mi.attention(model, [row])["L1.H2"][0] for row in rows]
    assert torch.allclose(found["L1.H2"][0], alone[0], atol=1e-6)
    assert torch.allclose(found["L1.H2"][1, :4, :4], alone[1], atol=1e-6)
    assert float(found["L1.H2"][1, 4:].abs().max()) == float(found["L1.H2"][1, :, 4:].abs().max()) == 0.0
    assert torch.allclose(mean["L1.H2"][0, :4, :4], (alone[0][:4, :4] + alone[1]) / 2, atol=1e-6)
    assert torch.allclose(mean["L1.H2"][0, 4:], alone[0][4:], atol=1e-6)
    flow = mi.attention_flow(model, rows, average=True)
    each = [mi.attention_flow(model, [row]).values[0, 0, 0] for row in rows]
    assert torch.allclose(flow.values[0, 0, 0, :4], (each[0][:4] + each[1]) / 2, atol=1e-6)


def test_nothing_is_changed_and_nobody_is_left_with_a_gradient() -> None:
    toy = mi.toys.induction()
    before = toy.model(toy.task.clean)
    mi.attention(toy.model, toy.task, weigh="gradient")
    assert torch.equal(toy.model(toy.task.clean), before)
    assert all(parameter.grad is None for parameter in toy.model.hf.parameters())


def test_pictures_are_self_contained_and_named() -> None:
    toy = mi.toys.copy()
    one = mi.attention(toy.model, toy.task[:2], "L1.H2.pattern")
    svg = one._repr_svg_()
    assert svg is not None and svg.startswith("<svg") and svg == one._repr_svg_()
    addresses = set(re.findall(r'https?://[^"\s]+', svg))
    assert not {address for address in addresses if "w3.org" not in address and "purl.org" not in address}
    figure = one.plot()
    texts = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert texts[0] == "<s> 0" and texts[-1] == "say 7" and figure.axes[0].get_title() == "L1.H2"
    grid = mi.attention(toy.model, toy.task, average=True).plot()
    assert len([axes for axes in grid.axes if axes.get_title()]) == 8
    assert "mean over 32 prompts" in grid.get_suptitle()
    # Twelve of the sixteen heads, in order.
    many = mi.toys.induction()
    shown = [axes.get_title() for axes in mi.attention(many.model, many.task).plot().axes if axes.get_title()]
    assert len(shown) == 12 and shown == sorted(shown)
    rolled = mi.attention_flow(toy.model, toy.task[:1])
    assert rolled.plot().axes[0].get_yticklabels()[0].get_text() == "say 7"


def test_tables_and_headlines() -> None:
    toy = mi.toys.copy()
    found = mi.attention(toy.model, toy.task[:2], "L1.H2.pattern | L0.H1.pattern")
    frame = found.to_frame()
    assert list(frame.columns) == ["prompt", "name", "q_pos", "k_pos", "q", "k", "value"]
    assert len(frame) == 2 * 2 * 8 * 9 // 2
    assert repr(found) == "Attention: attention; 2 heads, 2 prompts, 8 x 8 positions"
    assert repr(mi.attention_flow(toy.model, toy.task[:2], average=True)) == (
        "Attention: flow of attention; one position, mean over 2 prompts, 1 x 8 positions"
    )
    assert repr(mi.attention_rollout(toy.model, toy.task[:2])) == (
        "Attention: rollout of attention; 2 layers, 2 prompts, 8 x 8 positions"
    )


@pytest.mark.usefixtures("unchecked_types")
def test_messages() -> None:
    toy = mi.toys.copy()
    model, task = toy.model, toy.task
    for call, error, message in [
        (
            lambda: mi.attention(model, task, "L0.H1.z"),
            SelectorError,
            "L0.H1.z is not the attention of a head; write 'L9.H6.pattern' or 'L9.H*.pattern'",
        ),
        (
            lambda: mi.attention(model, task, weigh="values"),
            SelectorError,
            "there is no way to weigh attention by 'values'. Did you mean 'value'?",
        ),
        (
            lambda: mi.attention(model, task, metric="logit_diff"),
            MetricError,
            "metric= says whose gradient is meant; give it with weigh='gradient', not 'pattern'",
        ),
        (
            lambda: mi.attention(model, task, weigh="gradient", metric="kl"),
            MetricError,
            "'kl' has no gradient to weigh attention by; use metric='logit_diff'",
        ),
        (
            lambda: mi.attention(model, task.clean, weigh="gradient"),
            TaskError,
            "token ids alone were given where a task is needed, which has clean and corrupt prompts and answers: "
            "mi.Task(name=..., clean=..., corrupt=..., right=..., wrong=...), or one of mi.tasks",
        ),
        (
            lambda: mi.attention_rollout(model, task, residual=1.5),
            SelectorError,
            "residual=1.5: give the share of the stream that goes past attention, from 0 to 1",
        ),
        (lambda: mi.attention_flow(model, task, pos=9), SelectorError, "pos=9: the shortest prompt has 8 tokens"),
        (
            lambda: mi.attention(model, task)["L3.H0"],
            SelectorError,
            "there is no 'L3.H0' here. Did you mean 'L1.H0' or 'L0.H0' or 'L1.H3'?",
        ),
        (
            lambda: mi.attention(task, model),
            ModelError,
            "a Task was given where the model belongs: the model comes first, then the task",
        ),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message


@pytest.mark.parametrize("heads", ["L1.H5", "a1.h5", "a1.h5 | L1.H5.pattern"])
def test_heads_are_named_as_elsewhere(heads: str) -> None:
    toy = mi.toys.induction()
    whole = mi.attention(toy.model, toy.task)
    assert torch.equal(mi.attention(toy.model, toy.task, heads).values[:, 0], whole["L1.H5"])
