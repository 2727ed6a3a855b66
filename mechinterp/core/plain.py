"""Any module at all: its user says which activations have a name, and they are seen and edited like those of a transformer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp.core.audit import Audit
from mechinterp.core.edits import Call
from mechinterp.core.hooks import HookRegistry
from mechinterp.core.model import Model, ModelConfig
from mechinterp.core.places import Place
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site, SiteKind
from mechinterp.errors import EditError, MechInterpError, ModelError, SiteError, did_you_mean

__all__ = ["PlainConfig", "PlainModel", "load_plain"]

Named = Mapping[str, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class PlainConfig(ModelConfig):
    """The shape of a plain module: the kinds of its named activations, and the shape of each for the example."""

    kinds: Mapping[str, SiteKind] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class PlainModel(Model):
    """A plain module with named activations, for `mechinterp.run` and `HookRegistry`.

    Made by ``mechinterp.load(module, sites=..., example=...)``; called with what the module takes, it gives its output.
    """

    cfg: PlainConfig

    @property
    def hf(self) -> Any:
        """The module. Calling it fires the same hooks."""
        return self.bridge

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self._tensors()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((tensor.dtype for tensor in self._tensors() if tensor.is_floating_point()), torch.float32)

    def _tensors(self) -> Iterable[Tensor]:
        yield from self.bridge.parameters()
        yield from self.bridge.buffers()

    @property
    def sites(self) -> tuple[str, ...]:
        """The names that the user gave, but those that the audit refused."""
        return tuple(name for name in self.cfg.kinds if name not in self.audit.refused)

    def __call__(self, inputs: Tensor, *, keep: Iterable[int] | None = None) -> Tensor:
        """The module's output for these inputs ``[batch ...]``."""
        if keep is not None:
            raise ModelError(f"{self.name} is a plain module, which unembeds nothing; leave out keep=")
        output: Any = self.bridge(inputs.to(self.device))
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor):
            raise ModelError(
                f"{self.name} gives {type(output).__name__}, not a tensor; wrap it in a module whose forward returns the tensor "
                "that matters"
            )
        return output

    def place(self, site: Site) -> Place:
        """Where this activation is; `SiteError` where the audit refused it."""
        if self._audit is not None and site.name in self._audit.refused:
            raise SiteError(f"{site.name!r} is refused on {self.name}: {self._audit.refused[site.name]}")
        path = str(site.kind.point).format(site.layer)

        def read(hooked: Tensor, kept: dict[str, Tensor]) -> Tensor:
            if not isinstance(hooked, Tensor):
                raise EditError(
                    f"{site.whole}: the module {path!r} gives {type(hooked).__name__}, not a tensor; name one that does"
                )
            # The module behind may work in place, as ReLU(inplace=True) does.
            return hooked.clone()

        def write(hooked: Tensor, old: Tensor, new: Tensor, kept: dict[str, Tensor]) -> Tensor:
            # What is captured with its graph must not be overwritten either.
            return new.clone() if torch.is_grad_enabled() else new

        return Place(site.whole, self.bridge.get_submodule(path), read, write)

    def block(self, layer: int) -> Any:
        """There is none: `ModelError`."""
        raise ModelError(f"{self.name} is a plain module without transformer blocks; mi.run and mi.HookRegistry work on it")

    def describe(self) -> dict[str, object]:
        sites = {name: [kind.point, *kind.axes] for name, kind in self.cfg.kinds.items()}
        return {"name": self.name, "architecture": self.cfg.architecture, "device": str(self.device), "sites": sites}

    def __repr__(self) -> str:
        return f"Model {self.name}: plain {self.cfg.architecture}, sites {', '.join(self.sites)}"


