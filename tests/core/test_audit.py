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
from mechinterp.core.sites import KINDS, Site
from mechinterp.errors import SiteError

REFUSED = {"gpt2": [], "llama": ["pos_embed"], "neox": ["pos_embed", "resid_mid"], "gemma2": ["pos_embed"]}


def test_what_is_proved(twins: Any) -> None:
    report = mi.audit(twins.model)
    assert list(report.refused) == REFUSED[twins.architecture]
    assert list(report.proved) == [name for name in KINDS if name not in report.refused]
    assert twins.model.sites == report.proved


IDENTITIES = [
    "resid_pre + attn_out = mlp_in",
    "resid_pre + attn_out + mlp_out = resid_post",
    "sum of head_out + bias = attn_out",
    "z through the output projection = attn_out",
    "pattern times v = z",
    "pattern rows = 1",
    "softmax of scores = pattern",
    "q_in normed and projected = q",
    "k_in normed and projected = k",
    "v_in normed and projected = v",
    "MLP of mlp_in = mlp_out",
    "mlp_post through the output projection = mlp_out",
    "resid_post = resid_pre of the next layer",
    "norm of the last resid_post = final_norm",
]


def test_identities_hold(twins: Any) -> None:
    report = mi.audit(twins.model)
    # Attention and MLP in parallel read the same stream.
    assert list(report.largest) == IDENTITIES[twins.architecture == "neox" :]
    assert max(report.largest.values()) < 5e-6
    assert report.layers == (0, 1)


def test_every_sort_of_layer_is_edited() -> None:
    from tests.core.architectures import module_of

    # Gemma 3 and GPT-Neo alternate windows.
    for name, layers in (("Llama", (0, 2, 3)), ("GPT-Neo", (0, 1, 2, 3)), ("Gemma 3", (0, 1, 2, 3))):
        assert mi.load(module_of(name)).audit.layers == layers


def test_cost_in_forward_passes(twins_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = twins_of("llama").model
    rows: list[int] = []
    handle = model.hf.register_forward_pre_hook(lambda m, a, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    mi.audit(model)
    handle.remove()
    # Values, replacement by themselves, and a row for each edit of 4 sites outside and 18 in each of 2 layers, less pos_embed.
    assert rows == [2, 2, 1 + 3 + 2 * 18]


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
    assert re.fullmatch(r"  norm of the last resid_post = final_norm: off by at most \d\.\de[-+]\d\d", lines[-1])
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


def leak(axis: int) -> Any:
    """Writes that also change what is next along an axis."""

    def write(place: Any) -> Any:
        return lambda hooked, old, new, kept: place.write(hooked, old, new + 0.5 * (new - old).roll(1, axis), kept)

    return {"write": write}


NORM = "so a norm, a scale or a gate stands between them that this name does not tell of; use another of model.sites"
LIES = [
    # An edit that is lost.
    (
        "mlp_out",
        {"write": lambda place: lambda hooked, old, new, kept: hooked},
        r"an edit of L0.mlp_out\[1\] is lost on GPT2LMHeadModel: the activation keeps its value",
    ),
    # An edit that does something even where nothing is changed.
    (
        "embed",
        {"write": lambda place: lambda hooked, old, new, kept: new * 1.01},
        r"replacing embed by itself changes the logits by \d.\de[+-]\d\d on GPT2LMHeadModel",
    ),
    (
        "z",
        {"read": lambda place: lambda hooked, kept: hooked.flatten(2)},
        r"L0.z has shape \[2, 3, 32\] where the axes are batch pos head d_head",
    ),
    (
        "mlp_pre",
        {
            "read": lambda place: lambda hooked, kept: hooked[..., :40],
            "write": lambda place: lambda hooked, old, new, kept: hooked,
        },
        r"L0.mlp_pre has shape \[2, 3, 40\] where batch pos d_mlp are \[2, 3, 128\] on GPT2LMHeadModel",
    ),
    ("mlp_pre", {"read": lambda place: lambda hooked, kept: hooked / 0}, "L0.mlp_pre holds values that are not finite"),
    # A hook point that is never called.
    (
        "resid_pre",
        {"point": lambda place: torch.nn.Identity()},
        "GPT2LMHeadModel computes it without calling the hook point that transformer_lens has for it; "
        "use one of the sites that are proved",
    ),
    # Edits that reach other positions, heads or neurons than the named ones.
    ("mlp_post", leak(-1), r"an edit of L0.N1.mlp_post\[1\] also changes L0.mlp_post, where it must not"),
    ("attn_out", leak(1), r"an edit of L0.attn_out\[1\] also changes L0.attn_out, where it must not"),
    ("q", leak(2), r"an edit of L0.H1.q\[1\] also changes L0.q, where it must not"),
    # Another tensor of the same shape.
    (
        "head_out",
        {"read": lambda place: lambda hooked, kept: 2 * place.read(hooked, kept)},
        r"on GPT2LMHeadModel sum of head_out \+ bias = attn_out does not hold: in layer 0 it is off by \d.\de[+-]\d\d of the "
        f"largest number, {NORM}",
    ),
    (
        "scores",
        {"read": lambda place: lambda hooked, kept: 2 * hooked, "write": lambda place: lambda hooked, old, new, kept: new / 2},
        r"on GPT2LMHeadModel softmax of scores = pattern does not hold: in layer 0 it is off by \d.\de[+-]\d\d of the "
        f"largest number, {NORM}",
    ),
    (
        "q_in",
        {"read": lambda place: lambda hooked, kept: kept["resid_pre"].unsqueeze(2).expand(-1, -1, 4, -1).flip(-1)},
        r"on GPT2LMHeadModel q_in normed and projected = q does not hold: in layer 0 .*",
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


def test_what_the_hook_names_say_is_refused(twins_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """``ln2.hook_in`` shows the stream between attention and MLP, but a change there reaches the MLP alone."""
    honest = places.place_of

    def place_of(model: Any, site: Any) -> Any:
        return (
            replace(honest(model, Site("mlp_in", site.layer)), site=site.whole)
            if site.name == "resid_mid"
            else honest(model, site)
        )

    bridge = twins_of("gpt2").model.bridge
    monkeypatch.setattr("mechinterp.core.model.place_of", place_of)
    refused = wrap(bridge, name="mine").audit.refused
    # An edit of what shares the point is seen there too, so that is refused as well.
    assert list(refused) == ["resid_mid", "mlp_in"]
    assert re.fullmatch(
        r"with L0.resid_mid\[1\] edited, resid_pre \+ attn_out \+ mlp_out = resid_post does not hold in layer 0: "
        r"off by \d.\de[+-]\d\d of the largest number",
        refused["resid_mid"],
    )


def test_hooks_that_come_too_late_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformer_lens shows GPT-J's pattern once attention is over, also under the name of the scores."""
    from tests.core.architectures import module_of

    honest = places.place_of

    def place_of(model: Any, site: Any) -> Any:
        place = honest(model, site)
        return (
            replace(place, point=model.point(str(site.kind.point), site.layer)) if site.name in ("scores", "pattern") else place
        )

    module = module_of("GPT-J")
    monkeypatch.setattr("mechinterp.core.model.place_of", place_of)
    with pytest.warns(UserWarning, match="hook"):
        refused = mi.load(module, name="mine").audit.refused
    assert re.fullmatch(
        r"with L0.H1.pattern\[1\] edited, pattern times v = z does not hold in layer 0: off by .* of the largest number",
        refused["pattern"],
    )
    assert refused["scores"].startswith("on GPTJForCausalLM softmax of scores = pattern does not hold: in layer 0 it is off by")


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
