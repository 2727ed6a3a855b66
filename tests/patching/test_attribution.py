"""Gradient estimates against two public projects, finite differences of a forward pass by hand, and their own definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.errors import MetricError, SelectorError
from tests.core.conftest import module_of
from tests.oracles import published
from tests.reference import Intervention, copy_of

# EAP-IG's name for a column, and the points of our path that are the ones it takes.
COLUMNS: dict[str, int | Sequence[float]] = {
    "EAP": 0,
    "EAP-IG-inputs-5": [1.0, 0.8, 0.6, 0.4, 0.2],
    "EAP-IG-inputs-50": [1 - i / 50 for i in range(50)],
    "clean-corrupted": [0.0, 1.0],
    "EAP-IG-activations-5": [0.8, 0.6, 0.4, 0.2, 0.0],
}


def edge_scores(model: mi.Model, task: mi.Task, **options: Any) -> dict[tuple[str, str, str], float]:
    return mi.attribute(model, task, unit="edge", normalize=False, **options).as_dict()  # type: ignore[return-value]


def largest_gap(found: dict[Any, float], expected: dict[Any, float]) -> float:
    assert found.keys() == expected.keys()
    return max(abs(found[edge] - expected[edge]) for edge in expected)


# -- other people's numbers


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_equals_eap_ig(column: str, precision: str) -> None:
    model = published.model() if precision == "float32" else published.model64()
    path = "activations" if "activations" in column else "inputs"
    found = edge_scores(model, published.task(), steps=COLUMNS[column], path=path)
    expected = published.eapig_scores(column)
    # Rounding of the smallest oracle digit and of float32 sums.
    assert largest_gap(found, expected) < (1e-5 if precision == "float32" else 1e-6)
    # Columns differ from each other by far more than that, so that each one tests its own path.
    others = [published.eapig_scores(other) for other in COLUMNS if other != column]
    assert min(largest_gap(found, other) for other in others) > 1e-3


def test_equals_auto_circuit_with_its_sign() -> None:
    found = edge_scores(published.model(), published.task(), steps=0)
    scores = published.autocircuit()["scores"]["eap"]
    expected = {edge: -score for edge, score in zip(published.autocircuit_edges(), scores, strict=True)}
    assert largest_gap(found, expected) < 1e-5
    # A difference of the sources' corrupt and clean values can be zero: those edges are zero here as well.
    zero = [edge for edge, score in expected.items() if score == 0]
    assert len(zero) == 6
    assert all(found[edge] == 0 for edge in zero)


def test_node_scores_equal_the_right_ones() -> None:
    """MLPs included, where the other project takes the gradient at the input: it gives another sign for m0."""
    stored = published.eapig()["node_scores"]["EAP"]
    right = {published.eapig_node(name): value for name, value in stored["own_correct_batch_mean"].items()}
    found = mi.attribute(published.model(), published.task(), direction="noise", normalize=False).as_dict()
    assert largest_gap(found, right) < 1e-5  # type: ignore[arg-type]
    wrong = stored["own_mlp_gradient_at_input_batch_mean"]
    assert min(abs(found[name] - wrong[name]) for name in ("m0", "m1", "m2")) > 0.1


def test_node_scores_along_a_path_equal_the_other_projects() -> None:
    """Its node version takes other points than its edge version; heads only, for the defect above."""
    stored = published.eapig()["node_scores"]["EAP-IG-inputs-5"]
    found = mi.attribute(published.model(), published.task(), steps=[0.8, 0.6, 0.4, 0.2, 0.0], normalize=False).as_dict()
    for name, value in stored["scores"].items():
        if not name.startswith("m"):
            assert found[published.eapig_node(name)] == pytest.approx(value * stored["scale_to_batch_mean"], abs=1e-5)


# -- finite differences, over grouped queries as well


def test_every_edge_equals_finite_differences(setting: Any) -> None:
    """q, k and v of heads and of KV heads, MLPs and logits, each edge and each prompt for itself."""
    effects = mi.attribute(setting.model, setting.task, unit="edge", normalize=False)
    edges = list(effects.coords["edge"])
    assert {edge[2] for edge in edges} == {"q", "k", "v", "in"}
    expected = setting.reference.slopes(setting.task, edges)
    table = torch.stack([expected[edge] for edge in edges]).float()
    torch.testing.assert_close(effects.per_example, table, atol=1e-4, rtol=0)
    assert table.abs().mean(dim=1).max() > 0.1


def test_every_edge_along_a_path_equals_finite_differences(setting: Any) -> None:
    points = (0.25, 0.75)
    effects = mi.attribute(setting.model, setting.task, unit="edge", steps=2, normalize=False)
    assert effects.provenance["points"] == list(points)
    edges, reference, task = list(effects.coords["edge"]), setting.reference, setting.task
    ends = [reference.embed(tokens) for tokens in (task.clean, task.corrupt)]
    slopes = [reference.slopes(task, edges, base={"embed": torch.lerp(*ends, point)}) for point in points]
    table = torch.stack([sum(at[edge] for at in slopes) / len(points) for edge in edges]).float()
    torch.testing.assert_close(effects.per_example, table, atol=1e-4, rtol=0)


def test_the_other_direction_equals_finite_differences(setting: Any) -> None:
    task = setting.task
    swapped = mi.Task(
        name="swapped", clean=task.corrupt, corrupt=task.clean, right=task.right, wrong=task.wrong, answer_pos=task.answer_pos
    )
    effects = mi.attribute(setting.model, task, unit="edge", direction="denoise", normalize=False)
    expected = setting.reference.slopes(swapped, effects.coords["edge"])
    table = torch.stack(list(expected.values())).float()
    torch.testing.assert_close(effects.per_example, table, atol=1e-4, rtol=0)


def test_every_node_equals_finite_differences(setting: Any) -> None:
    task, reference = setting.task, setting.reference
    effects = mi.attribute(setting.model, task, normalize=False)
    clean, corrupt = reference.run(task.clean)[1], reference.run(task.corrupt)[1]
    for i, name in enumerate(effects.coords["node"]):
        ends = []
        for size in (1e-4, -1e-4):
            moved = clean[name] + size * (corrupt[name] - clean[name])
            ends.append(reference.metric(task, Intervention(put={name: lambda _, moved=moved: moved})))
        slope = (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close(effects.per_example[i].double(), slope, atol=1e-4, rtol=0)
    assert effects.coords["node"] == tuple(clean)


def test_a_nodes_score_is_the_sum_of_its_edges(setting: Any) -> None:
    edges = mi.attribute(setting.model, setting.task, unit="edge", normalize=False)
    nodes = mi.attribute(setting.model, setting.task, normalize=False)
    for i, name in enumerate(nodes.coords["node"]):
        own = [j for j, edge in enumerate(edges.coords["edge"]) if edge[0] == name]
        torch.testing.assert_close(edges.per_example[own].sum(dim=0), nodes.per_example[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("at", ["L*.H*.z", "L*.resid_mid", "L*.mlp_post", "L*.H*.q", "L*.v", "L*.H*.head_out"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_sites_equal_finite_differences_of_edits(setting: Any, at: str, direction: Any) -> None:
    """The estimate is the slope of what patching measures, at the receiving run: same sign, same scale."""
    task, model = setting.task, copy_of(setting.model, torch.float64)
    effects = mi.attribute(model, task, at, over=("layer",), direction=direction, normalize=False)
    own, others = (task.corrupt, task.clean) if direction == "denoise" else (task.clean, task.corrupt)
    rows = torch.arange(len(task))

    def metric(*edits: mi.Edit) -> Tensor:
        answer = mi.run(model, own, edits=edits).logits[rows, task.answer_pos]
        return answer[rows, task.right[:, 0]] - answer[rows, task.wrong[:, 0]]

    for layer in range(model.cfg.n_layers):
        site = mi.select(f"L{layer}.{at.split('.')[-1]}", model.cfg).sites[0]
        here, there = mi.run(model, own, capture=site)[site], mi.run(model, others, capture=site)[site]
        ends = [metric(mi.Replace(site, here + size * (there - here))) for size in (1e-3, -1e-3)]
        slope = (ends[0] - ends[1]) / 2e-3
        torch.testing.assert_close(effects.per_example[layer].double(), slope, atol=1e-3, rtol=0)
    assert effects.values.abs().max() > 0.01
    exact = mi.patch(model, task, at, over=("layer",), direction=direction, normalize=False)
    assert (effects - exact).axes == ("layer",)


# -- what the numbers must not depend on


@pytest.mark.parametrize("unit", ["node", "edge"])
def test_scores_do_not_depend_on_batch_order_or_memory(setting: Any, unit: Any) -> None:
    model, task = setting.model, setting.task
    options: dict[str, Any] = {"unit": unit, "steps": 2, "normalize": False}
    whole = mi.attribute(model, task, **options).per_example
    order = [4, 1, 0, 3, 2]
    torch.testing.assert_close(mi.attribute(model, task[order], **options).per_example, whole[:, order], atol=1e-5, rtol=0)
    twice = mi.attribute(model, task[[0, 1, 2, 3, 4] * 2], **options)
    torch.testing.assert_close(twice.values, whole.mean(-1), atol=1e-5, rtol=0)
    for row in range(len(task)):
        torch.testing.assert_close(mi.attribute(model, task[row], **options).per_example[:, 0], whole[:, row], atol=1e-5, rtol=0)
    # So little memory that every prompt is a part of its own.
    parts = mi.attribute(model, task, memory=1, **options)
    torch.testing.assert_close(parts.per_example, whole, atol=1e-5, rtol=0)


def test_memory_changes_neither_unit_nor_baseline(setting: Any) -> None:
    whole, parts = (mi.attribute(setting.model, setting.task, unit="edge", memory=size) for size in (1 << 30, 1))
    assert parts.baseline == pytest.approx(whole.baseline, abs=1e-6)
    torch.testing.assert_close(parts.values, whole.values, atol=1e-5, rtol=1e-4)
    assert parts.provenance["prompts"] == whole.provenance["prompts"] == 5


def test_memory_bounds_the_rows_of_a_forward_pass(setting: Any) -> None:
    seen: list[int] = []
    handle = setting.model.block(0).register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    try:
        mi.attribute(setting.model, setting.task, unit="edge", memory=1)
        assert set(seen) <= {1, 8}
        assert len(seen) == 5 * 2
    finally:
        handle.remove()


def test_padding_does_not_matter(setting: Any) -> None:
    model, short = setting.model, setting.task[[0, 1, 3, 4]]
    filler, mask = torch.full((4, 3), 17), torch.ones(4, 11, dtype=torch.bool)
    mask[:, 8:] = False
    wide = [torch.cat([tokens, filler], dim=1) for tokens in (short.clean, short.corrupt)]
    padded = mi.Task(name="padded", clean=wide[0], corrupt=wide[1], right=short.right, wrong=short.wrong, mask=mask)
    plain, longer = (mi.attribute(model, each, unit="edge", steps=2, normalize=False) for each in (short, padded))
    torch.testing.assert_close(longer.per_example, plain.per_example, atol=1e-5, rtol=0)


def test_sums_are_float32_in_a_bfloat16_model() -> None:
    from transformers import GPT2LMHeadModel

    module = GPT2LMHeadModel.from_pretrained(published.HERE / "tiny-gpt2").to(torch.bfloat16)
    half = mi.attribute(mi.load(module, name="half"), published.task(), unit="edge", normalize=False)
    assert half.per_example.dtype == torch.float32
    # A bfloat16 has 8 bits: products summed in it would be multiples of a power of two of their own size.
    values = half.per_example[half.per_example != 0]
    assert (values.to(torch.bfloat16).float() != values).float().mean() > 0.9
    exact = mi.attribute(published.model(), published.task(), unit="edge", normalize=False)
    assert torch.corrcoef(torch.stack([half.values, exact.values]))[0, 1] > 0.99


def test_completeness(setting: Any) -> None:
    """The embedding's scores sum to the whole difference as steps grow, and midpoints get there first."""
    for unit in ("edge", "node"):
        errors = {}
        for steps in (0, 1, 4, 16, 32):
            effects = mi.attribute(setting.model, setting.task, unit=unit, steps=steps)  # type: ignore[arg-type]
            errors[steps] = abs(effects.provenance["completeness_error"])
            if unit == "node":
                assert effects.as_dict()["embed"] - 1 == pytest.approx(effects.provenance["completeness_error"], abs=1e-5)
        assert errors[32] < errors[16] < errors[4]
        assert errors[32] < 0.02 * max(errors[0], errors[1])
        ends = mi.attribute(setting.model, setting.task, unit=unit, steps=[i / 16 for i in range(16)])  # type: ignore[arg-type]
        assert abs(ends.provenance["completeness_error"]) > errors[16]
    raw = mi.attribute(setting.model, setting.task, steps=16, normalize=False)
    gap = raw.baseline["corrupt"] - raw.baseline["clean"]
    assert raw.provenance["completeness_error"] == pytest.approx(raw.as_dict()["embed"] - gap, abs=1e-5)


