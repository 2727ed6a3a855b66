"""Running a circuit: two identities, two public projects, and a brute force written out by hand."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.ablation import as_ablation
from mechinterp.discovery.packing import Packing, outside_of
from mechinterp.errors import GraphError
from mechinterp.patching.readers import layout_of
from mechinterp.tasks import accuracy
from tests.core.conftest import ARCHITECTURES, module_of
from tests.oracles import published
from tests.reference import Intervention, Reference, copy_of

Edge = tuple[str, str, str]


def outputs(model: mi.Model, task: mi.Task, circuits: Sequence[Collection[Any]], **options: Any) -> Tensor:
    """``[circuit batch]``"""
    made = [each if isinstance(each, mi.Circuit) else mi.Circuit.from_edges(model, each) for each in circuits]
    return mi.run_circuits(model, task, made, **options).circuits


def drawn(model: mi.Model, shares: Sequence[float], seed: int) -> list[mi.Circuit]:
    """Circuits that hold each edge with the given chance."""
    generator = random.Random(seed)
    every = mi.Circuit.full(model).edges
    return [mi.Circuit.from_edges(model, [e for e in every if generator.random() < share]) for share in shares]


def by_hand(reference: Reference, task: mi.Task, circuit: mi.Circuit) -> Tensor:
    inside = {tuple(edge) for edge in circuit.edges}
    cut = {edge for edge in reference.edges if edge not in inside}
    return reference.metric(task, Intervention(cut=cut, instead=reference.run(task.corrupt)[1]))


# -- the two identities


def neox() -> mi.Model:
    """Attention and MLP in parallel."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_size=32,
        intermediate_size=48,
        vocab_size=61,
        max_position_embeddings=32,
    )
    module = GPTNeoXForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return mi.load(module, name="neox")


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_the_full_graph_is_the_clean_run_and_the_empty_one_the_corrupt_run(settings: Any, family: str) -> None:
    task = settings["gpt2"].task
    model = neox() if family == "neox" else settings[family].model
    runs = mi.run_circuits(model, task, [mi.Circuit.full(model), mi.Circuit.empty(model)])
    rows = torch.arange(len(task))
    for tokens, whole, found in ((task.clean, runs.clean, runs.circuits[0]), (task.corrupt, runs.corrupt, runs.circuits[1])):
        with torch.no_grad():
            answer = model(tokens)[rows, task.answer_pos]
        expected = answer[rows, task.right[:, 0]] - answer[rows, task.wrong[:, 0]]
        torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (runs.clean - runs.corrupt).abs().min() > 1e-3


def test_attention_only_models() -> None:
    toy = mi.toys.trained()
    runs = mi.run_circuits(toy.model, toy.task[:8], [mi.Circuit.full(toy.model), mi.Circuit.empty(toy.model)])
    torch.testing.assert_close(runs.circuits, torch.stack([runs.clean, runs.corrupt]), atol=1e-4, rtol=1e-5)


# -- other people's numbers


@pytest.mark.parametrize("name", ["full", "empty", "top20", "top50", "top100"])
def test_circuits_equal_eap_igs(name: str) -> None:
    stored = published.eapig()["circuits"][name]
    if name == "full":
        circuit: Any = mi.Circuit.full(published.model())
    else:
        circuit = published.eapig_edges(stored["edges"])
        assert len(circuit) == stored["n_edges"]
    [found] = outputs(published.model(), published.task(), [circuit])
    torch.testing.assert_close(found, torch.tensor(stored["metric_per_example"]), atol=2e-5, rtol=0)


def one_edge_less() -> tuple[list[Edge], list[mi.Circuit]]:
    every = [tuple(edge) for edge in mi.Circuit.full(published.model()).edges]
    assert len(every) == 262
    circuits = [mi.Circuit.from_edges(published.model(), [e for e in every if e != edge]) for edge in every]
    return every, circuits  # type: ignore[return-value]


def test_every_single_edge_equals_both_projects() -> None:
    edges, circuits = one_edge_less()
    runs = mi.run_circuits(published.model(), published.task(), circuits)
    effects = dict(zip(edges, (runs.circuits - runs.clean).mean(dim=1).tolist(), strict=True))
    exact = published.eapig_scores("exact")
    assert exact.keys() == effects.keys()
    assert max(abs(effects[edge] - exact[edge]) for edge in edges) < 1e-5
    theirs = dict(zip(published.autocircuit_edges(), published.autocircuit()["single_edge_effect"], strict=True))
    assert max(abs(effects[edge] - theirs[edge]) for edge in edges) < 1e-5
    # An estimate is not the exact effect: these are other numbers, some of another sign.
    assert max(abs(effects[edge] - score) for edge, score in published.eapig_scores("EAP").items()) > 0.1


