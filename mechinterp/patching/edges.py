"""Exact effects of edges: for each edge one counterfactual run, replayed from its reader on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from einops import einsum
from torch import Tensor

from mechinterp.core.ablation import Ablation, as_ablation
from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.effects import Effects, Label
from mechinterp.core.model import Model
from mechinterp.core.plan import Cell, Plan, progress_bar
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import FileFormatError, GraphError, SelectorError
from mechinterp.graph import Circuit, Edge, check_everywhere, edges_called
from mechinterp.graph.values import as_edge
from mechinterp.patching.compare import Comparison, Direction, MetricLike, ablated_values, compare_runs, plan_runs, unit_of
from mechinterp.patching.readers import Layout, ReaderGroup, layout_of
from mechinterp.patching.scores import written_difference
from mechinterp.tasks import Task, resolve_metric

__all__ = ["edge_effects", "plan_edges"]

# A position, the name of a span, or everywhere.
Where = int | str | None
Edges = str | Circuit | Iterable[Edge | str | tuple[str, ...]]
_WRITTEN_DIFFERENCES = 1 << 30
_SAVE_EVERY = 60.0


def edge_effects(
    model: Model,
    task: Task,
    edges: Edges = "*",
    *,
    over: Sequence[Literal["pos", "span"]] = (),
    ablation: Ablation | str = "resample",
    metric: MetricLike = None,
    direction: Direction = "noise",
    normalize: bool = True,
    memory: int | str | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Effects:
    """What does each edge carry, exactly?

    For an edge from writer u to reader v: run the receiving prompt, in which v alone reads in_v + (other_u - receiving_u)
    in place of in_v, before its norm, and everything after v follows. The effect is the change of the metric.

    Where attention's output passes a norm before it is added (Gemma 2), what a head writes is the change of the normed sum
    when this head takes its other value and all others keep theirs.

    Parameters
    ----------
    model, task
        What to run.
    edges
        ``"*"`` for all; a `Circuit`; edges; or patterns of their names, separated by ``|``: ``"*->logits"``,
        ``"a5.h*->a9.h6<q>"``, ``"embed->*"``.
    over
        ``("pos",)``: what each edge carries at each position, one run each, as a second axis. ``("span",)``: at all positions
        of each span of ``task.spans`` together.
    ablation, metric, direction, normalize, memory, progress
        As in `mechinterp.patch`, but the default direction is ``"noise"``, as for `mechinterp.attribute`.
    resume
        A safetensors file that is written every minute and at the end. If it is there, what it holds is not run again.

    Returns
    -------
    Effects
        Axis ``edge`` (and ``pos`` or ``span``), per example.

    Raises
    ------
    GraphError
        A pattern or an edge that the graph of this model does not have.
    FileFormatError
        ``resume`` holds another sweep.

    Notes
    -----
    Cost: 2 forward passes and less than half of one for each edge; `plan_edges` says how much before anything runs.

    References
    ----------
    Wang et al. 2022 (2211.00593); Conmy et al. 2023 (2304.14997), who remove edges one after another; here each is
    changed alone.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> effects = mi.edge_effects(toy.model, toy.task, "*->logits")
    >>> effects.axes
    ('edge',)
    """
    check_model_and_task(model, task)
    layout = layout_of(model)
    chosen, positions = _chosen(layout, edges), _positions(task, over)
    task = task.to(model.device)
    flat = torch.full((len(chosen) * len(positions), len(task)), torch.nan)
    rule = resolve_metric(metric, task)
    said = {
        "model": model.describe(),
        "tokens": hashlib.sha256(repr((task.clean.tolist(), task.corrupt.tolist())).encode()).hexdigest(),
        "answers": [task.right.tolist(), task.wrong.tolist(), task.answer_pos.tolist()],
        "metric": rule.name,
        "direction": direction,
        "ablation": str(as_ablation(ablation, seed=None)),
        "edges": [str(edge) for edge in chosen],
        "positions": positions,
    }
    if isinstance(positions[0], str):
        said["spans"] = task.spans.index.tolist()
    clean, corrupt = [], []
    ablated = ablated_values(ablation, model, task, layout.written, direction)
    wanted, readers = _wanted(layout), _reader_sites(layout)

    def both(part: slice) -> Comparison:
        return compare_runs(model, task[part], wanted, metric=rule, direction=direction, ablated=ablated(part), cells=readers)

    parts = [*_parts(layout, task, model)]
    runs = both(parts[0])
    with _kept(flat, said, _seen(runs), resume) as save, progress_bar(flat.numel(), "edges", show=progress) as bar:
        bar.update(int((~flat.isnan()).sum()))
        for part in parts:
            runs = runs if part is parts[0] else both(part)
            cells = _EdgeCells(runs, layout, chosen, positions)
            missing = flat[:, part].isnan().any(dim=1).tolist()
            left = [i for i in cells.order() if missing[i]]
            idle = [i for i in left if cells.idle(i)]
            flat[idle, part] = 0.0
            bar.update(flat[idle, part].numel())
            left = [i for i in left if not cells.idle(i)]
            for members, values in _measured(runs, cells, left, memory):
                flat[members, part] = values
                bar.update(values.numel())
                save()
            clean.append(runs.measure(runs.clean_logits))
            corrupt.append(runs.measure(runs.corrupt_logits))
    baseline = {"clean": float(torch.cat(clean).mean()), "corrupt": float(torch.cat(corrupt).mean())}
    axes: tuple[str, ...] = ("edge",)
    coords: dict[str, tuple[Label, ...]] = {"edge": tuple(tuple(edge) for edge in chosen)}
    if over:
        split = "span" if isinstance(positions[0], str) else "pos"
        axes, coords = ("edge", split), coords | {split: tuple(where for where in positions if where is not None)}
    scale = unit_of(baseline, direction, metric=rule, task=task) if normalize else 1.0
    provenance = runs.provenance(method="edge patching", site="", normalized=normalize, forwards=2 + len(flat))
    return Effects(
        quantity=f"patching edges ({direction})",
        axes=axes,
        coords=coords,
        per_example=(flat / scale).reshape(*(len(coords[axis]) for axis in axes), -1),
        baseline=baseline,
        provenance=provenance | {"prompts": len(task)},
    )


def plan_edges(
    model: Model,
    task: Task,
    edges: Edges = "*",
    *,
    over: Sequence[Literal["pos", "span"]] = (),
    metric: MetricLike = None,
    memory: int | str | None = None,
) -> Plan:
    """What would these exact edge effects cost, before anything runs? Parameters as in `edge_effects`.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> mi.plan_edges(toy.model, toy.task).cells == mi.GraphShape.of(toy.model).n_edges
    True
    """
    layout = layout_of(model)
    chosen, positions = _chosen(layout, edges), _positions(task, over)
    sites = _reader_sites(layout)
    cells = [[_at(sites[layout.reader_at[edge.dst, edge.port]], pos)] for edge in chosen for pos in positions]
    start = int(task.first_difference.min())
    return plan_runs(model, task, cells, start=start, metric=resolve_metric(metric, task), memory=memory)


def _chosen(layout: Layout, edges: Edges) -> list[Edge]:
    """The edges meant, in the order of the graph."""
    known = dict.fromkeys(layout.edges)
    if isinstance(edges, Circuit):
        if edges.shape != layout.shape:
            raise GraphError(f"{edges!r} is a circuit of another model: its graph has {edges.shape}, this one {layout.shape}")
        check_everywhere(edges, "A choice of edges to measure")
        wanted = set(edges.edges)
    elif isinstance(edges, str):
        # Arrows may have room around them.
        found, idle = edges_called(re.sub(r"\s*->\s*", "->", edges), known)
        if idle:
            raise GraphError(
                f"no edge is called {idle[0]!r}; edges are written like {str(layout.edges[0])!r}, with * for any part"
                + ("; keys and values are read by KV heads, like 'a0.kv0<k>'" if layout.shape.grouped else "")
            )
        wanted = set(found)
    else:
        listed = [as_edge(edge) for edge in edges]
        unknown = [edge for edge in listed if edge not in known]
        if unknown or not listed:
            what = f"{unknown[0]} is not an edge of this model's graph" if unknown else "no edges were given"
            raise GraphError(f"{what}; mi.computation_graph(model) has all of them, or write edges='*'")
        wanted = set(listed)
    return [edge for edge in layout.edges if edge in wanted]


def _positions(task: Task, over: Sequence[str]) -> list[Where]:
    over = (over,) if isinstance(over, str) else tuple(over)
    if over not in ((), ("pos",), ("span",)):
        raise SelectorError(f"over={over!r}: edges can be split by ('pos',) or by ('span',), or not at all")
    if over == ("span",):
        return [*task.spans.names]
    return [*range(task.clean.shape[1])] if over else [None]


def _parts(layout: Layout, task: Task, model: Model) -> Iterator[slice]:
    """Prompts whose written differences fit into memory together."""
    length = task.clean.shape[1] - int(task.first_difference.min())
    rows = max(1, _WRITTEN_DIFFERENCES // max(1, 4 * len(layout.writers) * length * model.cfg.d_model))
    for first in range(0, len(task), rows):
        yield slice(first, min(first + rows, len(task)))


def _wanted(layout: Layout) -> Selection:
    """What writers write, and the stream at every reader."""
    return layout.written | Selection(tuple(dict.fromkeys(_stream(group) for group in layout.groups)))


def _stream(group: ReaderGroup) -> Site:
    """Where what the readers of a group read is recorded."""
    return group.site if group.port == "in" else Site("resid_pre", group.layer)


def _reader_sites(layout: Layout) -> list[Site]:
    """The activation that takes another value when a reader reads something else: queries, keys or values of one head."""
    sites = []
    for group in layout.groups:
        for i in range(len(group.readers)):
            sites.append(group.site if group.port == "in" else Site(group.port, group.layer, head=i))
    return sites


def _at(site: Site, where: Where) -> Site:
    # The positions of a span are others in each prompt, so that all are written, most of them as they were.
    return site.at(where) if isinstance(where, int) else site


class _EdgeCells(Sequence[Cell]):
    """For each edge (and position) the activation that its run changes, made when it is asked for."""

    def __init__(self, runs: Comparison, layout: Layout, edges: Sequence[Edge], positions: Sequence[Where]) -> None:
        self.runs, self.positions = runs, positions
        self.sites = _reader_sites(layout)
        self.groups = [group for group in layout.groups for _ in group.readers]
        self.src = [layout.writer_at[edge.src] for edge in edges]
        self.dst = [layout.reader_at[edge.dst, edge.port] for edge in edges]
        self.start = runs.start
        width = runs.model.cfg.d_model
        wide = torch.promote_types(runs.model.dtype, torch.float32)
        difference = written_difference(runs, layout, self.start, wide)
        self.difference = difference.reshape(*difference.shape[:2], -1, width).to(runs.model.dtype)
        # ``[batch pos 1]`` of each span.
        self.inside: dict[Where, Tensor] = {}
        if any(isinstance(where, str) for where in positions):
            spans = runs.task.spans
            inside = spans.onehot[:, self.start :, None].to(self.difference)
            self.inside = {name: inside[..., i] for i, name in enumerate(spans.names)}
        self.nothing = {where for where, inside in self.inside.items() if not inside.any()}

    def __len__(self) -> int:
        return len(self.src) * len(self.positions)

    def order(self) -> list[int]:
        """Edges of one reader together."""
        return sorted(range(len(self)), key=lambda i: (self.dst[i // len(self.positions)], i))

    def idle(self, i: int) -> bool:
        """Whether the prompts have no token in this span that may differ."""
        return self.positions[i % len(self.positions)] in self.nothing

    def site(self, i: int) -> Site:
        """What cell ``i`` changes."""
        return _at(self.sites[self.dst[i // len(self.positions)]], self.positions[i % len(self.positions)])

    def __getitem__(self, i: Any) -> Any:
        edge, pos = divmod(i, len(self.positions))
        model, group, site = self.runs.model, self.groups[self.dst[edge]], self.site(i)
        stream = self.runs.receiver[_stream(group)]
        read = stream.clone()
        where = self.positions[pos]
        change = self.difference[:, self.src[edge]]
        read[:, self.start :] += change * self.inside[where] if where in self.inside else change
        if isinstance(where, int):
            read = read[:, where]
        if group.port == "in":
            return [(site, read)]
        projection = model.projection(group.layer, group.port)
        with torch.no_grad():
            value = einsum(model.norm("attn", group.layer)(read), projection.weight[site.head], "... m, m d -> ... d")
            return [(site, value if projection.bias is None else value + projection.bias[site.head])]


class _Chosen(Sequence[Cell]):
    """Some of the cells, still made when they are asked for."""

    def __init__(self, cells: _EdgeCells, members: Sequence[int]) -> None:
        self.cells, self.members = cells, members

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: Any) -> Any:
        return self.cells[self.members[i]]


def _measured(
    runs: Comparison, cells: _EdgeCells, members: Sequence[int], memory: int | str | None
) -> Iterator[tuple[list[int], Tensor]]:
    """The change of the metric ``[cell batch]`` of some cells at a time."""
    received = runs.received()
    plan = runs.plan([[cells.site(i)] for i in members], memory)
    run = {i for part in plan.batches for i in part.cells}
    still = [members[i] for i in range(len(members)) if i not in run]
    if still:
        yield still, torch.zeros(len(still), len(runs.task))
    for some, values in runs.sweep(plan, _Chosen(cells, members)):
        yield [members[i] for i in some], (values - received).float().cpu()


def _seen(runs: Comparison) -> Tensor:
    """Numbers that other weights, another metric or other ablated values would change, whatever these are called."""
    sizes = [value.float().abs().mean()[None] for value in runs.other.whole.values()]
    found = [runs.measure(runs.clean_logits), runs.measure(runs.corrupt_logits), runs.clean_logits.std(dim=-1), *sizes]
    return torch.cat([each.detach().double().cpu() for each in found])


@contextmanager
def _kept(flat: Tensor, said: dict[str, Any], seen: Tensor, path: str | os.PathLike[str] | None) -> Iterator[Any]:
    """Fill ``flat`` from the file, if it is there, and write it now and then and at the end, however that comes.

    ``said`` has to be what the file says, and ``seen`` about what its numbers were (threads and devices round in their own ways).
    """
    if path is None:
        yield lambda: None
        return
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = Path(path)
    name = json.dumps(said, sort_keys=True, default=str)
    stamp = hashlib.sha256(name.encode()).hexdigest()
    if file.exists():
        try:
            with safe_open(file, "pt") as opened:
                metadata, values, there = opened.metadata() or {}, opened.get_tensor("per_example"), opened.get_tensor("seen")
        except Exception as error:
            raise FileFormatError(f"{file} is not a table of edge effects ({error}); give another file to resume=") from error
        if metadata.get("sweep") != stamp or values.shape != flat.shape:
            raise FileFormatError(
                f"{file} holds another sweep (model, prompts, edges or metric differ); give another file to resume="
            )
        if there.shape != seen.shape or not torch.allclose(there, seen, rtol=1e-3, atol=1e-4):
            raise FileFormatError(
                f"{file} was measured with other weights, another metric or other ablated values of the same names; "
                "give another file to resume="
            )
        flat.copy_(values)
    saved = time.monotonic()

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}")
        save_file(
            {"per_example": flat, "seen": seen},
            part,
            metadata={"format": "mechinterp-edge-effects", "version": "1", "sweep": stamp},
        )
        os.replace(part, file)

    def save() -> None:
        nonlocal saved
        if time.monotonic() - saved > _SAVE_EVERY:
            write()
            saved = time.monotonic()

    try:
        # Before all the work, and not after it.
        write()
    except OSError as error:
        raise FileFormatError(f"{file} cannot be written ({error}); give another path to resume=") from error
    try:
        yield save
    finally:
        write()
