"""Path patching: what one set of nodes writes for the ports of another, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

import torch
from einops import einsum, rearrange
from torch import Tensor

from mechinterp.core.answers import answer_logits
from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.edits import Replace
from mechinterp.core.effects import Effects, Label
from mechinterp.core.hooks import HookRegistry
from mechinterp.core.model import Model
from mechinterp.core.plan import budget_of, halving, rows_per_forward
from mechinterp.core.run import Cache
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import SelectorError, did_you_mean
from mechinterp.patching.compare import Comparison, Direction, MetricLike, compare_runs
from mechinterp.patching.ends import own_ends
from mechinterp.patching.path_names import answering, check_reach, nodes_of, place_of, receivers_of, senders_of
from mechinterp.patching.readers import EMBED, Layout, layout_of
from mechinterp.tasks import Task

__all__ = ["patch_paths"]

# What is put where, for one counterfactual run.
Values = list[tuple[Site, Tensor]]
Found = TypeVar("Found")


def patch_paths(
    model: Model,
    task: Task,
    *,
    senders: str | Iterable[str],
    receivers: str | Iterable[str],
    via: str | Sequence[str] = (),
    through: str | None = None,
    over: Literal["sender", "receiver"] | Sequence[Literal["sender", "receiver"]] = (),
    metric: MetricLike = None,
    direction: Direction = "noise",
    normalize: bool = True,
    memory: int | str | None = None,
    progress: bool = False,
) -> Effects:
    """What travels from these senders to these receivers, directly or through the nodes that are named?

    1. The receiving prompt runs with the senders' output from the other run. All heads and MLPs between keep what they
       write in the receiving run, so that only what the senders write themselves reaches anyone; nodes in ``through`` are
       computed anew. What the receivers' ports read there is kept.
    2. With ``via``, the outputs that these nodes give when their ports read that are the senders of the next step.
    3. The receiving prompt runs again: the receivers read what was kept, and everything after them follows. A receiver that
       comes after another one reads what was kept too, and not what the earlier one now writes.

    Parameters
    ----------
    model, task
        What to run.
    senders
        Heads, MLPs and the embedding: node names with ``*`` for any part (``"a9.h*"``, ``"m3"``, ``"embed"``) or sites
        (``"L9.H9.z"``, ``"L*.mlp_out[end]"``, ``"L3.N17.mlp_post"``), separated by ``|``.
    receivers
        Ports that read, ``"a9.h6<q>"``, ``"a9.kv1<k>"`` (keys and values of grouped queries are those of KV heads),
        ``"m3"``, or sites ``"L9.H6.q"``, ``"L9.KV1.k[S2]"``, ``"L3.mlp_in"``; or ``"logits"`` alone.
    via
        Ports on the way, in order: ``via=["a5.h5<k>"]`` for senders -> the keys of a5.h5 -> receivers.
    through
        Nodes between that are computed anew instead of kept: ``"mlps"`` as Wang et al. do, ``"heads"``, or node names.
    over
        ``("sender",)``, ``("receiver",)`` or both: each of them alone, as axes of the result. Default: all together.
    metric, direction, normalize, memory, progress
        As in `mechinterp.patch`, but the default direction is ``"noise"``.

    Returns
    -------
    Effects
        Axes ``sender`` and ``receiver`` where asked for, else one cell ``path``; per example.

    Raises
    ------
    SelectorError
        A name that is no node or port of this model; ``"logits"`` beside other receivers.

    Notes
    -----
    Cost: 2 forward passes for the two runs, and less than one for each sender and receiver; one more for each sender and
    step of ``via``. To ``"logits"``, what the senders write is added to the recorded stream: no pass at all. With ``through``
    one more for each sender and step. Packed as rows.

    References
    ----------
    Wang et al. 2022 (2211.00593); Goldowsky-Dill et al. 2023 (2304.05969).

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> mi.patch_paths(toy.model, toy.task, senders="a0.*", receivers="a1.h*<k>", over=("sender", "receiver")).axes
    ('sender', 'receiver')
    """
    check_model_and_task(model, task)
    senders, receivers = _joined(senders), _joined(receivers)
    via = (via,) if isinstance(via, str) else via
    over = (over,) if isinstance(over, str) else over
    for axis in over:
        if axis not in ("sender", "receiver"):
            raise SelectorError(f"cannot sweep paths over {axis!r}. {did_you_mean(axis, ('sender', 'receiver'))}")
    layout, bytes_at_once = layout_of(model), budget_of(model, memory)
    free = nodes_of(layout, through)
    sent = senders_of(model, layout, senders)
    hops = [receivers_of(model, layout, ports) for ports in via]
    read = receivers_of(model, layout, receivers)
    check_reach(model, [sent, *hops, read])
    # Positions from the end are named ones where prompts differ in length.
    mentioned = dict.fromkeys(site for sites in (sent, *hops, read) for site in sites)
    parts = [site for site in mentioned if site.name != "logits"]
    renamed, task = own_ends(model, Selection(tuple(parts)), task)
    by_name = dict(zip(parts, renamed, strict=True)) if isinstance(renamed, Selection) else {}
    sent, read, *hops = ([by_name.get(site, site) for site in sites] for sites in (sent, read, *hops))
    runs = compare_runs(model, task, _wanted(layout, sent), metric=metric, direction=direction, cells=read)
    groups: list[Values] = [[(site, runs.other[site]) for site in group] for group in _grouped(sent, "sender" in over)]
    for hop in hops:
        groups = _answers(runs, layout, _listen(runs, layout, groups, free, hop, bytes_at_once), hop, bytes_at_once)
    received, unit = runs.received(), runs.unit(normalize)
    targets = _grouped(read, "receiver" in over)
    to_logits = read[0].name == "logits"
    if to_logits:
        flat = _listen_logits(runs, layout, groups, free, bytes_at_once) - received
    else:
        heard = _listen(runs, layout, groups, free, read, bytes_at_once)
        flat = _patched(runs, heard, targets, bytes_at_once, progress) - received
    labels = {"sender": [_label(group) for group in _grouped(sent, True)], "receiver": [_label(group) for group in targets]}
    axes = tuple(axis for axis in ("sender", "receiver") if axis in over) or ("path",)
    hops_said = "".join(f" -> {ports}" for ports in via)
    coords: dict[str, tuple[Label, ...]] = {axis: tuple(labels[axis]) for axis in axes if axis != "path"}
    coords = coords or {"path": (f"{senders}{hops_said} -> {receivers}",)}
    return Effects(
        quantity=f"patching paths {senders}{hops_said} -> {receivers} ({direction})",
        axes=axes,
        coords=coords,
        per_example=(flat / unit).float().cpu().reshape(*(len(coords[axis]) for axis in axes), -1),
        baseline=runs.baseline,
        provenance=runs.provenance(
            method="path patching",
            site="",
            senders=senders,
            receivers=receivers,
            via=list(via),
            through=through or "",
            normalized=normalize,
            # Where nothing is computed anew, what is heard follows from what is sent.
            forwards=2 + len(groups) * (len(via) + (1 + len(via) if free else 0)) + (0 if to_logits else flat.shape[0]),
        ),
    )


def _joined(text: str | Iterable[str]) -> str:
    return text if isinstance(text, str) else " | ".join(map(str, text))


def _grouped(sites: Sequence[Site], apart: bool) -> list[list[Site]]:
    return [[site] for site in sites] if apart else [list(sites)]


def _label(group: Sequence[Site]) -> str:
    shown = [str(site) if site != EMBED else "embed" for site in group]
    return shown[0] if len(shown) == 1 else f"{shown[0]} and {len(shown) - 1} more"


# -- runs ----------------------------------------------------------------------------------------


def _wanted(layout: Layout, sent: Iterable[Site]) -> Selection:
    """All that is kept of the two runs: what every node writes, and the ports of every head."""
    layers = range(layout.shape.n_layers)
    ports = [Site(port, layer) for layer in layers for port in "qkv"]
    streams = [] if layout.shape.attn_only else [Site("mlp_in", layer) for layer in layers]
    streams += [*(Site("resid_pre", layer) for layer in layers), Site("resid_post", layout.shape.n_layers - 1)]
    return layout.written | Selection(tuple(dict.fromkeys((*ports, *streams, *(site.whole for site in sent)))))


def _freeze(
    registry: HookRegistry,
    runs: Comparison,
    layout: Layout,
    n: int,
    groups: Sequence[Values],
    free: set[str],
    note: Callable[[Site, Tensor], None] | None = None,
) -> None:
    """All nodes but those in ``free`` write what they write in the receiving run, ``n`` times; ``note`` sees it before."""
    neurons = {site.layer for group in groups for site, _ in group if site.name == "mlp_post"}

    def kept(site: Site, live: Sequence[int] = ()) -> Callable[[Tensor], Tensor]:
        recorded = runs.receiver[site]

        def act(value: Tensor) -> Tensor:
            if note is not None:
                note(site, value)
            new = recorded.repeat(n, *[1] * (recorded.ndim - 1))
            if live:
                new[:, :, list(live)] = value[:, :, list(live)]
            return new

        return act

    for layer in range(layout.shape.n_layers):
        live = [head for head in range(layout.shape.n_heads) if f"a{layer}.h{head}" in free]
        registry.transform(Site("z", layer), kept(Site("z", layer), live))
        if layout.shape.attn_only or f"m{layer}" in free:
            continue
        # Of an MLP that sends single neurons, what it adds follows from them.
        at = Site("mlp_post" if layer in neurons else "mlp_out", layer)
        registry.transform(at, kept(at))


def _send(registry: HookRegistry, groups: Sequence[Values], batch: int) -> None:
    for i, group in enumerate(groups):
        for site, value in group:
            registry.add(Replace(site, value, rows=(i * batch, (i + 1) * batch), priority=1))


def _packed(
    runs: Comparison, groups: Sequence[Values], memory: int, run: Callable[[Sequence[Values]], Sequence[Found]]
) -> list[Found]:
    """What ``run`` finds for each group, of as many groups at a time as fit into memory."""
    batch, length = runs.task.clean.shape
    at_once = max(1, rows_per_forward(runs.model, length, memory=memory) // batch)
    found: list[Found] = []
    for first in range(0, len(groups), at_once):
        members = range(first, min(first + at_once, len(groups)))
        for _, results in halving(members, lambda some: run([groups[i] for i in some])):
            found += results
    return found


def _sent(registry: HookRegistry, runs: Comparison, layout: Layout, groups: Sequence[Values], free: set[str]) -> Tensor:
    """Answer logits ``[(group batch) vocab]`` when the senders of each group send and all else but ``free`` is kept."""
    n = len(groups)
    _freeze(registry, runs, layout, n, groups, free)
    _send(registry, groups, len(runs.task))
    with torch.no_grad(), registry:
        return answer_logits(runs.model, runs.tokens.repeat(n, 1), runs.task.answer_pos.repeat(n))


def _written(
    runs: Comparison, group: Values, take: Callable[[Tensor], Tensor] = lambda value: value
) -> list[tuple[float, Tensor]]:
    """What the senders add to the stream beyond what they add in the receiving run, and where in the order they write it.

    ``take`` says at which positions.
    """
    model, found = runs.model, []
    changed = runs.receiver.replaced(group)
    for site, value in changed.items():
        layer, new, old = site.layer or 0, take(value), take(runs.receiver[site])
        if torch.equal(new, old):
            continue
        if site.name == "mlp_post" and Site("mlp_out", layer) in changed:
            # Counted with what the MLP adds.
            continue
        if site.name == "mlp_out" and Site("mlp_post", layer) in changed:
            # Neurons send first; what is put into the output, perhaps at some positions alone, stands.
            post = Site("mlp_post", layer)
            sent = old + take(model.neurons_add(layer, changed[post]) - model.neurons_add(layer, runs.receiver[post]))
            new = torch.where(take(_put_in(runs, group, site)), new, sent)
        if site.name == "z":
            gap = model.attention_adds(layer, new) - model.attention_adds(layer, old)
        elif site.name == "mlp_post":
            gap = model.neurons_add(layer, new) - model.neurons_add(layer, old)
        else:
            gap = new - old
        found.append((place_of(model, site, reads=False), gap))
    return found


def _put_in(runs: Comparison, group: Values, whole: Site) -> Tensor:
    """Where the senders put a value into a whole activation; of its shape."""
    empty = Cache(runs.model, Selection((whole,)), {whole: torch.zeros_like(runs.receiver[whole])}, runs.task.positions)
    own = [(site, torch.ones_like(value)) for site, value in group if site.whole == whole]
    return empty.replaced(own)[whole] > 0


def _heard(runs: Comparison, group: Values, ports: Iterable[Site]) -> dict[Site, Tensor]:
    """What these whole ports read when the senders send and every other node writes what it writes in the receiving run.

    The stream then is the recorded one and what the senders add to it: no forward pass is needed.
    """
    model, found = runs.model, {}
    with torch.no_grad():
        written = _written(runs, group)
        for port in ports:
            gaps = [gap for place, gap in written if place < place_of(model, port, reads=True)]
            if not gaps:
                found[port] = runs.receiver[port]
                continue
            layer = port.layer or 0
            stream = runs.receiver[port if port.name == "mlp_in" else Site("resid_pre", layer)] + sum(gaps)
            if port.name == "mlp_in":
                found[port] = stream
                continue
            projection = model.projection(layer, port.name)
            value = einsum(model.norm("attn", layer)(stream), projection.weight, "b p m, h m d -> b p h d")
            found[port] = value if projection.bias is None else value + projection.bias
    return found


def _straight_to_logits(runs: Comparison, groups: Sequence[Values]) -> Tensor:
    """The metric ``[group batch]`` when the senders of each group write to the logits and nobody else hears them."""
    model, rows = runs.model, torch.arange(len(runs.task), device=runs.model.device)

    def at_answers(value: Tensor) -> Tensor:
        return value[rows, runs.task.answer_pos].unsqueeze(1)

    found = []
    with torch.no_grad():
        stream = at_answers(runs.receiver[Site("resid_post", model.cfg.n_layers - 1)])
        for group in groups:
            gaps = [gap for _, gap in _written(runs, group, at_answers)]
            if gaps:
                logits = model.unembed((stream + sum(gaps))[:, 0], runs.vocabulary)
                found.append(runs.measure_cells(logits[None])[0])
            else:
                found.append(runs.received())
    return torch.stack(found)


def _listen(
    runs: Comparison, layout: Layout, groups: Sequence[Values], free: set[str], ports: Sequence[Site], memory: int
) -> list[Values]:
    """What the ports read when the senders of each group send: for each group the ports' new values."""
    batch = len(runs.task)
    wholes = Selection(tuple(dict.fromkeys(site.whole for site in ports)))
    if not free:
        caches = (Cache(runs.model, wholes, _heard(runs, group, wholes), runs.task.positions) for group in groups)
        return [[(site, cache[site]) for site in ports] for cache in caches]

    def run(some: Sequence[Values]) -> list[Values]:
        seen: dict[Site, Tensor] = {}
        registry = HookRegistry(runs.model, runs.task.positions)
        registry.capture(wholes, seen)
        _sent(registry, runs, layout, some, free)
        heard = []
        for i in range(len(some)):
            own = {site: value[i * batch : (i + 1) * batch] for site, value in seen.items()}
            cache = Cache(runs.model, wholes, own, runs.task.positions)
            heard.append([(site, cache[site]) for site in ports])
        return heard

    return _packed(runs, groups, memory, run)


