"""A tuned lens: for each layer an affine map from the stream there to the last stream; saved, and read again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.model import Model
from mechinterp.core.sites import Site
from mechinterp.core.store import put_whole
from mechinterp.errors import FileFormatError, ModelError, SelectorError

__all__ = ["TunedLens"]

_FORMAT, _VERSION = "mechinterp.tuned_lens", 1
_PUBLISHED = ("config.json", "params.pt")


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens:
    """Translates the residual stream of a layer into what the last stream would be: h + A h + b.

    Translator i reads what enters block i (``L{i}.resid_pre``, which is ``L{i-1}.resid_post``); the last ``resid_post`` is its
    own translation. ``weight`` of zeros is the logit lens. Made by `mechinterp.fit_tuned_lens`, or `load`.

    Parameters
    ----------
    weight
        ``[layer d_model d_model]``: A, as `torch.nn.Linear` keeps it.
    bias
        ``[layer d_model]``.
    provenance
        How it was made; of a lens fitted here with held-out KL for each layer, before and after.

    Examples
    --------
    >>> import torch
    >>> import mechinterp as mi
    >>> model = mi.load("toy:induction")
    >>> lens = mi.TunedLens.identity(model)
    >>> bool((lens.translate("L1.resid_pre", torch.ones(1, model.cfg.d_model)) == 1).all())
    True
    """

    weight: Tensor
    bias: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.weight.shape)
        if len(shape) != 3 or shape[1] != shape[2] or tuple(self.bias.shape) != shape[:2]:
            raise FileFormatError(
                f"translators of shape {list(shape)} with biases {list(self.bias.shape)} make no tuned lens: it has weights "
                "[layer d_model d_model] and biases [layer d_model]"
            )

    @classmethod
    def identity(cls, model: Model) -> TunedLens:
        """The lens that changes nothing: the logit lens."""
        n, d = model.cfg.n_layers, model.cfg.d_model
        zeros = torch.zeros(n, d, d, dtype=model.dtype, device=model.device)
        return cls(zeros, zeros[:, 0].clone(), {"model": model.name, "method": "identity"})

    @property
    def n_layers(self) -> int:
        return len(self.weight)

    def translate(self, site: Site | str, stream: Tensor) -> Tensor:
        """What the stream ``[... d_model]`` of this site would be at the end.

        Raises
        ------
        SelectorError
            There is no translator for the site.
        """
        layer = self.layer_of(site)
        if layer == self.n_layers:
            return stream
        weight, bias = (each[layer].to(device=stream.device, dtype=stream.dtype) for each in (self.weight, self.bias))
        return stream + torch.nn.functional.linear(stream, weight, bias)

    def layer_of(self, site: Site | str) -> int:
        """Which translator reads this site; the number of layers for the last stream, which needs none."""
        match = re.fullmatch(r"L(\d+)\.resid_(pre|post)", str(site))
        layer = -1 if match is None else int(match[1]) + (match[2] == "post")
        if not 0 <= layer <= self.n_layers:
            raise SelectorError(
                f"a tuned lens of {self.n_layers} layers has no translator for {site}: it reads what enters a block and what "
                f"leaves it, L0 to L{self.n_layers - 1}, resid_pre or resid_post"
            )
        return layer

    def check(self, model: Model, sites: Iterable[Site] = ()) -> None:
        """Refuse a model of another shape, and sites without a translator."""
        n, d = model.cfg.n_layers, model.cfg.d_model
        if (self.n_layers, self.weight.shape[1]) != (n, d):
            raise ModelError(
                f"this lens was tuned for {self.provenance.get('model', 'a model')} with {self.n_layers} layers of width "
                f"{self.weight.shape[1]}, but {model.name} has {n} layers of width {d}"
            )
        for site in sites:
            self.layer_of(site)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as one safetensors file, whole or not at all, with its provenance."""
        from safetensors.torch import save_file

        target = Path(path)
        if target.suffix != ".safetensors":
            raise FileFormatError(f"{target} does not end in .safetensors, which is what a tuned lens is saved as")
        note = {"format": _FORMAT, "version": _VERSION, "provenance": dict(self.provenance)}
        tensors = {"weight": self.weight.detach().cpu().contiguous(), "bias": self.bias.detach().cpu().contiguous()}
        with put_whole(target) as part:
            save_file(tensors, part, metadata={"mechinterp": json.dumps(note)})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model) -> TunedLens:
        """What `save` wrote, or a published folder of the `tuned-lens` package (``config.json`` and ``params.pt``).

        Nothing that is read may run code: of ``params.pt`` tensors alone are read.

        Raises
        ------
        FileFormatError
            It is not there, is neither of the two, or of another version.
        ModelError
            It was tuned for a model of another shape.
        """
        source = Path(path)
        lens = _published(source) if source.is_dir() else _own(source)
        lens.check(model)
        weight, bias = (each.to(device=model.device, dtype=model.dtype) for each in (lens.weight, lens.bias))
        return cls(weight, bias, lens.provenance)

    def __repr__(self) -> str:
        name, method = self.provenance.get("model", "?"), self.provenance.get("method", "")
        n, d = self.weight.shape[:2]
        told = ""
        if "held_out_kl" in self.provenance:
            kls = [self.provenance[key] for key in ("held_out_kl_logit_lens", "held_out_kl")]
            before, after = (sum(each) / len(each) for each in kls)
            fitted = "layers" if len(kls[0]) == n else f"the {len(kls[0])} fitted layers"
            told = (
                f"; held-out KL to the final logits {after:.2f} nats, {before:.2f} through the logit lens (means over {fitted})"
            )
        return f"TunedLens: {n} translators of width {d} for {name}{f' ({method})' if method else ''}{told}"


