"""What the weights of heads say before any prompt: where a head looks (QK), what it moves (OV), who feeds whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from einops import rearrange
from torch import Tensor

from mechinterp.core.arguments import check_model
from mechinterp.core.effects import Effects
from mechinterp.core.model import Model
from mechinterp.errors import ModelError, did_you_mean
from mechinterp.graph import Edge, GraphShape
from mechinterp.graph.nodes import Node
from mechinterp.lens.folding import embedding, head_named, reading, unembedding, writing
from mechinterp.lens.rotary import rotation

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix

__all__ = ["composition", "copying_scores", "ov_circuit", "qk_circuit"]

Through = Literal["stream", "tokens"]
PORTS = ("q", "k", "v")


def qk_circuit(model: Model, head: str, *, distance: int = 0, through: Through = "stream", folded: bool = True) -> FactoredMatrix:
    """Where does this head look? W_Q R W_K^T, which takes what stands at a query and at a key to a score.

    Parameters
    ----------
    model
        From `mechinterp.load`.
    head
        ``"L9.H6"`` or ``"a9.h6"``. On grouped-query models its KV head is found.
    distance
        On models with rotary positions: how many positions the query stands behind the key. R turns by so many positions; it is
        taken from the model's own code, and held against its own scores.
    through
        ``"stream"``: ``[d_model d_model]``. ``"tokens"``: ``[vocab vocab]``, of the embedded tokens on both sides.
    folded
        The norm's weight (and LayerNorm's centring) are part of W_Q and W_K, as the head acts on the stream. False: raw weights.

    Returns
    -------
    transformer_lens.FactoredMatrix
        Never multiplied out: ``.svd()``, ``.eigenvalues``, ``.norm()``; one row is ``circuit[5].AB``.

    Raises
    ------
    GraphError
        No such head.
    ModelError
        A distance on a model without rotary positions, or attention that does more to queries and keys than multiply them.

    Notes
    -----
    Score = x_q (circuit) x_k / (scales of the norms), times 1/sqrt(d_head) or what the architecture has; biases of queries and
    keys are left out. Cost: one forward pass over five tokens.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> mi.qk_circuit(toy.model, "L1.H5").shape
    torch.Size([224, 224])

    References
    ----------
    Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    from transformer_lens import FactoredMatrix

    check_model(model)
    layer, index = head_named(model, head)
    turn = rotation(model, layer, distance)
    q = reading(model, layer, "q", folded=folded)[index]
    k = reading(model, layer, "k", folded=folded)[_kv(model, index)]
    circuit = FactoredMatrix(q @ turn, k.T)
    if _checked(through) == "stream":
        return circuit
    tokens = embedding(model)
    return FactoredMatrix(tokens @ circuit.A, circuit.B @ tokens.T)


def ov_circuit(model: Model, head: str, *, through: Through = "stream", folded: bool = True) -> FactoredMatrix:
    """What does this head write for what it attends to? W_V W_O.

    Parameters
    ----------
    model, head
        As for `qk_circuit`.
    through
        ``"stream"``: ``[d_model d_model]``. ``"tokens"``: ``[vocab vocab]``, from the attended token (embedded) to the logits.
    folded
        The norms before the values, behind the output (post-norm models) and before the unembedding are part of it, all but their
        scale. False: raw weights.

    Returns
    -------
    transformer_lens.FactoredMatrix

    Raises
    ------
    GraphError
        No such head.

    Notes
    -----
    Cost: no forward pass.

    Examples
    --------
    >>> import mechinterp as mi
    >>> toy = mi.toys.induction()
    >>> said = mi.ov_circuit(toy.model, "L1.H5", through="tokens")
    >>> bool((said.AB.argmax(dim=-1)[2:] == torch.arange(2, 20)).all())  # every word is copied
    True
    """
    from transformer_lens import FactoredMatrix

    check_model(model)
    layer, index = head_named(model, head)
    v = reading(model, layer, "v", folded=folded)[_kv(model, index)]
    o = writing(model, layer, folded=folded)[index]
    if _checked(through) == "stream":
        return FactoredMatrix(v, o)
    return FactoredMatrix(embedding(model) @ v, o @ unembedding(model, folded=folded).T)


