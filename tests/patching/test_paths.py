"""Path patching against edges, a forward pass by hand, and transformer_lens's direct paths."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching as lens

import mechinterp as mi
from mechinterp.errors import SelectorError
from tests.core.conftest import ARCHITECTURES, module_of
from tests.reference import Intervention, copy_of


def logit_diff(logits: Tensor, task: mi.Task) -> Tensor:
    rows = torch.arange(len(task))
    answer = logits[rows, task.answer_pos].detach()
    return answer[rows, task.right[:, 0]] - answer[rows, task.wrong[:, 0]]


def edge_of(sender: str, receiver: str, grouped: bool) -> tuple[str, str, str]:
    """What the graph calls the edge between two sites."""
    head = re.fullmatch(r"L(\d)\.H(\d)\.z", sender)
    src = f"a{head[1]}.h{head[2]}" if head else {"L0.mlp_out": "m0"}.get(sender, sender)
    port = re.fullmatch(r"L1\.(?:H|KV)(\d)\.([qkv])", receiver)
    if port is None:
        return src, {"L1.mlp_in": "m1"}.get(receiver, receiver), "in"
    return src, f"a1.{'kv' if grouped and port[2] != 'q' else 'h'}{port[1]}", port[2]


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_path_of_one_edge_is_that_edge(settings: dict[str, Any], architecture: str, direction: Any) -> None:
    """Edges are replayed from their reader on; paths are listened to in a run where all others are kept."""
    model, task = mi.load(module_of(architecture)), settings["gpt2"].task
    edges = mi.edge_effects(model, task, direction=direction, normalize=False)
    by_edge = dict(zip(edges.coords["edge"], edges.per_example, strict=True))
    largest = 0.0
    for receivers in ("a1.*<*> | m1", "logits"):
        found = mi.patch_paths(
            model,
            task,
            senders="embed | a0.h* | m0",
            receivers=receivers,
            over=("sender", "receiver"),
            direction=direction,
            normalize=False,
        )
        for i, sender in enumerate(found.coords["sender"]):
            for j, receiver in enumerate(found.coords["receiver"]):
                expected = by_edge[edge_of(str(sender), str(receiver), model.cfg.n_kv_heads < model.cfg.n_heads)]
                torch.testing.assert_close(found.per_example[i, j], expected, atol=1e-5, rtol=1e-5)
                largest = max(largest, float(expected.abs().max()))
    assert largest > 0.1


def test_sets_of_senders_and_receivers(setting: Any) -> None:
    """By hand: all edges from a sender to a receiver carry the other value, and no other edge does."""
    model, task, reference = setting.model, setting.task, setting.reference
    kv = "kv" if model.cfg.n_kv_heads < 4 else "h"
    other = reference.run(task.corrupt)[1]
    base, largest = reference.metric(task), 0.0
    senders = {"embed": ["embed"], "a0.h1 | m0": ["a0.h1", "m0"], "a0.* | L0.mlp_out": [f"a0.h{i}" for i in range(4)] + ["m0"]}
    receivers = {
        f"a1.h0<q> | a1.{kv}1<k>": [("a1.h0", "q"), (f"a1.{kv}1", "k")],
        f"L1.H*.q | a1.{kv}0<v>": [*((f"a1.h{i}", "q") for i in range(4)), (f"a1.{kv}0", "v")],
        "m1": [("m1", "in")],
    }
    for sent, nodes in senders.items():
        for read, ports in receivers.items():
            cut = {(node, *port) for node in nodes for port in ports}
            expected = reference.metric(task, Intervention(cut=cut, instead=other)) - base
            found = mi.patch_paths(model, task, senders=sent, receivers=read, normalize=False)
            assert found.axes == ("path",)
            torch.testing.assert_close(found.per_example[0].double(), expected, atol=1e-5, rtol=0)
            largest = max(largest, float(expected.abs().max()))
    assert largest > 0.1


@pytest.mark.parametrize("through", ["mlps", "m1", "heads"])
def test_nodes_between_that_are_computed_anew(setting: Any, through: str) -> None:
    """By hand: senders and all kept nodes are set, and the logits are read."""
    model, task, reference = setting.model, setting.task, setting.reference
    here, other = reference.run(task.clean)[1], reference.run(task.corrupt)[1]
    free = {"mlps": {"m0", "m1"}, "m1": {"m1"}, "heads": {f"a1.h{i}" for i in range(4)} | {f"a0.h{i}" for i in range(4)}}[through]
    put = {node: (lambda _, value=value: value) for node, value in here.items() if node not in free}
    put["a0.h2"] = lambda _: other["a0.h2"]
    expected = reference.metric(task, Intervention(put=put)) - reference.metric(task)
    found = mi.patch_paths(model, task, senders="a0.h2", receivers="logits", through=through, normalize=False)
    torch.testing.assert_close(found.per_example[0].double(), expected, atol=1e-5, rtol=0)
    direct = mi.patch_paths(model, task, senders="a0.h2", receivers="logits", normalize=False)
    assert (found.per_example - direct.per_example).abs().max() > 1e-3


def test_a_path_over_several_hops(setting: Any) -> None:
    """By hand: the node on the way answers what it hears, and only that goes on."""
    model, task, reference = setting.model, setting.task, setting.reference
    other = reference.run(task.corrupt)[1]
    kv = "kv" if model.cfg.n_kv_heads < 4 else "h"
    answer = reference.run(task.clean, Intervention(cut={("embed", "m0", "in")}, instead=other))[1]["m0"]
    expected = reference.metric(task, Intervention(cut={("m0", f"a1.{kv}1", "v")}, instead={"m0": answer})) - reference.metric(
        task
    )
    found = mi.patch_paths(model, task, senders="embed", via=["m0"], receivers=f"a1.{kv}1<v>", normalize=False)
    torch.testing.assert_close(found.per_example[0].double(), expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 0.01
    # Two ports of different layers on the way: neither hears the other's answer.
    through_kv = [f"a1.h{i}" for i in ((2, 3) if kv == "kv" else (1,))]
    written = reference.run(task.clean, Intervention(cut={("embed", "m0", "in")}, instead=other))[1]
    heads = reference.run(task.clean, Intervention(cut={("embed", f"a1.{kv}1", "v")}, instead=other))[1]
    instead = {"m0": written["m0"]} | {node: heads[node] for node in through_kv}
    cut = {(node, "logits", "in") for node in instead}
    expected = reference.metric(task, Intervention(cut=cut, instead=instead)) - reference.metric(task)
    found = mi.patch_paths(model, task, senders="embed", via=[f"m0 | a1.{kv}1<v>"], receivers="logits", normalize=False)
    torch.testing.assert_close(found.per_example[0].double(), expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_equals_transformer_lens(tiny_gpt2: Callable[..., mi.Model], setting: Any, component: str) -> None:
    """Head to head, whatever the ports; transformer_lens gives the mean of the metric with the path patched."""
    model, task = tiny_gpt2(n_layers=3, seed=4), setting.task
    other = copy_of(model)
    with torch.no_grad():
        _, clean = other.bridge.run_with_cache(task.clean)
        _, corrupt = other.bridge.run_with_cache(task.corrupt)
        theirs = lens.get_act_patch_direct_path_all_sources(
            other.bridge, task.corrupt, clean, corrupt, lambda logits: logit_diff(logits, task).mean(), component, verbose=False
        )
    found = mi.patch_paths(
        model,
        task,
        senders="a*.h*",
        receivers=f"a*.h*<{component}>",
        over=("sender", "receiver"),
        direction="denoise",
        normalize=False,
    )
    ours = found.values.reshape(3, 4, 3, 4)
    for src in range(3):
        assert not ours[src, :, : src + 1].any()
        for dst in range(src + 1, 3):
            expected = theirs[src, :, dst] - found.baseline["corrupt"]
            torch.testing.assert_close(ours[src, :, dst], expected.cpu(), atol=1e-5, rtol=0)
    assert ours.abs().max() > 0.01


def test_positions_and_neurons(setting: Any) -> None:
    model, task = setting.model, setting.task
    # What is sent or read at each position adds up, where the logits read it: but for the norm.
    last = mi.patch_paths(model, task, senders="L1.H2.z", receivers="logits", normalize=False)
    by_pos = [mi.patch_paths(model, task, senders=f"L1.H2.z[{pos}]", receivers="logits", normalize=False) for pos in range(8)]
    rows = torch.arange(len(task))
    answers = torch.stack([each.per_example[0] for each in by_pos])[task.answer_pos, rows]
    torch.testing.assert_close(answers, last.per_example[0], atol=1e-5, rtol=0)
    # Queries at the answer position alone decide what a last-layer head gives the answer.
    everywhere = mi.patch_paths(model, task, senders="m0", receivers="L1.H1.q", normalize=False)
    named = mi.Task(
        name="named",
        clean=task.clean,
        corrupt=task.corrupt,
        right=task.right,
        wrong=task.wrong,
        answer_pos=task.answer_pos,
        positions={"answer": task.answer_pos},
    )
    answering = mi.patch_paths(model, named, senders="m0", receivers="L1.H1.q[answer]", normalize=False)
    torch.testing.assert_close(answering.per_example, everywhere.per_example, atol=1e-5, rtol=0)
    # All neurons together are the MLP.
    neurons = mi.patch_paths(model, task, senders="L1.mlp_post", receivers="logits", normalize=False)
    # What neurons add to the stream that the logits read is known from the two runs.
    assert neurons.provenance["forwards"] == 2
    whole = mi.patch_paths(model, task, senders="m1", receivers="logits", normalize=False)
    torch.testing.assert_close(neurons.per_example, whole.per_example, atol=1e-5, rtol=0)
    one = mi.patch_paths(model, task, senders="L1.N3.mlp_post", receivers="logits", normalize=False)
    # Beside a part of its MLP's output: there the output is what is sent, elsewhere the neuron.
    pos = int(task.answer_pos[0])
    both = mi.patch_paths(model, task, senders=f"L1.N3.mlp_post | L1.mlp_out[{pos}]", receivers="logits", normalize=False)
    there = task.answer_pos == pos
    assert there.any() and not there.all()
    torch.testing.assert_close(both.per_example[0], whole.per_example[0].where(there, one.per_example[0]), atol=1e-5, rtol=0)
    clean, corrupt = mi.run(model, task, capture="L1.mlp_post"), mi.run(model, task.corrupt, capture="L1.mlp_post")
    moved = clean["L1.mlp_post"].clone()
    moved[..., 3] = corrupt["L1.mlp_post"][..., 3]
    expected = logit_diff(mi.run(model, task, edits=[mi.Replace("L1.mlp_post", moved)]).logits, task)
    torch.testing.assert_close(one.per_example[0], expected - logit_diff(clean.logits, task), atol=1e-5, rtol=0)


def test_on_the_toy_the_path_goes_through_keys() -> None:
    """The path to the induction head's keys carries everything, those to its queries and values nothing, exactly."""
    toy = mi.toys.induction()
    (edge,) = (edge for edge in toy.truth["resample"].edges if edge.src.startswith("a0") and edge.dst.startswith("a1"))
    sender, reader = edge.src, edge.dst
    ports = [f"{reader}<{port}>" for port in "qkv"]
    found = mi.patch_paths(toy.model, toy.task, senders=sender, receivers=" | ".join(ports), over=("receiver",))
    q, k, v = found.values.tolist()
    # All that the previous-token head does, it does through these keys.
    whole = mi.patch(toy.model, toy.task, f"L0.H{sender[-1]}.z", direction="noise").values.item()
    assert k == pytest.approx(whole, abs=1e-4)
    assert abs(k) > 0.1
    assert abs(q) < 1e-6
    assert abs(v) < 1e-6


