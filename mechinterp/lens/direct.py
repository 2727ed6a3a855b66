"""Direct logit attribution: who wrote the logits, every part of the stream by its own share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import einsum
from torch import Tensor

from mechinterp.core.arguments import check_model
from mechinterp.core.effects import Effects, Label, versions
from mechinterp.core.laws import tolerance
from mechinterp.core.memory import bytes_of
from mechinterp.core.model import Model
from mechinterp.core.plan import rows_per_forward
from mechinterp.core.prompts import Batch, Runnable, batch_of
from mechinterp.core.run import run
from mechinterp.core.select import Selection
from mechinterp.core.sites import Site
from mechinterp.errors import MetricError, ModelError, SelectorError, TaskError, did_you_mean
from mechinterp.lens.asked import Targets, Where, answers_of, as_targets, where_of
from mechinterp.lens.difference import Difference
from mechinterp.lens.paths import path_shares
from mechinterp.lens.written import Writers, check_written, written_sites

__all__ = ["direct_logits"]

BY = ("component", "layer", "head", "mlp", "neuron", "embed", "bias", "path")
By = Literal["component", "layer", "head", "mlp", "neuron", "embed", "bias", "path"]


def direct_logits(
    model: Model,
    prompts: Runnable,
    *,
    by: By = "component",
    targets: Targets = None,
    against: Targets = None,
    pos: int | str | None = None,
    over: Sequence[Literal["pos"]] = (),
    heads: str | Site | Selection = "L*.H*.z",
    memory: int | str | None = None,
) -> Effects:
    """Who wrote the answer into the residual stream?

    The last stream is a sum of parts, and the logits are linear in it once the scale of the final norm is held at the value
    that it has: a part c adds  u . (s * w * (c - mean c))  to the difference of logits, where s is that scale, w the norm's
    weight, the mean is taken off by a LayerNorm alone, and u the mean unembedding of the targets minus that of ``against``. The
    parts sum to the difference of logits, on raw weights:

    - ``"head"``: every attention head, a grid ``layer x head`` as `mechinterp.patch` gives it;
    - ``"mlp"``: every MLP but its output bias, over ``layer``; ``"neuron"``: the same split by neuron, ``layer x neuron``;
    - ``"embed"``: the token embedding, and where positions are vectors that are added, these;
    - ``"bias"``: output biases of attention (``a3.bias``) and MLPs (``m3.bias``), and the biases of the final norm and the
      unembedding;
    - ``"component"``: all of the above, named as nodes; these sum to the whole, and so do head, mlp, embed and bias together;
    - ``"layer"``: everything that a block writes as one (``L3``), embeddings and final biases; these sum to the whole too;
    - ``"path"``: two steps. What head B adds to the logits, split by who wrote what its values read, with B's pattern and the
      scales of the norms held: edges ``a0.h1->a1.h2<v>``. The edges into B sum to B's part.

    Where a norm stands between attention or MLP and the stream (Gemma 2, OLMo 2), a part is what that norm makes of it with its
    scale held, and the norm's bias belongs to the output bias. Logits that are capped are taken before the cap. A constant that
    is in all logits alike cancels in a difference, and not in a single target's logit.

    Parameters
    ----------
    model, prompts
        What to run: a task (its clean prompts), tokens or texts.
    by
        The sort of part.
    targets, against
        Whose logits, minus whose: ids ``[batch]`` or ``[batch k]`` (their mean counts), or texts, asked of every prompt.
        Default for a task: right answers minus wrong ones, its logit difference. With targets alone, their logit.
    pos
        The position whose logits are meant (default: a task's answer position, otherwise the last).
    over
        ``("pos",)``: at every position instead, as a further axis.
    heads
        Of ``by="path"``: the heads B.
    memory
        What activations may take at a time, such as ``"2 GiB"``.

    Returns
    -------
    Effects
        Per prompt. The provenance has ``largest_error``, by how much the parts of any prompt miss their sum.

    Raises
    ------
    TaskError
        No targets, or such as are no tokens of this model.
    ModelError
        The stream is no sum of parts (a norm on the stream itself, OPT-350M).

    Notes
    -----
    Cost: one forward pass. Sums are in float64; the activations are as the model computes them.

    References
    ----------
    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2022 (2211.00593). `transformer_lens`
    leaves the final norm's weight and bias out of raw models; here they count.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction(n=4)
    >>> mi.direct_logits(toy.model, toy.task, by="head").axes
    ('layer', 'head')
    >>> parts = mi.direct_logits(toy.model, toy.task)
    >>> bool(abs(parts.values.sum() - parts.baseline["clean"]) < 1e-3)
    True
    """
    check_model(model, prompts)
    if by not in BY:
        raise MetricError(f"by={by!r}: {did_you_mean(by, BY)}")
    if tuple(over) not in ((), ("pos",)):
        raise SelectorError(f"over={over!r}: parts can be split by ('pos',), or not at all")
    check_written(model)
    given = batch_of(model, prompts)
    model.check_tokens(given.tokens)
    difference = Difference(model, *_targets(model, prompts, given, targets, against))
    where = _where(model, prompts, given, pos, over)
    axes: tuple[str, ...]
    coords: dict[str, tuple[Label, ...]]
    if by == "path":
        if over:
            raise SelectorError("by='path' follows what is read at one position; leave out over=")
        edges, found, total, off = path_shares(difference, given.tokens, where.index[:, 0], heads=heads, memory=memory)
        axes, coords, site = ("edge",), {"edge": edges}, ""
    else:
        found, axes, coords, site, total, off = _shares(difference, given, where, by, memory, split=bool(over))
    if over:
        axes, coords = (*axes, "pos"), {**coords, "pos": where.labels}
    name = "logit_diff" if difference.minus is not None else "logit"
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    return Effects(
        quantity=f"direct {name.replace('_', ' ')} by {by}" + ("" if cap is None else ", before the soft cap"),
        axes=axes,
        coords=coords,
        per_example=found,
        baseline={"clean": float(total.mean())},
        provenance={
            "model": model.name,
            "task": getattr(prompts, "name", ""),
            "prompts": len(given.tokens),
            "method": "direct logit attribution",
            "by": by,
            "site": site,
            "metric": name,
            "soft_cap": cap,
            "pos": "all" if over else pos if pos is not None else "answer" if answers_of(prompts) else -1,
            "largest_error": off,
            "forwards": 1,
            "task_provenance": dict(getattr(prompts, "provenance", {})),
            "versions": versions(),
        },
    )


def _targets(model: Model, prompts: Any, given: Batch, targets: Targets, against: Targets) -> tuple[Tensor, Tensor | None]:
    batch = len(given.tokens)
    answers = answers_of(prompts)
    if targets is None and against is not None:
        raise TaskError("against= is subtracted from targets=, which were not given")
    if targets is None and answers is not None:
        right, wrong = (as_targets(model, each, batch, "answers of the task") for each in answers)
    else:
        right, wrong = as_targets(model, targets, batch), as_targets(model, against, batch, "against")
    if right is None:
        raise TaskError("whose logits? Give targets= (and against=, whose logits are subtracted), or a task, which has answers")
    return right, wrong


def _where(model: Model, prompts: Any, given: Batch, pos: int | str | None, over: Sequence[str]) -> Where:
    if over:
        if pos is not None:
            raise SelectorError(f"over=('pos',) is every position, pos={pos!r} is one; give one of them")
        where = where_of(model, given, None)
        if not bool(where.real.all()):
            raise SelectorError(
                "the prompts differ in length, so a position is not the same in all; leave out over=, or use pos="
            )
        return where
    if pos is None and answers_of(prompts) is not None:
        index = prompts.answer_pos.cpu()[:, None]
        return Where(index, torch.ones_like(index, dtype=torch.bool), ("answer",))
    return where_of(model, given, -1 if pos is None else pos)


def _shares(
    difference: Difference, given: Batch, where: Where, by: str, memory: int | str | None, *, split: bool
) -> tuple[Tensor, tuple[str, ...], dict[str, tuple[Label, ...]], str, Tensor, float]:
    """Shares ``[*axes batch]``, or ``[*axes pos batch]``; axes, labels, site; the difference of logits; the largest error."""
    model = difference.model
    sites = written_sites(model)
    if by == "neuron":
        if "mlp_post" not in model.sites or model.cfg.attn_only:
            raise ModelError(
                f"{model.name} has no neurons to speak of: {model.audit.refused.get('mlp_post', 'its MLPs write nothing')}"
            )
        sites = sites | Selection(tuple(Site("mlp_post", layer) for layer in range(model.cfg.n_layers)))
    budget = {} if memory is None else {"memory": bytes_of(memory)}
    at_once = rows_per_forward(model, given.tokens.shape[1], **budget)
    done: list[dict[str, Tensor]] = []
    neurons: list[Tensor] = []
    totals, off = [], 0.0
    for first in range(0, len(given.tokens), at_once):
        rows = slice(first, first + at_once)
        kept = run(model, given.tokens[rows], capture=sites, logits=False).cache.whole
        writers = Writers(model, {site: where.gather(value, rows) for site, value in kept.items()})
        reader = difference.at(rows, writers.values[Site("resid_post", model.cfg.n_layers - 1)])
        shares = component_shares(writers, reader.direction, model.cfg.n_layers)
        shares |= {"norm.bias": reader.norm_bias, "unembed.bias": reader.constant}
        off = max(off, check_sum(model, shares, reader.total))
        totals.append(reader.total.cpu())
        done.append({name: value.cpu() for name, value in shares.items()})
        if by == "neuron":
            neurons.append(torch.stack([_neurons(writers, reader.direction, layer) for layer in range(model.cfg.n_layers)]).cpu())
    whole = {name: torch.cat([part[name] for part in done]) for name in done[0]}
    if by == "neuron":
        found = torch.cat(neurons, dim=1).movedim(1, -1).movedim(1, -2)
        axes: tuple[str, ...] = ("layer", "neuron")
        coords: dict[str, tuple[Label, ...]] = {axis: tuple(range(size)) for axis, size in zip(axes, found.shape, strict=False)}
        site = "mlp_post"
    else:
        found, axes, coords, site = _arranged(model, whole, by)
    return (found if split else found.squeeze(-2)).float(), axes, coords, site, torch.cat(totals), off


def component_shares(writers: Writers, reader: Tensor, layers: int) -> dict[str, Tensor]:
    """What each part written before block ``layers`` adds in a direction ``[batch pos d_model]``: ``[batch pos]``."""
    model = writers.model
    shares = {name: (part * reader).sum(-1) for name, part in writers.embedding().items()}
    for layer in range(layers):
        heads, bias = writers.attention(layer)
        of_heads = einsum(heads, reader, "b p h m, b p m -> h b p")
        shares |= {f"a{layer}.h{i}": each for i, each in enumerate(of_heads)}
        _add(shares, f"a{layer}.bias", bias, reader)
        if not model.cfg.attn_only:
            out, bias = writers.mlp(layer)
            shares[f"m{layer}"] = (out * reader).sum(-1)
            _add(shares, f"m{layer}.bias", bias, reader)
    return shares


def _add(shares: dict[str, Tensor], name: str, bias: Tensor, reader: Tensor) -> None:
    """Only where there is such a bias at all."""
    if bool(bias.any()):
        shares[name] = (bias * reader).sum(-1)


def _neurons(writers: Writers, reader: Tensor, layer: int) -> Tensor:
    """``[batch pos neuron]``: activation times what the neuron's output weights say in that direction."""
    frozen = writers.norm_after_mlp(layer)
    back = reader if frozen is None else frozen.back(reader)
    model = writers.model
    bias = writers.mlp_bias(layer)
    unit = torch.eye(model.cfg.d_mlp, dtype=model.dtype, device=model.device)[None]
    with torch.no_grad():
        # The output weights as they act, whichever way round they are kept.
        weight = model.neurons_sum(layer, unit).double()[0] - bias[0]
    return writers.values[Site("mlp_post", layer)].double() * (back @ weight.T)


def check_sum(model: Model, shares: dict[str, Tensor], total: Tensor) -> float:
    """By how much the parts miss their sum; `ModelError` where they do not add up."""
    parts = torch.stack(list(shares.values()))
    off, largest = float((parts.sum(0) - total).abs().max()), float(parts.abs().max())
    if not off <= 10 * tolerance(model.dtype) * max(1.0, largest):
        raise ModelError(
            f"the parts of {model.name} ({model.cfg.architecture}) miss the difference of logits by {off:.2g}: something writes "
            "into its stream that is no embedding, head, MLP or bias"
        )
    return off


def _arranged(
    model: Model, whole: dict[str, Tensor], by: str
) -> tuple[Tensor, tuple[str, ...], dict[str, tuple[Label, ...]], str]:
    """``[*axes pos batch]`` of the parts of one sort."""
    n, layers = model.cfg.n_heads, range(model.cfg.n_layers)
    if by == "head":
        found = torch.stack([torch.stack([whole[f"a{layer}.h{i}"] for i in range(n)]) for layer in layers])
        return found.transpose(-1, -2), ("layer", "head"), {"layer": tuple(layers), "head": tuple(range(n))}, "head_out"
    if by == "mlp":
        if model.cfg.attn_only:
            raise ModelError(f"the MLPs of {model.name} write nothing; by='head' has all that is written")
        found = torch.stack([whole[f"m{layer}"] for layer in layers])
        return found.transpose(-1, -2), ("layer",), {"layer": tuple(layers)}, "mlp_out"
    if by == "layer":
        first = {name: value for name, value in whole.items() if name in ("embed", "pos_embed")}
        blocks = {
            f"L{layer}": torch.stack([value for name, value in whole.items() if name[1:].split(".")[0] == str(layer)]).sum(0)
            for layer in layers
        }
        chosen = first | blocks | {name: whole[name] for name in ("norm.bias", "unembed.bias")}
    elif by == "embed":
        chosen = {name: value for name, value in whole.items() if name in ("embed", "pos_embed")}
    elif by == "bias":
        chosen = {name: value for name, value in whole.items() if name.endswith(".bias")}
    else:
        chosen = whole
    return torch.stack(list(chosen.values())).transpose(-1, -2), ("node",), {"node": tuple(chosen)}, ""