def test_normalised_scores_are_shares_of_the_difference(setting: Any) -> None:
    for direction in ("noise", "denoise"):
        shares = mi.attribute(setting.model, setting.task, unit="edge", direction=direction)  # type: ignore[arg-type]
        raw = mi.attribute(setting.model, setting.task, unit="edge", direction=direction, normalize=False)  # type: ignore[arg-type]
        gap = raw.baseline["clean"] - raw.baseline["corrupt"]
        torch.testing.assert_close(shares.values * gap * (1 if direction == "denoise" else -1), raw.values, atol=1e-5, rtol=0)


def test_axes_are_those_of_patching(setting: Any) -> None:
    by_pos = mi.attribute(setting.model, setting.task, "L*.H*.z", over=("layer", "head", "pos"), normalize=False)
    heads = mi.attribute(setting.model, setting.task, "L*.H*.z", normalize=False)
    assert by_pos.axes == ("layer", "head", "pos")
    torch.testing.assert_close(by_pos.per_example.sum(dim=2), heads.per_example, atol=1e-5, rtol=0)
    nodes = mi.attribute(setting.model, setting.task, normalize=False).as_dict()
    assert heads.values[1, 2].item() == pytest.approx(nodes["a1.h2"], abs=1e-6)
    named = mi.attribute(setting.model, setting.task, "L*.H*.z[changed]", normalize=False)
    rows = torch.arange(5)
    expected = by_pos.per_example[:, :, setting.task.positions["changed"], rows]
    torch.testing.assert_close(named.per_example.reshape(2, 4, 5), expected, atol=1e-6, rtol=0)


