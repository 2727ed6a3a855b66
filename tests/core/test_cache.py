"""Where captures go: in memory, to files, and back; and how much of the model runs for them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.store import mapped_file
from mechinterp.errors import EditError, FileFormatError, ModelError, SelectorError, SiteError

CAPTURE = "embed | L*.resid_post | L0.H1.z | L1.pattern"


def same(one: Any, other: Any) -> None:
    assert list(one.cache if isinstance(one, mi.Run) else one) == list(other.cache if isinstance(other, mi.Run) else other)
    for site in other.cache:
        assert torch.equal(one[site], other[site])


def mapped(path: Path) -> bool:
    """Whether this process reads the file through its address space."""
    return str(path.resolve()) in Path("/proc/self/maps").read_text()


# -- stopping early --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capture", "ran"), [("embed", 0), ("L0.H1.q", 0), ("L0.resid_post", 1), ("L1.resid_pre", 1), ("L0.z | L1.z", 1)]
)
def test_no_more_runs_than_is_needed(twins: Any, tokens: Tensor, same_hooks: Any, capture: str, ran: int) -> None:
    """Blocks that were left, seen by nobody's hooks but the modules' own counts."""
    model = twins.model
    left: list[int] = []
    modules = [model.block(layer).original_component for layer in range(2)]
    before = [module.forward for module in modules]
    for i, module in enumerate(modules):

        def counted(*args: Any, forward: Any = module.forward, i: int = i, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            left.append(i)
            return out

        module.forward = counted
    try:
        full = mi.run(model, tokens, capture=capture)
        assert left == [0, 1]
        left.clear()
        with same_hooks(model):
            part = mi.run(model, tokens, capture=capture, logits=False)
        # The block whose output is hooked is left after the hook, if ever.
        assert len(left) <= ran
        assert left == list(range(len(left)))
    finally:
        for module, forward in zip(modules, before, strict=True):
            module.forward = forward
    same(part, full)
    assert torch.equal(model(tokens), full.logits)
    with pytest.raises(SiteError, match=r"^the logits of this run were not computed; leave out logits=False$"):
        part.logits  # noqa: B018


def test_edits_come_before_the_end(gpt2: Any, tokens: Tensor) -> None:
    edits = [mi.Zero("L1.mlp_out"), mi.Scale("L0.z", 2.0)]
    same(
        mi.run(gpt2, tokens, edits=edits, capture="L0.resid_post", logits=False),
        mi.run(gpt2, tokens, edits=edits, capture="L0.resid_post"),
    )
    with pytest.raises(SelectorError, match=r"^L1.z\[9\]: there is no position 9; the prompts have positions 0 to 6$"):
        mi.run(gpt2, tokens, edits=[mi.Zero("L1.z[9]")], capture="L0.z", logits=False)


def test_others_see_the_whole_pass(gpt2: Any, tokens: Tensor, same_hooks: Any) -> None:
    """Hooks of the caller and registries around it expect one."""
    seen: list[int] = []
    handle = gpt2.hf.register_forward_hook(lambda *_: seen.append(1))
    found = mi.run(gpt2, tokens, capture="L0.z", logits=False)
    handle.remove()
    assert seen == [1]
    outer = mi.HookRegistry(gpt2)
    outer.add(mi.Scale("L1.mlp_out", 2.0))
    with same_hooks(gpt2), outer:
        same(mi.run(gpt2, tokens, capture="L0.z", logits=False), found)


# -- memory and files ------------------------------------------------------------------------------


def test_in_parts(twins: Any, tokens: Tensor) -> None:
    many = torch.cat([tokens, tokens.flip(0), tokens.flip(1)[:1]])
    whole = mi.run(twins.model, many, capture=CAPTURE, keep=[-1])
    for batch in (1, 3, 7, 50):
        part = mi.run(twins.model, many, capture=CAPTURE, keep=[-1], batch=batch)
        torch.testing.assert_close(part.logits, whole.logits, atol=2e-5, rtol=1e-4)
        for site in whole.cache:
            torch.testing.assert_close(part[site], whole[site], atol=2e-5, rtol=1e-4)


def test_past_the_budget_it_goes_to_files(gpt2: Any, tokens: Tensor) -> None:
    whole = mi.run(gpt2, tokens, capture=CAPTURE)
    assert not whole.cache.files
    size = 3 * 7 * 32 * 4
    found = mi.run(gpt2, tokens, capture=CAPTURE, memory=2 * size)
    same(found, whole)
    # As they pass: embed and L0.z fit, nothing after them but what is smaller than the rest.
    assert {str(site) for site in found.cache.whole} - {str(site) for site in found.cache.files} == {"embed", "L0.z"}
    assert repr(found.cache).startswith("Cache: 5 activations, 0.0 MiB, 0.0 MiB of it on disk\n")
    paths = list(found.cache.files.values())
    assert all(path.exists() and mapped(path) for path in paths)
    kept = found["L1.pattern"]
    del found
    # The folder goes with the cache; what somebody still holds stays readable.
    assert not any(path.exists() for path in paths)
    assert torch.equal(kept, whole["L1.pattern"])


def test_to_a_folder_and_back(twins: Any, tokens: Tensor, tmp_path: Path) -> None:
    whole = mi.run(twins.model, tokens, capture=CAPTURE)
    for batch in (None, 2):
        folder = tmp_path / f"in-{batch}"
        found = mi.run(twins.model, tokens, capture=CAPTURE, store=folder, batch=batch, logits=False)
        for site in whole.cache:
            torch.testing.assert_close(found[site], whole[site], atol=2e-5, rtol=1e-4)
        names = sorted(path.name for path in folder.iterdir())
        sites = ["L0.resid_post", "L0.z", "L1.pattern", "L1.resid_post", "cache", "embed"]
        assert names == [f"{name}.{'json' if name == 'cache' else 'safetensors'}" for name in sites]
        again = mi.Cache.load(folder, twins.model)
        same(again, found)
        assert mapped(folder / "L0.z.safetensors")


def test_many_prompts_do_not_have_to_fit(gpt2: Any, tmp_path: Path) -> None:
    """What the process holds of its own while 40 MB of activations go by, read from the system's own count."""

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10

    prompts = torch.randint(0, 61, (10_000, 8), generator=torch.Generator().manual_seed(0))
    mi.run(gpt2, prompts[:200], capture="L*.resid_post | L*.mlp_post", logits=False, batch=100)
    before = held()
    found = mi.run(gpt2, prompts, capture="L*.resid_post | L*.mlp_post", store=tmp_path / "many", logits=False, batch=100)
    assert held() - before < 20 << 20
    assert found.cache.bytes == 10_000 * 8 * (2 * 32 + 2 * 128) * 4
    alone = mi.run(gpt2, prompts[7777:7778], capture="L1.mlp_post")
    torch.testing.assert_close(found["L1.mlp_post"][7777:7778], alone["L1.mlp_post"], atol=2e-5, rtol=1e-4)


