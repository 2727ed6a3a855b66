"""Direct logit attribution: parts that sum, on every architecture; each against plain arithmetic; planted heads."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.errors import MetricError, ModelError, SelectorError, TaskError
from tests.core.architectures import ARCHITECTURES
from tests.core.conftest import Plain
from tests.lens.conftest import Pair, error, pair_of

# A norm on the stream itself: it is no sum of parts.
NO_SUM = "OPT-350M (norm after)"
OLD_NAMES = {"GPT-2": "gpt2", "Llama": "llama", "GPT-NeoX (Pythia)": "neox", "Gemma 2": "gemma2"}


@pytest.fixture(params=[name for name in ARCHITECTURES if name != NO_SUM])
def summing(request: pytest.FixtureRequest) -> Pair:
    """Every architecture whose stream is a sum."""
    return pair_of(request.param)


def uncapped(pair: Pair, logits: Tensor) -> Tensor:
    cap = getattr(pair.plain.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.atanh((logits / cap).double()).float()


def wanted_difference(pair: Pair, task: mi.Task) -> Tensor:
    """Mean right minus mean wrong, from the plain module's logits."""
    logits = uncapped(pair, pair.logits(task.clean))
    found = []
    for i in range(len(task)):
        at = logits[i, int(task.answer_pos[i])]
        right, wrong = ([int(each) for each in row if each >= 0] for row in (task.right[i], task.wrong[i]))
        found.append(at[right].mean() - at[wrong].mean())
    return torch.stack(found)


# -- identities ------------------------------------------------------------------------------------


def test_parts_sum_to_the_difference_of_logits(summing: Pair, task: mi.Task) -> None:
    wanted = wanted_difference(summing, task)
    found = mi.direct_logits(summing.model, task)
    assert float((found.per_example.sum(0) - wanted).abs().max()) < 1e-4
    assert abs(found.baseline["clean"] - float(wanted.mean())) < 1e-4
    assert found.provenance["largest_error"] < 1e-4


def test_every_way_to_part_it(shape: Pair, task: mi.Task) -> None:
    wanted = wanted_difference(shape, task)
    found = {by: mi.direct_logits(shape.model, task, by=by) for by in ("layer", "head", "mlp", "embed", "bias")}
    assert float((found["layer"].per_example.sum(0) - wanted).abs().max()) < 1e-4
    parts = sum(found[by].per_example.reshape(-1, len(task)).sum(0) for by in ("head", "mlp", "embed", "bias"))
    assert float((parts - wanted).abs().max()) < 1e-4
    # Not because one of them is everything.
    assert all(float(found[by].per_example.abs().max()) > 1e-2 for by in ("head", "mlp", "embed"))


def test_neurons_sum_to_their_mlp(summing: Pair, task: mi.Task) -> None:
    if "mlp_post" not in summing.model.sites:
        with pytest.raises(ModelError, match=f"^{re.escape(summing.name)} has no neurons to speak of: the MLP of "):
            mi.direct_logits(summing.model, task, by="neuron")
        return
    neurons = mi.direct_logits(summing.model, task, by="neuron")
    mlps = mi.direct_logits(summing.model, task, by="mlp")
    assert neurons.axes == ("layer", "neuron")
    assert float((neurons.per_example.sum(1) - mlps.per_example).abs().max()) < 1e-4
    assert neurons.label(1) == "L0.N1.mlp_post"


def test_every_position(shape: Pair, tokens: Tensor) -> None:
    targets, against = torch.tensor([3, 27, 40]), torch.tensor([8, 5, 33])
    spread = mi.direct_logits(shape.model, tokens, targets=targets, against=against, over=("pos",))
    logits = uncapped(shape, shape.logits(tokens))
    for i in range(3):
        wanted = logits[i, :, targets[i]] - logits[i, :, against[i]]
        assert float((spread.per_example[..., i].sum(0) - wanted).abs().max()) < 1e-4
    at_two = mi.direct_logits(shape.model, tokens, targets=targets, against=against, pos=2)
    torch.testing.assert_close(spread.per_example[:, 2], at_two.per_example, rtol=1e-5, atol=1e-5)
    heads = mi.direct_logits(shape.model, tokens, by="head", targets=targets, over=("pos",))
    assert heads.axes == ("layer", "head", "pos")
    assert heads.per_example.shape == (4, 4, 7, 3)
    assert heads.label(8) == "L0.H1.head_out[1]"


