"""What a registry promises: nothing left behind, nothing foreign touched, nothing inert, nothing broadcast, two threads."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.edits import Edit
from mechinterp.core.hooks import block_calls, foreign_hooks
from mechinterp.core.sites import Site
from mechinterp.errors import EditError, InertError, MechInterpError, SelectorError, SiteError

ALL = "embed | L*.resid_mid | L*.H*.head_out | L*.H*.q_in | L*.KV*.k_in | L*.pattern | L*.mlp_in | logits"


def refuse(error: BaseException) -> Callable[[Tensor, Site], Tensor]:
    def function(value: Tensor, site: Site) -> Tensor:
        raise error

    return function


# -- nothing is left behind ------------------------------------------------------------------------


def test_no_hook_is_left(twins: Any, tokens: Tensor, same_hooks: Any) -> None:
    where = ALL if twins.architecture != "neox" else ALL.replace("L*.resid_mid |", "")
    with same_hooks(twins.model):
        mi.run(twins.model, tokens, edits=[mi.Scale(where, 2.0)], capture=where)
    with same_hooks(twins.model), mi.HookRegistry(twins.model):
        twins.model(tokens)
    with same_hooks(twins.model):
        mi.audit(twins.model)
    with same_hooks(twins.model), block_calls(twins.model):
        twins.model(tokens)


@pytest.mark.parametrize("where", ["embed", "L0.resid_mid", "L1.H2.q_in", "L1.head_out", "L0.pattern", "logits"])
@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__)
def test_no_hook_is_left_by_an_interruption(gpt2: Any, tokens: Tensor, same_hooks: Any, where: str, error: BaseException) -> None:
    base = gpt2(tokens)
    with same_hooks(gpt2), pytest.raises(type(error)) as caught:
        mi.run(gpt2, tokens, edits=[mi.Scale(ALL.replace("| L*.pattern", ""), 2.0), mi.Call(where, refuse(error))], capture=ALL)
    # The caller's own error, not one about hooks that did not fire.
    assert caught.value is error
    with same_hooks(gpt2), pytest.raises(type(error)), mi.HookRegistry(gpt2) as registry:
        registry.add(mi.Zero("L0.z"))
        raise error
    assert torch.equal(gpt2(tokens), base)


@pytest.mark.parametrize(
    "edit",
    [
        mi.Replace("L1.z", torch.zeros(1)),
        mi.Zero("L1.z[9]"),
        mi.Zero("L1.z[nowhere]"),
        mi.Zero("L1.z", rows=(0, 9)),
        mi.Zero("L9.z"),
        mi.Zero("L1.zz"),
        mi.Zero("L1.H0.z | L1.z"),
    ],
    ids=repr,
)
def test_no_hook_is_left_by_a_refusal(gpt2: Any, tokens: Tensor, same_hooks: Any, edit: Edit) -> None:
    with same_hooks(gpt2), pytest.raises(MechInterpError):
        mi.run(gpt2, tokens, edits=[mi.Scale("L0.z", 0.5), edit])


def test_edits_act_inside_only(gpt2: Any, tokens: Tensor) -> None:
    base = gpt2(tokens)
    registry = mi.HookRegistry(gpt2)
    registry.add(mi.Zero("L0.mlp_out"))
    assert torch.equal(gpt2(tokens), base)
    with registry as same:
        assert same is registry
        inside = gpt2(tokens)
        # By whichever door the model is called.
        assert torch.equal(gpt2.bridge(tokens), inside)
        assert torch.equal(gpt2.hf(input_ids=tokens).logits, inside)
    assert torch.equal(gpt2(tokens), base)
    assert not torch.allclose(inside, base)
    # The same registry again, for another pass.
    with registry:
        assert torch.equal(gpt2(tokens), inside)


# -- nothing foreign is touched --------------------------------------------------------------------


def test_hooks_of_the_caller_survive_and_fire(twins_of: Callable[..., Any], tokens: Tensor, same_hooks: Any) -> None:
    model = twins_of("gpt2").model
    fired: list[str] = []
    handles = [
        model.hf.register_forward_hook(lambda *_: fired.append("whole")),
        model.hf.register_forward_pre_hook(lambda *_: fired.append("before")),
        model.point("blocks.0.hook_out").register_forward_hook(lambda *_: fired.append("point")),
        model.block(1).mlp.original_component.register_forward_hook(lambda *_: fired.append("inside")),
    ]
    model.bridge.add_hook("blocks.1.attn.hook_z", lambda value, hook: fired.append("lens"))
    assert foreign_hooks(model) == 5
    everyone = ["before", "point", "lens", "inside", "whole"]
    for edits in ([], [mi.Scale("L0.resid_post | L1.z | L1.mlp_in | logits", 0.5)]):
        with same_hooks(model):
            mi.run(model, tokens, edits=edits, capture="L0.resid_post | L1.z")
        assert fired == everyone
        fired.clear()
    with same_hooks(model), pytest.raises(ZeroDivisionError):
        mi.run(model, tokens, edits=[mi.Call("logits", refuse(ZeroDivisionError()))])
    assert fired[:4] == everyone[:4]
    fired.clear()
    model(tokens)
    assert fired == everyone
    for handle in handles:
        handle.remove()
    model.bridge.reset_hooks()
    assert foreign_hooks(model) == 0


def test_hooks_of_the_caller_may_change_values(twins_of: Callable[..., Any], tokens: Tensor) -> None:
    """Ours come after them, and see what they left."""
    model = twins_of("gpt2").model
    with model.bridge.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: value * 0)]):
        found = mi.run(model, tokens, edits=[mi.Add("L0.mlp_out", torch.ones(32))], capture="L0.mlp_out")
    assert torch.equal(found["L0.mlp_out"], torch.ones(3, 7, 32))


# -- nothing is inert ------------------------------------------------------------------------------


def test_no_forward_pass(gpt2: Any, same_hooks: Any) -> None:
    registry = mi.HookRegistry(gpt2)
    registry.add(mi.Zero("L0.z"))
    message = "no forward pass ran while the hooks were attached; call model(tokens) inside the with block"
    with same_hooks(gpt2), pytest.raises(InertError, match=f"^{re.escape(message)}$"), registry:
        pass


def test_a_hook_that_fires_too_often(gpt2: Any, tokens: Tensor, same_hooks: Any) -> None:
    registry = mi.HookRegistry(gpt2)
    registry.add(mi.Scale("L0.mlp_out", 2.0))
    message = (
        "Scale('L0.mlp_out', factor=2.0) at L0.mlp_out fired 3 times in 2 forward passes of tiny-gpt2 (GPT2LMHeadModel); "
        "this site does not act as its name says there. See model.audit"
    )
    with same_hooks(gpt2), pytest.raises(InertError, match=f"^{re.escape(message)}$"), registry:
        gpt2(tokens)
        gpt2(tokens)
        gpt2.point("blocks.0.hook_mlp_out")(torch.zeros(1, 1, 32))


def test_a_hook_that_never_fires(gpt2: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, same_hooks: Any) -> None:
    honest = gpt2.place(Site("z", 0))
    monkeypatch.setattr(type(gpt2), "place", lambda model, site: replace(honest, point=torch.nn.Identity()))
    with same_hooks(gpt2), pytest.raises(InertError, match=r"^Zero\('L0.z'\) at L0.z fired 0 times in 1 forward passes"):
        mi.run(gpt2, tokens, edits=[mi.Zero("L0.z")])


# -- nothing is broadcast --------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Mine(Edit):
    """A user's own edit, with whatever it gives back."""

    result: Any

    def apply(self, value: Tensor, site: Site) -> Any:
        return self.result


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("result", "what"),
    [
        (torch.zeros(8), "torch.float32 of shape [8] on cpu"),
        (torch.zeros(3, 7, 1), "torch.float32 of shape [3, 7, 1] on cpu"),
        (torch.zeros(3, 7, 8, dtype=torch.float64), "torch.float64 of shape [3, 7, 8] on cpu"),
        (torch.zeros(3, 7, 8, device="meta"), "torch.float32 of shape [3, 7, 8] on meta"),
    ],
)
def test_own_edits_are_checked_as_well(gpt2: Any, tokens: Tensor, result: Tensor, what: str) -> None:
    shown = repr(Mine("L0.H1.z", result))
    message = f"{shown} at L0.H1.z gave {what}; the activation there is torch.float32 of shape [3, 7, 8] on cpu"
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        mi.run(gpt2, tokens, edits=[Mine("L0.H1.z", result)])


