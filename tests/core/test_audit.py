"""What is proved of a model's sites, and what a site that lies is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core import places
from mechinterp.core.loading import wrap
from mechinterp.core.sites import KINDS
from mechinterp.errors import SiteError

REFUSED = {"gpt2": [], "llama": ["pos_embed"], "neox": ["pos_embed", "resid_mid"], "gemma2": ["pos_embed"]}


def test_what_is_proved(twins: Any) -> None:
    report = mi.audit(twins.model)
    assert list(report.refused) == REFUSED[twins.architecture]
    assert list(report.proved) == [name for name in KINDS if name not in report.refused]
    assert twins.model.sites == report.proved


def test_identities_hold(twins: Any) -> None:
    largest = mi.audit(twins.model).largest
    expected = ["resid_pre + attn_out + mlp_out - resid_post", "pattern rows - 1"]
    if twins.architecture != "gemma2":
        # There a norm stands between the heads and what is added.
        expected.insert(1, "attn_out - sum of head_out - bias")
    assert list(largest) == expected
    assert max(largest.values()) < 5e-6


def test_made_once_when_loaded(twins: Any) -> None:
    assert twins.model._audit is not None
    assert twins.model.audit is twins.model.audit


def test_leaves_the_model_as_it_was(twins: Any, tokens: Tensor, same_hooks: Any) -> None:
    before = {name: value.clone() for name, value in twins.model.hf.state_dict().items()}
    state = torch.random.get_rng_state()
    with same_hooks(twins.model):
        mi.audit(twins.model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in twins.model.hf.state_dict().items())


def test_repr(twins_of: Callable[..., Any]) -> None:
    report = twins_of("neox").model.audit
    text = repr(report)
    lines = text.splitlines()
    assert lines[0] == "Audit of tiny-neox: 20 sites proved, 2 refused"
    assert lines[1] == "  refused pos_embed: tiny-neox has no position embedding vectors: its positions are rotary"
    assert re.fullmatch(r"  pattern rows - 1: off by at most \d\.\de-\d\d", lines[-1])
    # Shown in notebooks, so what comes from outside is escaped.
    page = replace(report, model="<b>mine</b>")._repr_html_()
    assert "<b>mine" not in page
    assert "Audit of &lt;b&gt;mine&lt;/b&gt;" in page


# -- sites that lie --------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, **parts: Any) -> None:
    """Make one site's place do something else than it says."""
    honest = places.place_of

    def place_of(model: Any, site: Any) -> Any:
        place = honest(model, site)
        if site.name != name:
            return place
        return replace(place, **{key: make(place) for key, make in parts.items()})

    monkeypatch.setattr("mechinterp.core.model.place_of", place_of)


LIES = [
    # An edit that is lost.
    (
        "mlp_out",
        {"write": lambda place: lambda hooked, old, new, kept: hooked},
        "an edit of L0.mlp_out does not reach the logits on GPT2LMHeadModel",
    ),
    # An edit that does something even where nothing is changed. All later sites would repair it.
    (
        "embed",
        {"write": lambda place: lambda hooked, old, new, kept: new * 1.01},
        r"replacing embed by itself changes the logits by \d.\de[+-]\d\d on GPT2LMHeadModel",
    ),
    (
        "z",
        {"read": lambda place: lambda hooked, kept: hooked.flatten(2)},
        r"L0.z has shape \[2, 5, 32\] where the axes are batch pos head d_head",
    ),
    ("mlp_pre", {"read": lambda place: lambda hooked, kept: hooked / 0}, "L0.mlp_pre holds values that are not finite"),
    # A hook point that is never called.
    (
        "resid_pre",
        {"point": lambda place: torch.nn.Identity()},
        r"capture of L0.resid_pre fired 0 times in 1 forward passes of mine \(GPT2LMHeadModel\); "
        "this site does not act as its name says there. See model.audit",
    ),
]


@pytest.mark.parametrize(("name", "parts", "reason"), LIES, ids=[name for name, _, _ in LIES])
def test_a_site_that_lies_is_refused(
    twins_of: Callable[..., Any], tokens: Tensor, monkeypatch: pytest.MonkeyPatch, name: str, parts: Any, reason: str
) -> None:
    bridge = twins_of("gpt2").model.bridge
    spoil(monkeypatch, name, **parts)
    model = wrap(bridge, name="mine")
    assert list(model.audit.refused) == [name]
    assert re.fullmatch(reason, model.audit.refused[name])
    assert name not in model.sites
    # Refused for good: neither edited nor read.
    where = name if not KINDS[name].per_layer else f"L1.{name}"
    pattern = f"^'{name}' is refused on mine: {reason}$"
    with pytest.raises(SiteError, match=pattern):
        mi.run(model, tokens, capture=where)
    with pytest.raises(SiteError, match=pattern):
        mi.run(model, tokens, edits=[mi.Zero(where)])


def test_neurons_that_nobody_reads(twins_of: Callable[..., Any]) -> None:
    """In an attention-only model an edit of the MLP's inside reaches nothing, which is no lie."""
    from mechinterp.core.loading import load_model

    module = twins_of("gpt2").model.hf
    with torch.no_grad():
        for layer in range(2):
            module.transformer.h[layer].mlp.out.original_component.weight.zero_()
            module.transformer.h[layer].mlp.out.original_component.bias.zero_()
    model = load_model(module, name="attention only")
    assert model.cfg.attn_only
    assert model.audit.refused == {}