def test_nothing_before_the_first_difference(setting: Any) -> None:
    by_pos = mi.attribute(setting.model, setting.task, "L*.resid_post", over=("layer", "pos"), normalize=False)
    for row, first in enumerate(setting.task.first_difference.tolist()):
        # Rows are computed in two calls, so that equal numbers may differ in their last bits.
        assert by_pos.per_example[:, :first, row].abs().max() < 1e-4
        assert by_pos.per_example[:, first, row].abs().max() > 1e-3


# -- messages


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"metric": "kl"},
            MetricError,
            "'kl' is at its minimum in the clean run, where its gradient is zero: use steps=5, direction='denoise' or "
            "another metric",
        ),
        (
            {"metric": "accuracy"},
            MetricError,
            "'accuracy' has a zero gradient almost everywhere, so estimates of it are all zero; use metric='logit_diff', or "
            "measure it exactly with mi.patch",
        ),
        ({"unit": "edges"}, MetricError, "unit='edges': write 'node', 'neuron' or 'edge'"),
        (
            {"unit": "edge", "at": "L*.z"},
            SelectorError,
            "unit='edge' scores every edge; a selector goes with unit='node'",
        ),
        (
            {"steps": -1},
            MetricError,
            "steps=-1: give 0 for the gradient at the receiving run, or the number of points of the path",
        ),
        (
            {"direction": "up"},
            MetricError,
            "direction='up': write 'denoise' (clean activations into the corrupt run) or 'noise' (corrupt activations into "
            "the clean run)",
        ),
    ],
)
def test_messages(setting: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        mi.attribute(setting.model, setting.task, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("options", [{"steps": 3}, {"direction": "denoise"}, {"steps": [0.0, 0.5]}])
def test_kl_elsewhere_is_fine(setting: Any, options: dict[str, Any]) -> None:
    assert mi.attribute(setting.model, setting.task, metric="kl", **options).values.abs().max() > 1e-3


def test_kl_along_the_path_is_complete(setting: Any) -> None:
    effects = mi.attribute(setting.model, setting.task, unit="edge", metric="kl", steps=32)
    assert abs(effects.provenance["completeness_error"]) < 0.05


def test_no_difference_to_explain(setting: Any) -> None:
    task = setting.task
    same = mi.Task(name="same", clean=task.clean, corrupt=task.clean, right=task.right, wrong=task.wrong)
    with pytest.raises(MetricError, match=r"^logit_diff is (\S+) on the clean and \1 on the corrupt prompts of task 'same'"):
        mi.attribute(setting.model, same, unit="edge")


def test_edges_where_the_heads_sum_passes_a_norm(settings: dict[str, Any]) -> None:
    """The embedding's edges sum to the whole difference; edges into the logits by hand."""
    model, task = mi.load(module_of("gemma2")), settings["gpt2"].task
    rough, estimate = (mi.attribute(model, task, unit="edge", steps=steps, normalize=False) for steps in (20, 200))
    rough_error, error = (abs(each.provenance["completeness_error"]) for each in (rough, estimate))
    assert error < min(0.01, rough_error / 20)
    local = mi.attribute(model, task, unit="edge", normalize=False).per_example
    clean, corrupt = (mi.run(model, tokens, capture="L*.z | L*.mlp_out | L1.resid_post") for tokens in (task.clean, task.corrupt))
    rows = torch.arange(len(task))
    stream = clean["L1.resid_post"][rows, task.answer_pos].requires_grad_()
    logits = model.unembed(stream)
    metric = logits[rows, task.right[:, 0]] - logits[rows, task.wrong[:, 0]]
    (gradient,) = torch.autograd.grad(metric.sum(), stream)
    for layer in (0, 1):
        z, other = clean[f"L{layer}.z"], corrupt[f"L{layer}.z"]
        change = {f"m{layer}": corrupt[f"L{layer}.mlp_out"] - clean[f"L{layer}.mlp_out"]}
        for head in range(4):
            mixed = torch.cat([z[:, :, :head], other[:, :, head : head + 1], z[:, :, head + 1 :]], dim=2)
            change[f"a{layer}.h{head}"] = model.attention_adds(layer, mixed) - model.attention_adds(layer, z)
        for node, moved in change.items():
            expected = (moved[rows, task.answer_pos] * gradient).sum(-1).detach()
            found = local[estimate.coords["edge"].index((node, "logits", "in"))]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# -- what results carry, and what is left alone


def test_provenance(setting: Any) -> None:
    effects = mi.attribute(setting.model, setting.task, unit="edge", steps=3)
    said = effects.provenance
    assert said["method"] == "EAP-IG inputs, 3 midpoints"
    assert said["points"] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert (said["forwards"], said["backwards"], said["direction"]) == (5, 3, "noise")
    assert repr(effects).startswith("Effects: EAP-IG inputs, 3 midpoints: patching edges (noise), estimated; ")
    assert list(effects.to_frame().columns)[:4] == ["src", "dst", "port", "value"]
    plain = mi.attribute(setting.model, setting.task, "L*.H*.z")
    assert plain.provenance["method"] == "attribution patching"
    assert "completeness_error" not in plain.provenance
    given = mi.attribute(setting.model, setting.task, steps=[0.0, 1.0])
    assert given.provenance["method"] == "attribution patching-IG inputs, 2 points"


@pytest.mark.parametrize(("options", "forwards"), [({"steps": 4}, (6, 4)), ({}, (2, 1)), ({"path": "activations"}, (7, 5))])
def test_forward_and_backward_passes_are_as_said(setting: Any, options: dict[str, Any], forwards: tuple[int, int]) -> None:
    calls: list[bool] = []
    handle = setting.model.block(0).register_forward_hook(lambda module, args, output: calls.append(torch.is_grad_enabled()))
    try:
        effects = mi.attribute(setting.model, setting.task, unit="edge", **options)
    finally:
        handle.remove()
    assert (len(calls), sum(calls)) == (effects.provenance["forwards"], effects.provenance["backwards"]) == forwards


@pytest.mark.parametrize("unit", ["node", "edge"])
def test_hooks_gradients_and_random_state_are_left_alone(setting: Any, unit: Any) -> None:
    model = setting.model
    parameters = list(model.hf.parameters())
    parameters[0].grad = torch.full_like(parameters[0], 7.0)
    census = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.hf.modules()]
    state, wanted, grad_mode = torch.get_rng_state(), [p.requires_grad for p in parameters], torch.is_grad_enabled()
    with torch.no_grad():
        # Gradients are the method's own business, also where the caller has switched them off.
        mi.attribute(model, setting.task, unit=unit, steps=2)

    def failing(logits: Tensor, task: mi.Task) -> Tensor:
        if logits.requires_grad:
            raise KeyboardInterrupt
        return logits[:, 0]

    with pytest.raises(KeyboardInterrupt):
        mi.attribute(model, setting.task, unit=unit, metric=failing)
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.hf.modules()]
    assert after == census
    assert parameters[0].grad.unique().tolist() == [7.0]
    assert all(p.grad is None for p in parameters[1:])
    parameters[0].grad = None
    assert torch.equal(torch.get_rng_state(), state)
    assert ([p.requires_grad for p in parameters], torch.is_grad_enabled()) == (wanted, grad_mode)


