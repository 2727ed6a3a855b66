"""The hand-written forward pass is the module: else nothing that is held against it is tested."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mechinterp import Circuit, Model
from tests.reference import Reference


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_and_edges(family: str, tiny_gpt2: Callable[..., Model], tiny_llama: Callable[..., Model]) -> None:
    model = {"gpt2": tiny_gpt2, "llama": tiny_llama}[family]()
    reference = Reference(model)
    tokens = torch.randint(0, 61, (3, 7))
    model.hf.double()
    with torch.no_grad():
        expected = model(tokens)
    # A Llama norm computes in float32 whatever the model is.
    torch.testing.assert_close(reference.run(tokens)[0], expected, atol=1e-5 if family == "llama" else 1e-12, rtol=0)
    assert set(reference.edges) == {tuple(edge) for edge in Circuit.full(model)}
    assert len(reference.edges) == len(Circuit.full(model))
