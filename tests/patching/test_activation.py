"""Activation patching against transformer_lens' own sweeps, a forward pass by hand, and what must hold by definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching as sweeps

import mechinterp as mi
from mechinterp.core.replay import why_not_exact
from mechinterp.errors import MetricError, SelectorError, SiteError
from tests.core.conftest import ARCHITECTURES, module_of
from tests.reference import Intervention, copy_of

# How transformer_lens calls the sweep, what it is here, and the axes here in its order.
SWEEPS = [
    ("resid_pre", "L*.resid_pre", ("layer", "pos")),
    ("attn_out", "L*.attn_out", ("layer", "pos")),
    ("mlp_out", "L*.mlp_out", ("layer", "pos")),
    ("attn_head_out_all_pos", "L*.H*.z", ("layer", "head")),
    ("attn_head_out_by_pos", "L*.H*.z", ("layer", "pos", "head")),
    ("attn_head_q_all_pos", "L*.H*.q", ("layer", "head")),
    ("attn_head_q_by_pos", "L*.H*.q", ("layer", "pos", "head")),
    ("attn_head_k_all_pos", "L*.KV*.k", ("layer", "kv_head")),
    ("attn_head_k_by_pos", "L*.KV*.k", ("layer", "pos", "kv_head")),
    ("attn_head_v_all_pos", "L*.KV*.v", ("layer", "kv_head")),
    ("attn_head_v_by_pos", "L*.KV*.v", ("layer", "pos", "kv_head")),
    ("attn_head_pattern_all_pos", "L*.H*.pattern", ("layer", "head")),
    ("attn_head_pattern_by_pos", "L*.H*.pattern", ("layer", "head", "pos")),
]


def logit_diff(logits: Tensor, task: mi.Task) -> Tensor:
    rows = torch.arange(len(task))
    answer = logits[rows, task.answer_pos]
    return answer[rows, task.right[:, 0]] - answer[rows, task.wrong[:, 0]]


def lens_sweep(name: str, model: mi.Model, task: mi.Task, *, grad: bool = False) -> Tensor:
    """What transformer_lens gives ``[*axes batch]``, less the corrupt run.

    Call it with a copy: caching leaves hooks on a model for good, and on a model with hooks the package runs every
    cell in full, so that what it does otherwise would go untested.
    """
    with torch.set_grad_enabled(grad):
        _, cache = model.bridge.run_with_cache(task.clean)
        sweep = getattr(sweeps, f"get_act_patch_{name}")
        found = sweep(model.bridge, task.corrupt, cache, lambda logits: logit_diff(logits, task), reduce="none")
        return (found.values - logit_diff(model(task.corrupt), task)).detach()


@pytest.fixture(scope="module")
def shapes(settings: dict[str, Any]) -> dict[str, mi.Model]:
    """GPT-2, Llama with grouped queries, and a parallel and a post-norm architecture."""
    return {name: mi.load(module_of(name), name=f"tiny-{name}") for name in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "at", "axes"), SWEEPS)
def test_equals_transformer_lens(
    settings: dict[str, Any], shapes: dict[str, mi.Model], architecture: str, name: str, at: str, axes: tuple[str, ...]
) -> None:
    model, task = shapes[architecture], settings["gpt2"].task
    expected = lens_sweep(name, copy_of(model), task)
    if ".KV" in at and model.cfg.n_kv_heads == model.cfg.n_heads:
        at, axes = at.replace("KV", "H"), (*axes[:-1], "kv_head")
    effects = mi.patch(model, task, at, over=axes, normalize=False)
    assert set(effects.axes) == set(axes)
    order = [effects.axes.index(axis) for axis in axes]
    torch.testing.assert_close(effects.per_example.permute(*order, -1), expected, atol=1e-5, rtol=1e-5)
    # Something was measured: else zeros would equal zeros.
    assert expected.abs().max() > 0.1
    # And nothing keeps the package from its short cuts here.
    assert why_not_exact(model) == ""
    assert "in full" not in effects.provenance["plan"]


def test_resid_mid_is_the_stream_and_not_only_what_the_mlp_reads(setting: Any) -> None:
    """The skip connection carries the patched value on, too.

    transformer_lens hooks what the MLP reads. With gradients off it writes in place, and so by luck into the stream
    that goes on; with gradients on it writes into a copy.
    """
    model, task, reference = setting.model, setting.task, setting.reference
    effects = mi.patch(model, task, "L*.resid_mid", over=("layer", "pos"), normalize=False)
    base = reference.metric(task, tokens=task.corrupt)
    for layer in range(model.cfg.n_layers):
        gap = reference.run(task.clean, stop_mid=layer)[0] - reference.run(task.corrupt, stop_mid=layer)[0]
        for pos in range(task.clean.shape[1]):
            shift = torch.zeros_like(gap)
            shift[:, pos] = gap[:, pos]
            moved = reference.metric(task, Intervention(shift={layer: shift}), tokens=task.corrupt)
            torch.testing.assert_close(effects.per_example[layer, pos].double(), moved - base, atol=1e-5, rtol=0)
    torch.testing.assert_close(effects.per_example, lens_sweep("resid_mid", copy_of(model), task), atol=1e-5, rtol=0)
    assert (effects.per_example - lens_sweep("resid_mid", copy_of(model), task, grad=True)).abs().max() > 0.1


def test_head_outputs_by_hand_in_the_other_direction(setting: Any) -> None:
    model, task, reference = setting.model, setting.task, setting.reference
    corrupt = reference.run(task.corrupt)[1]
    effects = mi.patch(model, task, "L*.H*.z", direction="noise", normalize=False)
    base = reference.metric(task)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            name = f"a{layer}.h{head}"
            moved = reference.metric(task, Intervention(put={name: lambda _, name=name: corrupt[name]}))
            torch.testing.assert_close(effects.per_example[layer, head].double(), moved - base, atol=1e-5, rtol=0)


# -- what must hold by definition


def test_one_unit_is_the_difference_between_the_runs(setting: Any) -> None:
    model, task = setting.model, setting.task
    clean, corrupt = (logit_diff(model(tokens), task).mean().item() for tokens in (task.clean, task.corrupt))
    for direction, gap in (("denoise", clean - corrupt), ("noise", corrupt - clean)):
        effects = mi.patch(model, task, "L*.resid_post", direction=direction)
        # The last layer's stream decides everything, and the first layer's input too.
        assert effects.values[-1].item() == pytest.approx(1.0, abs=1e-5)
        raw = mi.patch(model, task, "L*.resid_post", direction=direction, normalize=False)
        torch.testing.assert_close(raw.values / gap, effects.values, atol=1e-6, rtol=1e-5)
        assert raw.values[-1].item() == pytest.approx(gap, abs=1e-5)
        assert effects.baseline == pytest.approx({"clean": clean, "corrupt": corrupt}, abs=1e-5)
    embed = mi.patch(model, task, "L0.resid_pre", normalize=False)
    torch.testing.assert_close(
        embed.per_example[0], logit_diff(model(task.clean), task) - logit_diff(model(task.corrupt), task), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("at", ["L*.H*.z", "L*.resid_pre", "L*.mlp_out", "L*.H*.pattern", "L*.resid_mid", "L*.H*.q_in"])
def test_patching_a_run_into_itself_changes_nothing(setting: Any, at: str) -> None:
    """Exactly nothing: a run whose values are those of the receiving run is not run. And where it is, up to rounding."""
    task = setting.task
    same = mi.Task(name="same", clean=task.clean, corrupt=task.clean, right=task.right, wrong=task.wrong)
    effects = mi.patch(setting.model, same, at, normalize=False)
    assert not effects.per_example.any()
    assert effects.provenance["forwards"] == 2
    # The corrupt run is the clean one, but for rounding: nothing is equal, and everything is run.
    nearly = mi.patch(setting.model, task, at, normalize=False, corruption=mi.Scale("L0.resid_pre", 1 + 1e-6))
    assert nearly.per_example.abs().max() < 1e-4
    assert nearly.provenance["forwards"] > 2


def test_the_two_directions_are_one_with_the_prompts_swapped(setting: Any) -> None:
    task = setting.task
    swapped = mi.Task(
        name="swapped",
        clean=task.corrupt,
        corrupt=task.clean,
        right=task.right,
        wrong=task.wrong,
        answer_pos=task.answer_pos,
    )
    noise = mi.patch(setting.model, task, "L*.H*.z", direction="noise", normalize=False)
    denoise = mi.patch(setting.model, swapped, "L*.H*.z", direction="denoise", normalize=False)
    torch.testing.assert_close(noise.per_example, denoise.per_example, atol=0, rtol=0)


def test_the_batch_does_not_matter(setting: Any) -> None:
    model, task = setting.model, setting.task
    together = mi.patch(model, task, "L*.H*.z", over=("layer", "head", "pos"), normalize=False)
    order = [3, 0, 4, 2, 1]
    shuffled = mi.patch(model, task[order], "L*.H*.z", over=("layer", "head", "pos"), normalize=False)
    torch.testing.assert_close(shuffled.per_example, together.per_example[..., order], atol=5e-6, rtol=0)
    for row in range(len(task)):
        alone = mi.patch(model, task[row], "L*.H*.z", over=("layer", "head", "pos"), normalize=False)
        torch.testing.assert_close(alone.per_example[..., 0], together.per_example[..., row], atol=5e-6, rtol=0)


def test_padding_does_not_matter(setting: Any) -> None:
    model, task = setting.model, setting.task
    short, n_pad = task[[0, 1, 3, 4]], 3
    filler = torch.full((len(short), n_pad), 17)
    mask = torch.ones(len(short), 8 + n_pad, dtype=torch.bool)
    mask[:, 8:] = False
    padded = mi.Task(
        name="padded",
        clean=torch.cat([short.clean, filler], dim=1),
        corrupt=torch.cat([short.corrupt, filler], dim=1),
        right=short.right,
        wrong=short.wrong,
        mask=mask,
    )
    for at in ("L*.H*.z", "L*.mlp_out"):
        plain, wide = (mi.patch(model, each, at, normalize=False) for each in (short, padded))
        torch.testing.assert_close(plain.per_example, wide.per_example, atol=5e-6, rtol=0)


# -- axes


def test_axes_named_apart_by_the_selector_are_the_default(setting: Any) -> None:
    model, task = setting.model, setting.task
    every = mi.patch(model, task, "L*.H*.z")
    assert (every.axes, dict(every.coords)) == (("layer", "head"), {"layer": (0, 1), "head": (0, 1, 2, 3)})
    one = mi.patch(model, task, "L1.H2.z")
    assert one.values.item() == pytest.approx(every.values[1, 2].item(), abs=1e-6)
    some = mi.patch(model, task, "L0,1.H1,3.z[2:4]")
    assert some.axes == ("layer", "head", "pos")
    assert dict(some.coords) == {"layer": (0, 1), "head": (1, 3), "pos": (2, 3)}
    grid = mi.patch(model, task, "L*.H*.z", over=("pos", "head", "layer"))
    assert grid.axes == ("layer", "head", "pos")
    torch.testing.assert_close(some.per_example, grid.per_example[:, 1::2, 2:4], atol=5e-6, rtol=0)


def test_axes_left_out_are_patched_together(setting: Any) -> None:
    model, task = setting.model, setting.task
    by_layer = mi.patch(model, task, "L*.H*.z", over=("layer",))
    whole = mi.patch(model, task, "L*.z")
    assert by_layer.axes == ("layer",)
    torch.testing.assert_close(by_layer.per_example, whole.per_example, atol=1e-6, rtol=0)
    # The output projection is linear, so all heads together are what attention adds.
    torch.testing.assert_close(whole.per_example, mi.patch(model, task, "L*.attn_out").per_example, atol=1e-5, rtol=0)
    neurons = mi.patch(model, task, "L1.mlp_post", over=("neuron",))
    assert len(neurons.coords["neuron"]) == model.cfg.d_mlp == len(neurons.values)
    one = mi.patch(model, task, "L1.N3.mlp_post")
    assert one.values.flatten()[0].item() == pytest.approx(neurons.values[3].item(), abs=1e-6)


def test_sites_that_make_no_grid_are_listed(setting: Any) -> None:
    mixed = mi.patch(setting.model, setting.task, "L*.H0.z | L1.mlp_out")
    assert mixed.axes == ("site",)
    assert mixed.coords["site"] == ("L0.H0.z", "L1.H0.z", "L1.mlp_out")
    heads = mi.patch(setting.model, setting.task, "L*.H0.z")
    mlps = mi.patch(setting.model, setting.task, "L*.mlp_out")
    expected = torch.stack([*heads.per_example[:, 0], mlps.per_example[1]])
    torch.testing.assert_close(mixed.per_example, expected, atol=5e-6, rtol=0)
    gaps = mi.patch(setting.model, setting.task, "L0.H0.z | L1.H1.z")
    assert gaps.coords["site"] == ("L0.H0.z", "L1.H1.z")


def test_named_positions_move_from_prompt_to_prompt(setting: Any) -> None:
    model, task = setting.model, setting.task
    named = mi.patch(model, task, "L*.resid_pre[changed]", normalize=False)
    by_pos = mi.patch(model, task, "L*.resid_pre", over=("layer", "pos"), normalize=False)
    rows = torch.arange(len(task))
    expected = by_pos.per_example[:, task.positions["changed"], rows]
    torch.testing.assert_close(named.per_example.reshape(2, -1), expected, atol=5e-6, rtol=0)
    assert named.coords["pos"] == ("changed",)


def test_negative_positions_are_counted_from_the_end(setting: Any) -> None:
    by_pos = mi.patch(setting.model, setting.task, "L*.resid_post", over=("layer", "pos"))
    last = mi.patch(setting.model, setting.task, "L*.resid_post[-1]")
    torch.testing.assert_close(last.per_example[:, 0], by_pos.per_example[:, -1], atol=1e-5, rtol=0)


# -- metrics


def test_any_metric(setting: Any) -> None:
    model, task = setting.model, setting.task

    def right_logit(logits: Tensor, task: mi.Task) -> Tensor:
        return logits.gather(1, task.right)[:, 0]

    effects = mi.patch(model, task, "L*.H*.z", metric=right_logit)
    assert effects.provenance["metric"] == "right_logit"
    clean, corrupt = model(task.clean), model(task.corrupt)
    rows = torch.arange(len(task))
    assert effects.baseline["clean"] == pytest.approx(clean[rows, task.answer_pos, task.right[:, 0]].mean().item(), abs=1e-5)
    kl = mi.patch(model, task, "L*.resid_post", metric="kl", direction="noise", normalize=False)
    p, q = (each[rows, task.answer_pos].log_softmax(-1) for each in (clean, corrupt))
    torch.testing.assert_close(kl.per_example[-1], (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=0)
    assert kl.baseline["clean"] == 0.0
    accuracy = mi.patch(model, task, "L*.resid_post", metric="accuracy", normalize=False)
    assert set(accuracy.per_example.flatten().tolist()) <= {-1.0, 0.0, 1.0}


def test_no_difference_to_explain(setting: Any) -> None:
    task = setting.task
    same = mi.Task(name="same", clean=task.clean, corrupt=task.clean, right=task.right, wrong=task.wrong)
    with pytest.raises(
        MetricError,
        match=r"^logit_diff is (\S+) on the clean and \1 on the corrupt prompts of task 'same': there is no difference "
        r"to explain\. Use other corrupt prompts, another metric, or normalize=False$",
    ):
        mi.patch(setting.model, same, "L*.H*.z")


def bad_direction(model: mi.Model, task: mi.Task) -> None:
    mi.patch(model, task, "L*.H*.z", direction="both")  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            bad_direction,
            MetricError,
            "direction='both': write 'denoise' (clean activations into the corrupt run) or 'noise' (corrupt activations "
            "into the clean run)",
        ),
        (
            lambda model, task: mi.patch(model, task, "L*.H*.z", over=("layers",)),
            SelectorError,
            "cannot sweep over 'layers'. Did you mean 'layer'?",
        ),
        (
            lambda model, task: mi.patch(model, task, "L*.mlp_out", over=("head",)),
            SelectorError,
            "L0.mlp_out has no axis 'head'; its axes are batch pos d_model",
        ),
        (
            lambda model, task: mi.patch(model, task, "L*.rezid_pre"),
            SiteError,
            "in 'L*.rezid_pre': there is no site 'rezid_pre'. Did you mean 'resid_pre'",
        ),
    ],
)
def test_messages(setting: Any, call: Callable[..., None], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call(setting.model, setting.task)
    assert str(caught.value).startswith(message)


# -- what results carry, and what is left alone


def test_provenance_and_headline(setting: Any) -> None:
    effects = mi.patch(setting.model, setting.task, "L*.H*.z")
    said = effects.provenance
    assert {key: said[key] for key in ("method", "site", "at", "normalized", "direction", "metric", "prompts", "forwards")} == {
        "method": "activation patching",
        "site": "z",
        "at": "L*.H*.z",
        "normalized": True,
        "direction": "denoise",
        "metric": "logit_diff",
        "prompts": 5,
        "forwards": 2 + 8,
    }
    assert (said["task"], said["model"]) == ("random", setting.model.name)
    assert said["versions"]["torch"] == torch.__version__.split("+")[0] or said["versions"]["torch"] == torch.__version__
    assert repr(effects).startswith("Effects: patching z (denoise); 2 layers x 4 heads, 5 prompts; strongest L")
    frame = effects.to_frame()
    assert list(frame.columns)[:3] == ["layer", "head", "value"]
    strongest = frame.value.abs().idxmax()
    where = f"L{frame.layer[strongest]}.H{frame['head'][strongest]}.z"
    assert effects.top(1)[0] == (where, pytest.approx(frame.value[strongest]))


def census(model: mi.Model) -> list[tuple[str, int, int, int]]:
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for name, module in model.hf.named_modules()
    ]


@pytest.fixture
def users_hook(setting: Any) -> Iterator[list[int]]:
    """A hook of the user's own, which counts; it has to be there, and to fire."""
    calls: list[int] = []
    handle = setting.model.block(1).register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def test_hooks_gradients_and_random_state_are_left_alone(setting: Any, users_hook: list[int]) -> None:
    model, task = setting.model, setting.task
    parameter = next(model.hf.parameters())
    parameter.grad = torch.full_like(parameter, 7.0)
    before, state = census(model), torch.get_rng_state()
    mi.patch(model, task, "L*.H*.z | L*.resid_mid")
    assert users_hook
    assert census(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert parameter.grad.unique().tolist() == [7.0]
    parameter.grad = None
    calls = []

    def failing(logits: Tensor, task: mi.Task) -> Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return logits[:, 0]

    with pytest.raises(KeyboardInterrupt):
        mi.patch(model, task, "L*.H*.z", metric=failing)
    assert census(model) == before


def test_a_hook_of_the_users_acts_on_every_run(setting: Any) -> None:
    """Whatever the package does to save work, a model with a hook on it is the model that is patched."""
    model, task = copy_of(setting.model), setting.task
    plain = mi.patch(model, task, "L*.H*.z", normalize=False)
    handle = model.block(0).register_forward_hook(lambda module, args, output: output * 1.5)
    try:
        scaled = mi.patch(model, task, "L*.H*.z", normalize=False)
        expected = lens_sweep("attn_head_out_all_pos", model, task)
    finally:
        handle.remove()
    torch.testing.assert_close(scaled.per_example, expected, atol=1e-5, rtol=0)
    assert (plain.per_example - scaled.per_example).abs().max() > 0.05


@pytest.mark.parametrize("name", ["induction", "gqa_induction", "copy", "memory"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_marks_the_planted_heads_and_no_others(name: str, direction: Any) -> None:
    toy = mi.toys.build(name)
    effects = mi.patch(toy.model, toy.task, "L*.H*.z", direction=direction)
    marked = {f"a{layer}.h{head}" for layer, head in (effects.values.abs() > 1e-3).nonzero().tolist()}
    assert marked == set(toy.heads)