def test_memory_and_rows_do_not_matter(setting: Any) -> None:
    model, task = setting.model, setting.task
    kinds: dict[str, Any] = {"senders": "a0.* | m0", "receivers": "a1.h*<q> | m1", "over": ("sender", "receiver")}
    whole = mi.patch_paths(model, task, **kinds)
    small = mi.patch_paths(model, task, **kinds, memory=1)
    torch.testing.assert_close(small.per_example, whole.per_example, atol=2e-5, rtol=0)
    assert whole.coords["sender"] == ("L0.H0.z", "L0.H1.z", "L0.H2.z", "L0.H3.z", "L0.mlp_out")


def test_names_may_be_listed(setting: Any) -> None:
    one = mi.patch_paths(setting.model, setting.task, senders="a0.h0 | m0", receivers="a1.h0<q>", over=("sender",))
    same = mi.patch_paths(setting.model, setting.task, senders=["a0.h0", "m0"], receivers=["a1.h0<q>"], over="sender")
    assert torch.equal(one.per_example, same.per_example)
    assert one.coords == same.coords
    step = {"senders": "a0.h0", "receivers": "logits"}
    one, same = (mi.patch_paths(setting.model, setting.task, via=via, **step) for via in ("a1.h0<q>", ["a1.h0<q>"]))
    assert torch.equal(one.per_example, same.per_example)


