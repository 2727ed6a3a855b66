"""One run with edits and captures: prompts in, `Run` out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from mechinterp.core.arguments import check_model
from mechinterp.core.cache import Cache
from mechinterp.core.edits import Edit, Mean, Project
from mechinterp.core.hooks import HookRegistry
from mechinterp.core.memory import bytes_of, free_bytes
from mechinterp.core.model import Model
from mechinterp.core.prompts import Batch, Prompts, Runnable, batch_of, tokens_of
from mechinterp.core.select import Selection, select
from mechinterp.core.sites import Site
from mechinterp.core.store import Store
from mechinterp.errors import EditError, SelectorError, SiteError

__all__ = ["Cache", "Prompts", "Run", "run", "tokens_of"]


@dataclass(frozen=True, eq=False)
class Run:
    """What one run gave.

    Parameters
    ----------
    answer
        ``[batch pos vocab]``, or ``[batch len(keep) vocab]``; ``None`` where it was not asked for. Read it as `logits`.
    cache
        The captured activations.
    tokens
        What was run, ``[batch pos]``.
    edits
        What was changed on the way.
    lengths
        ``[batch]`` real tokens of each prompt, or ``None`` where none is padded. What stands at padded positions of the
        logits and of activations means nothing.
    """

    answer: Tensor | None
    cache: Cache
    tokens: Tensor
    edits: tuple[Edit, ...]
    lengths: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        if self.answer is None:
            raise SiteError("the logits of this run were not computed; leave out logits=False")
        return self.answer

    def __getitem__(self, key: Site | str) -> Tensor:
        return self.cache[key]

    def __repr__(self) -> str:
        batch, *rest = self.tokens.shape
        padded = "" if self.lengths is None else f"{int(self.lengths.min())} to "
        edits = f", {len(self.edits)} edits" if self.edits else ""
        # What a plain module reads need not be tokens.
        read = f"{batch} prompts of {padded}{rest[0]} tokens" if len(rest) == 1 else f"inputs {list(self.tokens.shape)}"
        return f"Run: {read}{edits}, {len(self.cache.whole)} activations captured"


def run(
    model: Model,
    prompts: Runnable,
    *,
    edits: Edit | Iterable[Edit] = (),
    capture: str | Site | Selection | None = None,
    keep: Iterable[int] | None = None,
    logits: bool = True,
    grad: bool = False,
    mask: Tensor | None = None,
    store: str | os.PathLike[str] | None = None,
    memory: int | str | None = None,
    batch: int | None = None,
) -> Run:
    """What does the model compute on these prompts, with these edits?

    Parameters
    ----------
    model
        From `mechinterp.load`.
    prompts
        Tokens ``[batch pos]``; a task (its clean prompts and named positions); or a list of token ids or texts, which are
        padded on the right where they differ in length. Padding changes nothing at real positions, and ``[-1]`` is the
        last real one of each prompt.
    edits
        One, or several: applied by priority, then in this order.
    capture
        A selector of activations to keep.
    keep
        Positions to unembed (default: all), in this order. The site ``logits`` cannot be edited or captured then.
    logits
        ``False``: the forward pass ends as soon as all edits and captures have been made.
    grad
        Keep the graph, so that ``torch.autograd.grad(metric, run[site])`` works. Off by default. For whole activations
        only (a head is a view, which the model does not go on with), and not for sites that are computed beside the
        model's own path (``pos_embed resid_mid head_out q_in k_in v_in``): torch says that they were not used.
    mask
        ``[batch pos]``, true for real tokens, where the tokens are padded (on the right) already.
    store
        Where captures and logits go as they pass. Default: they stay on the model's device. ``"cpu"``: to the machine's own
        memory. A path: captures to files in this new folder, from which `Cache.load` reads them again.
    memory
        What captures may take there, such as ``"2 GiB"`` (default: half of what is free). Those that do not fit become
        files in a temporary folder that goes with the cache.
    batch
        So many prompts at a time (default: all). With ``store=folder`` and ``logits=False`` no more than these are in memory.

    Returns
    -------
    Run
        ``.logits``, ``.cache``, and ``run["L5.H1.z"]``.

    Raises
    ------
    SelectorError, SiteError, EditError, InertError
        As `HookRegistry`; options that exclude each other; edits that mean certain rows, with ``batch``.
    TaskError
        An empty prompt, or a mask that does not fit.
    FileFormatError
        The folder of ``store`` has something in it.

    Notes
    -----
    Cost: one forward pass over all prompts; with ``logits=False`` the part of it up to the last capture.

    Examples
    --------
    >>> import mechinterp as mi
    >>> model = mi.load("toy:induction")
    >>> out = mi.run(model, mi.tasks.induction(model.cfg.d_vocab, n=2, length=4, seed=0), capture="L*.H0.z")
    >>> [str(site) for site in out.cache]
    ['L0.H0.z', 'L1.H0.z']

    Prompts of unequal length, and only what the first block adds to the stream:

    >>> short = mi.run(model, [[1, 2, 3], [4, 5]], capture="L0.attn_out", logits=False)
    >>> short["L0.attn_out[-1]"].shape == (2, model.cfg.d_model)
    True
    """
    check_model(model, prompts)
    given = batch_of(model, prompts, mask)
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    selection = Selection(()) if capture is None else select(capture, model.cfg)
    keep = None if keep is None else tuple(keep)
    _check(model, given, edits, selection, keep=keep, logits=logits, grad=grad, stored=store is not None, batch=batch)
    rows = len(given.tokens)
    device = torch.device("cpu") if store is not None else model.device
    kept: Store | dict[Site, Tensor] = {}
    if selection.sites and not grad:
        budget = free_bytes(device) // 2 if memory is None else bytes_of(memory)
        kept = Store(rows, device, budget, None if store in (None, "cpu") else Path(store or ""))
    try:
        answer = _run(model, given, edits, selection, kept, keep, logits=logits, grad=grad, device=device, batch=batch or rows)
    except BaseException:
        if isinstance(kept, Store):
            kept.discard()
        raise
    if isinstance(kept, Store):
        cache = Cache(model, selection, dict(kept), given.named(model), given.lengths, kept.files, kept)
        if kept.folder is not None:
            cache.write_index(kept.folder)
    else:
        cache = Cache(model, selection, kept, given.named(model), given.lengths)
    return Run(answer, cache, given.tokens, edits, given.lengths)


def _run(
    model: Model,
    given: Batch,
    edits: tuple[Edit, ...],
    selection: Selection,
    kept: Store | dict[Site, Tensor],
    keep: tuple[int, ...] | None,
    *,
    logits: bool,
    grad: bool,
    device: torch.device,
    batch: int,
) -> Tensor | None:
    """The logits; captures go to ``kept``."""
    answers: list[Tensor] = []
    rows = len(given.tokens)
    for first in range(0, rows, batch):
        part = given[first : first + batch] if batch < rows else given
        if isinstance(kept, Store):
            kept.first = first
        registry = HookRegistry(model, part.named(model), part.lengths)
        for edit in edits:
            registry.add(edit)
        registry.capture(selection, kept, grad=grad)
        with torch.set_grad_enabled(grad):
            if logits:
                with registry:
                    answers.append(_answer(model, part, keep).to(device))
            else:
                with registry.stopping_early():
                    # One position, where there is something to unembed at all.
                    model(part.tokens, keep=(0,) if model.cfg.d_vocab else None)
    return None if not logits else answers[0] if len(answers) == 1 else torch.cat(answers)


def _check(
    model: Model,
    given: Batch,
    edits: tuple[Edit, ...],
    selection: Selection,
    *,
    keep: tuple[int, ...] | None,
    logits: bool,
    grad: bool,
    stored: bool,
    batch: int | None,
) -> None:
    """Refuse options that exclude each other."""
    if keep is not None or not logits:
        touched = [site for edit in edits if isinstance(edit, Edit) for site in select(edit.at, model.cfg)]
        option = "keep=" if keep is not None else "logits=False"
        for site in (*touched, *selection):
            if site.name == "logits":
                # Position 3 of the prompt would be another row of what is left.
                raise SelectorError(
                    f"with {option} the logits have other positions than the prompts; leave out {option} or {str(site)!r}"
                )
    if not logits:
        if keep is not None:
            raise SelectorError("logits=False unembeds nothing, keep= says what to unembed; give one of them")
        if not selection.sites and not edits:
            raise SelectorError("nothing is asked for: logits=False goes with capture=")
    if grad and (stored or batch is not None or not logits):
        raise SelectorError(
            "grad=True keeps one whole forward pass on the model's device; leave out store=, batch= and logits=False"
        )
    if batch is None:
        return
    if batch < 1:
        raise SelectorError(f"batch={batch}: give the number of prompts that run at a time, 1 or more")
    for edit in edits:
        if batch < len(given.tokens) and _means_rows(edit):
            raise EditError(f"{edit!r} is about certain rows of all prompts, and with batch={batch} only so many run at a time")


def _means_rows(edit: Edit) -> bool:
    """Whether an edit may do something else where rows run apart: a vector for all rows does not."""
    if edit.rows is not None or any(hasattr(edit, name) for name in ("seed", "pairs")):
        return True
    if isinstance(edit, Mean | Project):
        return False
    held = [getattr(edit, each.name) for each in fields(edit) if each.name != "at"]
    return any(isinstance(each, Mapping) or (isinstance(each, Tensor) and each.ndim > 1) for each in held)


def _answer(model: Model, part: Batch, keep: tuple[int, ...] | None) -> Tensor:
    """Logits ``[batch pos vocab]``, or of the kept positions of each prompt."""
    if keep is None or part.lengths is None:
        return model(part.tokens, keep=keep)
    lengths = part.lengths.cpu()
    for pos in keep:
        short = (lengths < (-pos if pos < 0 else pos + 1)).nonzero().flatten().tolist()
        if short:
            raise SelectorError(
                f"keep={list(keep)}: prompt {short[0]} has {int(lengths[short[0]])} tokens, and no position {pos}"
            )
    wanted = torch.stack([lengths + pos if pos < 0 else torch.full_like(lengths, pos) for pos in keep], dim=1)
    places, where = torch.unique(wanted, return_inverse=True)
    found = model(part.tokens, keep=places.tolist())
    return found[torch.arange(len(found), device=found.device)[:, None], where.to(found.device)]