@pytest.mark.usefixtures("unchecked_types")
def test_what_is_no_tensor(gpt2: Any, tokens: Tensor) -> None:
    message = "Mine('L0.H1.z', result=0.0) at L0.H1.z gave float, not a tensor of shape [3, 7, 8]"
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        mi.run(gpt2, tokens, edits=[Mine("L0.H1.z", 0.0)])


def test_transforms_are_checked_as_well(gpt2: Any, tokens: Tensor) -> None:
    registry = mi.HookRegistry(gpt2)
    registry.transform(Site("resid_mid", 0), lambda value: value[:1])
    message = (
        "transform of L0.resid_mid gave torch.float32 of shape [1, 7, 32] on cpu; the activation there is torch.float32 of "
        "shape [3, 7, 32] on cpu"
    )
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"), registry:
        gpt2(tokens)


# -- order and conflicts ---------------------------------------------------------------------------


def conflict(one: str, other: str, site: str) -> str:
    return re.escape(
        f"{one} and {other} both set {site}; drop one, give them different rows, or say which comes last with priority="
    )


@pytest.mark.parametrize(
    ("one", "other", "site"),
    [
        ("L0.z", "L0.z", "L0.z"),
        ("L0.H1.z", "L0.z", "L0.H1.z"),
        ("L0.z", "L0.H1.z", "L0.z"),
        ("L0.z[1]", "L0.H1.z", "L0.z[1]"),
        ("L0.z[1]", "L0.z[1]", "L0.z[1]"),
        ("L0.N3.mlp_post", "L0.mlp_post[2]", "L0.N3.mlp_post"),
        # Prompts of seven tokens: the same position, however it is written, in one row or in all.
        ("L0.z[6]", "L0.z[-1]", "L0.z[6]"),
        ("L0.z[4]", "L0.z[end]", "L0.z[4]"),
        ("L0.H1.z[-3]", "L0.z[end]", "L0.H1.z[-3]"),
        ("L0.z[end]", "L0.z[start]", "L0.z[end]"),
        ("L0.H1.z[4]", "L0.z[-3] | L0.q", "L0.H1.z[4]"),
    ],
)
def test_two_replacements_of_the_same_numbers(
    gpt2: Any, tokens: Tensor, same_hooks: Any, one: str, other: str, site: str
) -> None:
    registry = mi.HookRegistry(gpt2, {"end": torch.tensor([6, 4, 6]), "start": torch.tensor([0, 4, 1])})
    registry.add(mi.Zero(one))
    registry.add(mi.Zero(other))
    with same_hooks(gpt2), pytest.raises(EditError, match=f"^{conflict(f'Zero({one!r})', f'Zero({other!r})', site)}$"), registry:
        gpt2(tokens)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (mi.Zero("L0.H0.z"), mi.Zero("L0.H1.z")),
        (mi.Zero("L0.z[0]"), mi.Zero("L0.z[1]")),
        (mi.Zero("L0.z[-1]"), mi.Zero("L0.z[-2]")),
        (mi.Zero("L0.z[S1]"), mi.Zero("L0.z[S2]")),
        (mi.Zero("L0.z[1]"), mi.Zero("L0.z[-1]")),
        (mi.Zero("L0.z[5]"), mi.Zero("L0.z[S1]")),
        (mi.Zero("L0.z[2]", rows=(0, 1)), mi.Zero("L0.z[S1]")),
        (mi.Zero("L0.N0.mlp_post[2]"), mi.Zero("L0.mlp_post[-1]")),
        (mi.Zero("L0.N0.mlp_post"), mi.Zero("L0.N1.mlp_post")),
        (mi.Zero("L0.z", rows=(0, 1)), mi.Zero("L0.z", rows=(1, 3))),
        (mi.Zero("L0.z"), mi.Zero("L1.z")),
        (mi.Zero("L0.z"), mi.Zero("L0.q")),
        (mi.Zero("L0.z"), mi.Scale("L0.z", 2.0)),
        (mi.Zero("L0.z"), mi.Zero("L0.z", priority=1)),
    ],
    ids=repr,
)
def test_what_is_no_conflict(gpt2: Any, tokens: Tensor, one: Edit, other: Edit) -> None:
    registry = mi.HookRegistry(gpt2, {"S1": torch.tensor([1, 2, 3]), "S2": torch.tensor([4, 4, 4])})
    registry.add(one)
    registry.add(other)
    with registry:
        gpt2(tokens)


