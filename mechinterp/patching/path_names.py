"""The senders and receivers of paths, as they are written, as activations of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

from mechinterp.core.model import Model
from mechinterp.core.select import select
from mechinterp.core.sites import Site
from mechinterp.errors import SelectorError, did_you_mean
from mechinterp.patching.readers import EMBED, Layout

__all__ = ["answering", "check_reach", "nodes_of", "place_of", "receivers_of", "senders_of"]

# A name of the graph and no site: a9.h6, a9.h6<q>, m3, with * for any part.
_NODE = re.compile(r"[am][\d*?\[][^/]*")
_WRITES = {"z": "z", "head_out": "z", "mlp_out": "mlp_out", "mlp_post": "mlp_post", "embed": "resid_pre"}
_PORTS = {"q": "q", "k": "k", "v": "v", "q_in": "q", "k_in": "k", "v_in": "v", "mlp_in": "mlp_in"}


def place_of(model: Model, site: Site, *, reads: bool) -> float:
    """Where in the order of computation something is read or written; what is written reaches what is read later."""
    layer = float(site.layer or 0)
    if site.name == "resid_pre":
        return -1.0
    if site.name == "logits":
        return float(model.cfg.n_layers)
    # An MLP reads what attention of its layer wrote, unless both read the same stream.
    late = site.name in ("mlp_out", "mlp_post") if not reads else site.name == "mlp_in" and not model.cfg.parallel
    return layer + (0.5 if late else 0.0) - (0.25 if reads else 0.0)


def check_reach(model: Model, steps: Sequence[Sequence[Site]]) -> None:
    """Raise `SelectorError` where nothing of one step comes before anything of the next: the path would carry nothing."""
    for step, (before, after) in enumerate(pairwise(steps)):
        written = [part for site in before for part in (answering(model, site) if step else [site])]
        if min(place_of(model, site, reads=False) for site in written) > max(place_of(model, site, reads=True) for site in after):
            raise SelectorError(
                f"nothing leads from {before[0]} to {after[0]}, which is computed before it; paths go from earlier to later nodes"
            )


def _terms(text: str) -> list[str]:
    return [term.strip() for term in text.split("|")]


def senders_of(model: Model, layout: Layout, text: str) -> list[Site]:
    """The activations that the senders write: z of a head, what an MLP adds, neurons, or the first stream."""
    found: dict[Site, None] = {}
    for term in _terms(text):
        nodes = [node for node in layout.writers if fnmatchcase(node, term)]
        if nodes:
            found |= dict.fromkeys(_written_by(node) for node in nodes)
            continue
        if _NODE.match(term):
            raise SelectorError(f"no node that writes is called {term!r}. {did_you_mean(term, layout.writers)}")
        for site in select(term, model.cfg):
            if site.name not in _WRITES:
                raise SelectorError(
                    f"{site} is nothing that a node writes; senders are {', '.join(_WRITES)}, or nodes such as "
                    f"{layout.writers[1]!r}"
                )
            layer = 0 if site.name == "embed" else site.layer
            found[Site(_WRITES[site.name], layer, head=site.head, pos=site.pos, neuron=site.neuron)] = None
    return [part for site in found for part in _split_heads(model, site)]


def _written_by(node: str) -> Site:
    if node == "embed":
        return EMBED
    layer, _, head = node[1:].partition(".h")
    return Site("z", int(layer), head=int(head)) if head else Site("mlp_out", int(layer))


def receivers_of(model: Model, layout: Layout, text: str) -> list[Site]:
    """The activations that take other values when a port reads something else."""
    found: dict[Site, None] = {}
    names = {f"{node}<{port}>" if port != "in" else node: (node, port) for node, port in layout.readers}
    for term in _terms(text):
        ports = [names[name] for name in names if fnmatchcase(name, term)]
        if ports:
            found |= dict.fromkeys(_read_by(node, port) for node, port in ports)
            continue
        if re.fullmatch(r"a[\d*?]+\.\S+", term) and "<" not in term:
            raise SelectorError(
                f"{term!r} does not say what reads: write {term}<q>, {term}<k> or {term}<v>, or {term}<*> for all"
            )
        if _NODE.match(term):
            shared = "; keys and values are read by KV heads here" if layout.shape.grouped and term[-3:] in ("<k>", "<v>") else ""
            raise SelectorError(f"no port is called {term!r}{shared}. {did_you_mean(term, names)}")
        for site in select(term, model.cfg):
            if site.name not in _PORTS:
                raise SelectorError(
                    f"{site} is nothing that reads; receivers are {', '.join(_PORTS)}, ports such as "
                    f"{next(iter(names))!r}, or 'logits'"
                )
            found[Site(_PORTS[site.name], site.layer, head=site.head, pos=site.pos)] = None
    if len(found) > 1 and any(site.name == "logits" for site in found):
        raise SelectorError("the logits are read at the end of a path; patch the paths to them and to other receivers apart")
    return [part for site in found for part in _split_heads(model, site)]


def _read_by(node: str, port: str) -> Site:
    if node == "logits":
        return Site("logits")
    layer, _, head = node[1:].partition(".")
    return Site("mlp_in", int(layer)) if port == "in" else Site(port, int(layer), head=int(head.lstrip("khv")))


def _split_heads(model: Model, site: Site) -> list[Site]:
    """One site for each head, so that each can be a cell of its own."""
    axis = site.kind.head_axis
    if axis is None or site.head is not None:
        return [site]
    count = model.cfg.n_heads if axis == "head" else model.cfg.n_kv_heads
    return [Site(site.name, site.layer, head=i, pos=site.pos, neuron=site.neuron) for i in range(count)]


def nodes_of(layout: Layout, text: str | None) -> set[str]:
    """The nodes that are computed anew."""
    if text is None:
        return set()
    found: set[str] = set()
    for term in _terms(text):
        pattern = {"mlps": "m*", "heads": "a*"}.get(term, term)
        nodes = {node for node in layout.writers if fnmatchcase(node, pattern) and node != "embed"}
        if not nodes and term == "mlps":
            raise SelectorError("this model's MLPs write nothing, so no path leads through them; leave out through=")
        if not nodes:
            raise SelectorError(f"no node is called {term!r}. {did_you_mean(term, ['mlps', 'heads', *layout.writers])}")
        found |= nodes
    return found


def answering(model: Model, port: Site) -> list[Site]:
    """The outputs of the nodes that a port belongs to; a KV head's are those of all its query heads."""
    if port.name == "mlp_in":
        return [Site("mlp_out", port.layer)]
    share = model.cfg.n_heads // model.cfg.n_kv_heads if port.kind.head_axis == "kv_head" else 1
    first = (port.head or 0) * share
    return [Site("z", port.layer, head=head) for head in range(first, first + share)]
