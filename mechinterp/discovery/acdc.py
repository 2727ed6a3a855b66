"""ACDC: edges are removed one after another, and many of the tests are run before it is known that they will be asked."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mechinterp.core.ablation import Ablation, as_ablation
from mechinterp.core.arguments import check_model_and_task
from mechinterp.core.model import Model
from mechinterp.core.plan import progress_bar
from mechinterp.discovery.choosing import Search
from mechinterp.discovery.packing import Packing
from mechinterp.errors import GraphError
from mechinterp.graph import Circuit, Edge
from mechinterp.patching.compare import MetricLike, unit_of
from mechinterp.patching.readers import Layout, layout_of
from mechinterp.tasks import Task, resolve_metric

__all__ = ["acdc", "acdc_of_size"]

Order = Literal["late-first", "early-first"] | Sequence[Edge | tuple[str, str, str]]
# Expected tests up to the next edge that stays, times this, are asked at once: a call more costs more than idle rows.
_AHEAD = 1.25
_ORDERS = ("late-first", "early-first")


def acdc(
    model: Model,
    task: Task,
    thresholds: float | Sequence[float],
    *,
    ablation: Ablation | str = "resample",
    metric: MetricLike = None,
    signed: bool = False,
    normalize: bool = True,
    order: Order = "late-first",
    ahead: int | None = None,
    memory: int | str | None = None,
    progress: bool = False,
) -> tuple[Circuit, ...]:
    """Which edges are left when each one is removed in turn, unless that changes the metric?

    Edges are visited reader by reader, the logits first and the first layer last. Each is removed from the circuit *as it
    stands*: its reader hears the ablated value of its writer. It stays removed if the metric moves by less than the threshold,
    else it is put back. With R the edges removed so far and m the mean metric over the prompts, edge e goes if

        |m(R + e) - m(R)| < threshold              (signed: the move towards the ablated side, without the bars)

    The result is that of the plain loop, edge by edge, and it depends on the order. What differs is the number of calls: the
    nested removals R + e1, R + e1 + e2, ... are rows of one pass, and row i minus row i - 1 is the loop's own test as long as
    all edges before were removed. Up to the first that is not, the rows are used; behind it the next pass begins.

    Parameters
    ----------
    model, task
        What to explain.
    thresholds
        One, or several: they are searched side by side, with rows of all of them in each pass. With ``normalize`` 1 is the
        whole difference between clean and corrupt, else they are in units of the metric.
    ablation, metric, memory, progress
        As in `mechinterp.run_circuits`. Conmy et al. test the rise of ``metric="kl"``.
    signed
        True, as Conmy et al. do: an edge whose removal moves the metric the other way goes as well, so that parts that work
        against the answer are lost. False: it stays.
    order
        ``"late-first"``: the edges of `mechinterp.graph.scored_edges` backwards (in a layer MLP, then v, k, q; of each reader
        the last writer first). ``"early-first"``: the same readers, of each the first writer first. Or all edges in any order.
    ahead
        How many tests to run ahead of their turn at most. Default: by how often edges stay, within the memory. 1 is the plain
        loop.

    Returns
    -------
    tuple of Circuit
        One for each threshold, in their order. The score of an edge is what its removal did when it was tested: positive
        towards the corrupt run, in the threshold's units. ``provenance`` has the order, the metric, ``calls`` (packed passes),
        ``rows`` (circuits in them, for each pack of prompts) and ``tests`` (what the plain loop would have called).

    Raises
    ------
    GraphError
        A threshold that is no positive number; an order that does not hold every edge once.
    MetricError
        ``normalize`` where clean and corrupt do not differ.

    Notes
    -----
    Cost: 2 forward passes, and a row for each test and for each of those that were run in vain. Rows start at the layer of the
    earliest reader that lost an edge, where that is exact: on average about half of the blocks.

    References
    ----------
    Conmy et al. 2023 (2304.14997), "Towards automated circuit discovery".

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> strict, loose = mi.acdc(toy.model, toy.task[:8], [0.01, 0.6])
    >>> strict.iou(toy.truth["resample"])
    1.0
    """
    check_model_and_task(model, task)
    asked = [thresholds] if isinstance(thresholds, int | float) else list(thresholds)
    for threshold in asked:
        if not (math.isfinite(threshold) and threshold > 0):
            raise GraphError(f"threshold={threshold}: give a positive number, such as 0.01 of the difference to explain")
    if not asked:
        raise GraphError("no thresholds were given; pass one, or a list such as [0.01, 0.03, 0.1]")
    if ahead is not None and ahead < 1:
        raise GraphError(f"ahead={ahead}: give the number of tests to run at once, from 1 on")
    layout = layout_of(model)
    places = _ordered(layout, order)
    started = time.perf_counter()
    bench = _Bench(model, task, layout, as_ablation(ablation, seed=None), metric, memory)
    unit = bench.unit(normalize)
    said = bench.provenance | {
        "method": "ACDC",
        "signed": signed,
        "normalized": normalize,
        "order": order if isinstance(order, str) else "as given",
        "test": ("move" if signed else "absolute move") + " of the mean metric below the threshold, in the circuit as it stands",
        "baseline": bench.baseline,
    }
    searches = [_Greedy(places, layout, tau, signed, bench.start, unit, ahead or bench.at_once) for tau in asked]
    running = {i: search.run() for i, search in enumerate(searches)}
    waiting = {i: next(each) for i, each in running.items()}
    with progress_bar(len(asked) * len(places), "acdc", show=progress) as bar:
        while waiting:
            answers = bench.measure([row for rows in waiting.values() for row in rows])
            for i, rows in list(waiting.items()):
                mine, answers = answers[: len(rows)], answers[len(rows) :]
                before = searches[i].at
                try:
                    waiting[i] = running[i].send(mine)
                except StopIteration:
                    del waiting[i]
                bar.update(searches[i].at - before)
    said |= {"calls": bench.calls, "rows": bench.rows, "forwards": 2 + bench.rows, "tests": len(asked) * len(places)}
    said["seconds"] = round(time.perf_counter() - started, 1)
    return tuple(
        Circuit(
            layout.shape,
            {layout.edges[i]: score for i, score in search.kept.items()},
            said | {"threshold": float(tau), "selection": {"rule": "acdc", "threshold": float(tau), "signed": signed}},
        )
        for tau, search in zip(asked, searches, strict=True)
    )


def acdc_of_size(search: Search) -> Circuit:
    """ACDC as `mechinterp.discover` runs it: at its threshold, or at the one of several whose circuit is nearest to the size.

    A size is searched for in at most three sweeps of six thresholds, each between the two of the last one that enclose it; of
    equally near ones the largest threshold is taken. The number of edges need not fall with the threshold, so it is no proof
    that no threshold is nearer. ``provenance["selection"]`` says how many were asked for (``n``) and ``found``, and which
    thresholds were ``tried``.
    """
    options: dict[str, Any] = {name: getattr(search, name) for name in ("ablation", "metric", "signed", "memory", "progress")}
    if search.threshold is not None:
        return acdc(search.model, search.task, search.threshold, **options)[0]
    low, high = 1e-4, 0.5
    found: dict[float, Circuit] = {}
    calls = rows = 0
    for _ in range(3):
        taus = [low * (high / low) ** (i / 5) for i in range(6)]
        fresh = [tau for tau in taus if tau not in found]
        circuits = acdc(search.model, search.task, fresh, **options)
        found |= dict(zip(fresh, circuits, strict=True))
        calls, rows = calls + circuits[0].provenance["calls"], rows + circuits[0].provenance["rows"]
        best = min(found, key=lambda tau: (abs(len(found[tau]) - search.wanted), -tau))
        if len(found[best]) == search.wanted:
            break
        above = [tau for tau in found if len(found[tau]) > search.wanted]
        below = [tau for tau in found if len(found[tau]) < search.wanted]
        if not above or not below:
            break
        low, high = max(above), min((tau for tau in below if tau > max(above)), default=max(below))
    circuit = found[best]
    selection = dict(circuit.provenance["selection"]) | {"n": search.wanted, "found": len(circuit), "tried": sorted(found)}
    said = dict(circuit.provenance) | {"selection": selection, "calls": calls, "rows": rows, "forwards": 2 + rows}
    return Circuit(circuit.shape, circuit.scores, said)


@dataclass(frozen=True, eq=False)
class _Row:
    """One circuit to run: its removed edges ``[reader writer]``, and the earliest layer that has any."""

    removed: Tensor
    layer: int


class _Bench:
    """Measures many circuits, and counts."""

    def __init__(
        self, model: Model, task: Task, layout: Layout, ablation: Ablation, metric: MetricLike, memory: int | str | None
    ) -> None:
        task = task.to(model.device)
        rule = resolve_metric(metric, task)
        packing = Packing.of(model, task, ablation, rule, memory)
        self.at_once, self.layout, self.task, self.metric = packing.at_once, layout, task, rule
        self.packs = [packing.pack(rows) for rows in packing.parts]
        self.calls = self.rows = 0
        clean, corrupt = (
            torch.cat([pack.runs.measure(getattr(pack.runs, which)) for pack in self.packs]).double().mean()
            for which in ("clean_logits", "corrupt_logits")
        )
        self.start = float(clean)
        self.baseline = {"clean": float(clean), "corrupt": float(corrupt)}
        self.provenance = self.packs[0].runs.provenance(ablation=str(ablation)) | {"prompts": len(task)}

    def unit(self, normalize: bool) -> float:
        """What scores are divided by: the difference to the corrupt run, or the sign of it."""
        if normalize:
            return unit_of(self.baseline, "noise", metric=self.metric, task=self.task)
        return math.copysign(1.0, self.baseline["corrupt"] - self.baseline["clean"])

    def measure(self, rows: Sequence[_Row]) -> list[float]:
        """The mean metric over all prompts of each circuit."""
        found: list[float] = []
        for chunk in range(0, len(rows), self.at_once):
            some = rows[chunk : chunk + self.at_once]
            removed = torch.stack([row.removed for row in some]).to(self.packs[0].ablated.device)
            first = min(row.layer for row in some)
            values = [pack.measure(pack.answers(removed, first=first)) for pack in self.packs]
            found += torch.cat(values, dim=1).double().mean(dim=1).tolist()
            self.calls += len(self.packs)
            self.rows += len(some)
        return found


class _Greedy:
    """The search at one threshold: asks for rows, and is told their metric."""

    def __init__(
        self, places: Sequence[int], layout: Layout, threshold: float, signed: bool, start: float, unit: float, most: int
    ) -> None:
        self.places, self.layout, self.threshold, self.signed = places, layout, threshold, signed
        self.value, self.unit, self.most = start, unit, most
        self.at = 0
        # Edges that stayed, by their place in the layout, and what their removal did.
        self.kept: dict[int, float] = {}

    def run(self) -> Generator[list[_Row], list[float], None]:
        layer_of = [group.layer for group in self.layout.groups for _ in group.readers]
        removed = torch.zeros(len(self.layout.readers), len(self.layout.writers))
        lowest = self.layout.shape.n_layers
        while self.at < len(self.places):
            rows: list[_Row] = []
            now, layer = removed.clone(), lowest
            for place in self.places[self.at : self.at + self._ahead()]:
                reader = self.layout.dst[place]
                now[reader, self.layout.src[place]] = 1.0
                layer = min(layer, layer_of[reader])
                rows.append(_Row(now.clone(), layer))
            values = yield rows
            for row, value in zip(rows, values, strict=True):
                move = (value - self.value) / self.unit
                place = self.places[self.at]
                self.at += 1
                if (move if self.signed else abs(move)) >= self.threshold:
                    self.kept[place] = move
                    break
                removed, lowest, self.value = row.removed, row.layer, value

    def _ahead(self) -> int:
        """As many as are likely to be used, by the share of edges that stayed so far."""
        stays = (len(self.kept) + 1) / (self.at + 8)
        return max(1, min(self.most, math.ceil(_AHEAD / stays)))


def _ordered(layout: Layout, order: Order) -> list[int]:
    """The places of all edges in the order in which they are tested."""
    place = {edge: i for i, edge in enumerate(layout.edges)}
    if isinstance(order, str):
        if order not in _ORDERS:
            raise GraphError(f"order={order!r}: write 'late-first', 'early-first', or give all edges in the order to test them")
        members: dict[int, list[int]] = {reader: [] for reader in dict.fromkeys(reversed(layout.dst))}
        for i, reader in enumerate(layout.dst):
            members[reader].append(i)
        return [i for each in members.values() for i in (reversed(each) if order == "late-first" else each)]
    listed = [Edge(*edge) for edge in order]
    if set(listed) != place.keys() or len(listed) != len(place):
        raise GraphError(
            f"order= has {len(set(listed) & place.keys())} of the {len(place)} edges in {len(listed)}; give each one once"
        )
    return [place[edge] for edge in listed]