def test_order(gpt2: Any, tokens: Tensor) -> None:
    """By priority, then as given; a capture comes last."""
    ones, five = torch.ones(32), torch.full((3, 7, 32), 5.0)
    where = "L0.mlp_out"
    late = [mi.Replace(where, five, priority=-1), mi.Add(where, ones), mi.Scale(where, 2.0)]
    assert float(mi.run(gpt2, tokens, edits=late, capture=where)[where].unique()) == 12
    assert float(mi.run(gpt2, tokens, edits=[late[2], late[1], late[0]], capture=where)[where].unique()) == 11
    last = [mi.Replace(where, five, priority=1), mi.Add(where, ones), mi.Scale(where, 2.0)]
    assert float(mi.run(gpt2, tokens, edits=last, capture=where)[where].unique()) == 5


def test_registries_may_be_nested(gpt2: Any, tokens: Tensor, same_hooks: Any) -> None:
    outer, inner = mi.HookRegistry(gpt2), mi.HookRegistry(gpt2)
    outer.add(mi.Zero("L0.mlp_out"))
    inner.add(mi.Zero("L1.H0.z"))
    both = mi.run(gpt2, tokens, edits=[mi.Zero("L0.mlp_out"), mi.Zero("L1.H0.z")]).logits
    with same_hooks(gpt2), outer:
        with inner:
            assert torch.equal(gpt2(tokens), both)
        assert torch.equal(mi.run(gpt2, tokens, edits=[mi.Zero("L1.H0.z")]).logits, both)
        assert torch.equal(gpt2(tokens), mi.run(gpt2, tokens).logits)