def test_to_the_machines_memory(gpt2: Any, tokens: Tensor) -> None:
    found = mi.run(gpt2, tokens, capture=CAPTURE, store="cpu")
    same(found, mi.run(gpt2, tokens, capture=CAPTURE))
    assert found.logits.device == torch.device("cpu")


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_save_and_load(gpt2: Any, tokens: Tensor, tmp_path: Path, name: str) -> None:
    task = mi.Task(
        name="t", clean=tokens, corrupt=tokens, right=[1] * 3, wrong=[2] * 3, positions={"S": [1, 2, 0]},
        mask=torch.arange(7) < torch.tensor([[7], [4], [5]]),
    )  # fmt: skip
    # The first block's output is the second's input: one tensor under two names.
    found = mi.run(gpt2, task, capture="L0.resid_post | L1.resid_pre | L0.H1.z[S] | L1.pattern")
    path = found.cache.save(tmp_path / name)
    assert path == tmp_path / name
    again = mi.Cache.load(path, gpt2)
    same(again, found)
    for key in ("L0.z[S]", "L0.H2.z[-1]", "L1.pattern[0]"):
        assert torch.equal(again[key], found[key])
    assert again.bytes == found.cache.bytes
    assert repr(again).startswith("Cache: 4 activations, ")
    assert "MiB of it on disk" in repr(again)
    # Once more to the same place, from what lies there.
    again.save(path)
    same(mi.Cache.load(path, gpt2), found)
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_plain_modules(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    model = mi.load(net, sites={"hidden": ("1", ("batch", "neuron"))}, example=torch.ones(3, 4), name="net")
    inputs = torch.randn(5, 4)
    whole = mi.run(model, inputs, capture="hidden")
    same(mi.run(model, inputs, capture="hidden", logits=False), whole)
    found = mi.run(model, inputs, capture="hidden", batch=2, store=tmp_path / "hidden")
    torch.testing.assert_close(found.logits, whole.logits)
    torch.testing.assert_close(mi.Cache.load(tmp_path / "hidden", model)["N3.hidden"], whole["N3.hidden"])
    refuse(
        ModelError,
        "net is a plain module, which generates no text; mi.run and mi.HookRegistry work on it",
        lambda: mi.generate(model, [[1]], max_new_tokens=1),
    )


def test_positions_by_text_are_kept(smollm2: Any, tmp_path: Path) -> None:
    """In prompts of unequal length, in parts, while generating, and after reading them from a file."""
    texts = ["When Mary and John went out", "Today Mary sang"]
    found = mi.run(smollm2, texts, capture="L0.resid_post['Mary']", logits=False)
    site = next(iter(found.cache))
    for row, pos in enumerate([2, 2]):
        assert torch.equal(found[site][row], found["L0.resid_post"][row, pos])
    assert torch.equal(mi.Cache.load(found.cache.save(tmp_path / "mary"), smollm2)[site], found[site])
    parts = mi.run(smollm2, texts, capture=site, batch=1, keep=[-1], edits=[mi.Zero("L0.resid_post['Mary']")])
    assert float(parts[site].abs().max()) == 0
    # The last token of the shorter prompt fills its row, and is there once all the same.
    zero = mi.Zero("L0.resid_post['Mary']")
    last = mi.run(smollm2, ["Today Mary", "Mary went out and sang"], edits=[zero], capture="L0.resid_post")
    assert float(last["L0.resid_post['Mary']"].abs().max()) == 0
    made = mi.generate(smollm2, texts, max_new_tokens=2, edits=[mi.Zero("L0.resid_post['Mary']")], capture="L0.resid_post")
    assert float(made["L0.resid_post[2]"].abs().max()) == 0


def test_dtypes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    layout = {
        "a": ((3, 2), torch.bfloat16), "b": ((2, 2), torch.float64), "c": ((5,), torch.uint8), "d": ((3,), torch.float16),
        "e": ((2, 1), torch.int64),
    }  # fmt: skip
    made = mapped_file(tmp_path / "all.safetensors", layout, {"x": "y"})
    for i, tensor in enumerate(made.values()):
        tensor.fill_(i + 1)
    read = load_file(tmp_path / "all.safetensors")
    for name, (shape, dtype) in layout.items():
        assert read[name].dtype == dtype
        assert tuple(read[name].shape) == shape
        assert torch.equal(read[name], made[name])


def test_nothing_half_done_stays(gpt2: Any, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(value: Tensor, site: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mi.run(gpt2, tokens, capture="L0.z", edits=[mi.Call("L1.z", fail)], store=tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    found = mi.run(gpt2, tokens, capture="L0.z").cache
    found.save(tmp_path / "kept")
    found.save(tmp_path / "kept.safetensors")
    bytes_before = (tmp_path / "kept.safetensors").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    for name in ("kept", "kept.safetensors"):
        with pytest.raises(OSError, match="full"):
            found.save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "kept.safetensors", "run"]
    assert torch.equal(mi.Cache.load(tmp_path / "kept", gpt2)["L0.z"], found["L0.z"])
    assert (tmp_path / "kept.safetensors").read_bytes() == bytes_before


def refuse(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_files_that_are_refused(gpt2: Any, llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    found = mi.run(gpt2, tokens, capture="L0.z").cache
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    here = tmp_path / "mine"
    refuse(
        FileFormatError,
        f"{here} is there already and is no cache of activations; choose another name",
        lambda: found.save(here),
    )
    refuse(
        FileFormatError,
        f"{here} is there already and not an empty folder; activations go to a new one",
        lambda: mi.run(gpt2, tokens, capture="L0.z", store=here),
    )
    (tmp_path / "a.safetensors").mkdir()
    refuse(
        FileFormatError,
        f"{tmp_path / 'a.safetensors'} is a folder; save to a path without .safetensors, or to a file in it",
        lambda: found.save(tmp_path / "a.safetensors"),
    )
    with pytest.raises(
        FileFormatError, match=r"holds no cache of activations \(FileNotFoundError: .*; they are written by cache"
    ):
        mi.Cache.load(here, gpt2)
    mapped_file(tmp_path / "other.safetensors", {"x": ((1,), torch.float32)})
    other = tmp_path / "other.safetensors"
    refuse(
        FileFormatError,
        f"{other} holds no cache of activations: it does not say that it is one",
        lambda: mi.Cache.load(other, gpt2),
    )
    folder = found.save(tmp_path / "good")
    with pytest.raises(
        FileFormatError, match=r"was captured from tiny-gpt2 with \{'architecture': 'GPT2LMHeadModel', .* but tiny-ll"
    ):
        mi.Cache.load(folder, llama)
    index = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps(index | {"version": 9}))
    refuse(FileFormatError, f"{folder} has version 9 of the format, not 1; capture anew", lambda: mi.Cache.load(folder, gpt2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logits": False}, SelectorError, "nothing is asked for: logits=False goes with capture="),
        (
            {"logits": False, "keep": [0], "capture": "L0.z"},
            SelectorError,
            "logits=False unembeds nothing, keep= says what to unembed; give one of them",
        ),
        (
            {"logits": False, "capture": "logits"},
            SelectorError,
            "with logits=False the logits have other positions than the prompts; leave out logits=False or 'logits'",
        ),
        (
            {"grad": True, "batch": 2},
            SelectorError,
            "grad=True keeps one whole forward pass on the model's device; leave out store=, batch= and logits=False",
        ),
        ({"batch": 0}, SelectorError, "batch=0: give the number of prompts that run at a time, 1 or more"),
        (
            {"batch": 2, "edits": [mi.Noise("L0.z", 0.1, seed=0)]},
            EditError,
            "Noise('L0.z', sigma=0.1, seed=0) is about certain rows of all prompts, and with batch=2 only so many run at a time",
        ),
        (
            {"batch": 2, "edits": [mi.Zero("L0.z", rows=(0, 1))]},
            EditError,
            "Zero('L0.z', rows=(0, 1)) is about certain rows of all prompts, and with batch=2 only so many run at a time",
        ),
        (
            {"batch": 2, "edits": [mi.Replace("L0.H1.z[0]", torch.zeros(2, 8))]},
            EditError,
            "Replace('L0.H1.z[0]', value=<[2, 8]>) is about certain rows of all prompts, and with batch=2 only so many run at a "
            "time",
        ),
        (
            {"capture": "L0.z", "memory": "2 gigs"},
            SelectorError,
            "there is no unit 'gigs' of memory in '2 gigs'. There are: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB.",
        ),
    ],
)
def test_options_that_exclude_each_other(
    gpt2: Any, tokens: Tensor, same_hooks: Any, options: Any, error: type[Exception], message: str
) -> None:
    with same_hooks(gpt2):
        refuse(error, message, lambda: mi.run(gpt2, tokens, **options))


def test_edits_for_all_rows_go_with_parts(gpt2: Any, tokens: Tensor) -> None:
    edits = [mi.Add("L0.mlp_out", torch.ones(32)), mi.Project("L1.resid_pre", torch.eye(32)[:2]), mi.Zero("L0.H1.z[-1]")]
    edits.append(mi.Mean("L1.mlp_out", torch.randn(7, 32)))
    one, other = (mi.run(gpt2, tokens, edits=edits, batch=batch).logits for batch in (1, None))
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
