"""Every architecture: what is proved, and what an edit does to an unwrapped copy changed by hand with ordinary hooks."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mechinterp as mi
from mechinterp.core.plan import plan_cells, sweep
from mechinterp.core.replay import why_not_exact
from mechinterp.core.sites import KINDS, Site
from mechinterp.errors import ModelError
from tests.core.architectures import ARCHITECTURES, LAYERS, Paths, module_of

CLOSE = 5e-6

# Everything else is proved on all of them.
PARALLEL = {"GPT-NeoX (Pythia)", "GPT-J", "Falcon (7B)", "Falcon (40B)", "Phi", "StableLM, parallel", "Cohere"}
LEARNED = {"GPT-2", "GPT-Neo", "OPT", "OPT-350M (norm after)"}
FURTHER = {
    "Mixtral": {"mlp_pre", "mlp_post"},
    "OPT-350M (norm after)": {"resid_mid", "attn_out", "mlp_in", "mlp_out", "q_in", "k_in", "v_in", "final_norm"},
}

_made: dict[str, tuple[Any, Any]] = {}


@pytest.fixture(params=list(ARCHITECTURES))
def pair(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """Name, `Model`, and the plain module that it was; made once. Do not change their weights."""
    name = request.param
    if name not in _made:
        module = module_of(name)
        _made[name] = copy.deepcopy(module), mi.load(module, name=name)
    plain, model = _made[name]
    return name, model, plain


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def plain_logits(plain: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return plain(input_ids=tokens, use_cache=False).logits


def test_what_is_proved(pair: tuple[str, Any, Any], tokens: Tensor) -> None:
    name, model, plain = pair
    expected = FURTHER.get(name, set()) | ({"resid_mid"} if name in PARALLEL else set())
    expected |= set() if name in LEARNED else {"pos_embed"}
    assert set(model.audit.refused) == expected
    assert model.audit.layers[0] == 0
    assert model.audit.layers[-1] == LAYERS - 1
    # A reason says which architecture or model, and more than that.
    assert all(name in reason or ARCHITECTURES[name].model in reason for reason in model.audit.refused.values())
    with torch.no_grad():
        assert error(model(tokens), plain_logits(plain, tokens)) < CLOSE
    # The table of the documentation says the same: python scripts/site_table.py writes it again.
    page = (Path(__file__).parents[2] / "docs" / "sites.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
    marks = [cell.strip()[:1] for cell in row.split("|")[2:-1]]
    assert marks == ["–" if site in expected else "✓" for site in KINDS]


def test_the_table_is_made_by_its_script() -> None:
    spec = importlib.util.spec_from_file_location("site_table", Path(__file__).parents[2] / "scripts" / "site_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.table(script.audits(["GPT-2", "OLMo 2"])).splitlines()
    page = script.PAGE.read_text(encoding="utf-8")
    assert made[0] in page
    assert made[2] in page
    assert made[-1] in page.replace("10. ", "2. ")


# -- the outside oracle ----------------------------------------------------------------------------


def pushed(value: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return value + torch.randn(value.shape, generator=generator) * value.abs().mean()


def hand_made(plain: Any, paths: Paths, name: str, layer: int, tokens: Tensor) -> Tensor:
    """Logits of the plain module when everything at a site is pushed, by hooks on its own modules."""
    block = plain.get_submodule(f"{paths.blocks}.{layer}")
    shape = (*tokens.shape, -1)

    def change(value: Tensor, site_shape: tuple[int, ...]) -> Tensor:
        return pushed(value.reshape(site_shape)).reshape(value.shape)

    def after(site_shape: tuple[int, ...]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            return (change(out[0], site_shape), *out[1:]) if isinstance(out, tuple) else change(out, site_shape)

        return hook

    def before(site_shape: tuple[int, ...]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (change(args[0], site_shape), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"], site_shape)}

        return hook

    heads = (*tokens.shape, 4, -1)
    handle = {
        "embed": lambda: plain.get_submodule(paths.embed).register_forward_hook(after(shape)),
        "resid_pre": lambda: block.register_forward_pre_hook(before(shape), with_kwargs=True),
        "resid_post": lambda: block.register_forward_hook(after(shape)),
        "attn_out": lambda: block.get_submodule(paths.attn).register_forward_hook(after(shape)),
        "z": lambda: block.get_submodule(paths.o).register_forward_pre_hook(before(heads), with_kwargs=True),
        "mlp_out": lambda: block.get_submodule(paths.mlp).register_forward_hook(after(shape)),
        "mlp_post": lambda: block.get_submodule(paths.out or "").register_forward_pre_hook(before(shape), with_kwargs=True),
        "final_norm": lambda: plain.get_submodule(paths.norm or "").register_forward_hook(after(shape)),
    }[name]()
    try:
        return plain_logits(plain, tokens)
    finally:
        handle.remove()


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 1])
def test_edits_do_what_hooks_on_the_plain_modules_do(pair: tuple[str, Any, Any], tokens: Tensor, layer: int) -> None:
    architecture, model, plain = pair
    base = plain_logits(plain, tokens)
    for name in ("embed", "resid_pre", "resid_post", "attn_out", "z", "mlp_out", "mlp_post", "final_norm"):
        if name not in model.sites:
            continue
        site = Site(name, layer if KINDS[name].per_layer else None)
        found = mi.run(model, tokens, edits=[mi.Call(site, lambda value, _: pushed(value))]).logits
        wanted = hand_made(plain, ARCHITECTURES[architecture].paths, name, layer, tokens)
        assert error(found, wanted) < CLOSE, name
        assert error(base, wanted) > 1e-3, name


def test_resid_mid_reaches_the_skip_and_the_mlp(pair: tuple[str, Any, Any], tokens: Tensor) -> None:
    """In the plain module, what attention adds is moved by the same amount: both readers then see it."""
    architecture, model, plain = pair
    if "resid_mid" not in model.sites:
        return
    paths = ARCHITECTURES[architecture].paths
    step = torch.randn(32, generator=torch.Generator().manual_seed(2))
    where = plain.get_submodule(f"{paths.blocks}.1.{paths.attn}")
    add = where.register_forward_hook(lambda m, a, out: (out[0] + step, *out[1:]) if isinstance(out, tuple) else out + step)
    wanted = plain_logits(plain, tokens)
    add.remove()
    assert error(mi.run(model, tokens, edits=[mi.Add("L1.resid_mid", step)]).logits, wanted) < CLOSE


@pytest.mark.parametrize("name", ["GPT-J", "GPT-Neo", "OPT"])
@pytest.mark.parametrize("layer", [0, 1])
def test_patterns_of_attention_that_takes_its_own_softmax(
    name: str, layer: int, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain module with the softmax of one layer replaced by hand."""
    module = module_of(name)
    plain, model = copy.deepcopy(module), mi.load(module, name=name)
    with torch.no_grad():
        weights = plain(input_ids=tokens, use_cache=False, output_attentions=True).attentions[layer]
    seen = mi.run(model, tokens, capture=f"L{layer}.pattern | L{layer}.scores")
    assert error(seen[f"L{layer}.pattern"], weights) < CLOSE
    assert error(seen[f"L{layer}.scores"].softmax(-1), weights) < CLOSE
    calls: list[int] = []
    softmax = nn.functional.softmax

    def by_hand(kind: str) -> Tensor:
        def edited(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            mine = len(calls) - 1 == layer
            if mine and kind == "scores":
                scores = scores.clone()
                scores[:, 1] *= 0.5
            pattern = softmax(scores, *args, **kwargs)
            if mine and kind == "pattern":
                pattern = pattern.clone()
                pattern[:, 2, 3] = pattern[:, 2, 3].flip(-1)
            return pattern

        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, "softmax", edited)
            return plain_logits(plain, tokens)

    turned = mi.run(model, tokens, edits=[mi.Call(f"L{layer}.H2.pattern[3]", lambda value, _: value.flip(-1))]).logits
    halved = mi.run(model, tokens, edits=[mi.Scale(f"L{layer}.H1.scores", 0.5)]).logits
    base = plain_logits(plain, tokens)
    for found, wanted in ((turned, by_hand("pattern")), (halved, by_hand("scores"))):
        assert error(found, wanted) < CLOSE
        assert error(base, wanted) > 1e-4
    # Nothing stays behind, and a copy of the module runs weights of its own.
    again = copy.deepcopy(model.hf)
    with torch.no_grad():
        again.get_submodule(ARCHITECTURES[name].paths.embed.split(".")[0]).requires_grad_(False)
        for parameter in again.parameters():
            parameter.mul_(0.5)
        assert not torch.allclose(again(input_ids=tokens).logits, model(tokens))
        assert error(model(tokens), base) < CLOSE


