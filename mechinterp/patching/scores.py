"""Scores of sites and of edges: differences between the runs times gradients, or what rules put in place of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from mechinterp.core.effects import Label
from mechinterp.core.model import Model
from mechinterp.core.replay import Recording
from mechinterp.core.run import Cache
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import ModelError
from mechinterp.graph import GraphShape
from mechinterp.patching.activation import Grid
from mechinterp.patching.compare import Comparison
from mechinterp.patching.gradients import gradients
from mechinterp.patching.norms import linear_norm
from mechinterp.patching.readers import EMBED, Layout, ReaderGroup, head_changes, layout_of
from mechinterp.patching.relevance import add_relevance_rules
from mechinterp.patching.star import fixed_edges, fixed_sites, in_a_branch, unsigned
from mechinterp.tasks import Spans

__all__ = ["RULES", "EdgeScores", "Rules", "SiteScores", "nodes_of", "written_difference"]


# Of one matrix product of readers and writers at least.
_ROWS = 64


@dataclass(frozen=True)
class Rules:
    """What takes the place of the gradient.

    Parameters
    ----------
    name
        Of the method, where it is not plain.
    relevance
        RelP's backward pass.
    fixes
        Attention is computed exactly where queries or keys change.
    drops
        One backward pass for each layer, in which nothing flows back through it.
    """

    name: str = ""
    relevance: bool = False
    fixes: bool = False
    drops: bool = False


RULES: Mapping[str, Rules] = MappingProxyType(
    {
        "gradient": Rules(),
        "relp": Rules("RelP", relevance=True),
        "qk-fix": Rules("attribution patching with exact attention", fixes=True),
        "grad-drop": Rules("attribution patching with GradDrop", drops=True),
        "atp-star": Rules("AtP*", fixes=True, drops=True),
    }
)


def nodes_of(model: Model) -> Grid:
    """Every writer as one cell."""
    shape = GraphShape.of(model)
    cells: dict[str, tuple[Site, ...]] = {"embed": (EMBED,)}
    for layer in range(shape.n_layers):
        cells |= {f"a{layer}.h{i}": (Site("z", layer, head=i),) for i in range(shape.n_heads)}
        if not shape.attn_only:
            cells[f"m{layer}"] = (Site("mlp_out", layer),)
    return Grid(("node",), {"node": tuple(cells)}, list(cells.values()), "")


class _Scores:
    """What both kinds need to know of the rules."""

    def __init__(self, model: Model, rules: Rules) -> None:
        self.model, self.rules = model, rules
        self.also = add_relevance_rules if rules.relevance else None
        # In which layer nothing flows back, pass by pass; the plain gradient comes first.
        self.drops: tuple[int | None, ...] = (None, *range(model.cfg.n_layers)) if rules.drops else (None,)
        # Sites that will be replayed in the receiving run.
        self.replayed: tuple[Site, ...] = ()

    def gradients(
        self, runs: Comparison, sites: Selection, points: Sequence[float], line: Site, capture: Selection | None = None
    ) -> Iterator[tuple[dict[Site, Tensor], dict[Site, Tensor]]]:
        return gradients(runs, sites, points, capture=capture, at=line, also=self.also, drops=self.drops)

    def recording(self, runs: Comparison) -> Recording:
        """The receiving run, for replays from the first position at which anything differs."""
        if runs.recording is None:
            raise ModelError(f"the receiving run of {self.model.name} was not recorded; use rules='gradient'")
        return runs.recording.since(_start(runs) if self.model.replay_prefix else 0)


class SiteScores(_Scores):
    """Scores of sites: difference times gradient, summed over all but the batch."""

    def __init__(self, model: Model, grid: Grid, rules: Rules) -> None:
        super().__init__(model, rules)
        self.grid = grid
        self.axes, self.site = grid.axes, grid.site
        self.coords: dict[str, tuple[Label, ...]] = grid.coords
        self.wanted = Selection(tuple(dict.fromkeys(site.whole for cell in grid.cells for site in cell)))
        self.streams = Selection(())
        if rules.fixes:
            self.replayed = tuple(site for site in self.wanted if site.name in ("q", "k"))
        mixed = Selection(tuple(dict.fromkeys(Site("z", site.layer) for site in self.replayed)))
        self.hooked = Selection(tuple(site for site in self.wanted if site not in self.replayed)) | mixed
        cfg = model.cfg
        widths = sum(max(cfg.d_model, cfg.d_mlp) if "d_mlp" in site.kind.axes else cfg.d_model for site in self.wanted)
        kept = 3 * widths + (len(mixed) * len(self.drops) * cfg.d_model if mixed else 0)
        self.bytes_per_token = 4 * (kept + len(self.drops) * len(grid.cells))

    def score(self, runs: Comparison, points: Sequence[float], lines: Sequence[Site], memory: int, bar: Any) -> Tensor:
        """``[1 cell batch]``, or where layers are dropped the plain and the absolute scores ``[2 cell batch]``."""
        passes = len(points) * len(lines)
        total: list[dict[Site, Tensor]] = [{} for _ in self.drops]
        for line in lines:
            for i, (found, _) in enumerate(self.gradients(runs, self.hooked, points, line)):
                into = total[i % len(self.drops)]
                for site, gradient in found.items():
                    into[site] = into.get(site, 0.0) + gradient.float() / passes
                bar.update(2 if len(self.drops) == 1 else 1)
        scores = torch.stack([self._products(runs, each) for each in total])
        if self.replayed:
            self._fix(scores, runs, total, memory)
        scores = scores.cpu()
        return unsigned(scores, torch.tensor([in_a_branch(cell) for cell in self.grid.cells])) if self.rules.drops else scores

    def _products(self, runs: Comparison, slopes: Mapping[Site, Tensor]) -> Tensor:
        """``[cell batch]``, of sites that are not replayed."""
        plain = Selection(tuple(site for site in self.wanted if site not in self.replayed))
        product = {site: (runs.other[site] - runs.receiver[site]).float() * slopes[site] for site in plain}
        parts = Cache(self.model, plain, product, runs.task.positions)
        batch = len(runs.task)
        nothing = torch.zeros(batch, device=runs.tokens.device)
        # Neurons come by the thousand: their sums over positions are made together.
        neurons: dict[Site, tuple[Tensor, ...]] = {}

        def total(site: Site) -> Tensor:
            if site != Site(site.name, site.layer, neuron=site.neuron) or site.neuron is None or product[site.whole].ndim != 3:
                return parts[site].reshape(batch, -1).sum(dim=-1)
            if site.whole not in neurons:
                neurons[site.whole] = product[site.whole].sum(dim=1).unbind(dim=1)
            return neurons[site.whole][site.neuron]

        rows = []
        for cell in self.grid.cells:
            each = [total(site) for site in cell if site.whole not in self.replayed]
            rows.append(sum(each[1:], each[0]) if each else nothing)
        return torch.stack(rows)

    def _fix(self, scores: Tensor, runs: Comparison, slopes: Sequence[Mapping[Site, Tensor]], memory: int) -> None:
        """Add what queries and keys do, to ``scores [drop cell batch]``."""
        recording = self.recording(runs)
        for whole in self.replayed:
            # Of a cell of several sites, each of these for itself.
            cells = {i: [site for site in cell if site.whole == whole] for i, cell in enumerate(self.grid.cells)}
            cells = {i: cell for i, cell in cells.items() if cell}
            places, layer = list(cells), whole.layer or 0
            gradient = torch.stack([each[Site("z", layer)][:, recording.start :] for each in slopes])
            change = runs.other[whole] - runs.receiver[whole]
            for i, effect in fixed_sites(recording, layer, whole.name, list(cells.values()), change, gradient, memory):
                scores[:, places[i]] += effect

    def from_embed(self, flat: Tensor) -> Tensor:
        return flat[self.coords["node"].index("embed")]


class EdgeScores(_Scores):
    """Scores of edges: each writer's difference times the gradient at each reader's input."""

    def __init__(self, model: Model, rules: Rules, spans: Spans | None = None) -> None:
        super().__init__(model, rules)
        self.layout: Layout = layout_of(model)
        self.site = ""
        self.axes: tuple[str, ...] = ("edge",)
        self.coords: dict[str, tuple[Label, ...]] = {"edge": tuple(tuple(edge) for edge in self.layout.edges)}
        self.spans = spans
        if spans is not None:
            self.axes, self.coords = ("edge", "span"), self.coords | {"span": spans.names}
        self.wanted = self.layout.written
        cfg, layers = model.cfg, range(model.cfg.n_layers)
        self.fixed = [group for group in self.layout.groups if rules.fixes and group.port in ("q", "k")]
        linear = [group for group in self.layout.groups if group not in self.fixed]
        self.replayed = tuple(Site(group.port, group.layer) for group in self.fixed)
        mixed = tuple(Site("z", layer) for layer in layers) if self.fixed else ()
        self.hooked = Selection((*(_gradient_site(group) for group in linear), *mixed))
        # q, k and v of a layer read the same stream through the same norm.
        places: dict[tuple[int, str], list[ReaderGroup]] = {}
        for group in linear:
            places.setdefault((group.layer, str(group.site) if group.port == "in" else ""), []).append(group)
        # Neighbouring places are scored together: few large products of matrices are faster than many small ones.
        self.chunks: list[list[list[ReaderGroup]]] = [[]]
        for groups in places.values():
            if sum(len(group.readers) for place in self.chunks[-1] for group in place) >= _ROWS:
                self.chunks.append([])
            self.chunks[-1].append(groups)
        self.streams = Selection(tuple(Site("resid_pre", layer) for layer in layers))
        self.bytes_per_token = 4 * cfg.d_model * (len(self.layout.writers) + _ROWS + 3 * cfg.n_heads)
        if len(self.drops) > 1:
            self.bytes_per_token += 4 * len(self.drops) * (len(self.layout.edges) // 8 + len(mixed) * cfg.d_model)
        if spans is not None:
            # No more spans than positions; and the products of some readers at all positions.
            self.bytes_per_token += 4 * len(self.layout.writers) * (len(self.layout.readers) + 2 * _ROWS)

    def score(self, runs: Comparison, points: Sequence[float], lines: Sequence[Site], memory: int, bar: Any) -> Tensor:
        """``[1 edge batch]``, or where layers are dropped the plain and the absolute scores ``[2 edge batch]``.

        With spans ``[1 (edge span) batch]``.
        """
        # Nothing differs before the runs first do.
        start = _start(runs)
        difference = written_difference(runs, self.layout, start)
        # Of the prompts of this part, which have the names of all of them.
        inside = None if self.spans is None else runs.task.spans.onehot
        slopes: list[dict[Site, Tensor]] = []
        tables: list[Tensor] = []
        passes = len(points) * len(lines)
        for line in lines:
            for found, values in self.gradients(runs, self.hooked, points, line, self.streams):
                table = self._table(found, values, difference, start, inside)
                if tables and not self.rules.drops:
                    tables[0] += table
                else:
                    tables.append(table)
                slopes.append(found)
                bar.update(2 if len(self.drops) == 1 else 1)
        scores = torch.stack(tables)
        if not self.rules.drops:
            scores /= passes
        if self.fixed:
            self._fix(scores, runs, difference, slopes, memory)
        scores = scores.cpu()
        if not self.rules.drops:
            return scores
        return unsigned(scores, torch.tensor([self.layout.readers[dst] != ("logits", "in") for dst in self.layout.dst]))

    def _table(
        self,
        found: dict[Site, Tensor],
        values: Mapping[Site, Tensor],
        difference: Tensor,
        start: int,
        inside: Tensor | None,
    ) -> Tensor:
        """``[edge batch]`` of the gradients at what is read, which are taken out of ``found``; 0 at edges computed otherwise.

        With spans ``[(edge span) batch]``.
        """
        layout, width = self.layout, self.model.cfg.d_model
        batch, n_writers, size = difference.shape
        at = None if inside is None else inside[:, start:].to(difference).transpose(1, 2)
        parts = () if at is None else (at.shape[1],)
        products = difference.new_zeros(len(layout.readers), n_writers, *parts, batch)
        # One piece of memory for all of them: a fresh one each time costs as much as a product.
        most = max(sum(len(group.readers) for place in chunk for group in place) for chunk in self.chunks)
        space = difference.new_empty(most, batch * size // width, width)
        for chunk in self.chunks:
            readers = [reader for place in chunk for group in place for reader in group.readers]
            first = 0
            for place in chunk:
                out = space[first : first + sum(len(group.readers) for group in place)]
                read = [found.pop(_gradient_site(group))[:, start:] for group in place]
                if place[0].port == "in":
                    out[0] = read[0].flatten(0, 1)
                else:
                    self._through_norm(place, read, values[Site("resid_pre", place[0].layer)][:, start:], out)
                first += len(out)
            # For the first readers of a chunk that is more than there are edges of.
            heard = max(group.n_writers for place in chunk for group in place)
            slopes = space[:first].reshape(first, batch, size).permute(1, 2, 0)
            if at is None:
                products[readers, :heard] = torch.bmm(difference[:, :heard], slopes).permute(2, 1, 0)
                continue
            # Position by position, and only then summed: the operations are the same.
            moved = rearrange(difference[:, :heard], "b w (p m) -> b p w m", m=width)
            each = torch.matmul(moved, rearrange(slopes, "b (p m) r -> b p m r", m=width))
            products[readers, :heard] = rearrange(torch.bmm(at, each.flatten(2)), "b s (w r) -> r w s b", r=first)
        if at is not None:
            return products[layout.dst, layout.src].flatten(0, 1)
        return products[torch.tensor(layout.dst, device=products.device), torch.tensor(layout.src, device=products.device)]

    def _fix(
        self, scores: Tensor, runs: Comparison, difference: Tensor, slopes: Sequence[Mapping[Site, Tensor]], memory: int
    ) -> None:
        """Put what queries and keys do into ``scores [drop edge batch]``."""
        recording, start = self.recording(runs), _start(runs)
        change = rearrange(difference, "b w (p m) -> b w p m", m=self.model.cfg.d_model)
        if recording.start < start:
            change = torch.nn.functional.pad(change, (0, 0, start, 0))
        src, dst = torch.tensor(self.layout.src), torch.tensor(self.layout.dst)
        for group in self.fixed:
            gradient = torch.stack([each[Site("z", group.layer)][:, recording.start :] for each in slopes])
            found = fixed_edges(recording, group.layer, group.port, change[:, : group.n_writers], gradient, memory)
            own = ((dst >= group.readers.start) & (dst < group.readers.stop)).nonzero().flatten()
            scores[:, own] = found[:, (dst[own] - group.readers.start) * group.n_writers + src[own]]

    def _through_norm(self, groups: Sequence[ReaderGroup], gradients: list[Tensor], stream: Tensor, out: Tensor) -> None:
        """The gradients at q, k and v ``[b p h d]``, pulled back through projection and norm to ``out [(q k v heads) (b p) m]``.

        Every head reads the same stream, so its own gradient needs no split of the stream in the forward pass.
        """
        layer = groups[0].layer
        module = self.model.norm("attn", layer)
        weights = [self.model.projection(layer, group.port).weight for group in groups]
        norm = linear_norm(module, stream)
        if norm is not None:
            norm.pull(gradients, weights, out, frozen=self.rules.relevance)
            return
        each = zip(gradients, weights, strict=True)
        normed = torch.cat([einsum(gradient, weight, "b p h d, h m d -> b p h m") for gradient, weight in each], dim=2)
        with torch.enable_grad():
            leaf = stream.unsqueeze(2).expand_as(normed).detach().requires_grad_()
            read = module(leaf)
        out.copy_(rearrange(torch.autograd.grad(read, leaf, normed)[0], "b p h m -> h (b p) m"))

    def from_embed(self, flat: Tensor) -> Tensor:
        of_embed = [i for i, writer in enumerate(self.layout.src) if writer == 0]
        return flat.reshape(len(self.layout.edges), -1, flat.shape[-1])[of_embed].sum(dim=(0, 1))


def _start(runs: Comparison) -> int:
    """The first position at which the runs differ; the last one where they do not."""
    return min(runs.start, runs.tokens.shape[1] - 1)


def _gradient_site(group: ReaderGroup) -> Site:
    """Where a group's gradient is taken: at the projection itself for q, k and v, else at what is read."""
    return group.site if group.port == "in" else Site(group.port, group.layer)


