"""Which sites mean what they say on this model, proved by a few tiny forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.edits import Call, Replace
from mechinterp.core.laws import LAWS, Law, after, joint_norm, tame, tolerance
from mechinterp.core.model import Model
from mechinterp.core.run import run
from mechinterp.core.select import Selection
from mechinterp.core.sites import KINDS, Site
from mechinterp.errors import InertError, MechInterpError

__all__ = ["Audit", "audit"]

# A position before the edited one, and one after.
LENGTH, POS = 3, 1


@dataclass(frozen=True)
class Audit:
    """The result of `audit`: each site is proved, or refused with a reason.

    ``largest`` holds the largest violation of each identity over all layers, relative to the largest number in it; ``notes``
    what is true of a site on this model and not on most; ``layers`` where sites were edited (their values were checked on all).
    """

    model: str
    proved: tuple[str, ...]
    refused: Mapping[str, str]
    largest: Mapping[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[int, ...] = ()

    def __repr__(self) -> str:
        lines = [f"Audit of {self.model}: {len(self.proved)} sites proved, {len(self.refused)} refused"]
        lines += [f"  refused {name}: {reason}" for name, reason in self.refused.items()]
        lines += [f"  note on {name}: {note}" for name, note in self.notes.items()]
        lines += [f"  {identity}: off by at most {value:.1e}" for identity, value in self.largest.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def audit(model: Model) -> Audit:
    """Does each site fire once, and does an edit there do what the definition says?

    On two short prompts, at all layers: every site is captured exactly once, with its axes; replacing every site by itself
    changes no bit; and the identities between them hold (``resid_pre + attn_out + mlp_out = resid_post``, the heads' outputs
    and the bias sum to what attention adds, pattern rows sum to 1, the pattern is the softmax of the scores and mixes the
    values, ...; all are in `mechinterp.core.laws`). Then every site is edited at one position, head or neuron of the first, a
    middle and the last layer, and of one layer of each other sort: the site takes the new value, nothing before it and no
    earlier position changes, no other head or neuron, and all identities hold in the edited run too. What fails is refused.

    Returns
    -------
    Audit
        ``.proved``, ``.refused`` with the reasons, ``.largest`` violations, ``.notes``.

    Notes
    -----
    Cost: three tiny forward passes, the last with a row for each edit; more where a site is refused. Made once, when a model
    is loaded, and kept as ``model.audit``. Sites that it refuses cannot be edited or captured from then on.
    """
    # What an earlier audit refused is looked at afresh.
    return _Auditor(replace(model, _audit=None)).result()


class _Auditor:
    """One audit under way: what is refused so far, and why."""

    def __init__(self, model: Model) -> None:
        self.model, self.cfg = model, model.cfg
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, min(self.cfg.d_vocab, 1000), (2, LENGTH), generator=generator).to(model.device)
        self.tolerance = tolerance(model.dtype)
        self.refused: dict[str, str] = {}
        self.largest: dict[str, float] = {}
        self.layers = _layers(model)

    def result(self) -> Audit:
        for site in self.sites(range(self.cfg.n_layers)):
            self.attempt([site], self.check_place)
        base: dict[Site, Tensor] = {}
        self.attempt(self.sites(range(self.cfg.n_layers)), lambda sites: base.update(self.capture(self.tokens, sites, [])))
        for site, value in base.items():
            self.attempt([site], lambda sites, value=value: self.check_value(sites[0], value))  # type: ignore[misc]
        # What is not even of its shape has no part in any identity.
        base = {site: value for site, value in base.items() if site.name not in self.refused}
        self.attempt(self.sites(range(self.cfg.n_layers)), lambda sites: self.check_same(base, sites))
        for layer in range(self.cfg.n_layers):
            for law, offs in self.violations(layer, base):
                off = max(offs)
                self.largest[law.text] = max(self.largest.get(law.text, 0.0), off)
                if not off < self.tolerance:
                    self.blame(law, layer, off)
        self.attempt(self.sites(self.layers), lambda sites: self.check_edits(sites, base))
        refused = {name: self.refused[name] for name in KINDS if name in self.refused}
        proved = tuple(name for name in KINDS if name not in refused)
        return Audit(self.model.name, proved, refused, self.largest, self.notes(proved), tuple(self.layers))

    def sites(self, layers: Iterable[int]) -> list[Site]:
        """Every site that is not refused yet."""
        kept = [kind for name, kind in KINDS.items() if name not in self.refused]
        outside = [Site(kind.name) for kind in kept if not kind.per_layer]
        return outside + [Site(kind.name, layer) for layer in layers for kind in kept if kind.per_layer]

    def attempt(self, sites: list[Site], check: Callable[[list[Site]], Any]) -> None:
        """Check all sites at once; only where that fails, by name, to see which are refused and why."""
        try:
            check(sites)
        except (MechInterpError, AttributeError, TypeError, RuntimeError) as error:
            names = list(dict.fromkeys(site.name for site in sites))
            if len(names) == 1:
                silent = isinstance(error, InertError) and " fired 0 times" in str(error)
                reason = (
                    f"{self.cfg.architecture} computes it without calling the hook point that transformer_lens has for it; "
                    "use one of the sites that are proved"
                )
                self.refused.setdefault(names[0], reason if silent else str(error))
            else:
                for name in names:
                    self.attempt([site for site in sites if site.name == name], check)

    def blame(self, law: Law, layer: int, off: float) -> None:
        reason = (
            f"on {self.cfg.architecture} {law.text} does not hold: in layer {layer} it is off by {off:.1e} of the largest "
            "number, so a norm, a scale or a gate stands between them that this name does not tell of; use another of model.sites"
        )
        for name in law.blame:
            self.refused.setdefault(name, reason)

    # -- values --------------------------------------------------------------------------------

    def check_place(self, sites: list[Site]) -> None:
        self.model.place(sites[0])

    def capture(self, tokens: Tensor, sites: list[Site], edits: list[Any]) -> dict[Site, Tensor]:
        cache = run(self.model, tokens, edits=edits, capture=Selection(tuple(sites))).cache
        return {site: cache.whole[site] for site in sites}

    def check_value(self, site: Site, value: Tensor) -> None:
        """A site has its axes, and holds numbers."""
        c = self.cfg
        size = {"batch": len(self.tokens), "pos": LENGTH, "q_pos": LENGTH, "k_pos": LENGTH, "head": c.n_heads}
        size |= {"kv_head": c.n_kv_heads, "d_model": c.d_model, "d_head": c.d_head, "d_mlp": c.d_mlp, "vocab": c.d_vocab}
        axes = site.kind.axes
        # Some models embed in fewer dimensions than they think, and some pad their vocabulary.
        free = {"embed": "d_model", "logits": "vocab"}.get(site.name)
        if any(value.shape[i] != size[axis] for i, axis in enumerate(axes) if axis != free):
            wanted = f"{' '.join(axes)} are {[size[axis] for axis in axes]}"
            raise InertError(f"{site} has shape {list(value.shape)} where {wanted} on {c.architecture}")
        if site.name != "scores" and not torch.isfinite(value).all():
            raise InertError(f"{site} holds values that are not finite")

    def check_same(self, base: Mapping[Site, Tensor], sites: list[Site]) -> None:
        """Replacing sites by themselves changes no bit. What is put back is what is there, so that no site hides another."""
        same = run(self.model, self.tokens, edits=[Call(site, lambda value, _: value) for site in sites]).logits
        if not torch.equal(same, base[Site("logits")]):
            off = float((same - base[Site("logits")]).abs().max())
            raise InertError(f"replacing {sites[0]} by itself changes the logits by {off:.1e} on {self.cfg.architecture}")

    # -- identities ----------------------------------------------------------------------------

    def violations(self, layer: int, values: Mapping[Site, Tensor]) -> Iterator[tuple[Law, list[float]]]:
        """Each law that speaks of sites that are there, and how far its sides differ in each row."""

        def at(name: str) -> Site:
            return Site(name, layer if KINDS[name].per_layer else None)

        for law in LAWS:
            if law.holds_for(self.model, layer) and all(at(name) in values for name in law.needs):
                try:
                    with torch.no_grad():
                        offs = _offs(*law.sides(self.model, layer, lambda name: values[at(name)]))
                except (RuntimeError, AttributeError, TypeError) as error:
                    for name in law.blame:
                        self.refused.setdefault(name, f"{law.text} cannot be checked on {self.cfg.architecture}: {error}")
                    continue
                yield law, offs
        here, following = Site("resid_post", layer), Site("resid_pre", layer + 1)
        if here in values and following in values:
            yield CHAIN, _offs(values[here], values[following])

    # -- edits ---------------------------------------------------------------------------------

    def check_edits(self, sites: list[Site], base: Mapping[Site, Tensor]) -> None:
        """Every site in turn is edited in a row of its own of one forward pass; the first row is as it is."""
        parts = [self.part(site) for site in sites]
        generator = torch.Generator().manual_seed(1)
        olds = [base[site][:1][_index(part)] for site, part in zip(sites, parts, strict=True)]
        news = [old + _push(old, site, generator) for old, site in zip(olds, sites, strict=True)]
        edits = [Replace(part, new, rows=(i, i + 1)) for i, (part, new) in enumerate(zip(parts, news, strict=True), start=1)]
        values = self.capture(self.tokens[:1].repeat(len(sites) + 1, 1), self.sites(self.layers), edits)
        changes = {site: _Changes(site, value, self.tolerance) for site, value in values.items()}
        laws = [(layer, law, offs) for layer in self.layers for law, offs in self.violations(layer, values)]
        for row, (part, new) in enumerate(zip(parts, news, strict=True), start=1):
            problem = self.problem(part, new, row, values, changes) or self.unlawful(part, row, laws)
            if problem:
                self.refused.setdefault(part.name, problem)

    def part(self, site: Site) -> Site:
        """The part of a site that is edited: one position; one head, or one neuron, where there are any."""
        size = {"head": self.cfg.n_heads, "kv_head": self.cfg.n_kv_heads}.get(site.kind.head_axis or "")
        neuron = 1 if site.name in ("mlp_pre", "mlp_post") else None
        return replace(site, pos=POS, head=None if size is None else min(1, size - 1), neuron=neuron)

    def problem(self, part: Site, new: Tensor, row: int, values: Mapping[Site, Tensor], changes: Mapping[Site, _Changes]) -> str:
        """What is wrong with the edit of one part, in its row of a forward pass; empty if nothing."""
        site, where = part.whole, f"an edit of {part}"
        if max(_offs(values[site][row : row + 1][_index(part)], new)) > self.tolerance:
            return f"{where} is lost on {self.cfg.architecture}: the activation keeps its value"
        can_change = after(self.model).get(site.name, frozenset())
        for other, change in changes.items():
            if change.beyond(row, part, self.free(site, other, can_change), self.cfg.n_heads // self.cfg.n_kv_heads):
                return f"{where} also changes {other}, where it must not"
        for effect in self.effects(site):
            if effect in changes and not changes[effect].at_all[row] and not self.meets_nothing(part, values):
                return f"{where} does not reach {effect} on {self.cfg.architecture}"
        return ""

    def unlawful(self, part: Site, row: int, laws: list[tuple[int, Law, list[float]]]) -> str:
        for layer, law, offs in laws:
            by_hand = part.name in law.broken and part.layer in (layer, None)
            broken = by_hand or (law is CHAIN and part == self.part(Site("resid_pre", layer + 1)))
            if not broken and not offs[row] < self.tolerance:
                return (
                    f"with {part} edited, {law.text} does not hold in layer {layer}: off by {offs[row]:.1e} of the largest number"
                )
        return ""

    def free(self, site: Site, other: Site, can_change: frozenset[str]) -> str:
        """What an edit of ``site`` may change of another one: ``"nothing"``, a ``"head"`` or ``"neuron"``, or all ``"later"``."""
        if site == other:
            return "part"
        at, there = self.stage(site), self.stage(other)
        if there < at or (there == at and site.layer is None):
            return "nothing"
        if there > at:
            return "later"
        if other.name not in can_change:
            return "nothing"
        if site.name == "mlp_pre" and other.name == "mlp_post":
            return "neuron"
        spread = any(site.name in (port, f"{port}_in") and joint_norm(self.model, at, port) for port in "qk")
        if site.kind.head_axis and other.kind.head_axis and not (spread and other.name not in ("q", "k")):
            return "head"
        return "later"

    def stage(self, site: Site) -> int:
        """When a site is computed: before the blocks, in one of them, or after."""
        if site.layer is not None:
            return site.layer
        return {"final_norm": self.cfg.n_layers, "logits": self.cfg.n_layers + 1}.get(site.name, -1)

    def effects(self, site: Site) -> list[Site]:
        """What an edit has to change where no identity ties the site to what is computed from it."""
        if site.name in ("q", "k"):
            return [Site("scores", site.layer)]
        if site.name == "mlp_pre":
            return [Site("mlp_post", site.layer)]
        return {"embed": [Site("resid_pre", 0)], "pos_embed": [Site("resid_pre", 0)], "final_norm": [Site("logits")]}.get(
            site.name, []
        )

    def meets_nothing(self, part: Site, values: Mapping[Site, Tensor]) -> bool:
        """A query that meets keys of exactly zero scores zero whatever it is, and so on; hand-made models are full of these."""
        group, head = self.cfg.n_heads // self.cfg.n_kv_heads, part.head or 0
        if part.name == "q" and Site("k", part.layer) in values:
            return not bool(values[Site("k", part.layer)][0, : POS + 1, head // group].any())
        if part.name == "k" and Site("q", part.layer) in values:
            return not bool(values[Site("q", part.layer)][0, POS:, head * group : (head + 1) * group].any())
        return part.name == "mlp_pre" and self.cfg.attn_only

    def notes(self, proved: tuple[str, ...]) -> dict[str, str]:
        found = {}
        for port in "qk":
            if any(joint_norm(self.model, layer, port) for layer in self.layers):
                for name in (port, f"{port}_in"):
                    if name in proved:
                        found[name] = (
                            f"one norm spans the {port} of all heads, so an edit of one head's moves the others' scores too"
                        )
        return found


# Not in the table, since it speaks of two layers.
CHAIN = Law(
    "resid_post = resid_pre of the next layer", (), (), ("resid_pre", "resid_post"), lambda model, layer, get: (get(""), get(""))
)


def _layers(model: Model) -> list[int]:
    """The first, a middle and the last layer, and the first of each sort of layer."""
    n, config = model.cfg.n_layers, model.hf.config.get_text_config()
    sorts: dict[Any, int] = {}
    for layer in range(n):
        kinds = [getattr(config, name, None) or [None] * n for name in ("layer_types", "attention_layers")]
        parts = tuple((name, type(part).__name__) for name, part in model.block(layer).named_modules())
        shapes = tuple(tuple(parameter.shape) for parameter in model.block(layer).parameters())
        sorts.setdefault((*(kind[layer] for kind in kinds), parts, shapes), layer)
    return sorted({0, n // 2, n - 1, *sorts.values()})


def _offs(left: Tensor, right: Tensor) -> list[float]:
    """The largest difference of each row, relative to the largest number in it; infinite where there is no number."""
    left, right = tame(left), tame(right)
    right = right.expand_as(left)
    left, right = left.reshape(len(left), -1), right.reshape(len(right), -1)
    sizes = torch.maximum(left.abs().amax(1), right.abs().amax(1))
    offs = (left - right).abs().amax(1) / sizes.where(sizes > 0, torch.ones_like(sizes))
    return [off if off == off else float("inf") for off in offs.tolist()]


class _Changes:
    """Where one site differs, in each row of a forward pass, from the first row."""

    def __init__(self, site: Site, value: Tensor, tolerance: float) -> None:
        self.kind, value = site.kind, tame(value)
        size = float(value.abs().nan_to_num(posinf=0).max()) or 1.0
        off = (value - value[:1]).abs() / size
        self.changed = ~(off <= tolerance)
        # An effect may be small where the numbers are coarse.
        self.at_all = (off.flatten(1).amax(1) > tolerance / 30).tolist()
        axes = self.kind.axes
        position = axes.index("q_pos" if "q_pos" in axes else "pos")
        self.some = self.changed.flatten(1).any(1).tolist()
        self.early = self.changed.narrow(position, 0, POS).flatten(1).any(1).tolist()
        self.across = {
            sort: self.changed.movedim(axis, 1).flatten(2).any(2).tolist()
            for sort, axis in (
                ("head", self.kind.axes.index(self.kind.head_axis) if self.kind.head_axis else None),
                ("neuron", -1),
            )
            if axis is not None
        }

    def beyond(self, row: int, part: Site, free: str, group: int) -> bool:
        """Whether more has changed than an edit of ``part`` may change; ``free`` says what that is."""
        if free == "part":
            # Of the site itself the part alone was written.
            own = self.changed[row : row + 1].clone()
            own[_index(part)] = False
            return bool(own.any())
        if not self.some[row]:
            return False
        if free == "nothing" or self.early[row]:
            return True
        if free == "head" and part.head is not None:
            # What one KV head holds is read by its group of query heads.
            size = 1 if part.kind.head_axis == self.kind.head_axis else group
            allowed = range(part.head * size, (part.head + 1) * size)
            return any(changed and i not in allowed for i, changed in enumerate(self.across["head"][row]))
        if free == "neuron":
            return any(changed and i != part.neuron for i, changed in enumerate(self.across["neuron"][row]))
        return False


def _index(part: Site) -> tuple[Any, ...]:
    index: list[Any] = [slice(None)] * len(part.kind.axes)
    for axis, chosen in ((part.kind.pos_axis, part.pos), (part.kind.neuron_axis, part.neuron)):
        if axis is not None and chosen is not None:
            index[axis] = chosen
    if part.head is not None:
        index[part.kind.axes.index(part.kind.head_axis or "")] = part.head
    return tuple(index)


def _push(old: Tensor, site: Site, generator: torch.Generator) -> Tensor:
    """A change of about the size of what is there, and for neurons one that switches them on."""
    noise = torch.randn(old.shape, generator=generator).to(old.device, old.dtype)
    size = float(tame(old).abs().clamp(max=1e3).mean().clamp(min=0.1))
    if site.name in ("mlp_pre", "mlp_post"):
        return noise.abs() * size + 2 * float(old.abs().max()) + 1.0
    if site.name == "scores":
        # What the mask hides stays hidden.
        size = float(old[old > -1e4].float().abs().mean().clamp(min=0.1))
        return torch.where(old > -1e4, noise * size, torch.zeros_like(old))
    return 3 * noise * size
