"""The logit lens against plain Hugging Face, layer by layer, and what it keeps in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mechinterp as mi
from mechinterp.errors import ModelError, SelectorError, SiteError, TaskError
from tests.lens.conftest import Pair, error

# transformer_lens computes their final norm itself, in another order of the same operations.
NORMED_BY_THE_BRIDGE = {"GPT-2", "GPT-J", "GPT-Neo", "Bloom", "Falcon (7B)", "Falcon (40B)", "Falcon (RW)", "Cohere"}
ALL = torch.arange(61).expand(3, -1)


# -- identities ------------------------------------------------------------------------------------


def test_the_last_layer_is_the_model(every: Pair, tokens: Tensor) -> None:
    reading = mi.logit_lens(every.model, tokens, targets=ALL)
    assert reading.logits is not None
    with torch.no_grad():
        logits = every.model(tokens)
    if every.name in NORMED_BY_THE_BRIDGE:
        assert error(reading.logits[-1], logits) < 1e-6
    else:
        assert torch.equal(reading.logits[-1], logits)
        assert torch.equal(reading.log_probs[-1], logits.log_softmax(-1))
    assert not reading.kl[-1].any()
    assert error(reading.logits[-1], every.logits(tokens)) < 5e-6
    # And no other layer is.
    assert bool((reading.kl[:-1] > 1e-4).all())


def test_the_identity_lens_is_the_logit_lens(shape: Pair, tokens: Tensor) -> None:
    lens = mi.TunedLens.identity(shape.model)
    one, other = (mi.logit_lens(shape.model, tokens, targets=ALL, lens=each) for each in (None, lens))
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.kl, other.kl)


def test_chunks_and_prompts_one_by_one(shape: Pair, tokens: Tensor) -> None:
    whole = mi.logit_lens(shape.model, tokens, targets=ALL)
    chunked = mi.logit_lens(shape.model, tokens, targets=ALL, memory=4 * 61 * 6 * 2)
    alone = [mi.logit_lens(shape.model, row[None], targets=ALL[:1]) for row in tokens]
    for name in ("logits", "log_probs", "entropy", "kl", "top_log_probs"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(
            torch.cat([getattr(each, name) for each in alone], dim=1), getattr(whole, name), rtol=1e-5, atol=2e-5
        )
    assert torch.equal(chunked.top, whole.top)


def test_padding_changes_nothing(shape: Pair, tokens: Tensor) -> None:
    rows = [tokens[0], tokens[1, :4], tokens[2, :6]]
    padded = mi.logit_lens(shape.model, rows, top_k=3)
    for i, row in enumerate(rows):
        alone = mi.logit_lens(shape.model, row, top_k=3)
        torch.testing.assert_close(padded.entropy[:, i, : len(row)], alone.entropy[:, 0], rtol=1e-5, atol=1e-5)
        assert torch.equal(padded.top[:, i, : len(row)], alone.top[:, 0])
        assert bool(padded.entropy[:, i, len(row) :].isnan().all())
        assert bool((padded.tokens[i, len(row) :] == -1).all())
    last = mi.logit_lens(shape.model, rows, pos=-1)
    assert last.tokens[:, 0].tolist() == [int(row[-1]) for row in rows]
    torch.testing.assert_close(last.kl[:, 1, 0], padded.kl[:, 1, 3])


# -- outside oracles -------------------------------------------------------------------------------


def test_every_layer_by_hand(shape: Pair, tokens: Tensor) -> None:
    """Blocks of the plain module, its norm and its head; probabilities and ranks by sorting."""
    reading = mi.logit_lens(shape.model, tokens, at="L0.resid_pre | L*.resid_post", targets=ALL, top_k=4)
    streams = shape.streams(tokens)
    final = shape.logits(tokens).softmax(-1)
    assert reading.sites == ("L0.resid_pre", "L0.resid_post", "L1.resid_post", "L2.resid_post", "L3.resid_post")
    for i, stream in enumerate(streams):
        logits = shape.unembed(stream)
        probs = logits.softmax(-1)
        assert error(reading.logits[i], logits) < 1e-5
        assert error(reading.entropy[i], -(probs * probs.log()).sum(-1)) < 1e-5
        assert error(reading.kl[i], (final * (final.log() - probs.log())).sum(-1)) < 1e-4 or i == len(streams) - 1
        order = probs.argsort(dim=-1, descending=True)
        assert torch.equal(reading.top[i], order[..., :4])
        assert torch.equal(reading.ranks[i], order.argsort(dim=-1))
        assert error(reading.top_log_probs[i].exp(), probs.gather(-1, order[..., :4])) < 1e-5


def test_transformer_lens_agrees(pair: Callable[[str], Pair], tokens: Tensor) -> None:
    """Its accumulated residual on folded and centred weights, which shift logits by a constant at each position."""
    import copy

    from transformer_lens.model_bridge.sources import build_bridge_from_module

    gpt2 = pair("GPT-2")
    plain = copy.deepcopy(gpt2.plain)
    bridge: Any = build_bridge_from_module(plain, "GPT2LMHeadModel", hf_config=plain.config)
    bridge.enable_compatibility_mode(disable_warnings=True)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        stack = cache.accumulated_resid(layer=None, apply_ln=True)
        wanted = (stack @ bridge.W_U + bridge.b_U).log_softmax(-1)
    found = mi.logit_lens(gpt2.model, tokens, at="L*.resid_pre | L3.resid_post", targets=ALL).log_probs
    assert found is not None
    assert len(found) == len(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "GPT-NeoX (Pythia)", "Gemma 2", "OLMo 2", "Phi", "Cohere", "Bloom"])
def test_contributions_sum_to_the_logits(name: str, pair: Callable[[str], Pair], tokens: Tensor) -> None:
    """With the biases of norm and unembedding, by hand from the plain module, before its cap."""
    each = pair(name)
    embeddings = "embed | pos_embed" if "pos_embed" in each.model.sites else "embed"
    if name in ("Gemma 2", "Bloom"):
        # Scaled, or normed, before the first block reads it: that is what is added.
        embeddings = "L0.resid_pre"
    parts = [mi.logit_lens(each.model, tokens, at=at, targets=ALL).logits for at in ("L*.attn_out | L*.mlp_out",)]
    total = parts[0].sum(0)
    norm, head = each.module(each.paths.norm), each.plain.get_output_embeddings()
    last = each.streams(tokens)[-1]
    zero = torch.zeros_like(last)
    with torch.no_grad():
        # Scale held: what the norm does to the embedding when it is told the last stream's scale.
        ratio = _unscaled(norm, last)
        first = each.streams(tokens)[0]
        read = head(norm(zero) + (_centred(norm, first)) * ratio) * (getattr(each.plain.config, "logit_scale", None) or 1.0)
        uncapped = head(norm(last)) * (getattr(each.plain.config, "logit_scale", None) or 1.0)
    assert error(total + read, uncapped) < 1e-4
    if embeddings != "L0.resid_pre":
        found = mi.logit_lens(each.model, tokens, at=embeddings, targets=ALL).logits.sum(0)
        with torch.no_grad():
            biases = head(norm(zero)) * (getattr(each.plain.config, "logit_scale", None) or 1.0)
        assert error(found + biases + total, uncapped) < 1e-4


def _centred(norm: Any, value: Tensor) -> Tensor:
    return value - value.mean(-1, keepdim=True) if "LayerNorm" in type(norm).__name__ else value


def _unscaled(norm: Any, last: Tensor) -> Tensor:
    """Weight times scale, coordinate by coordinate: what the norm multiplies each coordinate of the last stream by."""
    return (norm(last) - norm(torch.zeros_like(last))) / _centred(norm, last)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2", "OLMo 2"])
def test_heads_sum_to_attention(name: str, pair: Callable[[str], Pair], tokens: Tensor) -> None:
    model = pair(name).model
    heads = mi.logit_lens(model, tokens, at="L2.H*.head_out", targets=ALL).logits.sum(0)
    attention = mi.logit_lens(model, tokens, at="L2.attn_out", targets=ALL).logits[0]
    bias = mi.logit_lens(model, tokens, at="L2.attn_out", targets=ALL).logits[0] - heads
    if name == "GPT-2":
        # Its output bias is nobody's: the same vector everywhere, read with the scale of each position.
        assert error(heads, attention) > 1e-2
        ranks = torch.linalg.matrix_rank(bias.flatten(0, 1).double(), rtol=1e-3)
        assert int(ranks) == 1
    else:
        assert error(heads, attention) < 1e-5


# -- a planted answer ------------------------------------------------------------------------------


def test_the_induction_head_says_the_answer() -> None:
    toy = mi.toys.induction(n=6)
    heads = mi.logit_lens(toy.model, toy.task, at="L*.H*.head_out", pos=-1)
    right = toy.task.right[:, 0]
    confident = {site: float(heads.top_log_probs[i, :, 0, 0].exp().mean()) for i, site in enumerate(heads.sites)}
    assert max(confident, key=lambda site: confident[site]) == "L1.H5.head_out"
    assert torch.equal(heads.top[heads.row("L1.H5.head_out"), :, 0, 0], right)
    stream = mi.logit_lens(toy.model, toy.task, at="L0.resid_pre | L*.resid_post", pos=-1)
    # Right answers come first among the targets of a task.
    assert stream.targets[:, 0].tolist() == right.tolist()
    assert stream.ranks[-1, :, 0, 0].tolist() == [0] * 6
    assert stream.settled.flatten().tolist() == [2] * 6
    assert repr(stream) == (
        "LensReading: logit lens of toy:induction at 3 sites, 6 prompts, 1 position; "
        "the model's own token is the likeliest from L1.resid_post on (median)"
    )
    assert re.fullmatch(
        r"LensReading: logit lens of toy:induction at 16 sites, 6 prompts, 1 position; "
        r"the most certain is L1\.H5\.head_out, '\w+' at [01]\.\d\d",
        repr(heads),
    )


# -- memory ----------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor):
                self.size = max(self.size, each.numel())
        return out


@pytest.mark.parametrize("at", ["L*.resid_post", "L*.H*.head_out"])
def test_the_logits_of_all_positions_are_never_there(at: str, tiny_gpt2: Callable[..., Any]) -> None:
    model = tiny_gpt2(n_layers=3, d_vocab=5000)
    tokens = torch.randint(0, 5000, (4, 16), generator=torch.Generator().manual_seed(0))
    rows = 3
    with Largest() as seen:
        reading = mi.logit_lens(model, tokens, at=at, targets=[1, 2, 3, 4], memory=rows * 6 * 4 * 5000)
    # The unembedding itself, or the logits of one chunk of positions: not [pos vocab] of one prompt, even less of all sites.
    assert seen.size <= 5000 * 32
    assert len(reading.sites) * 64 * 5000 > seen.size
    with Largest() as seen:
        mi.logit_lens(model, tokens, at=at)
    # Without a limit one chunk holds all positions of one site, never of two.
    assert seen.size == max(64 * 5000, 5000 * 32)


# -- what is asked ---------------------------------------------------------------------------------


def test_positions_and_targets(pair: Callable[[str], Pair], task: mi.Task) -> None:
    model = pair("GPT-2").model
    whole = mi.logit_lens(model, task)
    assert whole.targets.tolist() == [[3, 9, 8], [27, -1, 5], [40, -1, 33]]
    assert bool(whole.log_probs[:, 1:, :, 1].isnan().all())
    assert bool((whole.ranks[:, 1:, :, 1] == -1).all())
    assert not whole.log_probs[:, 0].isnan().any()
    some = mi.logit_lens(model, task, pos=["middle", -1, 0], targets=torch.tensor([4, 5, 6]))
    assert some.pos == ("middle", -1, 0)
    for i, middle in enumerate([2, 3, 1]):
        torch.testing.assert_close(some.kl[:, i], whole.kl[:, i, [middle, 6, 0]])
    assert some.log_probs.shape == (4, 3, 3, 1)


def test_tables(pair: Callable[[str], Pair], task: mi.Task) -> None:
    reading = mi.logit_lens(pair("GPT-2").model, task, pos=[-1], at="L1,3.resid_post")
    frame = reading.to_frame()
    assert list(frame.columns) == [
        "site", "example", "pos", "token", "top", "prob", "entropy", "kl",
        "target0", "log_prob0", "rank0", "target1", "log_prob1", "rank1", "target2", "log_prob2", "rank2",
    ]  # fmt: skip
    assert frame[["site", "example"]].to_numpy().tolist() == [
        [site, i] for site in ("L1.resid_post", "L3.resid_post") for i in range(3)
    ]
    assert frame["kl"].tolist() == reading.kl.flatten().tolist()
    assert frame["rank2"].tolist() == reading.ranks[..., 2].flatten().tolist()
    assert frame["token"].tolist()[0] == f"<{int(task.clean[0, -1])}>"
    # Padding is no row.
    padded = mi.logit_lens(pair("GPT-2").model, [[1, 2, 3], [4, 5]], at="L0.resid_post").to_frame()
    assert padded[["example", "pos"]].to_numpy().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]


MESSAGES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "neuron": (
        {"at": "L0.mlp_post"},
        SiteError,
        "L0.mlp_post is no vector of the residual stream: a lens reads resid_pre, resid_mid, resid_post, and what is added to "
        "them: embed, pos_embed, attn_out, mlp_out, head_out",
    ),
    "both": (
        {"at": "L0.mlp_out | L0.resid_post"},
        SelectorError,
        "streams and contributions are read in different ways; ask for them one after the other",
    ),
    "position in the site": (
        {"at": "L0.resid_post[2]"},
        SelectorError,
        "L0.resid_post[2] is a part of a vector or a position; a lens reads L0.resid_post, with pos= for positions",
    ),
    "all heads": (
        {"at": "L2.head_out"},
        SelectorError,
        "L2.head_out is all heads: write 'L2.H*.head_out' for each, or 'attn_out' for their sum",
    ),
    "position": ({"pos": 7}, SelectorError, "pos=7: prompt 0 has 7 tokens, and no position 7"),
    "no position": ({"pos": []}, SelectorError, "pos=[] asks for no position; leave it out for all of them"),
    "name": ({"pos": "midle"}, SelectorError, "there is no position named 'midle'. Did you mean 'middle'?"),
    "top_k": ({"top_k": 0}, SelectorError, "top_k=0: GPT-2 has 61 tokens; ask for 1 or more of them"),
    "targets": (
        {"targets": [1, 2]},
        TaskError,
        "targets of shape [2] for 3 prompts: give token ids [batch] or [batch k], or the texts of tokens that are asked of every "
        "prompt",
    ),
    "a number": (
        {"targets": 5},
        TaskError,
        "targets of shape [] for 3 prompts: give token ids [batch] or [batch k], or the texts of tokens that are asked of every "
        "prompt",
    ),
    "ids and texts": (
        {"targets": ["a", 1, 2]},
        TaskError,
        "targets=['a', 1, 2]: give token ids [batch] or [batch k] (-1 fills rows that have fewer), or texts of tokens, not both",
    ),
    "rows of unequal length": (
        {"targets": [[1, 2], [3], [4]]},
        TaskError,
        "targets=[[1, 2], [3], [4]]: give token ids [batch] or [batch k] (-1 fills rows that have fewer), or texts of tokens, "
        "not both",
    ),
    "ids": (
        {"targets": [1, 2, 61]},
        TaskError,
        "targets reach from 1 to 61, but GPT-2 knows the tokens 0 to 60 (and -1 fills rows that have fewer)",
    ),
    "texts": (
        {"targets": " Mary"},
        TaskError,
        "GPT-2 has no tokenizer, so targets cannot be texts: give token ids [batch] or [batch k]",
    ),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case: str, pair: Callable[[str], Pair], task: mi.Task) -> None:
    options, kind, message = MESSAGES[case]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        mi.logit_lens(pair("GPT-2").model, task, **options)


def test_texts_are_single_tokens() -> None:
    toy = mi.toys.memory()
    reading = mi.logit_lens(toy.model, toy.task, targets=["paris", "rome"], pos=-1)
    paris, rome = (toy.model.tokenizer(each, add_special_tokens=False)["input_ids"][0] for each in ("paris", "rome"))
    assert reading.targets[0].tolist() == [paris, rome]
    with pytest.raises(TaskError, match=r"^targets: 'paris rome' is 2 tokens \('paris', 'rome'\); name one of them \(most words"):
        mi.logit_lens(toy.model, toy.task, targets="paris rome")


def test_streams_that_are_no_sum(pair: Callable[[str], Pair], tokens: Tensor) -> None:
    each = pair("OPT-350M (norm after)")
    with pytest.raises(
        ModelError, match=r"^the residual stream of OPT-350M \(norm after\) is not the sum of what its heads and MLPs write: "
    ):
        mi.logit_lens(each.model, tokens, at="L*.H*.head_out")


def test_a_site_that_was_not_read(pair: Callable[[str], Pair], tokens: Tensor) -> None:
    reading = mi.logit_lens(pair("GPT-2").model, tokens)
    with pytest.raises(SelectorError, match=r"^the lens did not read 'L9.resid_post'. Did you mean 'L3.resid_post'"):
        reading.row("L9.resid_post")