def test_prompts_one_by_one_and_padded(shape: Pair, tokens: Tensor) -> None:
    rows = [tokens[0], tokens[1, :4]]
    both = mi.direct_logits(shape.model, rows, targets=torch.tensor([3, 27]))
    for i, row in enumerate(rows):
        alone = mi.direct_logits(shape.model, row, targets=torch.tensor([[3], [27]])[i])
        torch.testing.assert_close(both.per_example[:, i], alone.per_example[:, 0], rtol=1e-4, atol=1e-5)
        # A single target's logit, biases included.
        wanted = uncapped(shape, shape.logits(row[None]))[0, -1, [3, 27][i]]
        assert abs(float(alone.per_example.sum()) - float(wanted)) < 1e-4
    few = mi.direct_logits(shape.model, tokens, targets=torch.tensor([1, 2, 3]), memory=1)
    torch.testing.assert_close(
        few.per_example, mi.direct_logits(shape.model, tokens, targets=torch.tensor([1, 2, 3])).per_example
    )


# -- outside oracles -------------------------------------------------------------------------------


def rms(value: Tensor, eps: float) -> Tensor:
    return (value.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def direction_by_hand(pair: Pair, task: mi.Task) -> Tensor:
    """``[batch d_model]``: the gradient of the difference in the last stream, the norm's scale detached."""
    norm, rows = pair.module(pair.paths.norm), torch.arange(3)
    last = pair.streams(task.clean)[-1][rows, task.answer_pos].double()
    centred = "LayerNorm" in type(norm).__name__
    weight = norm.weight.detach().double() + (1 if pair.name == "Gemma 2" else 0)
    eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    unembed = pair.plain.get_output_embeddings().weight.detach().double()
    right = torch.stack([unembed[[int(token) for token in row if token >= 0]].mean(0) for row in task.right])
    found = (right - unembed[task.wrong[:, 0]]) * weight / rms(last - last.mean(-1, keepdim=True) if centred else last, eps)
    return found - found.mean(-1, keepdim=True) if centred else found


def added_by_hand(pair: Pair, plain: Plain, task: mi.Task, layer: int, z: Tensor) -> Tensor:
    """``[batch head d_model]``: what heads that mix ``z`` ``[batch head d_head]`` add at the answer, a norm's scale held."""
    weight = plain.output_weight(layer).detach().double()
    out = torch.einsum("bhd,hdm->bhm", z.double(), weight)
    if pair.name != "Gemma 2":
        return out
    real = plain.values(task.clean, layer)["z"][torch.arange(3), task.answer_pos].double()
    summed = torch.einsum("bhd,hdm->bm", real, weight)[:, None]
    return out * (1 + plain.parts(layer).attn_end.weight.detach().double()) / rms(summed, pair.plain.config.rms_norm_eps)


def test_each_part_by_hand(shape: Pair, task: mi.Task) -> None:
    plain, rows = Plain(OLD_NAMES[shape.name], shape.plain), torch.arange(3)
    heads, mlps = mi.direct_logits(shape.model, task, by="head"), mi.direct_logits(shape.model, task, by="mlp")
    direction = direction_by_hand(shape, task)
    for layer in range(4):
        values = plain.values(task.clean, layer)
        out = added_by_hand(shape, plain, task, layer, values["z"][rows, task.answer_pos])
        mlp = values["mlp_out"][rows, task.answer_pos].double()
        if shape.name in ("GPT-2", "GPT-NeoX (Pythia)"):
            mlp = mlp - plain.parts(layer).post.bias.detach().double()
        assert error(heads.per_example[layer].double(), torch.einsum("bhm,bm->hb", out, direction)) < 1e-5
        assert error(mlps.per_example[layer].double(), (mlp * direction).sum(-1)) < 1e-5


def test_transformer_lens_agrees(pair: Callable[[str], Pair], task: mi.Task) -> None:
    """In its compatibility mode, where norm weights are folded; value biases stay with their heads."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    gpt2 = pair("GPT-2")
    plain = copy.deepcopy(gpt2.plain)
    bridge: Any = build_bridge_from_module(plain, "GPT2LMHeadModel", hf_config=plain.config)
    bridge.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False)
    bridge.set_use_attn_result(True)
    right, wrong = torch.tensor([9, 27, 40]), torch.tensor([8, 5, 33])
    with torch.no_grad():
        _, cache = bridge.run_with_cache(task.clean)
        heads = cache.logit_attrs(cache.stack_head_results(pos_slice=-1), right, wrong, pos_slice=-1)
        parts, labels = cache.decompose_resid(pos_slice=-1, return_labels=True)
        whole = cache.logit_attrs(parts, right, wrong, pos_slice=-1)
    found = mi.direct_logits(gpt2.model, task.clean, by="head", targets=right, against=wrong)
    assert error(found.per_example.reshape(16, 3), heads) < 1e-3
    ours = mi.direct_logits(gpt2.model, task.clean, targets=right, against=wrong)
    by_name = dict(zip(ours.coords["node"], ours.per_example, strict=True))
    for label, theirs in zip(labels, whole, strict=True):
        if label.endswith("_mlp_out"):
            layer = int(label.split("_")[0])
            assert error(by_name[f"m{layer}"] + by_name[f"m{layer}.bias"], theirs) < 1e-3
    assert sum(label.endswith("_mlp_out") for label in labels) == 4


# -- planted answers -------------------------------------------------------------------------------


def test_the_planted_heads_and_neurons() -> None:
    toy = mi.toys.induction(n=6)
    heads = mi.direct_logits(toy.model, toy.task, by="head")
    (first, share), (_, second) = heads.top(2)
    assert first == "L1.H5.head_out"
    assert abs(share - heads.baseline["clean"]) < 0.02 * abs(share)
    assert abs(second) < 0.02 * abs(share)
    memory = mi.toys.memory()
    neurons = mi.direct_logits(memory.model, memory.task, by="neuron")
    told = {(fact.subject, fact.relation): (fact.layer, fact.neuron) for fact in memory.facts}
    for i, text in enumerate(memory.task.texts or ()):
        words = text.split()
        (where,) = [place for (subject, relation), place in told.items() if subject in words and relation in words]
        strongest = int(neurons.per_example[..., i].argmax())
        assert divmod(strongest, memory.model.cfg.d_mlp) == where
    assert len(memory.task.texts or ()) == 60


# -- what is asked ---------------------------------------------------------------------------------


def test_what_results_say(pair: Callable[[str], Pair], task: mi.Task) -> None:
    gpt2, gemma = pair("GPT-2").model, pair("Gemma 2").model
    found = mi.direct_logits(gpt2, task)
    assert found.axes == ("node",)
    assert found.coords["node"][:4] == ("embed", "pos_embed", "a0.h0", "a0.h1")
    assert found.coords["node"][-4:] == ("m3", "m3.bias", "norm.bias", "unembed.bias")
    assert found.quantity == "direct logit diff by component"
    assert found.provenance["metric"] == "logit_diff"
    assert found.provenance["pos"] == "answer"
    assert repr(found).startswith("Effects: direct logit diff by component; 32 nodes, 3 prompts; strongest ")
    assert mi.direct_logits(gpt2, task, by="layer").coords["node"] == (
        "embed", "pos_embed", "L0", "L1", "L2", "L3", "norm.bias", "unembed.bias",
    )  # fmt: skip
    assert mi.direct_logits(gemma, task, by="embed").coords["node"] == ("embed",)
    capped = mi.direct_logits(gemma, task, by="head")
    assert capped.quantity == "direct logit diff by head, before the soft cap"
    assert capped.provenance["soft_cap"] == gemma.hf.config.final_logit_softcapping
    single = mi.direct_logits(gpt2, task, targets=task.right, pos="middle")
    assert single.quantity == "direct logit by component"


def test_models_without_mlps(tokens: Tensor) -> None:
    toy = mi.toys.trained(n=2)
    assert toy.model.cfg.attn_only
    found = mi.direct_logits(toy.model, toy.task)
    assert not any(name.startswith("m") for name in found.coords["node"])
    with pytest.raises(ModelError, match=r"^the MLPs of toy:trained write nothing; by='head' has all that is written$"):
        mi.direct_logits(toy.model, toy.task, by="mlp")
    with pytest.raises(ModelError, match=r"^toy:trained has no neurons to speak of: its MLPs write nothing$"):
        mi.direct_logits(toy.model, toy.task, by="neuron")


MESSAGES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "by": ({"by": "heads"}, MetricError, "by='heads': Did you mean 'head'?"),
    "over": ({"over": ("head",)}, SelectorError, "over=('head',): parts can be split by ('pos',), or not at all"),
    "over as a text": ({"over": "pos"}, SelectorError, "over='pos': parts can be split by ('pos',), or not at all"),
    "pos and over": (
        {"over": ("pos",), "pos": 2}, SelectorError, "over=('pos',) is every position, pos=2 is one; give one of them",
    ),
    "paths and over": (
        {"by": "path", "over": ("pos",)}, SelectorError, "by='path' follows what is read at one position; leave out over=",
    ),
    "against alone": ({"against": [1, 2, 3]}, TaskError, "against= is subtracted from targets=, which were not given"),
    "no heads": (
        {"by": "path", "heads": "L0.mlp_out"},
        SelectorError,
        "paths end in heads, and L0.mlp_out is none; write heads='L*.H*.z' or 'L9.H6.z'",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case: str, pair: Callable[[str], Pair], task: mi.Task) -> None:
    options, kind, message = MESSAGES[case]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        mi.direct_logits(pair("GPT-2").model, task, **options)


def test_tokens_have_no_answers(pair: Callable[[str], Pair], tokens: Tensor) -> None:
    message = "whose logits? Give targets= (and against=, whose logits are subtracted), or a task, which has answers"
    with pytest.raises(TaskError, match=f"^{re.escape(message)}$"):
        mi.direct_logits(pair("GPT-2").model, tokens)
    message = "the prompts differ in length, so a position is not the same in all; leave out over=, or use pos="
    with pytest.raises(SelectorError, match=f"^{re.escape(message)}$"):
        mi.direct_logits(pair("GPT-2").model, [[1, 2], [3]], targets=[1, 2], over=("pos",))


def test_a_stream_that_is_no_sum(pair: Callable[[str], Pair], task: mi.Task) -> None:
    with pytest.raises(ModelError) as caught:
        mi.direct_logits(pair(NO_SUM).model, task)
    assert str(caught.value).startswith(
        "the residual stream of OPT-350M (norm after) is not the sum of what its heads and MLPs write: logits cannot be split "
        "among them. mi.logit_lens reads the stream after each layer, and mi.patch measures what each part does. What does not "
        "hold: on OPTForCausalLM resid_pre + attn_out = mlp_in"
    )


def test_a_part_that_nobody_knows_of(pair: Callable[[str], Pair], task: mi.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are held against what the model computes, on every call."""
    from mechinterp.lens.written import Writers

    mlp = Writers.mlp
    monkeypatch.setattr(Writers, "mlp", lambda self, layer: (mlp(self, layer)[0] + 1.0 * torch.arange(32), mlp(self, layer)[1]))
    with pytest.raises(
        ModelError, match=r"^the parts of GPT-2 \(GPT2LMHeadModel\) miss the difference of logits by [\d.e+]+: something"
    ):
        mi.direct_logits(pair("GPT-2").model, task)