def _own(source: Path) -> TunedLens:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("mechinterp", "null"))
            known = isinstance(note, dict) and note.get("format") == _FORMAT
            tensors = {name: file.get_tensor(name) for name in ("weight", "bias")} if known else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise FileFormatError(
            f"{source} holds no tuned lens ({type(error).__name__}: {error}); they are written by lens.save(path), or are "
            "folders with config.json and params.pt"
        ) from None
    if not known:
        raise FileFormatError(f"{source} holds no tuned lens: it does not say that it is one")
    if note.get("version") != _VERSION:
        raise FileFormatError(f"{source} has version {note.get('version')} of the format, not {_VERSION}; fit the lens anew")
    return TunedLens(tensors["weight"], tensors["bias"], note["provenance"])


def _published(folder: Path) -> TunedLens:
    """A folder as the `tuned-lens` package writes it."""
    config_file, params_file = (folder / name for name in _PUBLISHED)
    if not (config_file.exists() and params_file.exists()):
        there = ", ".join(sorted(each.name for each in folder.iterdir())) or "nothing"
        raise FileFormatError(f"{folder} is no published tuned lens: it holds {there}, and not {' and '.join(_PUBLISHED)}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        state = torch.load(params_file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileFormatError(
            f"{folder} cannot be read as a tuned lens ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        ) from None
    n, d = config.get("num_hidden_layers"), config.get("d_model")
    kind = config.get("lens_type", "linear_tuned_lens")
    if kind != "linear_tuned_lens" or not isinstance(n, int) or not isinstance(d, int):
        raise FileFormatError(f"{config_file} describes {kind!r} with {n} layers of width {d}; linear_tuned_lens can be read")
    missing = [name for i in range(n) for name in (f"{i}.weight", f"{i}.bias") if name not in state]
    missing = [name for name in missing if config.get("bias", True) or name.endswith("weight")]
    if missing:
        raise FileFormatError(f"{params_file} lacks {missing[0]!r}; it has {', '.join(sorted(state)[:6]) or 'nothing'}")
    weight = torch.stack([state[f"{i}.weight"].float() for i in range(n)])
    bias = torch.stack([state.get(f"{i}.bias", torch.zeros(d)).float() for i in range(n)])
    said = {"model": config.get("base_model_name_or_path", ""), "method": "published tuned lens", "config": config}
    return TunedLens(weight, bias, said)