def test_memory_in_use_is_flat_in_steps(setting: Any) -> None:
    """No graph outlives its step: as many tensors with one are alive at the last point as at the first."""
    import gc

    alive: list[int] = []

    def metric(logits: Tensor, task: mi.Task) -> Tensor:
        if logits.requires_grad:
            gc.collect()
            alive.append(sum(1 for each in gc.get_objects() if type(each) is Tensor and each.grad_fn is not None))
        return logits[:, 0]

    mi.attribute(setting.model, setting.task, unit="edge", steps=5, metric=metric)
    assert len(alive) == 5
    assert len(set(alive[1:])) == 1


def peak_bytes(run: Any) -> int:
    """The most bytes that a call's tensors take at once, by the allocator's own account."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    held = most = 0
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_peak_memory_is_flat_in_steps(setting: Any) -> None:
    """All tensors, not only those with a graph: gradients and tables of one point are gone before the next but one."""
    task = setting.task[[0, 1, 2, 3, 4] * 8]
    peaks = {n: peak_bytes(lambda n=n: mi.attribute(setting.model, task, unit="edge", steps=n)) for n in (2, 3, 8)}
    assert peaks[2] > task.clean.numel() * setting.model.cfg.d_model * 4 * len(mi.GraphShape.of(setting.model).writers)
    assert peaks[3] < 1.05 * peaks[2]
    assert peaks[8] < 1.05 * peaks[2]


def test_a_budget_of_memory_is_kept(setting: Any) -> None:
    """More prompts take more memory only until the budget ends it."""
    task = setting.task[[0, 1, 2, 3, 4] * 40]
    mi.attribute(setting.model, task[:1], unit="edge")
    budget = 4 << 20
    free, bounded = (
        peak_bytes(lambda size=size: mi.attribute(setting.model, task, unit="edge", memory=size)) for size in ("1 GiB", budget)
    )
    assert bounded < budget < free


# -- a planted answer


@pytest.mark.parametrize("name", ["induction", "gqa_induction", "copy", "memory"])
@pytest.mark.parametrize("steps", [0, 5])
def test_planted_edges_score_above_all_others(name: str, steps: int) -> None:
    toy = mi.toys.build(name)
    scores = mi.attribute(toy.model, toy.task, unit="edge", steps=steps).as_dict()
    truth = {tuple(edge) for edge in toy.truth["resample"]}
    planted = [abs(value) for edge, value in scores.items() if edge in truth]
    others = [abs(value) for edge, value in scores.items() if edge not in truth]
    assert min(planted) > 10 * max(others)
