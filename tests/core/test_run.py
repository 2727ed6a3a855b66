"""One forward pass: identities, captures, what a cache gives and refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.edits import Edit
from mechinterp.core.run import Prompts, tokens_of
from mechinterp.core.sites import KINDS, Site
from mechinterp.errors import EditError, SelectorError, SiteError


@dataclass
class Task:
    """What the core needs of a task."""

    clean: Tensor
    positions: dict[str, Tensor] = field(default_factory=dict)


def test_without_edits_it_is_the_model(twins: Any, tokens: Tensor) -> None:
    found = mi.run(twins.model, tokens)
    assert torch.equal(found.logits, twins.model(tokens))
    assert found.tokens is tokens
    assert found.edits == ()
    assert len(found.cache) == 0


def test_captures_change_no_bit(twins: Any, tokens: Tensor) -> None:
    every = mi.Selection(tuple(Site(name, 1 if KINDS[name].per_layer else None) for name in twins.model.sites))
    assert torch.equal(mi.run(twins.model, tokens, capture=every).logits, mi.run(twins.model, tokens).logits)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_putting_a_whole_run_back_changes_no_bit(twins_of: Callable[..., Any], tokens: Tensor, architecture: str) -> None:
    """Every captured site of every layer at once, head by head where there are heads."""
    model = twins_of(architecture).model
    base = mi.run(model, tokens, capture="embed | L*.resid_mid | L*.H*.z | L*.KV*.k | L*.mlp_out | L*.H*.q_in | final_norm")
    for site in base.cache:
        assert torch.equal(mi.run(model, tokens, edits=[mi.Replace(site, base[site])]).logits, base.logits)
    edits = [mi.Replace(site, base[site]) for site in base.cache]
    assert torch.equal(mi.run(model, tokens, edits=edits).logits, base.logits)


@pytest.mark.parametrize(
    "where", ["L0.H1.z", "L1.resid_mid", "L0.H2.q_in[-2]", "L1.H0.head_out", "L0.mlp_in", "L0.N3.mlp_post[2]"]
)
def test_a_batch_is_its_prompts_one_by_one(twins: Any, tokens: Tensor, where: str) -> None:
    """As many different patches as rows, in one forward pass or in several. Largest difference seen: 2e-6."""
    if where == "L1.resid_mid" and twins.architecture == "neox":
        return
    model = twins.model
    other = mi.run(model, tokens.flip(0).roll(1, 1), capture=where)
    value = other[next(iter(other.cache))]
    together = mi.run(model, tokens, edits=[mi.Replace(where, value[i : i + 1], rows=(i, i + 1)) for i in range(3)]).logits
    whole = mi.run(model, tokens, edits=[mi.Replace(where, value)]).logits
    assert torch.equal(together, whole)
    for i in range(3):
        alone = mi.run(model, tokens[i : i + 1], edits=[mi.Replace(where, value[i : i + 1])]).logits
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=1e-5)


def test_edits_of_some_rows_leave_the_others_their_bits(gpt2: Any, tokens: Tensor) -> None:
    base = mi.run(gpt2, tokens).logits
    for where in ("L0.H1.z", "L0.resid_mid", "L0.H2.q_in", "L0.head_out", "logits", "pos_embed"):
        found = mi.run(gpt2, tokens, edits=[mi.Scale(where, 3.0, rows=(1, 2))]).logits
        assert torch.equal(found[[0, 2]], base[[0, 2]])
        assert not torch.allclose(found[1], base[1])


def test_captures_are_what_the_model_went_on_with(gpt2: Any, tokens: Tensor) -> None:
    found = mi.run(gpt2, tokens, edits=[mi.Zero("L0.H1.z[2]")], capture="L0.z | L0.head_out | L0.resid_mid | L0.mlp_in")
    assert float(found["L0.H1.z[2]"].abs().max()) == 0
    assert float(found["L0.H1.head_out[2]"].abs().max()) == 0
    assert float(found["L0.H0.z[2]"].abs().min()) > 0
    assert torch.equal(found["L0.resid_mid"], found["L0.mlp_in"])


def test_captures_are_not_changed_by_later_edits(gpt2: Any, tokens: Tensor) -> None:
    base = mi.run(gpt2, tokens, capture="L0.resid_post | L1.resid_pre")
    kept = base["L0.resid_post"].clone()

    def spoil(value: Tensor, site: Site) -> None:
        value.fill_(7)

    found = mi.run(gpt2, tokens, edits=[mi.Call("L1.resid_pre", spoil)], capture="L0.resid_post | L1.resid_pre")
    assert torch.equal(found["L0.resid_post"], kept)
    assert float(found["L1.resid_pre"].unique()) == 7


@pytest.mark.parametrize("where", ["L0.z", "L1.k", "L0.resid_post", "L0.mlp_post", "L1.pattern", "logits"])
def test_gradients_of_captures(twins: Any, tokens: Tensor, where: str) -> None:
    """Against the gradient at a leaf that is added there."""
    site = mi.select(where, twins.model.cfg).sites[0]
    on = mi.run(twins.model, tokens, capture=where, grad=True)
    (found,) = torch.autograd.grad(on.logits[:, -1, 0].sum(), on[where])
    leaf = torch.zeros_like(found, requires_grad=True)
    registry = mi.HookRegistry(twins.model)
    registry.transform(site, lambda value: value + leaf)
    with registry:
        (wanted,) = torch.autograd.grad(twins.model(tokens)[:, -1, 0].sum(), leaf)
    assert float(wanted.abs().max()) > 0
    torch.testing.assert_close(found, wanted)


def test_gradients_are_off_unless_asked_for(gpt2: Any, tokens: Tensor) -> None:
    off = mi.run(gpt2, tokens, capture="L0.z")
    assert not off.logits.requires_grad
    assert not off["L0.z"].requires_grad
    assert torch.is_grad_enabled()
    with torch.no_grad():
        on = mi.run(gpt2, tokens, capture="L0.z | L0.resid_mid", grad=True)
        assert on.logits.requires_grad
        assert not torch.is_grad_enabled()
    assert torch.equal(on.logits, off.logits)
    # As documented, a computed site is not on the path, and torch says so.
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(on.logits.sum(), on["L0.resid_mid"])


def test_kept_positions(twins: Any, tokens: Tensor) -> None:
    full = mi.run(twins.model, tokens).logits
    for keep in ([-1], [2, 5], list(range(7))):
        found = mi.run(twins.model, tokens, keep=keep, edits=[mi.Scale("L0.mlp_out", 1.0)]).logits
        torch.testing.assert_close(found, full[:, keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"edits": [mi.Zero("logits[0]")]}, "logits[0]"),
        ({"edits": [mi.Zero("embed | logits")]}, "logits"),
        ({"capture": "logits"}, "logits"),
    ],
)
def test_kept_positions_and_the_logits_as_a_site(gpt2: Any, tokens: Tensor, options: Any, name: str) -> None:
    message = f"with keep= the logits have other positions than the prompts; leave out keep= or {name!r}"
    with pytest.raises(SelectorError, match=f"^{re.escape(message)}$"):
        mi.run(gpt2, tokens, keep=[3], **options)


# -- prompts ---------------------------------------------------------------------------------------


def test_prompts(gpt2: Any, tokens: Tensor) -> None:
    task = Task(tokens, {"S": torch.tensor([1, 4, 6])})
    assert isinstance(task, Prompts)
    assert tokens_of(tokens)[0] is tokens
    assert tokens_of(tokens[0])[0].shape == (1, 7)
    assert tokens_of(task)[1] is task.positions
    found = mi.run(gpt2, task, edits=[mi.Zero("L0.H1.z[S]")], capture="L0.z | L0.pattern")
    for row, pos in enumerate([1, 4, 6]):
        assert float(found["L0.H1.z"][row, pos].abs().max()) == 0
        assert torch.equal(found["L0.H2.z[S]"][row], found["L0.z"][row, pos, 2])
        assert torch.equal(found["L0.H2.pattern[S]"][row], found["L0.pattern"][row, 2, pos])
        assert torch.equal(found["L0.N3.z[S]"][row], found["L0.z"][row, pos, :, 3])
    assert torch.equal(mi.run(gpt2, tokens[0]).logits, mi.run(gpt2, tokens[:1]).logits)


# -- the cache -------------------------------------------------------------------------------------


def test_parts_of_an_activation(llama: Any, tokens: Tensor) -> None:
    found = mi.run(llama, tokens, capture="L0.H1.z | L0.k | L1.mlp_post[3] | L0.scores | embed")
    whole = found["L0.z"]
    assert [str(site) for site in found.cache] == ["L0.H1.z", "L0.k", "L1.mlp_post[3]", "L0.scores", "embed"]
    assert len(found.cache) == 5
    # Only what was asked for is listed, but the activation is there whole, once.
    assert torch.equal(found["L0.H1.z"], whole[:, :, 1])
    assert torch.equal(found["L0.H3.z[-1]"], whole[:, -1, 3])
    assert torch.equal(found[Site("z", 0, head=1, pos=2, neuron=5)], whole[:, 2, 1, 5])
    assert torch.equal(found["L0.KV1.k[0]"], found["L0.k"][:, 0, 1])
    assert torch.equal(found["L0.H2.scores[4]"], found["L0.scores"][:, 2, 4])
    assert found["L0.H1.z"].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert "L0.H2.z" in found.cache
    assert "L1.z" not in found.cache
    assert found.cache.bytes == 4 * 3 * 7 * (32 + 16 + 48 + 4 * 7 + 32)
    assert {site: value.shape for site, value in found.cache.items()}[Site("embed")] == (3, 7, 32)


def test_shapes_are_those_of_the_axes(twins: Any, tokens: Tensor) -> None:
    c = twins.model.cfg
    sizes = {"batch": 3, "pos": 7, "q_pos": 7, "k_pos": 7, "head": c.n_heads, "kv_head": c.n_kv_heads, "d_model": c.d_model}
    sizes |= {"d_head": c.d_head, "d_mlp": c.d_mlp, "vocab": c.d_vocab}
    for name in twins.model.sites:
        site = Site(name, 0 if KINDS[name].per_layer else None)
        assert list(mi.run(twins.model, tokens, capture=site)[site].shape) == [sizes[axis] for axis in KINDS[name].axes]


CACHE_REFUSALS = [
    ("L0.mlp_out", SiteError, "L0.mlp_out was not captured. Did you mean 'L1.mlp_out'? Ask for it with capture='L0.mlp_out'"),
    ("L*.H1.z", SiteError, "'L*.H1.z' names 2 activations; ask for one, or loop over the cache"),
    ("L0.z[7]", SelectorError, "L0.z[7]: there is no position 7; the prompts have positions 0 to 6"),
    ("L0.z[S2]", SelectorError, "L0.z[S2]: there is no position named 'S2'. There are none."),
    ("L0.H4.z", SelectorError, "there is no head 4 in 'L0.H4.z': this model has heads 0 to 3"),
    ("L0.zz", SiteError, "in 'L0.zz': there is no site 'zz'. Did you mean 'z'?"),
]


@pytest.mark.parametrize(("key", "error", "message"), CACHE_REFUSALS, ids=[key for key, _, _ in CACHE_REFUSALS])
def test_cache_refuses(gpt2: Any, tokens: Tensor, key: str, error: type[Exception], message: str) -> None:
    found = mi.run(gpt2, tokens, capture="L0.z | L1.mlp_out")
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        found[key]


def test_what_cannot_be_captured(llama: Any, tokens: Tensor) -> None:
    with pytest.raises(SiteError, match=r"^'pos_embed' is refused on tiny-llama: tiny-llama has no position embedding vectors"):
        mi.run(llama, tokens, capture="L0.z | pos_embed")
    with pytest.raises(SelectorError, match="an empty selection selects nothing"):
        mi.run(llama, tokens, capture=mi.Selection(()))


@pytest.mark.usefixtures("unchecked_types")
def test_edits_must_be_edits(gpt2: Any, tokens: Tensor) -> None:
    with pytest.raises(
        EditError, match=r"^'L0.z' says where but not what; pass a function, or an edit such as mi.Zero\('L0.z'\)$"
    ):
        mi.run(gpt2, tokens, edits=["L0.z"])  # type: ignore[list-item]


def test_repr(gpt2: Any, tokens: Tensor) -> None:
    edits: list[Edit] = [mi.Zero("L0.H1.z"), mi.Scale("L1.mlp_out", 0.5)]
    found = mi.run(gpt2, tokens, edits=edits, capture="L0.z | embed")
    assert found.edits == tuple(edits)
    assert repr(found) == "Run: 3 prompts of 7 tokens, 2 edits, 2 activations captured"
    assert repr(mi.run(gpt2, tokens)) == "Run: 3 prompts of 7 tokens, 0 activations captured"
    lines = repr(found.cache).splitlines()
    assert lines[0] == "Cache: 2 activations, 0.0 MiB"
    # In the order in which the model computes them.
    assert lines[1].split() == ["embed", "batch", "pos", "d_model", "3", "x", "7", "x", "32"]
    assert lines[2].split() == ["L0.z", "batch", "pos", "head", "d_head", "3", "x", "7", "x", "4", "x", "8"]
    many = mi.run(gpt2, tokens, capture="L*.z | L*.q | L*.k | L*.v | L*.pattern | L*.mlp_out | L*.mlp_post")
    assert repr(many.cache).splitlines()[-1] == "  ... 2 more"
    page = found.cache._repr_html_()
    assert page.startswith("<b>Cache</b>: 2 activations, 0.0 MiB<table><tr><th>site</th>")
    assert "<td>L0.z</td><td>batch pos head d_head</td><td>3 x 7 x 4 x 8</td>" in page
