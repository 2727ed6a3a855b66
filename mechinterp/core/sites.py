"""Typed names of activations. The only file that spells a hook name.

A `Site` is what an explanation talks about: a layer's residual stream, one head's output, one neuron,
possibly at one position. It is written as researchers write it: ``L9.H6.z``, ``L3.mlp_out``,
``L0.KV1.k[-1]``. A `SiteKind` says which axes the activation has, and where in the bridge it can be seen.
A hook name is not a causal meaning, so how a site is *edited* is decided in `mechinterp.core.places`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from mechinterp.errors import SiteError, did_you_mean

__all__ = ["KINDS", "Site", "SiteKind", "kind_of", "loses_positions"]


@dataclass(frozen=True)
class SiteKind:
    """One sort of activation: its axes, and the hook point that carries it.

    Parameters
    ----------
    name
        As in TransformerLens, without the ``hook_`` prefix.
    axes
        The axes of the tensor, batch first.
    point
        Hook point inside the bridge, or submodule of a plain module; ``{}`` stands for the layer. ``None`` for the
        logits, which are the model's own output, and for sites that are computed from others.
    meaning
        One line for tables and errors.
    """

    name: str
    axes: tuple[str, ...]
    point: str | None
    meaning: str

    @property
    def per_layer(self) -> bool:
        # Of the sites without a point of their own, the logits alone are outside the blocks.
        return self.name != "logits" if self.point is None else "{}" in self.point

    @property
    def head_axis(self) -> str | None:
        """``"head"``, ``"kv_head"`` or ``None``."""
        return next((axis for axis in self.axes if axis in ("head", "kv_head")), None)

    @property
    def pos_axis(self) -> int | None:
        """Index of the axis that a position selects: ``pos``, or ``q_pos`` of a pattern."""
        return next((i for i, axis in enumerate(self.axes) if axis in ("pos", "q_pos")), None)

    @property
    def neuron_axis(self) -> int | None:
        """Index of the axis that a neuron selects: ``channel`` where there is one, or the last; ``None`` of a pattern."""
        if "channel" in self.axes:
            return self.axes.index("channel")
        last = len(self.axes) - 1
        return None if last == 0 or self.axes[-1] in ("pos", "q_pos", "k_pos", "vocab", "head", "kv_head") else last


def _kinds() -> dict[str, SiteKind]:
    stream = ("batch", "pos", "d_model")
    heads, kv_heads = ("batch", "pos", "head", "d_head"), ("batch", "pos", "kv_head", "d_head")
    square = ("batch", "head", "q_pos", "k_pos")
    rows = [
        ("embed", stream, "embed.hook_out", "token embedding"),
        ("pos_embed", stream, "pos_embed.hook_out", "learned position embedding"),
        ("resid_pre", stream, "blocks.{}.hook_in", "residual stream before the block"),
        ("resid_mid", stream, None, "residual stream between attention and MLP"),
        ("resid_post", stream, "blocks.{}.hook_out", "residual stream after the block"),
        ("attn_out", stream, "blocks.{}.hook_attn_out", "what attention adds to the residual stream"),
        ("mlp_in", stream, None, "what the MLP reads, before its norm; an edit reaches nothing else"),
        ("mlp_pre", ("batch", "pos", "d_mlp"), "blocks.{}.mlp.hook_pre", "neurons before the non-linearity"),
        ("mlp_post", ("batch", "pos", "d_mlp"), "blocks.{}.mlp.hook_post", "neurons as the output projection reads them"),
        ("mlp_out", stream, "blocks.{}.hook_mlp_out", "what the MLP adds to the residual stream"),
        ("q", heads, "blocks.{}.attn.q.hook_out", "queries, before rotary embedding"),
        ("k", kv_heads, "blocks.{}.attn.k.hook_out", "keys, before rotary embedding"),
        ("v", kv_heads, "blocks.{}.attn.v.hook_out", "values"),
        ("scores", square, "blocks.{}.attn.hook_attn_scores", "attention scores before the softmax"),
        ("pattern", square, "blocks.{}.attn.hook_pattern", "attention probabilities, as they weigh the values"),
        ("z", heads, "blocks.{}.attn.o.hook_in", "mixed values of each head, before the output projection"),
        ("head_out", ("batch", "pos", "head", "d_model"), None, "each head's part of the attention output"),
        ("q_in", ("batch", "pos", "head", "d_model"), None, "what each head's query reads, before the norm"),
        ("k_in", ("batch", "pos", "kv_head", "d_model"), None, "what each key head reads, before the norm"),
        ("v_in", ("batch", "pos", "kv_head", "d_model"), None, "what each value head reads, before the norm"),
        ("final_norm", stream, "ln_final.hook_out", "residual stream after the final norm"),
        ("logits", ("batch", "pos", "vocab"), None, "the model's output"),
    ]
    return {name: SiteKind(name, axes, point, meaning) for name, axes, point, meaning in rows}


KINDS: Mapping[str, SiteKind] = MappingProxyType(_kinds())

# Hook points that carry no site of their own, but are needed to compute or edit one.
LN2_IN = "blocks.{}.ln2.hook_in"
MLP_IN = "blocks.{}.mlp.hook_in"
ATTN_PROJECTED = "blocks.{}.attn.o.hook_out"


def loses_positions(point: object) -> bool:
    """Whether this hook point sees ``[(batch pos) ...]``: OPT flattens the stream around its MLP."""
    # transformer_lens restores the axis for hooks of its own alone.
    return type(getattr(point, "hook_conversion", None)).__name__ == "_UnflattenTokens"


def kind_of(name: str) -> SiteKind:
    """The `SiteKind` of a name; an unknown name is an error that says the nearest ones."""
    try:
        return KINDS[name]
    except KeyError:
        raise SiteError(f"there is no site {name!r}. {did_you_mean(name, KINDS)}") from None


@dataclass(frozen=True)
class Site:
    """One activation, or one part of it.

    Parameters
    ----------
    name
        A key of `KINDS`.
    layer
        Block index, or ``None`` for sites outside the blocks.
    head
        Query head or KV head, whichever the kind has; ``None`` means all of them.
    pos
        A position (negative counts from the end of the padded row), the name of a position of the task, or ``None`` for all.
    neuron
        Index into the last axis (neuron or coordinate; the channel of a convolution), or ``None`` for all.
    own
        The kind of an activation that a plain module's user has named; ``None`` for those of `KINDS`.

    Examples
    --------
    >>> str(Site("z", 9, head=6, pos=-1))
    'L9.H6.z[-1]'
    >>> Site("z", 9, head=6).whole
    Site(name='z', layer=9, head=None, pos=None, neuron=None)
    """

    name: str
    layer: int | None = None
    head: int | None = None
    pos: int | str | None = None
    neuron: int | None = None
    own: SiteKind | None = field(default=None, repr=False)

    @property
    def kind(self) -> SiteKind:
        return kind_of(self.name) if self.own is None else self.own

    @property
    def whole(self) -> Site:
        """The same activation with all heads, positions and neurons."""
        return Site(self.name, self.layer, own=self.own)

    @property
    def everywhere(self) -> Site:
        """The same part at all positions."""
        return replace(self, pos=None)

    def at(self, pos: int | str) -> Site:
        """The same part at one position."""
        return replace(self, pos=pos)

    def __str__(self) -> str:
        words = [] if self.layer is None else [f"L{self.layer}"]
        if self.head is not None:
            words.append(f"{'KV' if self.kind.head_axis == 'kv_head' else 'H'}{self.head}")
        if self.neuron is not None:
            words.append(f"N{self.neuron}")
        words.append(self.name)
        return ".".join(words) + ("" if self.pos is None else f"[{self.pos}]")