def written_difference(runs: Comparison, layout: Layout, start: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What each writer writes in the other run minus the receiving run, from position ``start``.

    ``[batch writer (pos d_model)]``, summed in ``dtype``.
    """
    model = runs.model

    def gap(site: Site) -> Tensor:
        return (runs.other[site][:, start:] - runs.receiver[site][:, start:]).to(dtype)

    first = gap(EMBED)
    batch, length, width = first.shape
    # Writers first: what the heads of a layer write is one product, which is written where it belongs.
    table = first.new_empty(len(layout.writers), batch, length, width)
    table[0] = first
    for layer in range(layout.shape.n_layers):
        # z is d_head wide where a head output is d_model wide, so it is z that is kept and projected here.
        z, into = Site("z", layer), table[layout.head_writers(layer)]
        if model.cfg.post_norm:
            changes = head_changes(model, layer, runs.receiver[z][:, start:], runs.other[z][:, start:])
            into.copy_(changes.permute(2, 0, 1, 3))
        else:
            moved = gap(z).permute(2, 0, 1, 3).flatten(1, 2)
            torch.bmm(moved, model.projection(layer, "o").weight.to(dtype), out=into.flatten(1, 2))
        if not layout.shape.attn_only:
            table[layout.mlp_writer(layer)] = gap(Site("mlp_out", layer))
    return table.flatten(2).transpose(0, 1)
