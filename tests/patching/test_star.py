"""AtP*: attention recomputed by hand, gradients dropped by hand, what both are for, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.errors import MetricError, ModelError
from tests.core.conftest import ARCHITECTURES, VOCAB, module_of
from tests.reference import Intervention, Reference

RULES = ("qk-fix", "grad-drop", "atp-star")
SIGN = "magnitudes over dropped layers, with the sign of the mean score without dropping"


class Dropping(Reference):
    """Nothing flows back through attention and MLP of one layer."""

    dropped: int | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, head: int) -> Tensor:
        out = super().attend(q, k, v, layer, head)
        return out.detach() if layer == self.dropped else out

    def mlp(self, x: Tensor, layer: int, act: Callable[[Tensor], Tensor] = lambda own: own) -> Tensor:
        out = super().mlp(x, layer, act)
        return out.detach() if layer == self.dropped else out


def slopes(by_hand: Dropping, task: mi.Task, dropped: int | None) -> dict[Any, Tensor]:
    """dm/d(what each node writes) and dm/d(what each reader reads), ``[batch pos d_model]``."""
    by_hand.dropped = dropped
    leaves: dict[Any, Tensor] = {}
    metric = by_hand.metric(task, Intervention(leaves=leaves))
    found = torch.autograd.grad(metric.sum(), list(leaves.values()), allow_unused=True)
    filled = [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves.values(), found, strict=True)]
    return dict(zip(leaves, filled, strict=True))


def layer_of(node: str) -> int | None:
    return None if node in ("embed", "logits") else int(node.split(".")[0][1:])


def outputs_when_moved(by_hand: Reference, tokens: Tensor, reader: str, port: str, moved: Tensor) -> dict[str, Tensor]:
    """What the heads that a query (or key) belongs to write, when it reads the stream plus ``moved``: all else as it is."""
    layer = layer_of(reader)
    assert layer is not None
    group = by_hand.n_heads // by_hand.n_kv_heads
    # The stream before this layer, with the positions and biases that no node writes.
    after, written = by_hand.run(tokens, stop_mid=layer)
    here = [name for name in written if layer_of(name) == layer]
    x = after - sum(written[name] for name in here)
    if not by_hand.is_llama:
        x = x - by_hand.w[f"transformer.h.{layer}.attn.c_proj.bias"]
    index = int("".join(c for c in reader.split(".")[1] if c.isdigit()))
    heads = range(by_hand.n_heads) if port == "k" else [index]
    out = {}
    for head in heads:
        kv = head // group
        if port == "k" and kv != index:
            continue
        q, k, v = (by_hand.project(x, layer, each, head if each == "q" else kv) for each in "qkv")
        if port == "q":
            q = by_hand.project(x + moved, layer, "q", head)
        else:
            k = by_hand.project(x + moved, layer, "k", kv)
        out[f"a{layer}.h{head}"] = by_hand.attend(q, k, v, layer, head) - written[f"a{layer}.h{head}"]
    return out


def expected_edge(by_hand: Dropping, task: mi.Task, label: Any, at: dict[Any, Tensor], moved: Tensor, fixed: bool) -> Tensor:
    reader, port = label[1:]
    if fixed and port in "qk":
        change = outputs_when_moved(by_hand, task.clean, reader, port, moved)
        return sum((each * at[head]).sum((1, 2)) for head, each in change.items())  # type: ignore[return-value]
    return (moved * at[reader, port]).sum((1, 2))


@pytest.mark.parametrize("rules", RULES)
def test_edges_equal_attention_and_gradients_by_hand(setting: Any, rules: Any) -> None:
    task, by_hand = setting.task, Dropping(setting.model)
    n_layers, fixed = by_hand.n_layers, rules != "grad-drop"
    by_hand.dropped = None
    clean, corrupt = (by_hand.run(tokens)[1] for tokens in (task.clean, task.corrupt))
    plain, dropped = slopes(by_hand, task, None), [slopes(by_hand, task, layer) for layer in range(n_layers)]
    by_hand.dropped = None
    effects = mi.attribute(setting.model, task, unit="edge", rules=rules, normalize=False)
    rows, means = [], []
    for label in effects.coords["edge"]:
        moved = corrupt[label[0]] - clean[label[0]]
        signed = expected_edge(by_hand, task, label, plain, moved, fixed)
        means.append(signed.mean())
        if rules == "qk-fix":
            rows.append(signed)
            continue
        others = [layer for layer in range(n_layers) if layer != layer_of(label[1])]
        each = [expected_edge(by_hand, task, label, dropped[layer], moved, fixed).abs() for layer in others]
        rows.append((-1 if signed.mean() < 0 else 1) * torch.stack(each).mean(dim=0))
    expected = torch.stack(rows).float()
    torch.testing.assert_close(effects.per_example.abs(), expected.abs(), atol=1e-4, rtol=1e-3)
    # The sign of what is nothing but rounding may be any.
    sure = torch.tensor([abs(float(value)) > 1e-4 for value in means])
    assert sure.sum() > 50
    torch.testing.assert_close(effects.per_example[sure], expected[sure], atol=1e-4, rtol=1e-3)
    gradient = mi.attribute(setting.model, task, unit="edge", normalize=False)
    assert (effects.values - gradient.values).abs().max() > 0.05


def test_nodes_are_the_mean_over_the_other_layers(setting: Any) -> None:
    task, by_hand = setting.task, Dropping(setting.model)
    clean, corrupt = (by_hand.run(tokens)[1] for tokens in (task.clean, task.corrupt))
    dropped = [slopes(by_hand, task, layer) for layer in range(by_hand.n_layers)]
    effects = mi.attribute(setting.model, task, rules="atp-star", normalize=False)
    for label, found in zip(effects.coords["node"], effects.per_example, strict=True):
        moved = corrupt[label] - clean[label]
        others = [layer for layer in range(by_hand.n_layers) if layer != layer_of(label)]
        expected = torch.stack([(moved * dropped[layer][label]).sum((1, 2)).abs() for layer in others]).mean(dim=0)
        torch.testing.assert_close(found.abs().double(), expected, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> mi.Model:
    return mi.load(module_of(request.param), name=f"tiny-{request.param}")


@pytest.fixture(scope="module")
def task() -> mi.Task:
    clean = torch.randint(1, VOCAB - 1, (3, 8), generator=torch.Generator().manual_seed(0))
    corrupt = clean.clone()
    corrupt[:, 5] = (clean[:, 5] + 7) % 59 + 1
    return mi.Task(name="random", clean=clean, corrupt=corrupt, right=[1, 2, 3], wrong=[4, 5, 6], positions={"changed": [5] * 3})


def slope_at(model: mi.Model, task: mi.Task, tokens: Tensor, site: mi.Site) -> Tensor:
    """The gradient of the logit difference at a whole site."""
    registry, rows = mi.HookRegistry(model), torch.arange(len(task))
    leaf = torch.zeros_like(mi.run(model, tokens, capture=site)[site], requires_grad=True)
    registry.transform(site, lambda value: value + leaf)
    with torch.enable_grad(), registry:
        logits = model(tokens)[rows, task.answer_pos]
        total = (logits[rows, task.right[:, 0]] - logits[rows, task.wrong[:, 0]]).sum()
    return torch.autograd.grad(total, leaf)[0]


def test_edits_of_queries_and_keys_give_the_same_on_all_shapes(model: mi.Model, task: mi.Task) -> None:
    """By whole forward passes of the public kind: soft cap, sliding window, rotary parts and grouped queries included."""
    layer = 1
    sites = " | ".join(f"L{layer}.{name}" for name in ("q", "k", "z", "resid_pre"))
    clean, corrupt = (mi.run(model, tokens, capture=sites) for tokens in (task.clean, task.corrupt))
    z = mi.Site("z", layer)
    slope = slope_at(model, task, task.clean, z)

    def expected(edit: mi.Edit) -> Tensor:
        return ((mi.run(model, task.clean, edits=[edit], capture=z)[z] - clean[z]) * slope).sum((1, 2, 3))

    for name in "qk":
        heads = model.cfg.n_heads if name == "q" else model.cfg.n_kv_heads
        sort = "H" if name == "q" else "KV"
        grid = mi.attribute(
            model, task, f"L{layer}.{sort}*.{name}", over=("head" if name == "q" else "kv_head", "pos"), rules="qk-fix",
            normalize=False,
        )  # fmt: skip
        assert grid.per_example.shape == (heads, 8, 3)
        for head, pos in ((0, 5), (heads - 1, 7), (0, 6), (1, 1)):
            site = mi.Site(name, layer, head=head, pos=pos)
            want = expected(mi.Replace(site, corrupt[site]))
            torch.testing.assert_close(grid.per_example[head, pos], want, atol=1e-5, rtol=1e-4)
        whole = mi.attribute(model, task, f"L{layer}.{name}", rules="qk-fix", normalize=False)
        want = expected(mi.Replace(mi.Site(name, layer), corrupt[mi.Site(name, layer)]))
        torch.testing.assert_close(whole.per_example.reshape(-1), want, atol=1e-5, rtol=1e-4)
        named = mi.attribute(model, task, f"L{layer}.{sort}0.{name}[changed]", rules="qk-fix", normalize=False)
        torch.testing.assert_close(named.per_example.reshape(-1), grid.per_example[0, 5], atol=1e-6, rtol=1e-5)
        assert grid.values.abs().max() > 1e-3
    mixed = mi.attribute(model, task, f"L{layer}.q | L{layer}.z", over=("layer",), rules="qk-fix", normalize=False)
    alone = [mi.attribute(model, task, f"L{layer}.{name}", rules="qk-fix", normalize=False).values.sum() for name in "qz"]
    assert mixed.values.sum().item() == pytest.approx(float(sum(alone)), abs=1e-5)


def test_cells_of_several_heads_or_positions_are_moved_together(model: mi.Model, task: mi.Task) -> None:
    """A query changes its own position of its own head alone, so that what moves together adds up."""
    options: dict[str, Any] = {"rules": "qk-fix", "normalize": False}
    grid = mi.attribute(model, task, "L1.H*.q", over=("head", "pos"), **options).per_example
    heads = mi.attribute(model, task, "L1.H*.q[6] | L1.H*.q[7]", over=("head",), **options).per_example
    torch.testing.assert_close(heads, grid[:, 6:8].sum(dim=1), atol=1e-5, rtol=1e-4)
    layer = mi.attribute(model, task, "L1.H*.q", over=("layer",), **options).per_example
    torch.testing.assert_close(layer[0], grid.sum(dim=(0, 1)), atol=1e-5, rtol=1e-4)
    assert (grid[:, 7].abs().amax(dim=1) > 1e-4).all()


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_edits_of_what_is_read_give_the_same_on_all_shapes(model: mi.Model, task: mi.Task, direction: Any) -> None:
    """Edges from the embedding and an MLP into queries and keys, by edits of what one head's port reads."""
    own, others = (task.clean, task.corrupt) if direction == "noise" else (task.corrupt, task.clean)
    names = ("L0.resid_pre", "L0.mlp_out")
    here, there = (mi.run(model, tokens, capture=" | ".join((*names, "L1.resid_pre", "L1.z"))) for tokens in (own, others))
    slope = slope_at(model, task, own, mi.Site("z", 1))
    found = mi.attribute(model, task, unit="edge", rules="qk-fix", direction=direction, normalize=False)
    places = {edge: i for i, edge in enumerate(found.coords["edge"])}
    grouped, largest = model.cfg.n_kv_heads < model.cfg.n_heads, 0.0
    for writer, name in zip(("embed", "m0"), names, strict=True):
        moved = here["L1.resid_pre"] + there[name] - here[name]
        for port, head in (("q", 0), ("q", 3), ("k", 1)):
            node = f"a1.kv{head}" if grouped and port == "k" else f"a1.h{head}"
            edit = mi.Replace(mi.Site(f"{port}_in", 1, head=head), moved)
            z = mi.run(model, own, edits=[edit], capture="L1.z")["L1.z"]
            want = ((z - here["L1.z"]) * slope).sum((1, 2, 3))
            torch.testing.assert_close(found.per_example[places[writer, node, port]], want, atol=1e-5, rtol=1e-3)
            largest = max(largest, float(want.abs().max()))
    assert largest > 1e-3
    # A head's edge is what attention's part of the stream changes: where it passes a norm, too.
    z_own, z = (mi.run(model, tokens, capture="L0.z")["L0.z"] for tokens in (own, others))
    mixed = torch.cat([z[:, :, :1], z_own[:, :, 1:]], dim=2)
    moved = here["L1.resid_pre"] + model.attention_adds(0, mixed).detach() - model.attention_adds(0, z_own).detach()
    edit = mi.Replace(mi.Site("q_in", 1, head=2), moved)
    want = ((mi.run(model, own, edits=[edit], capture="L1.z")["L1.z"] - here["L1.z"]) * slope).sum((1, 2, 3))
    torch.testing.assert_close(found.per_example[places["a0.h0", "a1.h2", "q"]], want, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("rules", RULES)
def test_memory_and_batches_do_not_matter(setting: Any, rules: Any) -> None:
    for unit in ("edge", "node"):
        options: dict[str, Any] = {"unit": unit, "rules": rules, "normalize": False}
        whole = mi.attribute(setting.model, setting.task, **options)
        parts = mi.attribute(setting.model, setting.task, memory=1, **options)
        torch.testing.assert_close(parts.per_example, whole.per_example, atol=1e-5, rtol=1e-4)
    sites = [mi.attribute(setting.model, setting.task, "L*.H*.q[5]", rules=rules, memory=m).values for m in (1, "1 GiB")]
    torch.testing.assert_close(*sites, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("rules", "passes"), [("qk-fix", (3, 1)), ("grad-drop", (3, 3)), ("atp-star", (3, 3))])
def test_passes_are_as_said(setting: Any, rules: Any, passes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    mi.attribute(setting.model, setting.task, unit="edge", rules="qk-fix")  # the check of replay runs once
    calls: dict[str, int] = {"forwards": 0, "backwards": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch.autograd, "grad", counted("backwards", torch.autograd.grad))
    monkeypatch.setattr(type(setting.model.hf), "forward", counted("forwards", type(setting.model.hf).forward))
    for unit in ("edge", "node"):
        calls |= {"forwards": 0, "backwards": 0}
        said = mi.attribute(setting.model, setting.task, unit=unit, rules=rules).provenance  # type: ignore[arg-type]
        assert calls == {"forwards": said["forwards"], "backwards": said["backwards"]}
        assert (said["forwards"], said["backwards"]) == passes


# -- planted answers


@pytest.mark.parametrize("name", ["induction", "gqa_induction"])
def test_saturated_attention(name: str) -> None:
    """The head looks where it should with a probability near one: its slope says little, its recomputed pattern everything."""
    toy = mi.toys.build(name)
    exact = mi.edge_effects(toy.model, toy.task).as_dict()
    scores = {rules: mi.attribute(toy.model, toy.task, unit="edge", rules=rules).as_dict() for rules in ("gradient", *RULES)}  # type: ignore[arg-type]
    ports = [tuple(edge) for edge in toy.truth["resample"] if edge.port in ("q", "k")]
    assert len(ports) == 2
    for edge in ports:
        assert scores["qk-fix"][edge] == pytest.approx(exact[edge], rel=1e-3)
        assert scores["atp-star"][edge] == pytest.approx(exact[edge], rel=1e-3)
        assert scores["gradient"][edge] < exact[edge] / 2
        assert scores["grad-drop"][edge] < exact[edge] / 2


def test_twins_hide_each_other() -> None:
    """Either of two heads is enough for the pattern of a third: their gradients vanish, the recomputed pattern does not."""
    toy = mi.toys.planted(seed=11, n=8)
    exact = mi.edge_effects(toy.model, toy.task).as_dict()
    plain, fixed = (mi.attribute(toy.model, toy.task, unit="edge", rules=rules).as_dict() for rules in ("gradient", "qk-fix"))  # type: ignore[arg-type]
    for twin in ("a0.h0", "a0.h3"):
        edge = (twin, "a1.kv1", "k")
        assert plain[edge] < exact[edge] / 10
        assert fixed[edge] == pytest.approx(exact[edge], rel=0.02)


def test_paths_that_cancel(setting: Any) -> None:
    """A metric for which one head's paths cancel to nothing: each dropped layer takes one of the paths away."""
    task = setting.task[0]

    def score(metric: Any, rules: Any) -> float:
        return mi.attribute(setting.model, task, metric=metric, rules=rules, normalize=False).as_dict()["a0.h1"]

    one, two = (score(lambda logits, task, t=token: logits[:, t], "gradient") for token in (4, 9))

    def cancelling(logits: Tensor, task: mi.Task) -> Tensor:
        return (two * logits[:, 4] - one * logits[:, 9]) / (one**2 + two**2) ** 0.5

    assert abs(score(cancelling, "gradient")) < 1e-5
    for rules in ("grad-drop", "atp-star"):
        assert abs(score(cancelling, rules)) > 1e-2


# -- what results say, and messages


@pytest.mark.parametrize("rules", ["grad-drop", "atp-star"])
def test_magnitudes_with_a_sign_for_all_prompts(setting: Any, rules: Any) -> None:
    effects = mi.attribute(setting.model, setting.task, unit="edge", rules=rules)
    assert effects.provenance["sign"] == SIGN
    assert "completeness_error" not in effects.provenance
    signs = effects.per_example.sign()
    assert ((signs >= 0).all(dim=1) | (signs <= 0).all(dim=1)).all()
    assert (effects.values < 0).any()
    assert (effects.values > 0).any()
    raw = mi.attribute(setting.model, setting.task, unit="edge", rules=rules, normalize=False)
    gap = raw.baseline["corrupt"] - raw.baseline["clean"]
    torch.testing.assert_close(effects.per_example * gap, raw.per_example, atol=1e-5, rtol=1e-4)
    names = {"grad-drop": "attribution patching with GradDrop", "atp-star": "AtP*"}
    assert effects.provenance["method"] == names[rules]
    assert repr(effects).startswith(f"Effects: {names[rules]}: patching edges (noise), estimated; ")


def test_other_ablations(setting: Any) -> None:
    zero = mi.attribute(setting.model, setting.task, unit="edge", rules="qk-fix", ablation="zero", normalize=False)
    resampled = mi.attribute(setting.model, setting.task, unit="edge", rules="qk-fix", normalize=False)
    exact = mi.edge_effects(setting.model, setting.task, ablation="zero", normalize=False)
    ports = [i for i, edge in enumerate(exact.coords["edge"]) if edge[2] == "q"]  # type: ignore[index]
    assert (zero.values - resampled.values)[ports].abs().max() > 1e-3
    assert torch.corrcoef(torch.stack([zero.values[ports], exact.values[ports]]))[0, 1] > 0.8


@pytest.mark.usefixtures("unchecked_types")
def test_messages(settings: Any) -> None:
    setting = settings["gpt2"]
    for options in ({"steps": 3}, {"steps": [0.5]}, {"path": "activations"}):
        with pytest.raises(MetricError) as caught:
            mi.attribute(setting.model, setting.task, rules="atp-star", **options)  # type: ignore[arg-type]
        assert str(caught.value) == (
            "rules='atp-star' takes the gradient at the receiving run: leave out steps= and path=, or use rules='gradient'"
        )
    handle = setting.model.block(0).register_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(ModelError) as hooked:
            mi.attribute(setting.model, setting.task, unit="edge", rules="qk-fix")
    finally:
        handle.remove()
    assert str(hooked.value) == (
        f"attention of {setting.model.name} (GPT2LMHeadModel) cannot be computed anew for other queries and keys: 1 hooks of "
        "yours are attached, which expect whole forward passes; use rules='grad-drop', or 'eap-ig'"
    )


def test_one_layer_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16, attn_implementation="eager")
    model = mi.load(GPT2LMHeadModel(config), name="one layer")
    task = mi.Task(name="t", clean=torch.tensor([[1, 2, 3]]), corrupt=torch.tensor([[1, 4, 3]]), right=[1], wrong=[2])
    with pytest.raises(ModelError) as caught:
        mi.attribute(model, task, rules="grad-drop")
    assert str(caught.value) == (
        "one layer has one layer, and GradDrop leaves out the gradient through another; use rules='qk-fix', or 'eap-ig'"
    )


@pytest.mark.parametrize("unit", ["edge", "node"])
def test_discover(unit: Any) -> None:
    toy = mi.toys.induction(n=8)
    truth = toy.truth["resample"]
    circuit = mi.discover(toy.model, toy.task, method="atp-star", unit=unit, edges=len(truth), selection="top")
    assert (circuit.provenance["estimator"], circuit.provenance["sign"]) == ("AtP*", SIGN)
    if unit == "edge":
        # Two layers: what acts through the other layer alone has no path left, and so no score.
        lost = {edge for edge in truth if edge.dst.startswith("a0")}
        assert set(truth) - lost <= set(circuit)
        scores = mi.attribute(toy.model, toy.task, unit="edge", rules="atp-star").as_dict()
        assert len(lost) == 1
        assert all(abs(scores[tuple(edge)]) < 1e-6 for edge in lost)  # type: ignore[index]
