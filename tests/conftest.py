"""What every test stands on: checked types, fixed seeds and threads, one real model, tiny random ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

# No test may ask a model hub for anything: what is not on the machine has to be an error at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import jaxtyping

from tests.checking import checked

# Before the package is imported by anyone: axis words and types are then checked at every call of every test.
jaxtyping.jaxtyped = checked
jaxtyping.install_import_hook("mechinterp", "beartype.beartype")

import pytest
import torch

from tests.randomized import randomize
from tests.reference import Reference

if TYPE_CHECKING:
    from mechinterp import Model, Task

# Sums over other numbers of threads differ in the last bits.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks first: begun last, they would keep one worker busy for minutes while the others have nothing left."""
    items.sort(key=lambda item: "test_notebooks" not in item.nodeid)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same global random state at the start of every test."""
    torch.manual_seed(0)


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """No checking of types in this test, which passes a wrong one to see what the package itself says.

    For one case of many: ``pytest.param(..., marks=pytest.mark.usefixtures("unchecked_types"))``.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """The real model, loaded once for all tests. Do not change its weights.

    A missing model is a failure, never a skip: a green suite has to mean that it was tested.
    """
    import mechinterp
    from mechinterp.errors import MechInterpError

    try:
        return mechinterp.load("smollm2")
    except MechInterpError as error:
        return pytest.fail(f"the suite needs the real model, which `make venv` installs: {error}", pytrace=False)


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., Model]:
    """Makes random GPT-2 models: ``tiny_gpt2(n_layers=3, seed=1)``. Every call is a model of its own."""

    def make(
        *,
        n_layers: int = 2,
        n_heads: int = 4,
        d_model: int = 32,
        d_vocab: int = 61,
        n_ctx: int = 32,
        seed: int = 0,
    ) -> Model:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_layer=n_layers,
            n_head=n_heads,
            n_embd=d_model,
            vocab_size=d_vocab,
            n_positions=n_ctx,
            bos_token_id=0,
            eos_token_id=0,
        )
        return _loaded(GPT2LMHeadModel, config, f"tiny-gpt2-{seed}", seed)

    return make


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Model]:
    """Makes random Llama models with grouped queries, RMSNorm and rotary positions, as `tiny_gpt2` does."""

    def make(
        *,
        n_layers: int = 2,
        n_heads: int = 4,
        n_kv_heads: int = 2,
        d_model: int = 32,
        d_mlp: int = 48,
        d_vocab: int = 61,
        n_ctx: int = 32,
        seed: int = 0,
    ) -> Model:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            hidden_size=d_model,
            intermediate_size=d_mlp,
            vocab_size=d_vocab,
            max_position_embeddings=n_ctx,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        return _loaded(LlamaForCausalLM, config, f"tiny-llama-{seed}", seed)

    return make


@dataclass(frozen=True)
class Setting:
    """A random model, pairs for it, and the same model written out by hand."""

    model: Model
    task: Task
    reference: Reference


@pytest.fixture(scope="session")
def settings(tiny_gpt2: Callable[..., Model], tiny_llama: Callable[..., Model]) -> dict[str, Setting]:
    """``gpt2``, and ``llama`` with grouped queries; pairs that differ at two places, answers at several positions."""
    from mechinterp import Task

    clean = torch.randint(1, 61, (5, 8), generator=torch.Generator().manual_seed(5))
    corrupt = clean.clone()
    # Row by row, so that the batch's first difference is not everybody's.
    for row, places in enumerate([(2, 4), (3, 4), (2, 5), (4, 5), (3, 6)]):
        corrupt[row, list(places)] = (clean[row, list(places)] + 7) % 60 + 1
    task = Task(
        name="random",
        clean=clean,
        corrupt=corrupt,
        right=[3, 9, 27, 40, 11],
        wrong=[8, 5, 33, 2, 50],
        answer_pos=[7, 7, 6, 7, 7],
        positions={"changed": [2, 3, 2, 4, 3]},
    )
    models = {"gpt2": tiny_gpt2(seed=1), "llama": tiny_llama(seed=1)}
    return {name: Setting(model, task, Reference(model)) for name, model in models.items()}


@pytest.fixture(params=["gpt2", "llama"])
def setting(request: pytest.FixtureRequest, settings: dict[str, Setting]) -> Setting:
    """One of the two."""
    return settings[request.param]


def _loaded(architecture: Any, config: Any, name: str, seed: int) -> Model:
    import mechinterp

    # A fused attention kernel would round differently from the eager one that the bridge runs.
    config._attn_implementation = "eager"
    module = randomize(architecture(config).eval(), seed)
    return mechinterp.load(module, name=name)
