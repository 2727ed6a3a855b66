"""Edits that move values between rows, and noise that does not care how rows are packed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.edit import Edit
from mechinterp.core.rows import shuffled
from mechinterp.core.sites import Site
from mechinterp.errors import EditError

Z = Site("z", 0, head=1)


@pytest.fixture
def value() -> Tensor:
    return torch.randn(4, 7, 8)


# -- exchange --------------------------------------------------------------------------------------


def test_swap_by_hand(value: Tensor) -> None:
    assert torch.equal(mi.Swap(Z).apply(value, Z), torch.stack([value[2], value[3], value[0], value[1]]))
    found = mi.Swap(Z, pairs=((0, 3), (2, 1))).apply(value, Z)
    assert torch.equal(found, torch.stack([value[3], value[2], value[1], value[0]]))
    assert torch.equal(mi.Swap(Z, pairs=((0, 1),)).apply(value[:3], Z), value[[1, 0, 2]])
    assert torch.equal(mi.Swap(Z).apply(mi.Swap(Z).apply(value, Z), Z), value)


@pytest.mark.parametrize("at", ["L1.H2.z", "L0.mlp_out[3]", "L1.resid_pre[changed]"])
def test_swapping_is_patching_both_ways(setting: Any, at: str) -> None:
    model, task = setting.model, setting.task
    both = torch.cat([task.clean, task.corrupt])
    (site,) = mi.select(at, model.cfg)
    positions = {name: where.repeat(2) for name, where in task.positions.items()}
    pair = mi.Task("both", both, both.flip(0), [1] * 10, [2] * 10, positions=positions)
    found = mi.run(model, pair, edits=[mi.Swap(at)]).logits
    clean, corrupt = mi.run(model, pair[:5], capture=at)[site], mi.run(model, pair[5:], capture=at)[site]
    expected = torch.cat(
        [
            mi.run(model, pair[:5], edits=[mi.Replace(at, corrupt)]).logits,
            mi.run(model, pair[5:], edits=[mi.Replace(at, clean)]).logits,
        ]
    )
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)
    assert not torch.allclose(found, mi.run(model, both).logits, atol=1e-3)


# -- another row -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 7, 64])
def test_shuffling_leaves_no_row_in_its_place(n: int) -> None:
    for seed in range(5):
        order = shuffled(n, seed=seed).tolist()
        assert sorted(order) == list(range(n))
        # One cycle: going round, every row is met before the first again.
        row, met = 0, set()
        for _ in range(n):
            met.add(row)
            row = order[row]
        assert row == 0
        assert len(met) == n
    assert len({tuple(shuffled(64, seed=seed).tolist()) for seed in range(10)}) == 10


def test_resampling_takes_another_row(setting: Any, value: Tensor) -> None:
    assert torch.equal(mi.Resample(Z, seed=3).apply(value, Z), value[shuffled(4, seed=3)])
    model, tokens = setting.model, setting.task.clean
    order = shuffled(5, seed=3)
    at = "L0.H1.z | L1.mlp_out"
    other = mi.run(model, tokens[order], capture=at)
    expected = mi.run(model, tokens, edits=[mi.Freeze(at, other.cache)]).logits
    # All sites together: the second place is reached by what was put into the first, so it is put there once more.
    found = mi.run(model, tokens, edits=[mi.Resample("L0.H1.z", seed=3), mi.Freeze("L1.mlp_out", other.cache)]).logits
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)
    state = torch.get_rng_state()
    mi.run(model, tokens, edits=[mi.Resample("L0.z", seed=1), mi.Noise("L1.z", 1.0, seed=1)])
    assert torch.equal(torch.get_rng_state(), state)


# -- noise -----------------------------------------------------------------------------------------


def drawn(value: Tensor, site: Site = Z, **options: Any) -> Tensor:
    options = {"seed": 0, **options}
    return mi.Noise(site, options.pop("sigma", 1.0), **options).apply(value, site) - value


def test_noise_is_normal() -> None:
    from scipy.stats import kstest

    found = drawn(torch.zeros(40, 20, 8), sigma=0.5)
    assert kstest(found.flatten().double().numpy() / 0.5, "norm").pvalue > 0.01
    assert torch.equal(drawn(torch.zeros(2, 3), sigma=0), torch.zeros(2, 3))
    # Twice the width is twice the same draw.
    torch.testing.assert_close(drawn(torch.zeros(40, 20, 8), sigma=1), 2 * found)


def test_noise_depends_on_seed_site_and_row_alone() -> None:
    zeros = torch.zeros(6, 7, 8)
    whole = drawn(zeros)
    assert torch.equal(drawn(zeros), whole)
    assert len(whole.unique(dim=0)) == 6
    assert not torch.equal(drawn(zeros, seed=1), whole)
    assert not torch.equal(drawn(zeros, site=Site("z", 0, head=2)), whole)
    # In parts, in another order of packing, padded, in half precision.
    assert torch.equal(torch.cat([drawn(zeros[:4]), drawn(zeros[4:], first_row=4)]), whole)
    for length in (3, 5, 8, 11):
        padded = drawn(torch.zeros(6, length, 8))
        kept = min(length, 7)
        assert torch.equal(padded[:, :kept], whole[:, :kept])
    half = mi.Noise(Z, 1.0, seed=0).apply(zeros.bfloat16(), Z)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, whole.bfloat16())
    assert drawn(zeros.double()).dtype == torch.float64


@pytest.mark.parametrize("width", [1, 3, 16, 17])
def test_padding_does_not_move_noise_of_any_width(width: int) -> None:
    long = drawn(torch.zeros(2, 23, width))
    for length in range(1, 23):
        assert torch.equal(drawn(torch.zeros(2, length, width)), long[:, :length])


def test_packed_rows_get_the_noise_of_their_prompt(setting: Any) -> None:
    model, tokens = setting.model, setting.task.clean
    alone = mi.run(model, tokens, edits=[mi.Noise("embed", 0.3, seed=5)]).logits
    packed = mi.run(
        model, tokens.repeat(3, 1), edits=[mi.Noise("embed", 0.3, seed=5, rows=(5 * i, 5 * i + 5)) for i in (0, 2)]
    ).logits
    torch.testing.assert_close(packed[:5], alone, atol=5e-6, rtol=0)
    torch.testing.assert_close(packed[10:], alone, atol=5e-6, rtol=0)
    torch.testing.assert_close(packed[5:10], mi.run(model, tokens).logits, atol=5e-6, rtol=0)
    assert not torch.allclose(alone, packed[5:10], atol=1e-2)


def test_deviation_by_hand(settings: Any) -> None:
    model, task = settings["gpt2"].model, settings["gpt2"].task
    embedded = model.hf.state_dict()["transformer.wte._original_component.weight"][task.clean]
    assert mi.deviation(model, task, "embed") == pytest.approx(embedded.std(correction=0).item(), rel=1e-5)
    mask = torch.ones_like(task.clean, dtype=torch.bool)
    mask[0, 5:] = mask[3, 7:] = False
    padded = mi.Task("padded", task.clean, task.corrupt, task.right, task.wrong, mask=mask, answer_pos=3)
    assert mi.deviation(model, padded, "embed") == pytest.approx(embedded[mask].std(correction=0).item(), rel=1e-5)
    z = mi.run(model, task, capture="L1.z")["L1.z"][:, :, 1:3][mask]
    assert mi.deviation(model, padded, "L1.H1,2.z") == pytest.approx(z.std(correction=0).item(), rel=1e-5)
    pattern = mi.run(model, task, capture="L1.pattern")["L1.pattern"].transpose(1, 2)[mask]
    assert mi.deviation(model, padded, "L1.pattern") == pytest.approx(pattern.std(correction=0).item(), rel=1e-5)
    with pytest.raises(EditError, match=r"^the deviation of embed\[2\] is taken over all positions; leave out \[2\]$"):
        mi.deviation(model, task, "embed[2]")


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: mi.Swap(Z).apply(torch.zeros(3, 8), Z),
            "Swap at L0.H1.z: 3 rows have no two halves; give an even batch, or pairs=((0, 1), ...)",
        ),
        (
            lambda: mi.Swap(Z, pairs=((0, 3),)).apply(torch.zeros(3, 8), Z),
            "Swap at L0.H1.z: there is no row 3; the batch has rows 0 to 2",
        ),
        (
            lambda: mi.Swap(Z, pairs=((0, 3), (3, 1))),
            "Swap: the pairs ((0, 3), (3, 1)) name a row twice or a negative one; each row has one partner at most",
        ),
        (
            lambda: mi.Swap(Z, pairs=((0, -1),)),
            "Swap: the pairs ((0, -1),) name a row twice or a negative one; each row has one partner at most",
        ),
        (
            lambda: mi.Resample(Z, seed=0).apply(torch.zeros(1, 8), Z),
            "Resample at L0.H1.z: there is 1 row, so no other one to take the value from",
        ),
        (lambda: mi.Noise(Z, -1, seed=0), "Noise: sigma is a standard deviation, 0 or more, not -1"),
        (lambda: mi.Noise(Z, float("nan"), seed=0), "Noise: sigma is a standard deviation, 0 or more, not nan"),
    ],
)
def test_refused(make: Callable[[], Edit | Tensor], message: str) -> None:
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        make()


def test_the_seed_has_to_be_said() -> None:
    with pytest.raises(TypeError):
        mi.Noise(Z, 1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        mi.Resample(Z)  # type: ignore[call-arg]


def test_two_ways_to_set_a_value_conflict(setting: Any) -> None:
    edits = [mi.Resample("L0.z", seed=0), mi.Mean("L0.H1.z", torch.zeros(8))]
    with pytest.raises(EditError, match=r"both set L0.z; drop one, give them different rows, or say which comes last"):
        mi.run(setting.model, setting.task, edits=edits)
    # What starts from the value that is there may come after what set it.
    found = mi.run(setting.model, setting.task, edits=[edits[1], mi.Clamp("L0.H1.z", low=1)], capture="L0.H1.z")
    assert found["L0.H1.z"].unique().tolist() == [1.0]