def load_plain(module: nn.Module, sites: Named, example: Tensor, *, name: str | None = None) -> PlainModel:
    """Which activations of this module can be seen and edited? A model of any module; see `mechinterp.load`.

    Parameters
    ----------
    module
        Any module that takes one tensor ``[batch ...]`` and gives a tensor. Put into eval mode.
    sites
        A name to the path of the submodule whose output it is, and to its axes, the batch first:
        ``{"conv1": ("features.0", ("batch", "channel", "height", "width"))}``. ``{}`` in a path counts layers, which are then
        selected as in ``"L*.act"``. The axis ``pos`` is selected by ``[3]``, ``head`` by ``H3``, ``channel`` or else the last
        by ``N3``.
    example
        An input, run four times and more: to learn the shapes, and to check each site.
    name
        What results call it.

    Returns
    -------
    PlainModel
        Its ``audit`` says which sites are proved: they fire once, replacing them by themselves changes no bit of the output,
        and an edit reaches it.

    Raises
    ------
    ModelError
        No such submodule, axes that do not fit, or an output that is no tensor.

    Examples
    --------
    >>> import torch
    >>> import mechinterp as mi
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = mi.load(net, sites={"hidden": ("1", ("batch", "neuron"))}, example=torch.ones(3, 4))
    >>> mi.run(model, torch.ones(1, 4), edits=[mi.Zero("N3.hidden")], capture="hidden")["N3.hidden"]
    tensor([0.])
    """
    module.eval()
    label = name or type(module).__name__
    kinds = {each: _kind(each, given, module) for each, given in sites.items()}
    if not kinds:
        raise ModelError("sites= names no activation; write sites={'hidden': ('path.of.module', ('batch', 'neuron'))}")
    unknown = {each: (0,) * len(kind.axes) for each, kind in kinds.items()}
    cfg = PlainConfig(
        architecture=type(module).__name__, n_layers=_layers(kinds, module), n_heads=0, n_kv_heads=0, d_model=0, d_head=0,
        d_mlp=0, d_vocab=0, n_ctx=0, norm="", positional="", kinds=kinds, shapes=unknown,
    )  # fmt: skip
    model = PlainModel(bridge=module, tokenizer=None, name=label, cfg=cfg)
    shapes = dict(cfg.shapes)
    refused: dict[str, str] = {}
    with torch.no_grad():
        base = model(example)
    for kind in kinds.values():
        try:
            shapes[kind.name] = _check(model, kind, example, base)
        except MechInterpError as error:
            refused[kind.name] = str(error)
    proved = tuple(each for each in kinds if each not in refused)
    model = replace(model, cfg=replace(cfg, shapes=shapes))
    model._audit = Audit(label, proved, refused, {})
    return model


def _kind(name: str, given: Any, module: nn.Module) -> SiteKind:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ModelError(f"{name!r} cannot be a site's name; use letters, digits and _")
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str)):
        raise ModelError(f"site {name!r} is given as {given!r}; write ('path.of.module', ('batch', ...))")
    path, axes = given[0], tuple(given[1])
    if not axes or axes[0] != "batch" or len(set(axes)) != len(axes):
        raise ModelError(f"site {name!r} has the axes {axes}; name each once, 'batch' first")
    paths = [path for path, _ in module.named_modules()]
    if path.format(0) not in paths:
        near = did_you_mean(path, filter(None, paths))
        raise ModelError(f"site {name!r}: {type(module).__name__} has no submodule {path.format(0)!r}. {near}")
    return SiteKind(name, axes, path, f"output of {path or 'the whole module'}")


def _layers(kinds: Mapping[str, SiteKind], module: nn.Module) -> int:
    paths = {path for path, _ in module.named_modules()}
    counts = {}
    for kind in kinds.values():
        if kind.per_layer:
            n = 1
            while str(kind.point).format(n) in paths:
                n += 1
            counts[kind.name] = n
    if len(set(counts.values())) > 1:
        raise ModelError(f"the sites have different numbers of layers, {counts}; give each sort of layer a path of its own")
    return max(counts.values(), default=0)


def _check(model: PlainModel, kind: SiteKind, example: Tensor, base: Tensor) -> tuple[int, ...]:
    """The shape of a kind of activation, once it is shown at all layers to be what it says."""
    shapes = set()
    for layer in range(model.cfg.n_layers) if kind.per_layer else [None]:
        site = Site(kind.name, layer, own=kind)
        kept: dict[Site, Tensor] = {}
        for label, change in (("replacing", lambda value: value), ("pushing", lambda value: value + 1 + value.abs())):
            registry = HookRegistry(model)
            registry.capture(Selection((site,)), kept)
            registry.add(Call(site, lambda value, _, change=change: change(value)))  # type: ignore[misc]
            with torch.no_grad(), registry:
                output = model(example)
            if torch.equal(output, base) != (label == "replacing"):
                what = "by itself changes the output" if label == "replacing" else "far away does not reach the output"
                raise SiteError(f"{label} {site} {what}")
        shapes.add(tuple(kept[site].shape))
    if len(shapes) > 1:
        raise SiteError(f"{kind.name!r} has other shapes in other layers, {sorted(shapes)}; name them one by one")
    return shapes.pop()
