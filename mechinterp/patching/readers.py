"""The writers and readers of the computation graph as activations of a model.

A writer is a head, an MLP or the embedding; a reader is a port of a head (q, k, v), an MLP, or the logits. What a
writer contributes and what a reader reads are both ``[batch pos d_model]``, before the reader's norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from einops import einsum, rearrange
from torch import Tensor

from mechinterp.core.model import Model
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.graph import Edge, GraphShape, scored_edges

__all__ = ["EMBED", "Layout", "ReaderGroup", "head_changes", "layout_of"]

# Token and position embeddings together. Positions are the same in both runs, so a line between the two values of
# this site is a line between the token embeddings.
EMBED = Site("resid_pre", 0)


@dataclass(frozen=True)
class ReaderGroup:
    """Readers that read the same residual stream at the same point: one port of one layer, an MLP, or the logits.

    ``site`` is the activation whose edit changes what they read; ``readers`` are positions in `Layout.readers`
    and ``n_writers`` how many writers come before.
    """

    port: str
    layer: int
    site: Site
    readers: range
    n_writers: int


@dataclass(frozen=True)
class Layout:
    """Writers and readers in the order of the forward pass, and the edges between them.

    Parameters
    ----------
    writers
        Node names.
    readers
        ``(node, port)`` pairs.
    edges
        As `mechinterp.graph.scored_edges`; edge ``i`` joins ``writers[src[i]]`` to ``readers[dst[i]]``.
    """

    shape: GraphShape
    writers: tuple[str, ...]
    readers: tuple[tuple[str, str], ...]
    groups: tuple[ReaderGroup, ...]
    edges: tuple[Edge, ...]
    src: tuple[int, ...]
    dst: tuple[int, ...]

    @cached_property
    def writer_at(self) -> dict[str, int]:
        """Where each node is among the writers."""
        return {name: i for i, name in enumerate(self.writers)}

    @cached_property
    def reader_at(self) -> dict[tuple[str, str], int]:
        """Where each node and port is among the readers."""
        return {reader: i for i, reader in enumerate(self.readers)}

    @property
    def written(self) -> Selection:
        """The activations that what the writers write is computed from."""
        layers = range(self.shape.n_layers)
        sites = [EMBED, *(Site("z", layer) for layer in layers)]
        if not self.shape.attn_only:
            sites += [Site("mlp_out", layer) for layer in layers]
        return Selection(tuple(sites))

    def stacked(self, stream: Callable[[Site], Tensor], heads: Callable[[int], Tensor]) -> Tensor:
        """``[batch writer (pos d_model)]``: all writers in order, of ``stream(site)`` ``[batch pos d_model]`` of the embedding
        and the MLPs, and ``heads(layer)`` ``[batch pos head d_model]``.
        """
        first = stream(EMBED)
        batch, length, width = first.shape
        table = first.new_empty(batch, len(self.writers), length * width)
        table[:, 0] = first.reshape(batch, -1)
        for layer in range(self.shape.n_layers):
            table[:, self.head_writers(layer)] = rearrange(heads(layer), "b p h m -> b h (p m)")
            if not self.shape.attn_only:
                table[:, self.mlp_writer(layer)] = stream(Site("mlp_out", layer)).reshape(batch, -1)
        return table

    def head_writers(self, layer: int) -> slice:
        """Where the heads of a layer are among the writers."""
        first = 1 + layer * self._per_layer
        return slice(first, first + self.shape.n_heads)

    def mlp_writer(self, layer: int) -> int:
        """Where the MLP of a layer is among the writers."""
        return 1 + layer * self._per_layer + self.shape.n_heads

    @property
    def _per_layer(self) -> int:
        return self.shape.n_heads + (not self.shape.attn_only)


def layout_of(model: Model) -> Layout:
    """Writers, readers and edges of a model."""
    return _layout(GraphShape.of(model))


def head_changes(model: Model, layer: int, before: Tensor, after: Tensor) -> Tensor:
    """How what the stream gets changes when one head at a time mixes other values: ``[batch pos head d_model]``.

    ``before`` and ``after`` are z ``[batch pos head d_head]``. Where attention's output passes a norm before it is added,
    a head's part is not its own: it is the change of the normed sum with all other heads as they were ``before``.
    """
    if not model.cfg.post_norm:
        wide = torch.promote_types(after.dtype, torch.float32)
        return einsum((after - before).to(wide), model.projection(layer, "o").weight.to(wide), "b p h d, h d m -> b p h m")
    heads = torch.eye(before.shape[2], dtype=torch.bool, device=before.device)
    with torch.no_grad():
        one_changed = torch.where(heads[:, None, None, :, None], after, before)
        added = model.attention_adds(layer, rearrange(one_changed, "n b p h d -> (n b) p h d"))
        changed = rearrange(added, "(n b) p m -> b p n m", b=len(before))
        return changed - model.attention_adds(layer, before).unsqueeze(2)


@lru_cache(maxsize=16)
def _layout(shape: GraphShape) -> Layout:
    writers = ["embed"]
    readers: list[tuple[str, str]] = []
    groups: list[ReaderGroup] = []

    def group(port: str, layer: int, site: Site, nodes: list[str], n_writers: int) -> None:
        first = len(readers)
        readers.extend((node, port) for node in nodes)
        groups.append(ReaderGroup(port, layer, site, range(first, len(readers)), n_writers))

    grouped = shape.n_kv_heads < shape.n_heads
    for layer in range(shape.n_layers):
        before = len(writers)
        heads = [f"a{layer}.h{i}" for i in range(shape.n_heads)]
        kv = [f"a{layer}.kv{i}" for i in range(shape.n_kv_heads)] if grouped else heads
        for port, nodes in (("q", heads), ("k", kv), ("v", kv)):
            group(port, layer, Site(f"{port}_in", layer), nodes, before)
        writers += heads
        if not shape.attn_only:
            group("in", layer, Site("mlp_in", layer), [f"m{layer}"], before if shape.parallel else len(writers))
            writers.append(f"m{layer}")
    group("in", shape.n_layers - 1, Site("resid_post", shape.n_layers - 1), ["logits"], len(writers))
    edges = tuple(scored_edges(shape))
    writer_at = {name: i for i, name in enumerate(writers)}
    reader_at = {reader: i for i, reader in enumerate(readers)}
    return Layout(
        shape,
        tuple(writers),
        tuple(readers),
        tuple(groups),
        edges,
        tuple(writer_at[edge.src] for edge in edges),
        tuple(reader_at[edge.dst, edge.port] for edge in edges),
    )