def test_every_single_edges_kl_equals_auto_circuits() -> None:
    edges, circuits = one_edge_less()
    runs = mi.run_circuits(published.model(), published.task(), circuits, metric="kl")
    found = dict(zip(edges, runs.circuits.mean(dim=1).tolist(), strict=True))
    theirs = dict(zip(published.autocircuit_edges(), published.autocircuit()["single_edge_kl"], strict=True))
    assert max(abs(found[edge] - theirs[edge]) for edge in edges) < 1e-5
    assert max(theirs.values()) > 0.1


@pytest.mark.parametrize("name", [f"{scores}_top{n}" for scores in ("eap", "ig10") for n in (20, 50, 100)])
def test_circuits_equal_auto_circuits(name: str) -> None:
    stored, edges = published.autocircuit()["circuits"][name], published.autocircuit_edges()
    [found] = outputs(published.model(), published.task(), [[edges[i] for i in stored["kept"]]])
    torch.testing.assert_close(found, torch.tensor(stored["logit_diff"]), atol=2e-5, rtol=0)
    if "logit_diff_edge_patch" in stored:
        # Another question, with other answers: values of the clean run put into the corrupt run.
        assert (found - torch.tensor(stored["logit_diff_edge_patch"])).abs().max() > 0.1


# -- a brute force by hand, over grouped queries as well


def test_circuits_of_all_sizes_equal_a_brute_force(setting: Any) -> None:
    circuits = drawn(setting.model, [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98], seed=3)
    found = outputs(setting.model, setting.task, circuits)
    expected = torch.stack([by_hand(setting.reference, setting.task, each) for each in circuits])
    torch.testing.assert_close(found, expected.float(), atol=5e-5, rtol=0)
    assert expected.std(dim=0).min() > 0.05


def test_every_single_edge_equals_a_brute_force(setting: Any) -> None:
    every = mi.Circuit.full(setting.model)
    circuits = [every - mi.Circuit.from_edges(setting.model, [edge]) for edge in every.edges]
    runs = mi.run_circuits(setting.model, setting.task, circuits)
    corrupt = setting.reference.run(setting.task.corrupt)[1]
    for edge, found in zip(every.edges, runs.circuits, strict=True):
        change = Intervention(cut={tuple(edge)}, instead=corrupt)
        torch.testing.assert_close(found.double(), setting.reference.metric(setting.task, change), atol=5e-5, rtol=0)


def test_every_single_edge_of_a_parallel_model_equals_an_edit() -> None:
    """There is no forward pass by hand for it; one edit of what one reader reads says the same."""
    model = neox()
    clean, corrupt = torch.randint(1, 61, (2, 3, 7))
    task = mi.Task(name="parallel", clean=clean, corrupt=corrupt, right=[3, 4, 5], wrong=[6, 7, 8])
    every = mi.Circuit.full(model)
    assert not [edge for edge in every.edges if edge.src.startswith("a0") and edge.dst == "m0"]
    written = mi.select("L0.resid_pre | L*.head_out | L*.mlp_out", model.cfg)
    ours, theirs = (mi.run(model, tokens, capture=written) for tokens in (clean, corrupt))

    def place(node: str, port: str) -> str:
        if node == "logits":
            return "L1.resid_post"
        if node.startswith("m"):
            return f"L{node[1:]}.mlp_in"
        layer, head = node[1:].split(".h")
        return f"L{layer}.{'H' if port == 'q' else 'KV'}{head}.{port}_in"

    def source(node: str) -> str:
        if node == "embed":
            return "L0.resid_pre"
        if node.startswith("m"):
            return f"L{node[1:]}.mlp_out"
        return "L{}.H{}.head_out".format(*node[1:].split(".h"))

    runs = mi.run_circuits(model, task, [every - mi.Circuit.from_edges(model, [edge]) for edge in every.edges])
    rows = torch.arange(3)
    for edge, found in zip(every.edges, runs.circuits, strict=True):
        delta = theirs[source(edge.src)] - ours[source(edge.src)]
        at = place(edge.dst, edge.port)
        answer = mi.run(model, clean, edits=[mi.Add(at, delta)]).logits[rows, -1]
        expected = answer[rows, task.right[:, 0]] - answer[rows, task.wrong[:, 0]]
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_only_the_named_reader_changes(setting: Any) -> None:
    """Cutting an edge is no shift of the stream: the other heads of the layer keep their bits."""
    model, task = setting.model, setting.task
    node, port, head = ("a1.h1", "q", 1)
    cut = mi.Circuit.full(model) - mi.Circuit.from_edges(model, [f"embed->{node}<{port}>", f"m0->{node}<{port}>"])
    seen: list[Tensor] = []
    z = model.point("blocks.{}.attn.o.hook_in", 1)
    handle = z.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    try:
        mi.run_circuits(model, task, [mi.Circuit.full(model), cut])
    finally:
        handle.remove()
    # The last call holds both circuits as rows; the heads may lie flat.
    full, less = seen[-1].reshape(2, len(task), task.clean.shape[1], -1, 4, model.cfg.d_head).unbind(0)
    changed = (full != less).any(dim=-1).any(dim=2).any(dim=1).any(dim=0)
    assert changed.tolist() == [i == head for i in range(4)]


