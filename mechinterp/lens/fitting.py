"""Fitting a tuned lens: translators of all layers by gradient descent on KL to the model's own output, and the best kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.arguments import check_model
from mechinterp.core.effects import versions
from mechinterp.core.model import Model
from mechinterp.core.plan import progress_bar
from mechinterp.core.prompts import Batch, Runnable, batch_of
from mechinterp.core.run import run
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.core.store import put_whole
from mechinterp.errors import FileFormatError, SelectorError, TaskError
from mechinterp.lens.logit_lens import rows_of_logits
from mechinterp.lens.tuned import TunedLens

__all__ = ["fit_tuned_lens"]

_FORMAT, _VERSION = "mechinterp.tuned_lens_fit", 1
_SAVE_EVERY = 60.0
_BETAS, _EPSILON = (0.9, 0.95), 1e-8


def fit_tuned_lens(
    model: Model,
    prompts: Runnable,
    *,
    seed: int,
    held_out: float = 0.2,
    steps: int = 250,
    positions: int = 256,
    check_every: int = 25,
    check_positions: int = 1024,
    layers: Sequence[int] | None = None,
    lr: float = 1e-3,
    memory: int | str | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> TunedLens:
    """Which affine map of each layer's stream says best, through the model's own norm and unembedding, what the model will say?

    For what enters block l, A and b minimise the mean over positions of KL(final || softmax(unembed(norm(h + A h + b)))), from
    A = 0 and b = 0, which is the logit lens. On prompts that are held out the KL of each layer is measured every
    ``check_every`` steps, and each layer keeps the translator that was best there; where none was better it keeps the identity,
    so no layer's held-out KL is above the logit lens's.

    Parameters
    ----------
    model, prompts
        What to run; the model's weights stay. Texts of some hundred thousand tokens make a good lens.
    seed
        Draws the held-out prompts, the order of the others, and their positions.
    held_out
        Share of the prompts that are held out, between 0 and 1.
    steps
        Steps of Adam; its rate falls linearly to 0.
    positions
        Positions in a step. Only so many prompts run at a time as hold them: activations are never kept.
    check_every, check_positions
        How often, and on how many of the held-out positions.
    layers
        The layers to fit (default: all); the others keep the identity.
    lr
        Rate of Adam, for a stream whose coordinates have been brought to one scale (their root mean square in the first step);
        it is divided by sqrt(d_model / 64).
    memory
        What logits may take at a time (default 128 MiB).
    resume
        A safetensors file that is written every minute and at the end. If it is there, the fit goes on from it, and ends with
        the same numbers as without a break.
    progress
        Show a progress bar.

    Returns
    -------
    TunedLens
        With ``held_out_kl`` and ``held_out_kl_logit_lens`` for each layer, the steps at which they were reached, and everything
        above in its provenance.

    Raises
    ------
    TaskError
        Too few prompts to hold some out.
    SelectorError
        Numbers that make no sense, or layers that are not there.
    FileFormatError
        ``resume`` holds another fit.

    Notes
    -----
    Cost of a step: one forward pass over some prompts, and for each layer one unembedding of ``positions`` rows, forward and
    backward. Memory: translators, their best and two moments of Adam (5 tensors ``[layer d_model d_model]``), and logits of one
    layer and one chunk of positions.

    References
    ----------
    Belrose et al. 2023 (2303.08112), who use SGD with momentum on 2^18 tokens a step; Adam needs fewer.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction(n=8)
    >>> lens = mi.fit_tuned_lens(toy.model, toy.task, seed=0, steps=2, check_every=1)
    >>> after, before = lens.provenance["held_out_kl"], lens.provenance["held_out_kl_logit_lens"]
    >>> all(a <= b for a, b in zip(after, before))
    True
    """
    check_model(model, prompts)
    given = batch_of(model, prompts)
    model.check_tokens(given.tokens)
    chosen = _layers(model, layers)
    counts = {"steps": steps, "positions": positions, "check_every": check_every, "check_positions": check_positions}
    for name, value in counts.items():
        if value < 1:
            raise SelectorError(f"{name}={value}: give 1 or more")
    if not 0 < lr < math.inf:
        raise SelectorError(f"lr={lr}: give a rate above 0")
    data = _Data.split(given, held_out, seed=seed)
    said = {
        "model": model.describe(),
        "tokens": hashlib.sha256(repr((given.tokens.tolist(), data.lengths.tolist())).encode()).hexdigest(),
        "seed": seed,
        "held_out": held_out,
        **counts,
        "layers": chosen,
        "lr": lr,
    }
    fit = _Fit(model, data, chosen, said, rows_of_logits(model, memory))
    with _kept(fit, resume) as save, progress_bar(steps, "tuned lens", show=progress) as bar:
        bar.update(fit.step)
        while True:
            # A fit that was interrupted here has not been checked yet at the step that it goes on from.
            if fit.checked < fit.step and (fit.step % check_every == 0 or fit.step == steps):
                fit.check()
                bar.set_postfix_str(f"held-out KL {float(fit.state['best_kl'].mean()):.3f}")
            if fit.step == steps:
                break
            fit.advance()
            bar.update()
            save()
    return fit.lens()


def _layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    n = model.cfg.n_layers
    chosen = list(range(n)) if layers is None else sorted({layer % n if -n <= layer < n else layer for layer in layers})
    if not chosen or not all(0 <= layer < n for layer in chosen):
        raise SelectorError(f"layers={layers}: give one or more of the layers 0 to {n - 1} of {model.name}")
    return chosen


@dataclass(frozen=True, eq=False)
class _Data:
    """Prompts to fit on and prompts to judge on, and how batches are drawn from them."""

    tokens: Tensor
    lengths: Tensor
    fitted: tuple[int, ...]
    judged: tuple[int, ...]
    seed: int

    @classmethod
    def split(cls, given: Batch, held_out: float, *, seed: int) -> _Data:
        n, width = given.tokens.shape
        if not 0 < held_out < 1:
            raise SelectorError(f"held_out={held_out} is the share of prompts to hold out, between 0 and 1")
        if n < 2:
            raise TaskError("a tuned lens is judged on prompts that it was not fitted on: give at least 2, better hundreds")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        cut = min(n - 1, max(1, round(n * held_out)))
        lengths = torch.full((n,), width) if given.lengths is None else given.lengths.cpu()
        return cls(given.tokens.cpu(), lengths, tuple(order[cut:]), tuple(order[:cut]), seed)

    def batch(self, step: int, positions: int) -> list[tuple[int, Tensor]]:
        """Of step ``step``: rows, and some of the positions of each; the same whenever it is asked."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step + 1)
        return self._take([self.fitted[i] for i in torch.randperm(len(self.fitted), generator=generator)], positions, generator)

    def held_out(self, positions: int) -> list[tuple[int, Tensor]]:
        return self._take(list(self.judged), positions, torch.Generator().manual_seed(self.seed))

    def _take(self, rows: list[int], positions: int, generator: torch.Generator) -> list[tuple[int, Tensor]]:
        taken: list[tuple[int, Tensor]] = []
        left = positions
        for row in rows:
            if left <= 0:
                break
            length = int(self.lengths[row])
            taken.append((row, torch.randperm(length, generator=generator)[:left].sort().values))
            left -= len(taken[-1][1])
        return taken


