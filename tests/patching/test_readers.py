"""Writers and readers as activations: the layout and the graph are the same graph."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.graph import scored_edges
from mechinterp.patching.readers import Layout, _layout, head_changes, layout_of
from tests.core.conftest import ARCHITECTURES, module_of

SHAPES = [
    mi.GraphShape(n_layers=3, n_heads=4),
    mi.GraphShape(n_layers=2, n_heads=6, n_kv_heads=2),
    mi.GraphShape(n_layers=2, n_heads=4, n_kv_heads=1, parallel=True),
    mi.GraphShape(n_layers=2, n_heads=2, attn_only=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_layout_is_the_graph(shape: mi.GraphShape) -> None:
    layout = _layout(shape)
    assert layout.edges == tuple(scored_edges(shape))
    assert layout.writers == shape.writers
    assert sorted(layout.readers) == sorted(shape.readers)
    for edge, src, dst in zip(layout.edges, layout.src, layout.dst, strict=True):
        assert (layout.writers[src], *layout.readers[dst]) == tuple(edge)
    # Groups cover every reader once, and say how many writers it hears.
    covered = [i for group in layout.groups for i in group.readers]
    assert covered == list(range(len(layout.readers)))
    for group in layout.groups:
        for i in group.readers:
            node, port = layout.readers[i]
            assert port == group.port
            assert {src for src, dst in zip(layout.src, layout.dst, strict=True) if dst == i} == set(range(group.n_writers))
            assert group.n_writers == shape.n_writers_before(node)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_writers_lie(shape: mi.GraphShape) -> None:
    layout = _layout(shape)
    for layer in range(shape.n_layers):
        assert layout.writers[layout.head_writers(layer)] == tuple(f"a{layer}.h{i}" for i in range(shape.n_heads))
        if not shape.attn_only:
            assert layout.writers[layout.mlp_writer(layer)] == f"m{layer}"
    assert len(layout.written) == 1 + shape.n_layers * (1 if shape.attn_only else 2)


def test_a_group_is_read_where_its_site_is(tiny_llama: object) -> None:
    model = tiny_llama()  # type: ignore[operator]
    layout: Layout = layout_of(model)
    tokens = torch.randint(0, 61, (2, 5))
    for group in layout.groups:
        seen = mi.run(model, tokens, capture=group.site)[group.site]
        n = len(group.readers)
        assert list(seen.shape) == ([2, 5, 32] if group.port == "in" else [2, 5, n, 32])


def test_attention_only_models_have_no_mlps() -> None:
    assert not [name for name in layout_of(mi.toys.trained().model).writers if name.startswith("m")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_head_changes(architecture: str) -> None:
    """With every head changed but one at a time: by hand, through the norm behind them where there is one."""
    model = mi.load(module_of(architecture))
    before, after = torch.randn(2, 2, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    found = head_changes(model, 1, before, after)
    for head in range(4):
        one = before.clone()
        one[:, :, head] = after[:, :, head]
        expected = (model.attention_adds(1, one) - model.attention_adds(1, before)).detach()
        torch.testing.assert_close(found[:, :, head], expected, atol=1e-5, rtol=1e-5)