def test_a_registry_is_attached_once(gpt2: Any, tokens: Tensor, same_hooks: Any) -> None:
    registry = mi.HookRegistry(gpt2)
    registry.add(mi.Scale("L0.mlp_out", 2.0))
    message = "this registry is already attached; make another HookRegistry for a second with block or thread"
    with same_hooks(gpt2), registry:
        once = gpt2(tokens)
        with pytest.raises(EditError, match=f"^{message}$"), registry:
            pass
        # The first with block is not disturbed.
        assert torch.equal(gpt2(tokens), once)


# -- declaring -------------------------------------------------------------------------------------


def test_functions(gpt2: Any, tokens: Tensor) -> None:
    seen: list[tuple[str, list[int]]] = []
    registry = mi.HookRegistry(gpt2)
    registry.add("L0.H1-2.z[-1]", lambda value, site: seen.append((str(site), list(value.shape))), rows=(1, 3))
    registry.add(Site("mlp_out", 0), lambda value, site: value * 0, priority=-1)
    registry.add("L0.mlp_out", lambda value, site: value + 1)
    kept: dict[Site, Tensor] = {}
    registry.capture(mi.select("L0.mlp_out", gpt2.cfg), kept)
    with registry:
        gpt2(tokens)
    assert seen == [("L0.H1.z[-1]", [2, 8]), ("L0.H2.z[-1]", [2, 8])]
    assert torch.equal(kept[Site("mlp_out", 0)], torch.ones(3, 7, 32))


OWN = "Zero('L0.z') brings its own function, rows and priority; give rows= and priority= to the edit itself"


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("L0.z",), {}, "'L0.z' says where but not what; pass a function, or an edit such as mi.Zero('L0.z')"),
        ((mi.Zero("L0.z"), lambda value, site: value), {}, OWN),
        ((mi.Zero("L0.z"),), {"rows": (0, 1)}, OWN),
        ((mi.Zero("L0.z"),), {"priority": 1}, OWN),
    ],
)
def test_declarations_that_say_too_little_or_too_much(gpt2: Any, args: Any, options: Any, message: str) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        mi.HookRegistry(gpt2).add(*args, **options)


def test_a_selector_must_name_something_on_this_model(gpt2: Any, llama: Any) -> None:
    registry = mi.HookRegistry(llama)
    with pytest.raises(SelectorError, match=r"^there is no layer 2 in 'L2.z': this model has layers 0 to 1$"):
        registry.add(mi.Zero("L2.z"))
    with pytest.raises(SelectorError, match=r"^'k' has 2 KV heads on this model: write KV0 to KV1, not H3$"):
        registry.add(mi.Zero("L0.H3.k"))
    with pytest.raises(SelectorError, match="an empty selection selects nothing"):
        registry.add(mi.Zero(mi.Selection(())))
    with pytest.raises(SiteError, match="'pos_embed' is refused on tiny-llama: tiny-llama has no position embedding vectors"):
        registry.add(mi.Zero("pos_embed"))


@pytest.mark.parametrize("rows", [(0, 4), (2, 2), (-1, 2), (2, 1)])
def test_rows_outside_the_batch(gpt2: Any, tokens: Tensor, rows: tuple[int, int]) -> None:
    message = f"rows {rows} at L0.z do not lie in a batch of 3 prompts; write (first, stop)"
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        mi.run(gpt2, tokens, edits=[mi.Zero("L0.z", rows=rows)])


# -- positions -------------------------------------------------------------------------------------


