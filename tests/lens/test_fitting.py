"""Fitting a tuned lens: never worse than the logit lens, a planted translation is found, an interrupted fit ends the same."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.errors import FileFormatError, SelectorError, TaskError
from mechinterp.lens.fitting import _Fit
from tests.lens.conftest import Pair

PROMPTS = torch.randint(0, 61, (12, 9), generator=torch.Generator().manual_seed(3))
SHORT: dict[str, Any] = {"seed": 0, "steps": 6, "positions": 40, "check_every": 2}


def test_never_worse_than_the_logit_lens(shape: Pair) -> None:
    before = copy.deepcopy(shape.plain.state_dict())
    lens = mi.fit_tuned_lens(shape.model, PROMPTS, seed=0, steps=20, positions=90, check_every=5, lr=1e-2)
    told = lens.provenance
    assert all(a <= b for a, b in zip(told["held_out_kl"], told["held_out_kl_logit_lens"], strict=True))
    # A good part of it is gained, not nothing.
    assert sum(told["held_out_kl"]) < 0.95 * sum(told["held_out_kl_logit_lens"])
    assert not any(parameter.grad is not None for parameter in shape.model.hf.parameters())
    for name, value in shape.plain.state_dict().items():
        assert torch.equal(value, before[name])
    # The numbers that it reports are those of the lens that it gives.
    held_out = PROMPTS[torch.randperm(12, generator=torch.Generator().manual_seed(0))[:2]]
    for given, key in ((None, "held_out_kl_logit_lens"), (lens, "held_out_kl")):
        reading = mi.logit_lens(shape.model, held_out, at="L*.resid_pre", lens=given)
        torch.testing.assert_close(reading.kl.double().mean((1, 2)), torch.tensor(told[key]).double(), rtol=1e-4, atol=1e-4)


def test_far_too_large_steps_leave_the_logit_lens(pair: Callable[[str], Pair]) -> None:
    lens = mi.fit_tuned_lens(pair("Llama").model, PROMPTS, **SHORT, lr=1e4)
    assert not lens.weight.any()
    assert not lens.bias.any()
    assert lens.provenance["best_step"] == [0] * 4
    assert lens.provenance["held_out_kl"] == lens.provenance["held_out_kl_logit_lens"]


def test_a_planted_translation(tiny_gpt2: Callable[..., Any]) -> None:
    """The last block adds one constant vector and nothing else, so the true translator is a bias."""
    model = tiny_gpt2(n_layers=2, seed=4)
    last = model.hf.transformer.h[1]
    constant = 2.0 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for each in (last.attn.c_proj, last.mlp.c_proj):
            each.weight.zero_()
            each.bias.zero_()
        last.mlp.c_proj.bias.copy_(constant)
    lens = mi.fit_tuned_lens(model, PROMPTS, seed=0, steps=100, positions=90, check_every=20, layers=[1], lr=3e-2)
    (after,), (before,) = (lens.provenance[key] for key in ("held_out_kl", "held_out_kl_logit_lens"))
    assert before > 0.1
    assert after < 0.1 * before
    # And what it adds points there.
    stream = mi.run(model, PROMPTS, capture="L1.resid_pre")["L1.resid_pre"]
    moved = (lens.translate("L1.resid_pre", stream) - stream).flatten(0, 1)
    centred = constant - constant.mean()
    assert float(torch.cosine_similarity(moved - moved.mean(-1, keepdim=True), centred, dim=-1).mean()) > 0.6
    # Layers that were not asked for keep the identity, and are no part of the mean that it tells.
    assert not lens.weight[0].any()
    told = f"; held-out KL to the final logits {after:.2f} nats, {before:.2f} through the logit lens"
    assert repr(lens).endswith(told + " (means over the 1 fitted layers)")


def test_the_first_step_by_hand(shape: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient at the identity, against autograd through the plain module's own norm and head, with torch's KL."""
    seen: list[dict[str, Tensor]] = []
    adam = _Fit._adam
    monkeypatch.setattr(_Fit, "_adam", lambda self, gradients: (seen.append(dict(gradients)), adam(self, gradients))[1])
    fits: list[_Fit] = []
    advance = _Fit.advance
    monkeypatch.setattr(_Fit, "advance", lambda self: (fits.append(self), advance(self))[1])
    mi.fit_tuned_lens(shape.model, PROMPTS, seed=0, steps=1, positions=20)
    (found,), fit = seen, fits[0]
    rows = fit.data.batch(0, 20)
    streams = [torch.cat([stream[row, where] for row, where in rows]) for stream in shape.streams(PROMPTS)]
    assert [len(stream) for stream in streams] == [20] * 5
    final = shape.unembed(streams[-1]).log_softmax(-1)
    for layer in range(4):
        scale = streams[layer].pow(2).mean(0).sqrt()
        a, b = torch.zeros(32, 32, requires_grad=True), torch.zeros(32, requires_grad=True)
        moved = streams[layer] + scale * (streams[layer] / scale @ a.T + b)
        norm, head = shape.module(shape.paths.norm), shape.plain.get_output_embeddings()
        logits = head(norm(moved))
        cap = getattr(shape.plain.config, "final_logit_softcapping", None)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        loss = torch.nn.functional.kl_div(logits.log_softmax(-1), final, reduction="batchmean", log_target=True)
        for name, wanted in zip(("A", "b"), torch.autograd.grad(loss, [a, b]), strict=True):
            torch.testing.assert_close(found[name][layer], wanted, rtol=1e-3, atol=1e-5)
    # Chunks of positions give the same.
    fit.chunk, fit.step = 3, 0
    for name in ("A", "b"):
        fit.state[name].zero_()
    fit.advance()
    for name in ("A", "b"):
        torch.testing.assert_close(seen[1][name], found[name], rtol=1e-3, atol=1e-5)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("at", ["advance", "check"])
