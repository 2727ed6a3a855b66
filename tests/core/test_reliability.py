"""What holds for every public call that runs a model: nothing left behind, nothing foreign touched, whatever happens."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.hooks import active_registries
from mechinterp.core.plan import plan_cells, sweep
from mechinterp.core.sites import Site
from tests.core.conftest import census

Calls = dict[str, Callable[[Any, Any, Any], Any]]


def circuit_of(model: Any, task: Any) -> Any:
    return mi.Circuit.full(model)


# Every public function that runs the model it is given: (model, task, metric).
CALLS: Calls = {
    "run": lambda model, task, metric: mi.run(model, task, edits=[mi.Scale("L0.z[-1]", 2.0)], capture="L*.resid_post"),
    "run, stopped": lambda model, task, metric: mi.run(model, task, capture="L0.resid_post", logits=False),
    "run, in parts": lambda model, task, metric: mi.run(model, task, capture="L1.z", batch=2, memory=1),
    "patch": lambda model, task, metric: mi.patch(model, task, "L*.H*.z", metric=metric),
    "patch, whole passes": lambda model, task, metric: mi.patch(model, task, "L*.H*.q", metric=metric),
    "attribute": lambda model, task, metric: mi.attribute(model, task, metric=metric, steps=2),
    "attribute edges": lambda model, task, metric: mi.attribute(model, task, unit="edge", metric=metric),
    "discover": lambda model, task, metric: mi.discover(model, task, edges=8, metric=metric),
    "run_circuits": lambda model, task, metric: mi.run_circuits(model, task, [circuit_of(model, task)], metric=metric),
    "evaluate": lambda model, task, metric: mi.evaluate(circuit_of(model, task), model, task, metric=metric, seed=0),
    "describe": lambda model, task, metric: mi.describe(circuit_of(model, task), model, task),
    "audit": lambda model, task, metric: mi.audit(model),
    "generate": lambda model, task, metric: mi.generate(
        model, task, max_new_tokens=3, edits=[mi.Scale("L0.z", 2.0)], capture="L1.z", stop=()
    ),
}
WITH_METRIC = [name for name in CALLS if name not in ("run", "run, stopped", "run, in parts", "describe", "audit", "generate")]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, twins_of: Callable[..., Any]) -> Any:
    return twins_of(request.param, seed=2).model


@pytest.fixture(scope="module")
def task() -> Any:
    clean = torch.randint(1, 61, (4, 7), generator=torch.Generator().manual_seed(5))
    corrupt = clean.clone()
    corrupt[:, 3] = (clean[:, 3] + 7) % 60 + 1
    return mi.Task(name="random", clean=clean, corrupt=corrupt, right=[3, 9, 27, 40], wrong=[8, 5, 33, 2])


@pytest.fixture
def untouched() -> Callable[[Any], Any]:
    """``with untouched(model): ...``: hooks, mode, gradients, parameters' identity and this thread's registries stay."""

    def state(model: Any) -> Any:
        modules = list(model.hf.modules())
        grads = [(id(weight), weight.grad is None, weight.requires_grad) for weight in model.hf.parameters()]
        forwards = [module.__dict__.get("forward") for module in modules]
        return (
            census(model),
            grads,
            [module.training for module in modules],
            forwards,
            active_registries(),
            torch.is_grad_enabled(),
        )

    @contextmanager
    def check(model: Any) -> Iterator[None]:
        before = state(model)
        try:
            yield
        finally:
            assert state(model) == before

    return check


@contextmanager
def interrupted(model: Any, at: int, error: BaseException) -> Iterator[list[int]]:
    """The error comes out of the middle of the model, when an MLP is called for the ``at``-th time. No hook is involved."""
    calls: list[int] = []
    modules = [model.block(layer).mlp.original_component for layer in range(2)]
    for module in modules:

        def forward(*args: Any, inner: Any = module.forward, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                raise error
            return inner(*args, **kwargs)

        module.forward = forward
    try:
        yield calls
    finally:
        for module in modules:
            del module.forward


# -- hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_left(model: Any, task: Any, untouched: Any, name: str) -> None:
    base = model(task.clean)
    with untouched(model):
        CALLS[name](model, task, None)
    assert torch.equal(model(task.clean), base)


@pytest.mark.parametrize("name", CALLS)
# Of other errors the audit takes some for a site that is refused.
@pytest.mark.parametrize("error", [OverflowError("mine"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_nothing_is_left_by_an_interruption(model: Any, task: Any, untouched: Any, name: str, error: BaseException) -> None:
    """At the start, in the middle and at the end of everything that the call makes the model do."""
    # What is checked once on each model belongs to nobody's call.
    mi.patch(model, task[:1], "L0.H0.z")
    with interrupted(model, -1, error) as calls:
        CALLS[name](model, task, None)
    total = len(calls)
    assert total > 0
    base = model(task.clean)
    for at in sorted({1, (total + 1) // 2, total}):
        with interrupted(model, at, error), untouched(model), pytest.raises(type(error)) as caught:
            CALLS[name](model, task, None)
        assert caught.value is error
    assert torch.equal(model(task.clean), base)


@pytest.mark.parametrize("name", WITH_METRIC)
@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_nothing_is_left_by_a_metric_that_fails(model: Any, task: Any, untouched: Any, name: str, error: BaseException) -> None:
    def metric(logits: Tensor, task: Any) -> Tensor:
        raise error

    with untouched(model), pytest.raises(type(error)) as caught:
        CALLS[name](model, task, metric)
    assert caught.value is error


@pytest.mark.parametrize("name", CALLS)
def test_hooks_of_the_caller_survive_and_fire(model: Any, task: Any, untouched: Any, name: str) -> None:
    fired: list[str] = []
    handles = [
        model.hf.register_forward_hook(lambda *_: fired.append("after")),
        model.hf.register_forward_pre_hook(lambda *_: fired.append("before")),
        model.block(1).mlp.original_component.register_forward_hook(lambda *_: fired.append("inside")),
        model.block(0).mlp.original_component.register_full_backward_hook(lambda *_: fired.append("backwards")),
    ]
    try:
        with untouched(model):
            CALLS[name](model, task, None)
        # Whole forward passes, and no other.
        assert fired.count("before") == fired.count("after") > 0
        # The audit calls parts of blocks by themselves as well.
        assert fired.count("inside") == fired.count("before") or (name == "audit" and "inside" in fired)
        assert ("backwards" in fired) == name.startswith(("attribute", "discover", "describe"))
        with interrupted(model, 1, KeyboardInterrupt()), untouched(model), pytest.raises(KeyboardInterrupt):
            CALLS[name](model, task, None)
        with untouched(model), pytest.raises(OverflowError):
            handle = model.block(1).register_forward_hook(lambda *_: (_ for _ in ()).throw(OverflowError))
            try:
                CALLS[name](model, task, None)
            finally:
                handle.remove()
        fired.clear()
        model(task.clean)
        assert fired == ["before", "inside", "after"]
    finally:
        for handle in handles:
            handle.remove()


def test_generators_that_are_closed_early(model: Any, task: Any, untouched: Any) -> None:
    sites = [Site("q", layer, head) for layer in range(2) for head in range(4)]
    cells = [((site, torch.zeros(4, 7, 8)),) for site in sites]
    plan = plan_cells(model, 4, 7, [[site] for site in sites], start=0, read=task.answer_pos, memory=1)
    assert plan.calls > 1
    with untouched(model):
        going = sweep(plan, model, task.corrupt, cells, read=task.answer_pos)
        next(going)
        going.close()

    def walk() -> Iterator[Tensor]:
        registry = mi.HookRegistry(model)
        registry.add(mi.Zero("L0.z"))
        with registry:
            while True:
                yield model(task.clean)

    base = model(task.clean)
    with untouched(model):
        going = walk()
        inside = next(going)
        going.close()
    assert torch.equal(model(task.clean), base)
    assert not torch.equal(inside, base)
    # Begun here, closed by another thread, which has a context of its own.
    before = census(model)
    going = walk()
    next(going)
    closing = threading.Thread(target=going.close)
    closing.start()
    closing.join()
    assert census(model) == before
    assert active_registries() == 0
    assert torch.equal(model(task.clean), base)
    # Dropped without a word.
    with untouched(model):
        going = walk()
        next(going)
        del going
        gc.collect()


# -- right answers ---------------------------------------------------------------------------------


def test_threads_on_one_model(model: Any, task: Any, untouched: Any) -> None:
    """Different calls at once, again and again, each with its own right answer."""
    jobs: list[Callable[[], Any]] = [
        lambda: mi.run(model, task, edits=[mi.Scale("L0.mlp_out", 2.0)], capture="L1.z")["L1.z"],
        lambda: mi.run(model, task, edits=[mi.Zero("L0.H1.z[-1]")], capture="L0.resid_post", logits=False)["L0.resid_post"],
        lambda: mi.generate(model, task, max_new_tokens=4, edits=[mi.Scale("L0.z", 3.0)], stop=()).logits,
        lambda: mi.patch(model, task, "L*.H*.q").per_example,
    ]
    alone = [job() for job in jobs]
    found: dict[int, Any] = {}
    start = threading.Barrier(len(jobs), timeout=60)

    def work(i: int) -> None:
        try:
            start.wait()
            found[i] = [jobs[i]() for _ in range(4)]
        except BaseException as error:  # a thread's error would be printed, and the test pass
            found[i] = error

    with untouched(model):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, wanted in enumerate(alone):
        assert isinstance(found[i], list), found[i]
        for each in found[i]:
            torch.testing.assert_close(each, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["run", "run, in parts", "patch", "attribute", "run_circuits", "generate"])
def test_a_batch_is_its_prompts_one_by_one(model: Any, task: Any, name: str) -> None:
    def numbers(part: Any) -> Tensor:
        if name in ("patch", "attribute"):
            # One unit is the mean over the prompts, so only unnormalised effects can be compared.
            return getattr(mi, name)(model, part, "L*.H*.z", normalize=False).per_example.movedim(-1, 0)
        found = CALLS[name](model, part, None)
        return found.circuits.T if name == "run_circuits" else found.logits

    together = numbers(task)
    alone = torch.cat([numbers(part) for part in task])
    torch.testing.assert_close(together, alone, atol=5e-5, rtol=1e-4)


def test_putting_itself_back_changes_no_bit(twins: Any, tokens: Tensor) -> None:
    """Of a run every part, and of a text what was read at each position."""
    model = twins.model
    names = " | ".join(f"L*.{name}" for name in model.sites if name not in ("embed", "pos_embed", "final_norm", "logits"))
    base = mi.run(model, tokens, capture=f"embed | {names} | final_norm | logits")
    for site in base.cache:
        assert torch.equal(mi.run(model, tokens, edits=[mi.Replace(site, base[site])]).logits, base.logits), site
    text = mi.generate(model, tokens, max_new_tokens=4, capture="L*.resid_mid" if "L*.resid_mid" in names else "L*.z", stop=())
    edits = [mi.Replace(site.at(pos), text[site][:, pos]) for site in text.cache for pos in range(10)]
    again = mi.generate(model, tokens, max_new_tokens=4, edits=edits, stop=())
    assert torch.equal(again.logits, text.logits)
    assert torch.equal(again.tokens, text.tokens)
