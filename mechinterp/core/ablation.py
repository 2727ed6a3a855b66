"""What an ablated activation is set to: one object for edits, sweeps, circuits and their evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from mechinterp.core.edits import Edit, Freeze, Mean, Zero
from mechinterp.core.model import Model
from mechinterp.core.optimal import fit_constants
from mechinterp.core.reference import Pairs, mask_of, means_over, position_axis, record, wholes
from mechinterp.core.rows import shuffled
from mechinterp.core.run import Cache, tokens_of
from mechinterp.core.select import Selection, select
from mechinterp.core.sites import Site
from mechinterp.errors import EditError, did_you_mean

__all__ = ["ABLATIONS", "Ablation", "as_ablation"]

ABLATIONS: Mapping[str, str] = MappingProxyType(
    {
        "zero": "zero",
        "mean": "its mean over all tokens of the reference prompts",
        "mean-pos": "its mean over the reference prompts, at each position",
        "resample": "its value on the corrupt prompt of the pair",
        "resample-shuffled": "its value on another prompt, drawn by chance",
        "optimal": "the one value that changes the model's answers least",
    }
)


@dataclass(frozen=True, eq=False, repr=False)
class Ablation:
    """To which value is an activation set when it is ablated?

    ====================  ============================================================================================
    `kind`                the value of a node at position p of prompt i
    ====================  ============================================================================================
    "zero"                0
    "mean"                the mean over all real tokens of the reference (BOS included), one for all positions
    "mean-pos"            the mean over the reference prompts that have a position p, at that position
    "resample"            what it is at p when the model runs on the corrupt prompt i
    "resample-shuffled"   what it is at p on another clean prompt of the same length: of the reference where one is given,
                          else of the task itself (a permutation that leaves no prompt in its place)
    "optimal"             one constant for all positions, fitted for each node alone: argmin over a of the mean over the
                          reference of KL(clean answer || answer with node := a)
    ====================  ============================================================================================

    Parameters
    ----------
    kind
        A key of `ABLATIONS`.
    reference
        Prompts that means, fits and draws are taken over: a task (its clean prompts, padding excluded) or tokens
        ``[batch pos]``. Default: the clean prompts that are ablated.
    seed
        Of the draw; needed by ``"resample-shuffled"`` and used by nothing else.
    steps
        Of the fit of ``"optimal"``, which is deterministic: Adam from the mean on, never worse than the mean.

    Raises
    ------
    EditError
        An unknown kind; no seed where something is drawn; a kind that the prompts do not allow.

    Notes
    -----
    Cost: one forward pass over the reference for means, over the task for resampling, none for zero; for ``"optimal"``
    as well ``steps`` forward and backward passes over the reference for each node.

    References
    ----------
    Wang et al. 2022 (2211.00593), means; Chan et al. 2022, causal scrubbing; Li and Janson 2024 (2409.09951), optimal
    constants, which they fit for all nodes of a circuit together; here each node has its own problem, whatever else is
    ablated beside it.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> mean = mi.Ablation("mean-pos")
    >>> mean.values(toy.model, toy.task, "L0.z")["L0.H3.z"].shape
    torch.Size([32, 13, 28])
    >>> run = mi.run(toy.model, toy.task, edits=[mean.edit(toy.model, toy.task, "L0.H3.z")])
    >>> mi.run_circuits(toy.model, toy.task, [toy.truth["mean"]], ablation=mean)
    CircuitRuns: logit_diff, clean 5.539, corrupt -5.539, 1 circuits 5.539; mean-pos ablation of everything 0.168
    """

    kind: str = "resample"
    _: KW_ONLY
    reference: Tensor | Pairs | None = None
    seed: int | None = None
    steps: int = 100

    def __post_init__(self) -> None:
        if self.kind not in ABLATIONS:
            raise EditError(f"there is no ablation {self.kind!r}. {did_you_mean(self.kind, ABLATIONS)}")
        if self.kind == "resample-shuffled" and self.seed is None:
            raise EditError("the ablation 'resample-shuffled' draws prompts; write mi.Ablation('resample-shuffled', seed=0)")
        if self.steps < 0:
            raise EditError(f"steps={self.steps}: give the number of steps of the fit, 0 for the mean itself")

    # -- what it gives -------------------------------------------------------------------------

    def values(self, model: Model, task: Tensor | Pairs, at: str | Site | Selection) -> Cache:
        """The ablated value of each selected activation, ``[batch pos ...]``, for every prompt of the task.

        Of "optimal", the numbers outside the sites that were asked for are not a number.
        """
        return self.source(model, task, at)(slice(None))

    def edit(self, model: Model, task: Tensor | Pairs, at: str | Site | Selection) -> Edit:
        """The edit that ablates these activations together: `Zero`, `Mean` or `Freeze`, for the prompts of this task.

        The edit for "mean" fits other prompts as well, and that for "mean-pos" others of the same length.
        """
        selection = select(at, model.cfg)
        if self.kind == "zero":
            return Zero(selection)
        if self.kind not in ("mean", "mean-pos"):
            return Freeze(selection, self.values(model, task, selection))
        tokens, positions = tokens_of(task)
        fixed = self._constants(model, task, selection)
        small = Cache(model, selection, fixed)
        full = Cache(model, selection, _spread(fixed, tokens), positions)
        return Mean(selection, {site: (small if site.pos is None else full)[site] for site in selection})

    def source(self, model: Model, task: Tensor | Pairs, at: str | Site | Selection) -> Callable[[slice], Cache]:
        """`values` of some rows of the task at a time; what all of them share is computed once."""
        selection = select(at, model.cfg)
        tokens, positions = tokens_of(task)
        other = self.prompts(task)
        fixed = {} if other is not None else self._constants(model, task, selection)

        def rows(part: slice) -> Cache:
            here = {name: where[part] for name, where in positions.items()}
            if other is None:
                return Cache(model, selection, _spread(fixed, tokens[part]), here)
            return Cache(model, selection, record(model, other[part], selection), here)

        return rows

    def prompts(self, task: Tensor | Pairs) -> Tensor | None:
        """The tokens ``[batch pos]`` of the runs that the values come from, row by row; ``None`` for constants."""
        tokens, _ = tokens_of(task)
        if self.kind == "resample":
            if isinstance(task, Tensor):
                raise EditError(
                    "the ablation 'resample' takes values from corrupt prompts, and these are tokens alone; give a task, or "
                    "draw among them: mi.Ablation('resample-shuffled', seed=0)"
                )
            return task.corrupt
        return self._drawn(tokens, mask_of(task)) if self.kind == "resample-shuffled" else None

    # -- how it is made ------------------------------------------------------------------------

    def _drawn(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Each prompt's partner: of equal length, so that every real token has a real token for a partner."""
        lengths = mask.sum(dim=1)
        donors, of_donors = tokens, lengths
        if self.reference is not None:
            donors, of_donors = tokens_of(self.reference)[0].to(tokens.device), mask_of(self.reference).sum(dim=1)
        other = tokens.clone()
        for length in sorted(set(lengths.tolist())):
            rows, pool = (lengths == length).nonzero()[:, 0].cpu(), (of_donors == length).nonzero()[:, 0].cpu()
            if len(pool) < (2 if self.reference is None else 1):
                whose = "the task has one prompt" if self.reference is None else "the reference has no prompt"
                raise EditError(
                    f"{whose} of {length} tokens, so there is no other one to take values from; give more prompts of that "
                    "length, or use another ablation, such as 'mean-pos'"
                )
            if self.reference is None:
                chosen = rows[shuffled(len(rows), seed=int(self.seed or 0))]
            else:
                generator = torch.Generator().manual_seed(int(self.seed or 0))
                chosen = pool[torch.randint(0, len(pool), (len(rows),), generator=generator)]
            other[rows, :length] = donors[chosen, :length]
        return other

    def _constants(self, model: Model, task: Tensor | Pairs, selection: Selection) -> dict[Site, Tensor]:
        """For each whole activation ``[1 1 ...]``, or ``[1 pos ...]`` where positions differ."""
        length = tokens_of(task)[0].shape[1]
        if self.kind == "zero":
            sizes = {whole: _sizes(model, whole, length) for whole in wholes(selection)}
            return {whole: torch.zeros(size, device=model.device, dtype=model.dtype) for whole, size in sizes.items()}
        reference = task if self.reference is None else self.reference
        means = means_over(model, reference, selection, pooled=self.kind != "mean-pos")
        if self.kind == "mean":
            return means
        if self.kind == "mean-pos":
            _check_covered(mask_of(task), mask_of(reference))
            return {whole: _resized(mean, whole, length) for whole, mean in means.items()}
        tokens, _ = tokens_of(reference)
        read = mask_of(reference).sum(dim=1) - 1 if isinstance(reference, Tensor) else reference.answer_pos
        return fit_constants(model, tokens, read, selection, means, steps=self.steps)

    # -- showing itself ------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ablation) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return self.kind, id(self.reference), self.seed, self.steps

    def __str__(self) -> str:
        """The kind and all that its values depend on, in a few words, as results record it."""
        words = [self.kind]
        if self.kind == "resample-shuffled":
            words.append(f"seed {self.seed}")
        if self.kind == "optimal":
            words.append(f"{self.steps} steps")
        if self.reference is not None and self.kind not in ("zero", "resample"):
            name = "tokens" if isinstance(self.reference, Tensor) else getattr(self.reference, "name", "prompts")
            words.append(f"over {name}, {len(tokens_of(self.reference)[0])} prompts")
        return ", ".join(words)

    def __repr__(self) -> str:
        return f"Ablation({self}: {ABLATIONS[self.kind]})"


