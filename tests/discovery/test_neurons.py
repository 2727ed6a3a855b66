"""Circuits whose MLPs keep some neurons alone: run, scored, chosen, judged, against plain hooks and a forward pass by hand."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.discovery.choosing import node_scores
from mechinterp.discovery.discover import score_again
from mechinterp.discovery.methods import METHODS
from mechinterp.discovery.packing import Packing
from mechinterp.errors import GraphError, MechInterpError
from mechinterp.graph import scored_edges
from mechinterp.graph.graph import edges_among
from mechinterp.graph.neurons import neuron_name, parse_neuron
from mechinterp.patching.neurons import check_neurons
from mechinterp.verifying import verify
from tests.core.architectures import module_of as wider
from tests.core.conftest import ARCHITECTURES, Plain, module_of
from tests.reference import Intervention, Reference

ABLATIONS = ("resample", "zero", "mean")
ABLE = [name for name, method in METHODS.items() if "neuron" in method.units]


@dataclass(frozen=True, eq=False)
class Twins:
    """A model, the module that it was before it was wrapped, and pairs for it."""

    model: mi.Model
    plain: Plain
    task: mi.Task

    def neurons(self, tokens: Tensor) -> list[Tensor]:
        """What the output projection of each layer reads."""
        return [self.plain.values(tokens, layer)["mlp_post"] for layer in range(2)]

    def hooked(self, acts: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
        """The metric ``[batch]`` of clean prompts, with other neurons in the place of a layer's own."""
        handles = [
            self.plain.parts(layer).post.register_forward_pre_hook(lambda module, args, act=act: (act(args[0]),))
            for layer, act in acts.items()
        ]
        try:
            return self.metric(self.plain.logits(self.task.clean))
        finally:
            for handle in handles:
                handle.remove()

    def metric(self, logits: Tensor) -> Tensor:
        rows = torch.arange(len(self.task))
        return logits[rows, -1, self.task.right[:, 0]] - logits[rows, -1, self.task.wrong[:, 0]]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def twins(request: pytest.FixtureRequest) -> Twins:
    module = module_of(request.param)
    plain = Plain(request.param, copy.deepcopy(module))
    clean, corrupt = torch.randint(1, 40, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    corrupt[:, :2] = clean[:, :2]
    task = mi.Task(name="random", clean=clean, corrupt=corrupt, right=[3, 9, 27], wrong=[8, 5, 33])
    return Twins(mi.load(module), plain, task)


def drawn(model: mi.Model, edges: Sequence[mi.Edge], share: float, seed: int) -> mi.Circuit:
    """Of some MLPs, and each neuron with some chance."""
    generator = random.Random(seed)
    kept = {
        f"m{layer}": dict.fromkeys(i for i in range(model.cfg.d_mlp) if generator.random() < share)
        for layer in range(2)
        if layer == seed % 2 or generator.random() < 0.6
    }
    return mi.Circuit(mi.GraphShape.of(model), dict.fromkeys(edges), neurons=kept)


def mixed(kept: Mapping[int, Any], other: Tensor) -> Callable[[Tensor], Tensor]:
    """Own neurons where they are kept, and others where they are not."""

    def act(own: Tensor) -> Tensor:
        new = other.expand_as(own).clone()
        new[..., list(kept)] = own[..., list(kept)]
        return new

    return act


def layer_of(mlp: str) -> int:
    return int(mlp[1:])


# -- running


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_left_out_neurons_are_ablated(twins: Twins, ablation: str) -> None:
    model, task = twins.model, twins.task
    theirs = {
        "resample": twins.neurons(task.corrupt),
        "zero": [torch.zeros(())] * 2,
        "mean": [own.mean(dim=(0, 1), keepdim=True) for own in twins.neurons(task.clean)],
    }[ablation]
    circuits = [drawn(model, scored_edges(model), share, seed) for seed, share in enumerate((0.05, 0.5, 0.95, 0.3))]
    runs = mi.run_circuits(model, task, circuits, ablation=ablation)
    for circuit, found in zip(circuits, runs.circuits, strict=True):
        expected = twins.hooked({layer_of(mlp): mixed(kept, theirs[layer_of(mlp)]) for mlp, kept in circuit.neurons.items()})
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        assert (found - runs.clean).abs().max() > 1e-3


def test_all_neurons_are_the_clean_run_and_none_are_ablated_mlps(twins: Twins) -> None:
    model, full = twins.model, mi.Circuit.full(twins.model)
    every = full.with_neurons([neuron_name(f"m{layer}", i) for layer in range(2) for i in range(model.cfg.d_mlp)])
    none = replace(full, neurons={"m0": {}, "m1": {}})
    mute = full.only(edge for edge in full if not edge.src.startswith("m"))
    runs = mi.run_circuits(model, twins.task, [every, none, mute])
    torch.testing.assert_close(runs.circuits[0], runs.clean, atol=2e-6, rtol=0)
    torch.testing.assert_close(runs.circuits[1], runs.circuits[2], atol=5e-6, rtol=0)
    assert (runs.circuits[1] - runs.clean).abs().max() > 1e-2
    # What passes an MLP without a neuron is on no path.
    assert none.connected() == replace(mute.connected(), provenance=full.provenance)


def test_an_edge_of_an_mlp_that_is_cut_carries_what_the_whole_mlp_is_ablated_to(twins: Twins) -> None:
    model, task, plain = twins.model, twins.task, twins.plain
    circuit = drawn(model, [edge for edge in scored_edges(model) if str(edge) != "m0->logits"], 0.4, 0)
    theirs, corrupt = twins.neurons(task.corrupt), plain.values(task.corrupt, 0)["mlp_out"]
    own: list[Tensor] = []
    handles = [
        plain.parts(0).mlp_end.register_forward_hook(lambda module, args, out: own.append(out)),
        plain.roots.norm.register_forward_pre_hook(lambda module, args: (args[0] + corrupt - own[-1],)),
    ]
    try:
        expected = twins.hooked({layer_of(m): mixed(kept, theirs[layer_of(m)]) for m, kept in circuit.neurons.items()})
    finally:
        for handle in handles:
            handle.remove()
    [found] = mi.run_circuits(model, task, circuit).circuits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    whole = mi.run_circuits(model, task, circuit.with_neurons({})).circuits[0]
    assert (found - whole).abs().max() > 1e-3


def by_hand(reference: Reference, task: mi.Task, circuit: mi.Circuit) -> Tensor:
    """Edges cut and neurons left out together, by a forward pass that is written out."""
    theirs: dict[int, Tensor] = {}

    def note(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda own: theirs.setdefault(layer, own)

    instead = reference.run(task.corrupt, Intervention(neurons={layer: note(layer) for layer in range(2)}))[1]
    cut: dict[Any, Tensor] = {}
    index, names = task.spans.index, task.spans.names
    for edge in reference.edges:
        found = mi.Edge(*edge)
        kept = circuit.spans.get(found, names if found in circuit else ())
        cut[edge] = torch.stack([index != names.index(span) for span in kept] or [index >= -1]).all(dim=0).double()
    acts = {layer_of(mlp): mixed(kept, theirs[layer_of(mlp)]) for mlp, kept in circuit.neurons.items()}
    return reference.metric(task, Intervention(cut=cut, instead=instead, neurons=acts))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_edges_cut_and_neurons_left_out_equal_a_brute_force(setting: Any, share: float) -> None:
    model, task, generator = setting.model, setting.task, random.Random(1)
    circuits = [
        drawn(model, [edge for edge in scored_edges(model) if generator.random() < share or "m" in edge.src], 0.5, seed)
        for seed in range(3)
    ]
    # Also at some spans, beside circuits without neurons, and whatever the packing.
    at = [replace(each, spans={edge: {"changed": None} for edge in each.edges[::3]}) for each in circuits]
    circuits += [at[0], circuits[1].with_neurons({}), at[2].with_neurons({})]
    circuits = [circuits[i] for i in (3, 0, 4, 1, 5, 2)]
    runs = mi.run_circuits(model, task, circuits)
    for circuit, found in zip(circuits, runs.circuits, strict=True):
        torch.testing.assert_close(found.double(), by_hand(setting.reference, task, circuit), atol=5e-5, rtol=0)
    alone = torch.cat([mi.run_circuits(model, task, circuit).circuits for circuit in circuits])
    torch.testing.assert_close(alone, runs.circuits, atol=2e-5, rtol=0)
    parts = mi.run_circuits(model, task, circuits, memory=1).circuits
    torch.testing.assert_close(parts, runs.circuits, atol=2e-5, rtol=0)


def test_circuits_without_neurons_run_as_they_did(setting: Any) -> None:
    """Beside others: the very same bits, in a pass of their own in which nothing is done to neurons."""
    model, task = setting.model, setting.task
    plain = [mi.Circuit.from_edges(model, scored_edges(model)[seed::3]) for seed in range(3)]
    some = drawn(model, scored_edges(model), 0.5, 0)
    together = mi.run_circuits(model, task, [plain[0], some, *plain[1:]]).circuits[[0, 2, 3]]
    assert torch.equal(together, mi.run_circuits(model, task, plain).circuits)
    rows: list[int] = []
    handle = model.block(0).register_forward_hook(lambda module, args, output: rows.append(output.numel()))
    try:
        mi.run_circuits(model, task, [plain[0], some, *plain[1:]])
    finally:
        handle.remove()
    assert [count // rows[0] for count in rows] == [1, 1, 3, 1]


def test_whole_passes_leave_out_the_same_neurons(twins: Twins) -> None:
    """A hook of one's own expects all positions and layers, of which a replay would leave some out."""
    model, task = twins.model, twins.task
    circuit = drawn(model, scored_edges(model)[::2], 0.5, 0)
    expected, seen = mi.run_circuits(model, task, circuit).circuits, []
    handle = model.block(0).register_forward_hook(lambda *_: seen.append(1))
    try:
        found = mi.run_circuits(model, task, circuit).circuits
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(seen) == 3


def test_neurons_take_their_share_of_the_memory(twins: Twins) -> None:
    some = [
        Packing.of(twins.model, twins.task, mi.Ablation("resample"), None, 1 << 24, layers).at_once
        for layers in ((), (0,), (0, 1))
    ]
    assert some[0] > some[1] > some[2] > 1


# -- scores


@pytest.mark.parametrize("architecture", ["twins"])
def test_exact_scores_are_one_neuron_changed_at_a_time(twins: Twins, architecture: str) -> None:
    model, task = twins.model, twins.task
    circuit = mi.discover(model, task, method="exact", unit="neuron", threshold=0.0)
    scores, theirs = circuit.provenance["selection"]["node_scores"], twins.neurons(task.corrupt)
    assert circuit.n_neurons == 2 * model.cfg.d_mlp and len(scores) == circuit.n_neurons + 8
    assert {f"a{layer}.h{head}" for layer in range(2) for head in range(4)} < scores.keys()
    clean = twins.hooked({})
    gap = (twins.metric(twins.plain.logits(task.corrupt)) - clean).mean()
    for layer, i in ((layer, i) for layer in range(2) for i in range(0, model.cfg.d_mlp, 5)):
        others = [j for j in range(model.cfg.d_mlp) if j != i]
        effect = (twins.hooked({layer: mixed(dict.fromkeys(others), theirs[layer])}) - clean).mean() / gap
        assert scores[f"m{layer}.n{i}"] == circuit.neurons[f"m{layer}"][i] == pytest.approx(float(effect), abs=3e-5)


def test_estimates_of_neurons_are_those_of_their_sites_and_sum_to_their_mlp(setting: Any) -> None:
    model, task = setting.model, setting.task
    found = mi.attribute(model, task, unit="neuron", steps=2)
    scores, nodes = node_scores(found), node_scores(mi.attribute(model, task, steps=2))
    sites = mi.attribute(model, task, "L*.N*.mlp_post", over=("layer", "pos", "neuron"), steps=2).values.sum(dim=1)
    for name, score in scores.items():
        if (neuron := parse_neuron(name)) is not None:
            assert score == pytest.approx(float(sites[layer_of(neuron[0]), neuron[1]]), abs=1e-6)
        else:
            assert score == pytest.approx(nodes[name], abs=1e-6)
    for mlp in ("m0", "m1"):
        # The output projection is linear: a slope along all neurons is the sum of those along each.
        assert sum(s for name, s in scores.items() if name.startswith(f"{mlp}.")) == pytest.approx(nodes[mlp], abs=1e-5)
    whole = mi.attribute(model, task, steps=2).provenance["completeness_error"]
    assert found.provenance["completeness_error"] == pytest.approx(whole, abs=1e-6)


# -- choosing


def planted() -> tuple[Any, mi.Circuit]:
    """Two heads and twelve neurons of two MLPs that hold a fact each."""
    toy = mi.toys.memory()
    shape = mi.GraphShape.of(toy.model)
    edges = dict.fromkeys(edges_among(shape, {"a0.h1", "a0.h2", "m0", "m1"}))
    facts: dict[str, dict[int, float | None]] = {"m0": {}, "m1": {}}
    for fact in toy.facts:
        facts[f"m{fact.layer}"][fact.neuron] = None
    return toy, mi.Circuit(shape, edges, neurons=facts)


@pytest.mark.parametrize("method", ABLE)
def test_finds_the_neurons_that_hold_the_facts(method: str) -> None:
    toy, truth = planted()
    circuit = mi.discover(toy.model, toy.task, method=method, unit="neuron", nodes=14)
    assert circuit.iou(truth) == 1.0
    said = circuit.provenance["selection"]
    assert set(said["nodes"]) == {"a0.h1", "a0.h2", *(neuron_name(mlp, i) for mlp, kept in truth.neurons.items() for i in kept)}
    assert all(
        circuit.neurons[mlp][i] == said["node_scores"][neuron_name(mlp, i)] for mlp, kept in truth.neurons.items() for i in kept
    )
    runs = mi.run_circuits(
        toy.model, toy.task, [circuit, *(without(circuit, mlp, i) for mlp, kept in truth.neurons.items() for i in kept)]
    )
    torch.testing.assert_close(runs.circuits[0], runs.clean, atol=5e-2, rtol=0)
    # Each of them is needed.
    shares = (runs.circuits.mean(dim=1) - runs.corrupt.mean()) / (runs.clean - runs.corrupt).mean()
    assert (1 - shares[1:]).min() > 0.02


def without(circuit: mi.Circuit, mlp: str, neuron: int) -> mi.Circuit:
    less = {i: score for i, score in circuit.neurons[mlp].items() if i != neuron}
    return circuit.with_neurons({**circuit.neurons, mlp: less})


def test_the_best_are_taken_by_number_threshold_and_budget_of_edges(setting: Any) -> None:
    model, task = setting.model, setting.task
    scores = node_scores(mi.attribute(model, task, unit="neuron"))
    ranked = sorted((name for name in scores if name != "embed"), key=lambda name: -abs(scores[name]))

    def taken(**options: Any) -> list[str]:
        circuit = mi.discover(model, task, method="eap", unit="neuron", **options)
        chosen = circuit.provenance["selection"]["nodes"]
        nodes = {name.split(".n")[0] for name in chosen}
        assert set(circuit.edges) == set(edges_among(circuit.shape, nodes))
        kept = {neuron_name(mlp, i) for mlp, neurons in circuit.neurons.items() for i in neurons}
        assert kept == {name for name in chosen if ".n" in name}
        return list(chosen)

    assert taken(nodes=30) == ranked[:30]
    cut = abs(scores[ranked[11]])
    assert taken(threshold=cut) == ranked[:12]
    up = sorted((name for name in scores if name != "embed"), key=lambda name: -scores[name])
    assert taken(nodes=9, signed=True) == up[:9]
    some = taken(edges=20)
    assert some == ranked[: len(some)]
    many = {name.split(".n")[0] for name in ranked[: len(some) + 1]}
    assert len(edges_among(mi.GraphShape.of(model), many)) > 20


# -- judging


def test_reports_files_and_what_they_claim(tmp_path: Any) -> None:
    toy, truth = planted()
    report = mi.evaluate(truth, toy.model, toy.task, seed=0, random_circuits=3)
    assert report.neurons == 12 and report.faithfulness == pytest.approx(1.0, abs=1e-2) and report.beats_random == 3
    assert "18 edges, 18 connected, of 110; 6 nodes; 12 neurons in the place of whole MLPs" in repr(report)
    assert mi.evaluate(truth.with_neurons({}), toy.model, toy.task, seed=0, random_circuits=0).neurons is None
    told = truth.with_report(report.to_json())
    assert told.certificate is not None and told.certificate.claims["neurons"] == 12
    found = replace(told, provenance={"task": toy.task.name, "model": toy.model.name})
    again = mi.Circuit.load(found.save(tmp_path / "c.json"))
    checked = verify(again, toy.model)
    assert checked.holds and {"neurons", "random_faithfulness[2]"} <= {check.name for check in checked.checks}
    # A file with one neuron less does not do what this one claims.
    less = verify(without(again, "m0", 0), toy.model, quick=True)
    assert not less.holds and {"neurons", "faithfulness"} <= {check.name for check in less.checks if not check.holds}


def test_taking_edges_away_keeps_the_neurons(setting: Any) -> None:
    model, task = setting.model, setting.task
    circuit = drawn(model, scored_edges(model), 0.5, 0)
    drops = mi.minimality(circuit, model, task, sample=3, seed=0)
    edges = [mi.Edge(*label) for label in drops.coords["edge"]]  # type: ignore[misc]
    less = [mi.Circuit(circuit.shape, dict.fromkeys(set(circuit) - {edge}), neurons=circuit.neurons) for edge in edges]
    runs = mi.run_circuits(model, task, [circuit, *less])
    gap = (runs.clean - runs.empty).mean()
    torch.testing.assert_close(drops.per_example, (runs.circuits[0] - runs.circuits[1:]) / gap, atol=1e-5, rtol=0)


def test_scores_of_edges_are_not_those_that_chose_a_circuit_with_neurons(setting: Any) -> None:
    circuit = mi.discover(setting.model, setting.task, method="eap", threshold=0.0)
    assert score_again(circuit, setting.model, setting.task) is not None
    assert score_again(circuit.with_neurons(["m1.n3"]), setting.model, setting.task) is None


# -- messages


def test_messages(setting: Any) -> None:
    model, task = setting.model, setting.task
    last, n = model.cfg.d_mlp - 1, 8 + 2 * model.cfg.d_mlp
    circuit = mi.Circuit.from_edges(model, ["embed->m0", "m0->logits"]).with_neurons(["m0.n1", "m0.n5"])
    shape = mi.GraphShape(3, 4, model.cfg.n_kv_heads)
    deep = mi.Circuit.full(shape).with_neurons(["m2.n1"])
    far = circuit.with_neurons(["m0.n1", f"L0.N{last + 1}.mlp_post"])
    whole = "knows whole MLPs alone, and 1 MLP of this circuit keeps some neurons. For the bare edges: circuit.with_neurons({})."
    missing = f"there is no neuron m0.n{last + 1}: the MLPs of {model.name} have neurons 0 to {last}"
    able = "for unit='neuron' there are 'eap', 'eap-ig', 'clean-corrupt', 'eap-ig-activations', 'relp', 'atp-star', 'exact'"
    cases: list[tuple[Any, str]] = [
        (lambda: mi.run_circuits(model, task, far), missing),
        (lambda: mi.evaluate(far, model, task, seed=0), missing),
        (
            lambda: mi.evaluate(deep, model, task, seed=0),
            f"{deep!r} is a circuit of shape {shape}, but {model.name} has {circuit.shape}",
        ),
        (
            lambda: mi.discover(model, task, unit="neuron", method="acdc"),
            f"the method 'acdc' works on edges alone; {able}",
        ),
        (
            lambda: mi.discover(model, task, unit="neuron", method="screen-verify"),
            f"the method 'screen-verify' works on edges alone; {able}",
        ),
        (
            lambda: mi.discover(model, task, unit="neuron", nodes=n + 1),
            f"nodes={n + 1}: this model has {n} heads and neurons to choose from; give 0 to {n}",
        ),
        (
            lambda: mi.discover(model, task, unit="neuron", positions=True),
            "positions=True chooses edges at spans of the prompts; leave out unit='neuron', or positions=True",
        ),
        (
            lambda: mi.attribute(model, task, "L0.mlp_out", unit="neuron"),
            "unit='neuron' scores every neuron; a selector goes with unit='node'",
        ),
        (lambda: mi.evaluate(circuit, model, task, seed=0, thorough=True), f"thorough=True {whole}"),
        (lambda: mi.check_hypotheses(circuit, model, task, seed=0), f"mi.check_hypotheses {whole}"),
        (lambda: mi.save_mib(circuit, "x.json", d_model=8), f"A MIB file {whole}"),
        (lambda: mi.edge_effects(model, task, circuit), f"A choice of edges to measure {whole}"),
        (lambda: mi.size_curve(circuit, model, task), f"A ranking of edges {whole}"),
        (lambda: mi.auroc(circuit, circuit.with_neurons({})), f"A ranking of edges {whole}"),
        (lambda: mi.auroc({}, circuit), f"mi.auroc {whole}"),
        (lambda: mi.compare_to_known(circuit.with_neurons({}), circuit), f"mi.compare_to_known {whole}"),
    ]
    for call, message in cases:
        with pytest.raises(MechInterpError) as caught:
            call()
        assert str(caught.value) == message


def test_mixtures_of_experts_have_no_neurons() -> None:
    model = mi.load(wider("Mixtral"), name="experts")
    clean, corrupt = torch.randint(1, 30, (2, 2, 5), generator=torch.Generator().manual_seed(0))
    task = mi.Task(name="random", clean=clean, corrupt=corrupt, right=[3, 9], wrong=[8, 5])
    message = (
        "m0 of experts (MixtralForCausalLM) is a mixture of experts, which has no one set of neurons; take its experts as one: "
        "unit='node', circuit.with_neurons({})"
    )
    circuit = mi.Circuit.full(model).with_neurons(["m0.n1"])
    for call in (
        lambda: mi.discover(model, task, unit="neuron", nodes=3),
        lambda: mi.discover(model, task, unit="neuron", method="exact"),
        lambda: mi.run_circuits(model, task, circuit),
        lambda: mi.evaluate(circuit, model, task, seed=0),
    ):
        with pytest.raises(GraphError) as caught:
            call()
        assert str(caught.value) == message


def test_each_mlp_is_asked_for_its_own_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only later layers have experts."""
    model = mi.load(module_of("llama"), name="mixed")
    monkeypatch.setattr(model.block(1).mlp, "out", None)
    check_neurons(model, "m0", [1])
    with pytest.raises(GraphError, match=r"^m1 of mixed \(LlamaForCausalLM\) is a mixture of experts"):
        check_neurons(model, "m1", [1])