def test_neurons_of_opt_keep_their_positions(tokens: Tensor) -> None:
    """It runs its MLP on positions and prompts in one axis."""
    module = module_of("OPT")
    plain, model = copy.deepcopy(module), mi.load(module)
    site = "L1.N5.mlp_post[2]"

    def zero(module: nn.Module, args: Any) -> Any:
        value = args[0].clone()
        value.view(*tokens.shape, -1)[1, 2, 5] = 0.0
        return (value,)

    handle = plain.model.decoder.layers[1].fc2.register_forward_pre_hook(zero)
    wanted = plain_logits(plain, tokens)
    handle.remove()
    found = mi.run(model, tokens, edits=[mi.Zero(site, rows=(1, 2))], capture="L1.mlp_post")
    assert error(found.logits, wanted) < CLOSE
    assert found["L1.mlp_post"].shape == (*tokens.shape, 48)
    assert float(found[site][1]) == 0.0


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma 2", "Falcon (40B)", "GPT-J"])
def test_one_head_changes_that_head_alone(name: str, tokens: Tensor) -> None:
    model = mi.load(module_of(name))
    base = mi.run(model, tokens, capture="L1.z")["L1.z"]
    for site, heads in (("L1.H1.q_in", [1]), ("L1.KV0.k_in" if model.cfg.n_kv_heads < 4 else "L1.H0.k_in", None)):
        z = mi.run(model, tokens, edits=[mi.Add(site, torch.randn(32))], capture="L1.z")["L1.z"]
        changed = [h for h in range(4) if not torch.allclose(z[:, :, h], base[:, :, h], atol=1e-5)]
        assert changed == (heads or list(range(4 // model.cfg.n_kv_heads)))


def test_joint_norms_are_noted() -> None:
    notes = mi.load(module_of("OLMo 2")).audit.notes
    assert sorted(notes) == ["k", "k_in", "q", "q_in"]
    assert notes["q"] == "one norm spans the q of all heads, so an edit of one head's moves the others' scores too"


def test_half_precision(tokens: Tensor) -> None:
    for name in ("GPT-J", "OPT", "Falcon (40B)", "Qwen3"):
        exact = mi.load(module_of(name))
        half = mi.load(module_of(name), dtype=torch.bfloat16)
        assert half.sites == exact.sites, half.audit
    # Its rotary embedding gives float32 queries there, which transformer_lens 4.3 multiplies with the values as they are.
    message = (
        "transformer_lens cannot run Olmo2ForCausalLM in bfloat16 (expected scalar type Float but found BFloat16); "
        "load it with dtype=torch.float32"
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        mi.load(module_of("OLMo 2"), dtype=torch.bfloat16)


def test_sweeps_are_exact(pair: tuple[str, Any, Any], tokens: Tensor) -> None:
    """Replayed from a layer and a position on, or run in full where that is not exact: the same as one run for each."""
    name, model, _ = pair
    reason = why_not_exact(model)
    # Where a norm comes after what is added there is no stream between attention and MLP to start from.
    assert bool(reason) == (name == "OPT-350M (norm after)"), reason
    read = torch.full((len(tokens),), tokens.shape[1] - 1)
    layers = model.cfg.n_layers
    wanted = [
        f"L{i % layers}.{site}" for i, site in enumerate(("z", "mlp_out", "resid_pre", "q", "mlp_post")) if site in model.sites
    ]
    cells: list[list[tuple[mi.Site, Tensor]]] = []
    for text in wanted:
        (site,) = mi.select(text, model.cfg)
        value = mi.run(model, tokens, capture=site)[site].clone()
        value[:, 3:] += pushed(value[:, 3:])
        cells.append([(site, value)])
    plan = plan_cells(model, len(tokens), tokens.shape[1], [[site for site, _ in cell] for cell in cells], start=3, read=read)
    assert plan.replayed == (0 if reason else len(cells))
    for members, logits in sweep(plan, model, tokens, cells, read=read):
        for i, found in zip(members, logits, strict=True):
            alone = mi.run(model, tokens, edits=[mi.Replace(*part) for part in cells[i]]).logits[:, -1]
            assert error(found, alone) < 1e-5