# -- what the numbers must not depend on


def test_packed_is_one_by_one(setting: Any) -> None:
    circuits = drawn(setting.model, [0.3, 0.6, 0.9, 0.0, 1.0], seed=1)
    together = outputs(setting.model, setting.task, circuits)
    alone = torch.cat([outputs(setting.model, setting.task, [circuit]) for circuit in circuits])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(outputs(setting.model, setting.task, circuits[::-1]).flip(0), together, atol=2e-5, rtol=0)


def test_memory_changes_no_number(setting: Any) -> None:
    circuits = drawn(setting.model, [0.3, 0.6, 0.9], seed=2)
    whole = mi.run_circuits(setting.model, setting.task, circuits)
    rows: list[int] = []
    handle = setting.model.block(0).register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    try:
        # One prompt and one circuit at a time: every prompt has a first difference of its own.
        parts = mi.run_circuits(setting.model, setting.task, circuits, memory=1)
    finally:
        handle.remove()
    for name in ("clean", "corrupt", "circuits", "accuracy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=2e-5, rtol=0)
    assert len(rows) == 5 * (2 + 3)


def test_batch_and_order_do_not_matter(setting: Any) -> None:
    circuits = drawn(setting.model, [0.4, 0.8], seed=4)
    whole = outputs(setting.model, setting.task, circuits)
    order = [2, 4, 0, 1, 3]
    torch.testing.assert_close(outputs(setting.model, setting.task[order], circuits), whole[:, order], atol=2e-5, rtol=0)
    for row in range(5):
        torch.testing.assert_close(outputs(setting.model, setting.task[row], circuits)[:, 0], whole[:, row], atol=2e-5, rtol=0)


def test_padding_does_not_matter(setting: Any) -> None:
    model, short = setting.model, setting.task[[0, 1, 3, 4]]
    filler, mask = torch.full((4, 3), 17), torch.ones(4, 11, dtype=torch.bool)
    mask[:, 8:] = False
    wide = [torch.cat([tokens, filler], dim=1) for tokens in (short.clean, short.corrupt)]
    padded = mi.Task(name="padded", clean=wide[0], corrupt=wide[1], right=short.right, wrong=short.wrong, mask=mask)
    circuits = drawn(model, [0.4, 0.8], seed=5)
    torch.testing.assert_close(outputs(model, padded, circuits), outputs(model, short, circuits), atol=2e-5, rtol=0)


def test_answers_may_be_read_before_the_prompts_differ(setting: Any) -> None:
    model, task = setting.model, setting.task
    clean, corrupt = task.clean.clone(), task.clean.clone()
    corrupt[:, 6] = (clean[:, 6] + 7) % 60 + 1
    read = [7, 3, 6, 1, 7]
    own = mi.Task(name="late", clean=clean, corrupt=corrupt, right=task.right, wrong=task.wrong, answer_pos=read)
    outs = mi.run_circuits(model, own, [mi.Circuit.full(model), mi.Circuit.empty(model)], metric="logit_diff")
    torch.testing.assert_close(outs.circuits, torch.stack([outs.clean, outs.corrupt]), atol=2e-5, rtol=0)
    logits = model(clean)[range(5), read].detach()
    expected = mi.tasks.logit_diff(logits, own)
    torch.testing.assert_close(outs.clean, expected, atol=2e-5, rtol=0)
    # One pair that does not differ, alone in its part.
    corrupt[2] = clean[2]
    some = mi.Task(name="same", clean=clean, corrupt=corrupt, right=task.right, wrong=task.wrong)
    found = mi.run_circuits(model, some, mi.Circuit.empty(model), metric="logit_diff", memory=1)
    torch.testing.assert_close(found.circuits[0], found.corrupt, atol=2e-5, rtol=0)
    assert found.clean[2] == found.corrupt[2]


def test_dangling_edges_do_nothing(setting: Any) -> None:
    """Under resampling, an edge on no path from the embedding to the logits carries the corrupt value either way."""
    for circuit in drawn(setting.model, [0.15, 0.3], seed=6):
        assert circuit.n_connected < len(circuit)
        both = outputs(setting.model, setting.task, [circuit, circuit.connected()])
        torch.testing.assert_close(both[0], both[1], atol=2e-5, rtol=0)


def test_one_forward_pass_of_rows(setting: Any) -> None:
    rows: list[int] = []
    handle = setting.model.block(0).register_forward_hook(lambda module, args, output: rows.append(output.numel()))
    try:
        mi.run_circuits(setting.model, setting.task, drawn(setting.model, [0.5] * 7, seed=0))
    finally:
        handle.remove()
    assert [count // rows[0] for count in rows] == [1, 1, 7]


# -- results


def test_accuracy_beside_any_metric(setting: Any) -> None:
    full, empty = mi.Circuit.full(setting.model), mi.Circuit.empty(setting.model)
    pairs = setting.task
    with torch.no_grad():
        best = [setting.model(tokens)[:, -1].argmax(dim=-1) for tokens in (pairs.clean, pairs.corrupt)]
    # Of these pairs, one gets the right answer in both runs.
    wrong = best[1].clone()
    wrong[0] = (best[0][0] + 1) % 61
    right = torch.where(best[0] == wrong, (wrong + 1) % 61, best[0])
    task = mi.Task(name="best", clean=pairs.clean, corrupt=pairs.corrupt, right=right, wrong=wrong)
    runs = mi.run_circuits(setting.model, task, [empty, full], metric="kl")
    with torch.no_grad():
        by_run = [accuracy(setting.model(tokens)[:, -1], task) for tokens in (task.corrupt, task.clean)]
    assert torch.equal(runs.accuracy, torch.stack([by_run[0], by_run[1], by_run[1]]))
    assert by_run[1].mean() > by_run[0].mean()
    assert runs.metric == "kl"
    assert runs.clean.abs().max() == 0
    torch.testing.assert_close(runs.circuits[0], runs.corrupt, atol=1e-5, rtol=0)
    assert runs.corrupt.min() > 0.01


def test_further_metrics_are_of_the_same_passes(setting: Any) -> None:
    circuits = drawn(setting.model, [0.5, 0.9], seed=3)
    # One prompt at a time, so that parts are put together again.
    together = mi.run_circuits(setting.model, setting.task, circuits, also=("kl", "prob_diff"), memory=1)
    assert list(together.also) == ["kl", "prob_diff"]
    for name, values in together.also.items():
        alone = mi.run_circuits(setting.model, setting.task, circuits, metric=name).circuits
        torch.testing.assert_close(values, alone, atol=2e-5, rtol=0)


def test_headline(setting: Any) -> None:
    runs = mi.run_circuits(setting.model, setting.task, [mi.Circuit.full(setting.model)])
    clean, corrupt = runs.clean.mean().item(), runs.corrupt.mean().item()
    assert repr(runs) == f"CircuitRuns: logit_diff, clean {clean:.3f}, corrupt {corrupt:.3f}, 1 circuits {clean:.3f}"


def test_no_circuits(setting: Any) -> None:
    with pytest.raises(GraphError) as caught:
        mi.run_circuits(setting.model, setting.task, [])
    assert str(caught.value) == "no circuits were given; pass a list such as [circuit, mi.Circuit.full(model)]"


def test_a_circuit_of_another_model(setting: Any) -> None:
    shape = mi.GraphShape(n_layers=1, n_heads=2)
    with pytest.raises(GraphError) as caught:
        mi.run_circuits(setting.model, setting.task, [mi.Circuit.full(shape)])
    own = mi.GraphShape.of(setting.model)
    assert str(caught.value) == (f"{mi.Circuit.full(shape)!r} is a circuit of shape {shape}, but {setting.model.name} has {own}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_whole_graph_is_the_clean_run_and_none_of_it_the_corrupt_one(setting: Any, architecture: str) -> None:
    """Also where attention and MLP read the same stream, and where the heads' sum passes a norm."""
    model = mi.load(module_of(architecture))
    outs = mi.run_circuits(model, setting.task, [mi.Circuit.full(model), mi.Circuit.empty(model)])
    torch.testing.assert_close(outs.circuits[0], outs.clean, atol=1e-5, rtol=0)
    torch.testing.assert_close(outs.circuits[1], outs.corrupt, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_but_one_edge_is_that_edge_s_effect(setting: Any, architecture: str) -> None:
    """Two ways to the same number: a circuit as one forward pass, and a run replayed from the edge's reader."""
    model = mi.load(module_of(architecture))
    effects = mi.edge_effects(model, setting.task, normalize=False)
    full = mi.Circuit.full(model)
    without = [full - mi.Circuit.from_edges(full.shape, [edge]) for edge in full.edges]
    outs = mi.run_circuits(model, setting.task, without)
    torch.testing.assert_close(outs.circuits - outs.clean, effects.per_example, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("share", [0.05, 0.9])
def test_few_edges_and_many_are_summed_alike(setting: Any, architecture: str, share: float) -> None:
    """A reader's input is the sum over what is cut, or everything less what is kept: whichever is shorter."""
    model = mi.load(module_of(architecture))
    some = drawn(model, [share] * 3, seed=0)
    outs = mi.run_circuits(model, setting.task, some)
    layout = layout_of(model)
    packing = Packing.of(model, setting.task, as_ablation("resample", seed=None), None, None)
    outside = torch.stack([outside_of(circuit, layout) for circuit in some])
    # With gradients every edge counts by what is cut from it.
    whole = packing.pack(slice(0, len(setting.task)))
    torch.testing.assert_close(outs.circuits, whole.measure(whole.answers(outside, grad=True)), atol=3e-5, rtol=1e-5)
    late = outside.clone()
    first = model.cfg.n_layers - 1
    for group in layout.groups:
        if group.layer < first:
            late[:, group.readers.start : group.readers.stop] = 0
    torch.testing.assert_close(
        whole.measure(whole.answers(late, first=first)), whole.measure(whole.answers(late)), atol=3e-5, rtol=1e-5
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_no_norm_scales_up_what_rounding_leaves(architecture: str) -> None:
    """Where all that a reader hears is zero, a norm without a bias makes any rounding large: float32 has to do."""
    model = mi.load(module_of(architecture))
    wide = copy_of(model, torch.float64)
    clean = torch.randint(1, 61, (3, 6), generator=torch.Generator().manual_seed(1))
    corrupt = clean.clone()
    corrupt[:, 2] = (clean[:, 2] + 7) % 60 + 1
    task = mi.Task(name="few", clean=clean, corrupt=corrupt, right=[3, 9, 27], wrong=[8, 5, 33])
    for shares in ([0.02, 0.05, 0.1], [0.1, 0.2, 0.3], [0.7, 0.3]):
        circuits = drawn(model, shares, seed=3)
        exact = outputs(wide, task, circuits, ablation="zero")
        torch.testing.assert_close(outputs(model, task, circuits, ablation="zero").double(), exact, atol=2e-5, rtol=0)
    assert exact.abs().max() > 1


def test_hooks_and_gradients_are_left_alone(setting: Any) -> None:
    model = setting.model
    parameters = list(model.hf.parameters())
    parameters[0].grad = torch.full_like(parameters[0], 7.0)
    calls: list[int] = []
    handle = model.block(1).register_forward_hook(lambda *_: calls.append(1))

    def census() -> list[tuple[int, int, int]]:
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.hf.modules()]

    before = census()
    half = drawn(model, [0.5], seed=0)
    assert not mi.run_circuits(model, setting.task, half).circuits.requires_grad
    assert len(calls) == 3

    def failing(logits: Tensor, task: mi.Task) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mi.run_circuits(model, setting.task, half, metric=failing)
    assert census() == before
    handle.remove()
    assert parameters[0].grad.unique().tolist() == [7.0]
    assert all(each.grad is None for each in parameters[1:])
    parameters[0].grad = None


@pytest.mark.parametrize("name", ["induction", "gqa_induction", "copy", "memory"])
def test_the_planted_circuit_is_enough_and_each_edge_is_needed(name: str) -> None:
    toy = mi.toys.build(name)
    truth = toy.truth["resample"]
    less: list[mi.Circuit] = [truth - mi.Circuit.from_edges(toy.model, [edge]) for edge in truth.edges]
    runs = mi.run_circuits(toy.model, toy.task, [truth, *less])
    gap = (runs.clean - runs.corrupt).mean()
    shares = (runs.circuits.mean(dim=1) - runs.corrupt.mean()) / gap
    assert shares[0].item() == pytest.approx(1.0, abs=1e-3)
    # Of the copy toy, one edge works against the answer.
    assert (shares[1:] - 1).abs().min() > 0.05
