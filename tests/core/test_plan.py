"""Many counterfactual runs at once: the same answers as one full forward pass for each, and the cost as it was said.

Largest difference seen between a sweep and single full forward passes: 2e-6 of the largest logit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mechinterp as mi
from mechinterp.core.plan import Cell, answer_logits, plan_cells, rows_per_forward, sweep
from mechinterp.core.replay import ENTRIES
from mechinterp.core.sites import Site

READ = torch.tensor([6, 5, 6])
WHERE = torch.tensor([3, 4, 3])
CLOSE = 5e-6


def cells_of(model: Any, tokens: Tensor, patterns: list[str], start: int) -> list[Cell]:
    """For each pattern one run that changes its sites, from position ``start`` on."""
    generator = torch.Generator().manual_seed(1)
    cells: list[Cell] = []
    for pattern in patterns:
        cell = []
        sites = mi.select(pattern, model.cfg)
        kept = mi.run(model, tokens, capture=mi.Selection(tuple(dict.fromkeys(site.whole for site in sites))))
        for site in sites:
            whole = kept[site.whole]
            noise = torch.randn(whole.shape, generator=generator) * whole.nan_to_num(0, 0, 0).clamp(-10, 10).abs().mean()
            axis = site.kind.pos_axis
            assert axis is not None
            noise.narrow(axis, 0, start).zero_()
            changed = mi.Cache(model, sites, {site.whole: whole + noise}, {"S": WHERE})
            cell.append((site, changed[site].clone()))
        cells.append(cell)
    return cells


def one_by_one(model: Any, tokens: Tensor, cells: list[Cell]) -> Tensor:
    """``[cell batch vocab]`` by ordinary runs."""

    class Task:
        clean, positions = tokens, {"S": WHERE}

    rows = torch.arange(len(tokens))
    return torch.stack([mi.run(model, Task(), edits=[mi.Replace(*part) for part in cell]).logits[rows, READ] for cell in cells])


def swept(model: Any, tokens: Tensor, cells: list[Cell], *, start: int, memory: int = 1 << 30) -> tuple[Any, Tensor]:
    """The plan, and ``[cell batch vocab]`` by it."""
    plan = plan_cells(model, 3, 7, [[site for site, _ in cell] for cell in cells], start=start, read=READ, memory=memory)
    found = dict(sweep(plan, model, tokens, cells, read=READ, positions={"S": WHERE}))
    assert sorted(found) == list(range(len(cells)))
    return plan, torch.stack([found[i] for i in range(len(cells))])


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def patterns_of(model: Any) -> list[str]:
    """Whole activations, single heads and neurons, single and named positions, of both layers."""
    found = []
    for name in (*ENTRIES, "q", "pattern"):
        if name not in model.sites:
            continue
        part = {"z": "H2.z", "q": "H1.q", "pattern": "H0.pattern", "mlp_post": "N5.mlp_post"}.get(name, name)
        found += [f"L{layer}.{each}" for layer in (0, 1) for each in (name, part, f"{part}[4]", f"{part}[S]", f"{part}[-1]")]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("start", [0, 3])
def test_a_sweep_is_its_runs_one_by_one(twins: Any, tokens: Tensor, same_hooks: Any, start: int) -> None:
    cells = cells_of(twins.model, tokens, patterns_of(twins.model), start)
    wanted = one_by_one(twins.model, tokens, cells)
    with same_hooks(twins.model):
        plan, found = swept(twins.model, tokens, cells, start=start)
    assert error(found, wanted) < CLOSE
    # The runs differ from each other and from the unchanged one, so a mixed-up order would be seen.
    plain = twins.model(tokens)[torch.arange(3), READ].detach()
    assert all(error(each, plain) > 1e-4 for cell, each in zip(cells, wanted, strict=True) if not _unseen(cell))
    in_full = sum(cell[0][0].name in ("q", "pattern") for cell in cells)
    assert plan.cells - plan.replayed == in_full


def _unseen(cell: Cell) -> bool:
    """In the last layer a change at one position is seen there alone, and nobody reads position 4."""
    site = cell[0][0]
    return site.layer == 1 and site.pos is not None


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_every_site_can_be_swept(twins_of: Callable[..., Any], tokens: Tensor, architecture: str) -> None:
    model = twins_of(architecture).model
    names = [name for name in model.sites if name not in ("logits", "scores")]
    patterns = [f"L0.{name}" if name not in ("embed", "pos_embed", "final_norm") else name for name in names]
    cells = cells_of(model, tokens, patterns, 0)
    assert error(swept(model, tokens, cells, start=0)[1], one_by_one(model, tokens, cells)) < CLOSE


def test_cells_of_many_sites(gpt2: Any, tokens: Tensor) -> None:
    cells = cells_of(gpt2, tokens, ["L0.H0.z | L0.H2.z[3]", "L0.H0.z | L1.H2.z", "L0.mlp_out | L0.H1.z", "embed"], 2)
    plan, found = swept(gpt2, tokens, cells, start=2)
    assert error(found, one_by_one(gpt2, tokens, cells)) < CLOSE
    assert plan.replayed == 1
    assert plan.reason == "their sites are spread over layers, or change what attention computes"


@pytest.mark.parametrize("memory", [1, 200_000])
def test_little_memory(llama: Any, tokens: Tensor, memory: int) -> None:
    """More and shorter passes, the same answers."""
    cells = cells_of(llama, tokens, patterns_of(llama), 2)
    plan, found = swept(llama, tokens, cells, start=2, memory=memory)
    assert error(found, one_by_one(llama, tokens, cells)) < CLOSE
    assert plan.calls > swept(llama, tokens, cells, start=2)[0].calls
    if memory == 1:
        assert plan.calls == len(cells)


def test_putting_back_what_was_there(twins: Any, tokens: Tensor) -> None:
    """Every answer is that of the unchanged run. Replays sum in another order: 2e-6 was seen."""
    kept = mi.run(twins.model, tokens, capture="L*.z | L*.mlp_out | L*.resid_pre")
    cells: list[Cell] = [[(site, kept[site])] for site in kept.cache]
    found = swept(twins.model, tokens, cells, start=3)[1]
    plain = mi.run(twins.model, tokens).logits[torch.arange(3), READ]
    assert error(found, plain.expand_as(found)) < CLOSE


def test_hooks_of_the_caller_get_whole_runs(twins_of: Callable[..., Any], tokens: Tensor) -> None:
    model = twins_of("gpt2").model
    lengths: list[int] = []
    cells = cells_of(model, tokens, ["L0.z", "L1.mlp_out"], 3)
    handle = model.block(0).register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    plan, found = swept(model, tokens, cells, start=3)
    handle.remove()
    assert set(lengths) == {7}
    assert plan.replayed == 0
    assert plan.reason == "1 hooks of yours are attached, which expect whole forward passes"
    assert error(found, one_by_one(model, tokens, cells)) < CLOSE
    assert swept(model, tokens, cells, start=3)[0].replayed == 2


def test_inside_a_registry_its_edits_act_as_well(twins: Any, tokens: Tensor, same_hooks: Any) -> None:
    model, edit = twins.model, mi.Zero("L0.mlp_out")
    cells = cells_of(model, tokens, ["L0.H1.z", "L1.resid_pre"], 2)
    rows = torch.arange(3)
    wanted = torch.stack(
        [mi.run(model, tokens, edits=[edit, *(mi.Replace(*part) for part in cell)]).logits[rows, READ] for cell in cells]
    )
    registry = mi.HookRegistry(model)
    registry.add(edit)
    with same_hooks(model), registry:
        plan, found = swept(model, tokens, cells, start=2)
    assert plan.reason == "it runs inside a HookRegistry, whose edits act on whole forward passes"
    assert error(found, wanted) < CLOSE


def test_nothing_is_left_by_an_error(gpt2: Any, tokens: Tensor, same_hooks: Any) -> None:
    wrong: list[Cell] = [[(Site("q", 0), torch.zeros(1))]]
    with same_hooks(gpt2), pytest.raises(mi.MechInterpError, match="the value has shape"):
        swept(gpt2, tokens, wrong, start=0)
    # A sweep that is left half-way.
    cells = cells_of(gpt2, tokens, ["L0.z", "L0.q", "L1.q"], 0)
    with same_hooks(gpt2):
        plan = plan_cells(gpt2, 3, 7, [[site for site, _ in cell] for cell in cells], start=0, read=READ, memory=1)
        steps = sweep(plan, gpt2, tokens, cells, read=READ)
        next(steps)
        steps.close()  # type: ignore[attr-defined]


# -- the cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_cost_is_what_torch_counts(twins_of: Callable[..., Any], tokens: Tensor, architecture: str) -> None:
    model = twins_of(architecture).model
    # No cell can be replayed, so it is one full forward pass for each; heads as rows of one call.
    cells = cells_of(model, tokens, ["L0.q", "L1.q", "L0.pattern"], 0)
    read = torch.tensor([6, 6, 6])
    plan = plan_cells(model, 3, 7, [[site for site, _ in cell] for cell in cells], start=0, read=read)
    with FlopCounterMode(display=False) as counter:
        list(sweep(plan, model, tokens, cells, read=read))
    assert counter.get_total_flops() == pytest.approx(plan.flops, rel=0.02)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for _ in cells:
            model(tokens)
    assert counter.get_total_flops() == pytest.approx(plan.flops_full, rel=0.02)


@pytest.mark.parametrize("where", ["L*.H*.z", "L*.mlp_out", "L*.resid_pre", "L*.mlp_in"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_cost_of_replays_is_what_torch_counts(
    twins_of: Callable[..., Any], tokens: Tensor, architecture: str, where: str
) -> None:
    model = twins_of(architecture).model
    read = torch.tensor([6, 6, 6])
    cells = cells_of(model, tokens, [str(site) for site in mi.select(where, model.cfg)], 3)
    plan = plan_cells(model, 3, 7, [[site for site, _ in cell] for cell in cells], start=3, read=read)
    assert plan.replayed == len(cells)
    with FlopCounterMode(display=False) as counter:
        list(sweep(plan, model, tokens, cells, read=read))
    assert counter.get_total_flops() == pytest.approx(plan.flops, rel=0.1)


def test_rows(llama: Any) -> None:
    assert rows_per_forward(llama, 7, memory=1) == 1
    one = rows_per_forward(llama, 7)
    assert rows_per_forward(llama, 7, memory=2 << 30) == pytest.approx(2 * one, abs=1)
    assert rows_per_forward(llama, 14) < one / 2 + 1


def test_repr(gpt2: Any, tokens: Tensor) -> None:
    whole = plan_cells(gpt2, 3, 7, [[Site("q", 0)], [Site("z", 0)]], start=0, read=READ)
    assert re.fullmatch(
        r"Plan: 2 cells in 2 packed passes, [\d.e-]+ TFLOP, \d\.\d\d of one full forward pass for each cell; 1 run in full: "
        "their sites are spread over layers, or change what attention computes",
        repr(whole),
    )
    part = plan_cells(gpt2, 3, 7, [[Site("z", 1)]], start=0, read=READ)
    assert repr(part).endswith(" of one full forward pass for each cell")


def test_answers_are_read_where_they_are(twins: Any, tokens: Tensor) -> None:
    full = twins.model(tokens).detach()
    for read in (READ, torch.tensor([0, 0, 0]), torch.tensor([6, 0, 3])):
        found = answer_logits(twins.model, tokens, read).detach()
        torch.testing.assert_close(found, full[torch.arange(3), read], atol=1e-5, rtol=1e-5)