def as_ablation(given: Ablation | str, *, seed: int | None) -> Ablation:
    """The ablation of that name; `seed` is for those that draw."""
    return given if isinstance(given, Ablation) else Ablation(given, seed=seed if given == "resample-shuffled" else None)


def _sizes(model: Model, whole: Site, length: int) -> list[int]:
    """Of a constant: 1 for prompts and positions."""
    cfg = model.cfg
    known = {"batch": 1, "pos": 1, "q_pos": 1, "k_pos": length}
    known |= {"head": cfg.n_heads, "kv_head": cfg.n_kv_heads, "vocab": cfg.d_vocab}
    return [known[axis] if axis in known else int(getattr(cfg, axis)) for axis in whole.kind.axes]


def _spread(fixed: Mapping[Site, Tensor], tokens: Tensor) -> dict[Site, Tensor]:
    """``[batch pos ...]``: views of constants, which take no memory."""
    spread = {}
    for whole, value in fixed.items():
        sizes = [-1] * value.ndim
        sizes[0], sizes[position_axis(whole)] = tokens.shape
        spread[whole] = value.expand(sizes)
    return spread


def _check_covered(needed: Tensor, given: Tensor) -> None:
    """Every position of the prompts needs a mean."""
    last, known = int(needed.any(dim=0).sum()), int(given.any(dim=0).sum())
    if known < last:
        raise EditError(
            f"the reference has no prompt with a token at position {known}, and the prompts have positions 0 to {last - 1}; "
            "give longer prompts, or use 'mean', one value for all positions"
        )


def _resized(mean: Tensor, whole: Site, length: int) -> Tensor:
    """``[1 pos ...]`` for prompts padded to another length."""
    named = zip(whole.kind.axes, mean.shape, strict=True)
    sizes = [length if axis in ("pos", "q_pos", "k_pos") else size for axis, size in named]
    if sizes == list(mean.shape):
        return mean
    both = tuple(slice(min(one, other)) for one, other in zip(sizes, mean.shape, strict=True))
    resized = mean.new_zeros(sizes)
    resized[both] = mean[both]
    return resized