def copying_scores(model: Model, *, mlp0: bool = False) -> Effects:
    """Which heads copy, by their weights alone? Sum of the eigenvalues of W_E W_V W_O W_U over the sum of their sizes.

    1: every direction of tokens that the head reads raises itself; -1: each is suppressed; near 0: neither. All norms are folded.

    Parameters
    ----------
    model
        From `mechinterp.load`.
    mlp0
        Tokens are taken with what the first MLP adds to them, as later layers mostly see them (Wang et al. 2022).

    Returns
    -------
    Effects
        Axes ``layer head``, one number each.

    Notes
    -----
    The ``[vocab vocab]`` circuit has no more than d_head eigenvalues that are not 0; they are those of a small matrix. Cost: no
    forward pass, one product of the embedding with the unembedding (vocab d_model^2), and n_layers n_heads small eigenproblems.

    Examples
    --------
    >>> import mechinterp as mi
    >>> scores = mi.copying_scores(mi.toys.copy().model).values
    >>> round(float(scores[1, 2]), 3), round(float(scores[0, 1]), 3), round(float(scores[0, 2]), 3)
    (1.0, -1.0, 0.0)

    References
    ----------
    Elhage et al. 2021; tests of the same in Olsson et al. 2022 (2209.11895).
    """
    from transformer_lens import FactoredMatrix

    check_model(model)
    cfg = model.cfg
    # W_U W_E, [d_model d_model]: once for all heads.
    said_and_read = unembedding(model).T @ embedding(model, mlp0=mlp0)
    group = cfg.n_heads // cfg.n_kv_heads
    scores = torch.zeros(cfg.n_layers, cfg.n_heads)
    for layer in range(cfg.n_layers):
        v = reading(model, layer, "v").repeat_interleave(group, dim=0)
        said = writing(model, layer) @ said_and_read
        values = FactoredMatrix(v, said).eigenvalues
        size = values.abs().sum(dim=-1)
        # A matrix that is nothing but rounding has eigenvalues of some sign.
        nothing = size <= 1e-5 * v.flatten(1).norm(dim=-1) * said.flatten(1).norm(dim=-1)
        scores[layer] = torch.where(nothing, 0.0, values.real.sum(dim=-1) / size.clamp(min=1e-30)).cpu()
    coords = {"layer": tuple(range(cfg.n_layers)), "head": tuple(range(cfg.n_heads))}
    read = "tokens and the first MLP" if mlp0 else "tokens"
    return Effects(
        f"copying score of {read}",
        ("layer", "head"),
        coords,
        scores[..., None],
        {},
        {"model": model.name, "mlp0": mlp0, "metric": "score"},
    )