def test_a_sender_reaches_what_is_computed_after_it(setting: Any) -> None:
    # The MLP of its own layer, but no head of it; and nothing reaches an earlier layer.
    mi.patch_paths(setting.model, setting.task, senders="a0.h0", receivers="m0")
    mi.patch_paths(setting.model, setting.task, senders="embed", receivers="a0.h0<q>")
    for senders, receivers in (("a0.h0", "a0.h1<q>"), ("m0", "m0"), ("m0", "a0.h1<q>")):
        with pytest.raises(SelectorError, match="nothing leads from"):
            mi.patch_paths(setting.model, setting.task, senders=senders, receivers=receivers)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": ("senders",)}, "cannot sweep paths over 'senders'. Did you mean 'sender'?"),
        ({"senders": "L0.q"}, "L0.q is nothing that a node writes; senders are z, head_out, mlp_out, mlp_post, embed, or nodes"),
        ({"receivers": "L1.z"}, "L1.z is nothing that reads; receivers are q, k, v, q_in, k_in, v_in, mlp_in, ports such as"),
        ({"receivers": "a1.h0"}, "'a1.h0' does not say what reads: write a1.h0<q>, a1.h0<k> or a1.h0<v>, or a1.h0<*> for all"),
        (
            {"receivers": "logits | m1"},
            "the logits are read at the end of a path; patch the paths to them and to other receivers",
        ),
        ({"through": "mlp"}, "no node is called 'mlp'. Did you mean 'mlps'"),
        ({"senders": "a9.h0"}, "no node that writes is called 'a9.h0'. Did you mean 'a"),
        ({"receivers": "a1.h9<q>"}, "no port is called 'a1.h9<q>'. Did you mean 'a1.h"),
        ({"senders": "a1.h0", "receivers": "a0.h0<q>"}, "nothing leads from L1.H0.z to L0.H0.q, which is computed before it"),
        ({"senders": "a0.h0", "receivers": "a1.h1<q>", "via": "a1.h1<q>"}, "nothing leads from L1.H1.q to L1.H1.q"),
    ],
)
def test_messages(setting: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectorError) as caught:
        mi.patch_paths(setting.model, setting.task, **({"senders": "a0.*", "receivers": "logits"} | options))
    assert str(caught.value).startswith(message)