def test_named_positions(gpt2: Any, tokens: Tensor) -> None:
    """Each prompt at its own position; rows packed behind each other take the names again."""
    where = torch.tensor([1, 4, 6])
    registry = mi.HookRegistry(gpt2, {"S": where})
    for target in ("L0.H1.z[S]", "L0.pattern[S]", "L1.N2.mlp_post[S]", "L1.H0.q_in[S]"):
        registry.add(mi.Scale(target, 0.5))
    registry.add(mi.Zero("L0.mlp_out[S]", rows=(1, 2)))
    with registry:
        found = gpt2(tokens)
    for row, pos in enumerate(where.tolist()):
        edits = [mi.Scale(f"L0.H1.z[{pos}] | L0.pattern[{pos}] | L1.N2.mlp_post[{pos}] | L1.H0.q_in[{pos}]", 0.5)]
        if row == 1:
            edits.append(mi.Zero(f"L0.mlp_out[{pos}]"))  # type: ignore[arg-type]
        alone = mi.run(gpt2, tokens[row], edits=edits).logits[0]
        torch.testing.assert_close(found[row], alone, atol=1e-5, rtol=1e-5)
    twice = mi.HookRegistry(gpt2, {"S": where})
    twice.add(mi.Zero("L0.H1.z[S]", rows=(3, 6)))
    single = mi.HookRegistry(gpt2, {"S": where})
    single.add(mi.Zero("L0.H1.z[S]"))
    with twice:
        packed = gpt2(tokens.repeat(2, 1))
    with single:
        torch.testing.assert_close(packed[3:], gpt2(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:3], gpt2(tokens), atol=1e-5, rtol=1e-5)


def test_positions_that_do_not_fit(gpt2: Any, tokens: Tensor) -> None:
    registry = mi.HookRegistry(gpt2, {"S": torch.tensor([1, 2])})
    registry.add(mi.Zero("L0.z[S]"))
    with pytest.raises(SelectorError, match=r"^L0.z\[S\]: position 'S' is given for 2 prompts, the batch has 3$"), registry:
        gpt2(tokens)
    with pytest.raises(SelectorError, match=r"^L0.z\[7\]: there is no position 7; the prompts have positions 0 to 6$"):
        mi.run(gpt2, tokens, edits=[mi.Zero("L0.z[7]")])
    with pytest.raises(SelectorError, match=r"^L0.z\[S2\]: there is no position named 'S2'. There are none.$"):
        mi.run(gpt2, tokens, edits=[mi.Zero("L0.z[S2]")])


# -- threads and tasks -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_two_threads_on_one_model(twins_of: Callable[..., Any], tokens: Tensor, same_hooks: Any, architecture: str) -> None:
    """Both are in the middle of their passes at once, with other edits, batches and captures."""
    model = twins_of(architecture).model
    jobs = [
        (tokens, [mi.Scale("L1.H0.q_in | L0.resid_mid", 2.0), mi.Zero("L0.mlp_out")]),
        (tokens[:2, :5], [mi.Add("L1.H0.head_out", torch.ones(32)), mi.Scale("L0.mlp_out", -1.0)]),
        (tokens[:1], []),
    ]
    alone = [mi.run(model, prompts, edits=edits, capture="L1.z") for prompts, edits in jobs]
    meet = threading.Barrier(len(jobs), timeout=30)
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        prompts, edits = jobs[i]

        def wait(value: Tensor, site: Site) -> Tensor:
            meet.wait()
            return value

        try:
            for _ in range(5):
                waits = [mi.Call(where, wait) for where in ("embed", "L0.resid_post", "logits")]
                found[i] = mi.run(model, prompts, edits=[*edits, *waits], capture="L1.z")
        except BaseException as error:  # a thread's error would be printed, and the test pass
            found[i] = error
            meet.abort()

    with same_hooks(model):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, expected in enumerate(alone):
        assert isinstance(found[i], mi.Run), found[i]
        assert torch.equal(found[i].logits, expected.logits)
        assert torch.equal(found[i]["L1.z"], expected["L1.z"])


def test_two_tasks_on_one_model(gpt2: Any, tokens: Tensor) -> None:
    async def job(factor: float) -> Tensor:
        registry = mi.HookRegistry(gpt2)
        registry.add(mi.Scale("L0.mlp_out", factor))
        with registry:
            await asyncio.sleep(0)
            logits = gpt2(tokens)
            await asyncio.sleep(0)
        return logits

    async def both() -> list[Tensor]:
        return await asyncio.gather(job(0.0), job(3.0))

    for factor, found in zip((0.0, 3.0), asyncio.run(both()), strict=True):
        assert torch.equal(found, mi.run(gpt2, tokens, edits=[mi.Scale("L0.mlp_out", factor)]).logits)