def composition(model: Model, port: str, *, unit: Literal["z", "score"] = "z", folded: bool = True) -> Effects:
    """Which earlier head's output is what this head reads? Q-, K- or V-composition of all pairs, against chance.

    score = |W_VO X| / (|W_VO| |X|) in Frobenius norms, with W_VO = W_V W_O of the writer, and of the reader X = W_Q W_K^T for
    ``q``, W_K W_Q^T for ``k``, W_V W_O for ``v``. On grouped-query models K and V are read by the KV head for all its queries: X
    is then the X of its query heads side by side.

    Chance is a reader turned at random (all its singular values kept): score^2 is 1/d_model on average, and its standard
    deviation follows from the singular values of both (Haar measure; nothing is drawn). ``unit="z"`` is how many of these score^2
    is away.

    Parameters
    ----------
    model
        From `mechinterp.load`.
    port
        ``"q"``, ``"k"`` or ``"v"``.
    unit
        ``"z"``, or ``"score"`` itself, 0 to 1.
    folded
        Norms are part of the weights, as they act on the stream (see `qk_circuit`). False: raw weights.

    Returns
    -------
    Effects
        Axis ``edge``, one number for each pair of a head and a reader in a later layer: ``("a0.h3", "a1.h5", "k")``.

    Raises
    ------
    ModelError
        There is no such port or unit, or there is one layer.

    Notes
    -----
    Positions are left out (under rotary ones it is composition at distance 0), and norms of queries and keys (Qwen 3, Gemma 3).
    Cost: no forward pass.

    Examples
    --------
    >>> import mechinterp as mi
    >>> mi.composition(mi.toys.gqa_induction().model, "k").top(1)[0][0]
    'a0.h2->a1.kv0<k>'

    References
    ----------
    Elhage et al. 2021, who take a constant for chance.
    """
    from transformer_lens import FactoredMatrix

    check_model(model)
    if port not in PORTS:
        raise ModelError(f"there is no port {port!r} of composition. {did_you_mean(port, PORTS)}")
    if unit not in ("z", "score"):
        raise ModelError(f"there is no unit {unit!r} of composition. {did_you_mean(unit, ('z', 'score'))}")
    shape, cfg = GraphShape.of(model), model.cfg
    if cfg.n_layers < 2:
        raise ModelError(f"{model.name} has one layer, so no head reads another")
    readers: list[Tensor] = []
    writers: list[Tensor] = []
    for layer in range(cfg.n_layers):
        q, k, v = (reading(model, layer, each, folded=folded) for each in PORTS)
        o = writing(model, layer, folded=folded)
        wide = v.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, dim=0)
        # [head d_head d_model] and [reader d_model d_head], of the same norms and products as the circuits.
        writers.append(FactoredMatrix(wide, o).collapse_l())
        if port == "q":
            right = FactoredMatrix(q, k.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, dim=0).transpose(-2, -1))
        else:
            beside = rearrange(q.transpose(-2, -1) if port == "k" else o, "(kv g) d m -> kv d (g m)", kv=cfg.n_kv_heads)
            right = FactoredMatrix(k if port == "k" else v, beside)
        readers.append(right.collapse_r())
    left = torch.cat(writers)
    edges: list[Edge] = []
    found: list[Tensor] = []
    for layer in range(1, cfg.n_layers):
        earlier, later = left[: layer * cfg.n_heads], readers[layer]
        products = torch.einsum("adm,bmn->abdn", earlier, later).flatten(2).norm(dim=-1)
        score = products / earlier.flatten(1).norm(dim=-1)[:, None] / later.flatten(1).norm(dim=-1)
        found.append((_z(score, earlier, later) if unit == "z" else score).flatten().cpu())
        kind: Literal["kv", "head"] = "kv" if port != "q" and shape.grouped else "head"
        edges += [
            Edge(str(Node("head", *divmod(writer, cfg.n_heads))), str(Node(kind, layer, reader)), port)
            for writer in range(len(earlier))
            for reader in range(len(later))
        ]
    values = torch.cat(found)[:, None]
    named = f"{port.upper()}-composition" + (", standard deviations from a random rotation" if unit == "z" else "")
    metric = "standard deviations" if unit == "z" else "score"
    about = {"model": model.name, "port": port, "unit": unit, "metric": metric, "folded": folded}
    return Effects(named, ("edge",), {"edge": tuple(tuple(edge) for edge in edges)}, values, {"chance": cfg.d_model**-0.5}, about)


def _z(score: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Standard deviations of score^2 from what a Haar-random rotation between the two would give.

    E tr(A Q B Q^T) = tr A tr B / d, and the variance is 2 |A0|^2 |B0|^2 / ((d - 1)(d + 2)), with A0 and B0 the traceless parts.
    """
    d = left.shape[-1]

    def spread(small: Tensor) -> Tensor:
        """``|A0|^2 / (tr A)^2`` of the Gram matrix A of each."""
        share = small / small.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
        return (share.pow(2).sum(dim=(-2, -1)) - 1 / d).clamp(min=0)

    one, other = spread(left @ left.transpose(-2, -1)), spread(right.transpose(-2, -1) @ right)
    deviation = (2 * one[:, None] * other / ((d - 1) * (d + 2))).sqrt()
    return (score.pow(2) - 1 / d) / deviation


def _kv(model: Model, head: int) -> int:
    return head // (model.cfg.n_heads // model.cfg.n_kv_heads)


def _checked(through: Through) -> Through:
    if through not in ("stream", "tokens"):
        raise ModelError(f"there is no way through {through!r}. {did_you_mean(through, ('stream', 'tokens'))}")
    return through