def _listen_logits(runs: Comparison, layout: Layout, groups: Sequence[Values], free: set[str], memory: int) -> Tensor:
    """The metric ``[group batch]`` when the logits read what the senders send."""
    if not free:
        return _straight_to_logits(runs, groups)

    def run(some: Sequence[Values]) -> list[Tensor]:
        logits = _sent(HookRegistry(runs.model, runs.task.positions), runs, layout, some, free)
        return [runs.measure(each) for each in rearrange(logits, "(n b) v -> n b v", b=len(runs.task))]

    return torch.stack(_packed(runs, groups, memory, run))


def _answers(runs: Comparison, layout: Layout, heard: Sequence[Values], ports: Sequence[Site], memory: int) -> list[Values]:
    """What the nodes with these ports write when the ports read that, each by itself: the senders of the next step."""
    batch, model = len(runs.task), runs.model
    nodes = dict.fromkeys(node for site in ports for node in answering(model, site))
    inputs = dict.fromkeys(
        Site(port, node.layer) for node in nodes for port in (("q", "k", "v") if node.name == "z" else ("mlp_in",))
    )

    def run(some: Sequence[Values]) -> list[Values]:
        n = len(some)
        seen: dict[Site, Tensor] = {}
        registry = HookRegistry(model, runs.task.positions)
        # A node's other ports read what they read in the receiving run, whatever the nodes before it answer.
        for site in inputs:
            recorded = runs.receiver[site].repeat(n, *[1] * (runs.receiver[site].ndim - 1))
            registry.transform(site, lambda value, recorded=recorded: recorded)  # type: ignore[misc]
        _send(registry, some, batch)
        _freeze(registry, runs, layout, n, [], set(), note=seen.__setitem__)
        with torch.no_grad(), registry:
            answer_logits(model, runs.tokens.repeat(n, 1), runs.task.answer_pos.repeat(n))
        sent = []
        for i in range(n):
            own = {site: seen[site][i * batch : (i + 1) * batch] for site in {node.whole for node in nodes}}
            cache = Cache(model, Selection(tuple(nodes)), own, runs.task.positions)
            sent.append([(node, cache[node]) for node in nodes])
        return sent

    return _packed(runs, heard, memory, run)


def _patched(runs: Comparison, heard: Sequence[Values], targets: Sequence[Sequence[Site]], memory: int, progress: bool) -> Tensor:
    """The metric ``[(group target) batch]`` when each target reads what it heard from each group."""
    received = runs.received()
    cells = [[(site, value) for site, value in group if site in target] for group in heard for target in targets]
    changed = [[part for part in cell if not torch.equal(part[1], runs.receiver[part[0]])] for cell in cells]
    live = [i for i, cell in enumerate(changed) if cell]
    plan = runs.plan([[site for site, _ in changed[i]] for i in live], memory)
    flat = received.expand(len(cells), -1).clone()
    for members, values in runs.sweep(plan, [changed[i] for i in live], label="patch paths", progress=progress):
        flat[[live[i] for i in members]] = values
    return flat
