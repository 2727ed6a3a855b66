"""Toys as a user meets them: with the package's own methods, by name, and what goes wrong."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp import toys
from mechinterp.errors import FileFormatError, ModelError, TaskError
from mechinterp.tasks import accuracy, gather_answer_logits
from mechinterp.toys import Toy

HAND_SET = ("induction", "gqa_induction", "copy", "memory")
# The package's name for it is the function.
TRAINED = importlib.import_module("mechinterp.toys.trained")
WEIGHTS = TRAINED.WEIGHTS
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built() -> dict[str, Toy]:
    return {name: toys.build(name) for name in toys.NAMES}


def answers(toy: Toy) -> Tensor:
    with torch.no_grad():
        return gather_answer_logits(toy.model(toy.task.clean), toy.task)


def pattern(toy: Toy, layer: int, head: int) -> Tensor:
    """[batch q_pos k_pos]"""
    return mi.run(toy.model, toy.task.clean, capture="L*.pattern").cache[f"L{layer}.H{head}.pattern"]


# -- the planted answer, found by the package ---------------------------------------------------------------


@pytest.mark.parametrize("name", toys.NAMES)
def test_every_toy_does_its_task(built: dict[str, Toy], name: str) -> None:
    toy = built[name]
    assert accuracy(answers(toy), toy.task).mean() == 1.0
    assert (answers(toy).argmax(-1) == toy.task.right[:, 0]).all()


@pytest.mark.parametrize("direction", ("noise", "denoise"))
@pytest.mark.parametrize("name", HAND_SET)
def test_patching_marks_exactly_the_planted_heads(built: dict[str, Toy], name: str, direction: str) -> None:
    toy = built[name]
    effects = mi.patch(toy.model, toy.task, "L*.H*.z", direction=direction).values
    marked = {f"a{layer}.h{head}" for layer, head in (effects.abs() > 1e-6).nonzero().tolist()}
    assert marked == set(toy.heads)
    assert effects.abs()[effects.abs() > 1e-6].min() > 0.1


@pytest.mark.parametrize("steps", (0, 5))
@pytest.mark.parametrize("direction", ("noise", "denoise"))
@pytest.mark.parametrize("name", HAND_SET)
def test_planted_edges_score_above_all_others(built: dict[str, Toy], name: str, direction: str, steps: int) -> None:
    toy = built[name]
    effects = mi.attribute(toy.model, toy.task, unit="edge", steps=steps, direction=direction)
    scores = dict(zip(effects.coords["edge"], effects.values.abs().tolist(), strict=True))
    truth = {tuple(edge) for edge in toy.truth["resample"]}
    # AUROC 1.0: every planted edge above every other.
    assert min(scores[edge] for edge in truth) > 1e4 * max(s for edge, s in scores.items() if edge not in truth)


def test_the_suppressing_head_has_the_other_sign(built: dict[str, Toy]) -> None:
    effects = mi.patch(built["copy"].model, built["copy"].task, "L*.H*.z").values
    assert effects[0, 1] == pytest.approx(-0.3 / 0.7, rel=1e-3)
    assert effects[1, 2] == pytest.approx(1 / 0.7, rel=1e-3)


# -- decoys deserve the name --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "planted", "decoys"),
    [
        ("induction", (0, 3), [(0, 6)]),
        ("induction", (1, 5), [(1, 2)]),
        ("gqa_induction", (1, 1), [(1, 0)]),
        ("copy", (1, 2), [(0, 1), (0, 2), (1, 1)]),
        ("memory", (0, 1), [(0, 3), (1, 1)]),
    ],
)
def test_some_decoys_attend_like_what_is_planted(
    built: dict[str, Toy], name: str, planted: tuple[int, int], decoys: list[tuple[int, int]]
) -> None:
    for decoy in decoys:
        torch.testing.assert_close(pattern(built[name], *decoy), pattern(built[name], *planted), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", HAND_SET)
def test_every_head_writes_something_that_depends_on_the_prompt(built: dict[str, Toy], name: str) -> None:
    toy = built[name]
    run = mi.run(toy.model, toy.task.clean, capture="L*.z")
    for layer in range(toy.model.cfg.n_layers):
        weight = toy.model.projection(layer, "o").weight
        written = torch.einsum("bphd,hdm->bhpm", run.cache[f"L{layer}.z"], weight)
        assert (written[:, :, -1].std(dim=0).norm(dim=-1) > 0.01).all()


@pytest.mark.parametrize("name", HAND_SET)
def test_planted_attention_is_sharp_but_not_saturated(built: dict[str, Toy], name: str) -> None:
    for node in built[name].heads:
        layer, head = (int(part[1:]) for part in node.split("."))
        most = pattern(built[name], layer, head)[:, -1].amax(-1)
        assert (most > 0.9).all() and (most < 0.999).all()


# -- the memory ---------------------------------------------------------------------------------------------


def test_each_fact_is_in_its_neuron_alone(built: dict[str, Toy]) -> None:
    toy = built["memory"]
    assert len(toy.facts) == len({(fact.layer, fact.neuron) for fact in toy.facts}) == 12
    ids = toy.model.tokenizer.get_vocab()
    asked = [f"the {fact.relation} of {fact.subject} is" for fact in toy.facts]
    tokens = toy.model.tokens(asked)
    answer = torch.tensor([ids[fact.answer] for fact in toy.facts])
    rows = torch.arange(len(toy.facts))
    whole = toy.model(tokens)[:, -1]
    assert (whole.argmax(-1) == answer).all()
    for row, fact in enumerate(toy.facts):
        without = mi.run(toy.model, tokens, edits=[mi.Zero(f"L{fact.layer}.N{fact.neuron}.mlp_post")])
        lost = (whole - without.logits[:, -1])[rows, answer]
        assert lost[row] > 3
        assert lost[rows != row].abs().max() < 1e-4


def test_a_fact_says_what_it_is(built: dict[str, Toy]) -> None:
    assert str(built["memory"].facts[7]) == "language of japan: japanese (L1, neuron 5)"


# -- the trained toy ----------------------------------------------------------------------------------------


def test_the_trained_toy_has_learnt_induction_and_not_the_prompts() -> None:
    toy = toys.trained(n=200, seed=12345)
    assert (answers(toy).argmax(-1) == toy.task.right[:, 0]).float().mean() > 0.99
    # Other lengths, other places: it does not count back a fixed distance.
    for length, repeat in ((6, 2), (9, 5), (14, 9)):
        task = mi.tasks.induction(toy.model.tokenizer, n=100, seed=1, length=length, repeat=repeat)
        logits = gather_answer_logits(toy.model(task.clean), task)
        assert accuracy(logits, task).mean() > 0.97


def test_the_trained_toy_has_a_previous_token_head_and_an_induction_head() -> None:
    toy = toys.trained(n=64, seed=3)
    end, target = toy.task.positions["end"], toy.task.positions["target"]
    rows = torch.arange(len(toy.task))
    back = [pattern(toy, 0, head).diagonal(-1, 1, 2)[:, 1:].mean().item() for head in range(4)]
    found = [pattern(toy, 1, head)[rows, end, target].mean().item() for head in range(4)]
    assert max(back) > 0.5
    assert max(found) > 0.5


def test_the_trained_toy_is_small_and_attention_only(built: dict[str, Toy]) -> None:
    toy = built["trained"]
    assert WEIGHTS.stat().st_size < 1_000_000
    assert toy.model.cfg.attn_only
    assert dict(toy.truth) == {} and toy.heads == ()
    assert repr(toy) == "Toy trained: 2 layers of 4 heads, 32 pairs, true circuit unknown"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_toy", ROOT / "scripts" / "train_toy.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_trains_reproducibly_and_leaves_the_mlps_at_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, threads = script(), torch.get_num_threads()
    monkeypatch.setattr(train, "STEPS", 3)
    try:
        train.main(tmp_path / "a" / "once.safetensors")
        train.main(tmp_path / "again.safetensors")
    finally:
        torch.set_num_threads(threads)
    written = (tmp_path / "a" / "once.safetensors").read_bytes()
    assert written == (tmp_path / "again.safetensors").read_bytes()
    assert "step     0  loss 4." in capsys.readouterr().out
    monkeypatch.setattr(TRAINED, "WEIGHTS", tmp_path / "again.safetensors")
    assert toys.trained(n=2).model.cfg.attn_only


def test_the_training_prompts_count_only_what_can_be_known() -> None:
    tokens, known = script().rounds(torch.Generator().manual_seed(0), 50, 64)
    for row, counts in zip(tokens, known, strict=True):
        assert row[0] == 0 and row[1:].min() >= 2
        for place in range(1, len(row) - 1):
            earlier = (row[:place] == row[place]).nonzero()
            assert bool(counts[place]) == bool(len(earlier))
            if len(earlier):
                assert row[int(earlier[-1]) + 1] == row[place + 1]


# -- by name, and as values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", toys.NAMES)
def test_load_takes_toys_by_name(name: str) -> None:
    model = mi.load(f"toy:{name}")
    assert model.name == f"toy:{name}"
    assert f"toy:{name}" in repr(model)
    assert set(toys.describe()) == set(toys.NAMES)


def test_toys_can_be_had_in_double_precision(built: dict[str, Toy]) -> None:
    toy = built["gqa_induction"]
    exact = mi.load("toy:gqa_induction", dtype=torch.float64)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact(toy.task.clean).float(), toy.model(toy.task.clean), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", toys.NAMES)
def test_each_call_makes_a_toy_of_its_own_and_draws_from_nobody(name: str) -> None:
    before = torch.get_rng_state()
    one, other = toys.build(name), toys.build(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.model.hf is not other.model.hf
    assert torch.equal(one.task.clean, other.task.clean)
    for a, b in zip(one.model.hf.state_dict().values(), other.model.hf.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", (toys.induction, toys.gqa_induction, toys.copy, toys.trained))
def test_a_seed_decides_the_prompts_and_n_how_many(make: type) -> None:
    a, b, c = make(n=5, seed=1), make(n=5, seed=1), make(n=5, seed=2)
    assert len(a.task) == 5 and a.task.provenance["seed"] == 1
    assert torch.equal(a.task.clean, b.task.clean)
    assert not torch.equal(a.task.clean, c.task.clean)
    with pytest.raises(TaskError) as caught:
        make(n=0)
    assert str(caught.value) == "a toy was asked for 0 pairs: n is at least 1."


@pytest.mark.parametrize("name", ("induction", "gqa_induction"))
def test_the_hand_set_induction_does_the_general_task(built: dict[str, Toy], name: str) -> None:
    toy = built[name]
    for corruption in ("key", "value", "query"):
        task = mi.tasks.induction(toy.model.tokenizer, n=40, seed=0, length=12, repeat=5, corruption=corruption)
        with torch.no_grad():
            logits = gather_answer_logits(toy.model(task.clean), task)
        assert accuracy(logits, task).mean() == 1.0


@pytest.mark.parametrize("name", toys.NAMES)
def test_the_tokenizer_spells_the_prompts(built: dict[str, Toy], name: str) -> None:
    toy = built[name]
    assert toy.task.texts is not None
    assert torch.equal(toy.model.tokens(list(toy.task.texts)), toy.task.clean)


def test_the_truth_cannot_be_changed(built: dict[str, Toy]) -> None:
    with pytest.raises(TypeError):
        built["copy"].truth["resample"] = None  # type: ignore[index]


@pytest.mark.parametrize("name", toys.NAMES)
def test_a_toy_shows_itself(built: dict[str, Toy], name: str) -> None:
    toy = built[name]
    html = toy._repr_html_()
    assert repr(toy) in html and toy.description in html
    for circuit in toy.truth.values():
        assert all(str(edge).replace("<", "&lt;").replace(">", "&gt;") in html for edge in circuit)


def test_an_unknown_toy() -> None:
    with pytest.raises(ModelError) as caught:
        mi.load("toy:inductoin")
    assert str(caught.value) == "there is no toy 'inductoin'. Did you mean 'induction' or 'gqa_induction'?"


def test_weights_that_are_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    def message(path: Path) -> str:
        monkeypatch.setattr(TRAINED, "WEIGHTS", path)
        with pytest.raises(FileFormatError) as caught:
            toys.trained()
        return str(caught.value)

    missing, broken, other, partial = (tmp_path / f"{name}.safetensors" for name in ("missing", "broken", "other", "part"))
    broken.write_bytes(b"not safetensors")
    save_file({"x": torch.zeros(1)}, other)
    weights = load_file(WEIGHTS)
    del weights["lm_head.weight"]
    save_file(weights, partial, metadata={"mechinterp": '{"format": "mechinterp-toy", "version": 1}'})
    assert message(missing).startswith(f"cannot read the weights of the trained toy from {missing} (")
    assert message(broken).startswith(f"cannot read the weights of the trained toy from {broken} (")
    assert message(broken).endswith("). Run: make toys")
    assert message(other) == f"{other} is not a toy of version 1. Run: make toys"
    assert message(partial) == f"{partial} does not fit the trained toy: lm_head.weight. Run: make toys"