def test_an_interrupted_fit_ends_the_same(
    at: str, pair: Callable[[str], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = pair("Llama").model, tmp_path / "fit.safetensors"
    whole = mi.fit_tuned_lens(model, PROMPTS, **SHORT)
    method, calls = getattr(_Fit, at), []

    def stopping(self: _Fit) -> None:
        calls.append(self.step)
        if self.step == 4:
            raise StoppedError
        method(self)

    with monkeypatch.context() as patch:
        patch.setattr(_Fit, at, stopping)
        with pytest.raises(StoppedError):
            mi.fit_tuned_lens(model, PROMPTS, **SHORT, resume=file)
    assert calls[-1] == 4
    again = mi.fit_tuned_lens(model, PROMPTS, **SHORT, resume=file)
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.bias, whole.bias)
    assert again.provenance == whole.provenance
    # What is done is not done again.
    with monkeypatch.context() as patch:
        patch.setattr(_Fit, "advance", stopping)
        patch.setattr(_Fit, "check", stopping)
        calls.clear()
        assert torch.equal(mi.fit_tuned_lens(model, PROMPTS, **SHORT, resume=file).weight, whole.weight)
    assert not calls
    message = f"{file} holds another fit (model, prompts or settings differ); give another file to resume="
    with pytest.raises(FileFormatError, match=f"^{re.escape(message)}$"):
        mi.fit_tuned_lens(model, PROMPTS, **{**SHORT, "seed": 1}, resume=file)
    file.write_text("no")
    with pytest.raises(FileFormatError, match=f"^{re.escape(str(file))} is no unfinished tuned lens "):
        mi.fit_tuned_lens(model, PROMPTS, **SHORT, resume=file)


def test_seeds_and_padding(pair: Callable[[str], Pair]) -> None:
    model = pair("Llama").model
    one, other = (mi.fit_tuned_lens(model, PROMPTS, **{**SHORT, "seed": seed}) for seed in (0, 1))
    assert torch.equal(one.weight, mi.fit_tuned_lens(model, PROMPTS, **SHORT).weight)
    assert not torch.equal(one.weight, other.weight)
    assert one.provenance["seed"] == 0
    # Padded positions are never drawn: what stands there makes no difference.
    rows = [row[: 4 + i % 5] for i, row in enumerate(PROMPTS)]
    mask = torch.arange(9) < torch.tensor([len(row) for row in rows])[:, None]
    task = mi.Task(
        name="t", clean=PROMPTS.where(mask, 0), corrupt=PROMPTS.where(mask, 0), right=[1] * 12, wrong=[2] * 12, mask=mask
    )
    listed, padded = (mi.fit_tuned_lens(model, each, **SHORT) for each in (rows, task))
    torch.testing.assert_close(listed.weight, padded.weight, rtol=1e-3, atol=1e-6)


MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 0}, "steps=0: give 1 or more"),
    "no rate": ({"lr": -1e-3}, "lr=-0.001: give a rate above 0"),
    "no number": ({"lr": float("nan")}, "lr=nan: give a rate above 0"),
    "held out": ({"held_out": 1.0}, "held_out=1.0 is the share of prompts to hold out, between 0 and 1"),
    "layers": ({"layers": [4]}, "layers=[4]: give one or more of the layers 0 to 3 of Llama"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case: str, pair: Callable[[str], Pair]) -> None:
    options, message = MESSAGES[case]
    with pytest.raises(SelectorError, match=f"^{re.escape(message)}$"):
        mi.fit_tuned_lens(pair("Llama").model, PROMPTS, seed=0, **options)


def test_one_prompt_is_too_few(pair: Callable[[str], Pair]) -> None:
    message = "a tuned lens is judged on prompts that it was not fitted on: give at least 2, better hundreds"
    with pytest.raises(TaskError, match=f"^{message}$"):
        mi.fit_tuned_lens(pair("Llama").model, PROMPTS[0], seed=0)