class _Fit:
    """A fit under way; ``state`` is all that changes, as tensors."""

    def __init__(self, model: Model, data: _Data, layers: list[int], said: Mapping[str, Any], chunk: int) -> None:
        self.model, self.data, self.layers, self.said, self.chunk = model, data, layers, said, chunk
        n, d = len(layers), model.cfg.d_model
        shapes = {"A": (n, d, d), "b": (n, d)}
        self.state = {
            f"{name}{what}": torch.zeros(shape, device=model.device)
            for name, shape in shapes.items()
            for what in ("", "_best", "_m", "_v")
        }
        self.state |= {name: torch.full((n,), torch.inf, dtype=torch.float64) for name in ("first_kl", "best_kl")}
        self.state |= {"scale": torch.ones(n, d, device=model.device), "best_step": torch.zeros(n, dtype=torch.long)}
        self.step, self.checked = 0, -1

    def streams(self, rows: list[tuple[int, Tensor]]) -> tuple[dict[int, Tensor], Tensor]:
        """For each layer ``[position d_model]`` of what enters it, and of the last stream. One forward pass a few prompts."""
        sites = Selection((*(Site("resid_pre", i) for i in self.layers), Site("resid_post", self.model.cfg.n_layers - 1)))
        found: dict[Site, list[Tensor]] = {site: [] for site in sites}
        at_once = 8
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            kept = run(self.model, self.data.tokens[[row for row, _ in part]], capture=sites, logits=False).cache.whole
            for site, parts in found.items():
                parts += [kept[site][i, where.to(kept[site].device)] for i, (_, where) in enumerate(part)]
        whole = {site: torch.cat(parts) for site, parts in found.items()}
        return {i: whole[Site("resid_pre", i)] for i in self.layers}, whole[Site("resid_post", self.model.cfg.n_layers - 1)]

    def kl(self, j: int, stream: Tensor, final: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``[position]``: KL(final || translated) for fitted layer ``j``; ``a`` and ``b`` act on coordinates of one scale."""
        scale = self.state["scale"][j].to(stream.dtype)
        moved = stream + scale * torch.nn.functional.linear(stream / scale, a.to(stream.dtype), b.to(stream.dtype))
        log_probs = self.model.unembed(moved).float().log_softmax(-1)
        return torch.nn.functional.kl_div(log_probs, final, reduction="none", log_target=True).sum(-1)

    def final(self, last: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.unembed(last).float().log_softmax(-1)

    def advance(self) -> None:
        """One step of Adam for all layers."""
        streams, last = self.streams(self.data.batch(self.step, int(self.said["positions"])))
        if self.step == 0:
            for j, layer in enumerate(self.layers):
                self.state["scale"][j] = streams[layer].float().pow(2).mean(0).sqrt().clamp(min=1e-3)
        gradients = {name: torch.zeros_like(self.state[name]) for name in ("A", "b")}
        for first in range(0, len(last), self.chunk):
            rows = slice(first, first + self.chunk)
            final = self.final(last[rows])
            for j, layer in enumerate(self.layers):
                a, b = (self.state[name][j].clone().requires_grad_() for name in ("A", "b"))
                with torch.enable_grad():
                    loss = self.kl(j, streams[layer][rows], final, a, b).sum() / len(last)
                # Of these two alone: the model's own weights need none, and keep their .grad.
                for name, found in zip(("A", "b"), torch.autograd.grad(loss, [a, b]), strict=True):
                    gradients[name][j] += found
        # At once, so that an interrupted fit is between two steps.
        self.state |= self._adam(gradients)
        self.step += 1

    def _adam(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What changes in the state."""
        changed: dict[str, Tensor] = {}
        t, (first, second) = self.step + 1, _BETAS
        rate = float(self.said["lr"]) / (self.model.cfg.d_model / 64) ** 0.5 * (1 - self.step / int(self.said["steps"]))
        for name, gradient in gradients.items():
            m = torch.lerp(self.state[f"{name}_m"], gradient, 1 - first)
            v = torch.lerp(self.state[f"{name}_v"], gradient * gradient, 1 - second)
            moved = rate * (m / (1 - first**t)) / ((v / (1 - second**t)).sqrt() + _EPSILON)
            changed |= {f"{name}_m": m, f"{name}_v": v, name: self.state[name] - moved}
        return changed

    def check(self) -> None:
        """Measure the held-out KL of each layer, and keep what is better than before."""
        streams, last = self.streams(self.data.held_out(int(self.said["check_positions"])))
        total = torch.zeros(len(self.layers), dtype=torch.float64)
        with torch.no_grad():
            for first in range(0, len(last), self.chunk):
                rows = slice(first, first + self.chunk)
                final = self.final(last[rows])
                for j, layer in enumerate(self.layers):
                    kl = self.kl(j, streams[layer][rows], final, self.state["A"][j], self.state["b"][j])
                    total[j] += float(kl.double().sum()) / len(last)
        if self.step == 0:
            self.state["first_kl"].copy_(total)
        better = total < self.state["best_kl"]
        for name in ("A", "b"):
            self.state[f"{name}_best"][better.to(self.model.device)] = self.state[name][better.to(self.model.device)]
        self.state["best_kl"][better] = total[better]
        self.state["best_step"][better] = self.step
        self.checked = self.step

    def lens(self) -> TunedLens:
        """The best translators, in the stream's own coordinates."""
        lens = TunedLens.identity(self.model)
        scale = self.state["scale"]
        weight, bias = lens.weight.clone(), lens.bias.clone()
        weight[self.layers] = (scale[:, :, None] * self.state["A_best"] / scale[:, None, :]).to(weight.dtype)
        bias[self.layers] = (scale * self.state["b_best"]).to(bias.dtype)
        told = {key: self.said[key] for key in self.said if key not in ("model", "tokens")}
        fitted = {key: self.state[name].tolist() for key, name in
                  (("held_out_kl", "best_kl"), ("held_out_kl_logit_lens", "first_kl"), ("best_step", "best_step"))}  # fmt: skip
        provenance = {
            "model": self.model.name,
            "method": "tuned lens",
            **told,
            **fitted,
            "prompts": len(self.data.tokens),
            "forwards": "one over some prompts for each step and check",
            "versions": versions(),
        }
        return TunedLens(weight, bias, provenance)


@contextmanager
def _kept(fit: _Fit, path: str | os.PathLike[str] | None) -> Iterator[Any]:
    """Read what an interrupted fit left, and write it every minute and at the end."""
    if path is None:
        yield lambda: None
        return
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = Path(path)
    stamp = hashlib.sha256(json.dumps(fit.said, sort_keys=True, default=str).encode()).hexdigest()
    if file.exists():
        try:
            with safe_open(file, "pt", device=str(fit.model.device)) as opened:
                note = json.loads((opened.metadata() or {}).get("mechinterp", "null"))
                values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:
            raise FileFormatError(f"{file} is no unfinished tuned lens ({error}); give another file to resume=") from error
        if not isinstance(note, dict) or (note.get("format"), note.get("version")) != (_FORMAT, _VERSION):
            raise FileFormatError(f"{file} is no unfinished tuned lens of version {_VERSION}; give another file to resume=")
        if note.get("fit") != stamp or set(values) != set(fit.state):
            raise FileFormatError(f"{file} holds another fit (model, prompts or settings differ); give another file to resume=")
        for name, value in values.items():
            fit.state[name].copy_(value)
        fit.step, fit.checked = int(note["step"]), int(note["checked"])
    saved = time.monotonic()

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        note = {"format": _FORMAT, "version": _VERSION, "fit": stamp, "step": fit.step, "checked": fit.checked}
        with put_whole(file) as part:
            save_file({name: value.cpu() for name, value in fit.state.items()}, part, metadata={"mechinterp": json.dumps(note)})

    def save() -> None:
        nonlocal saved
        if time.monotonic() - saved > _SAVE_EVERY:
            write()
            saved = time.monotonic()

    try:
        yield save
    finally:
        write()
