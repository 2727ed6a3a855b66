"""Hand-set induction: in GPT-2's shape, and in Llama's with grouped queries."""

from __future__ import annotations

import torch
from torch import Tensor

from mechinterp.toys import weights as w
from mechinterp.toys.prompts import induction_pairs
from mechinterp.toys.toy import Toy, loaded, truths
from mechinterp.toys.words import WORDS, tokenizer_of

__all__ = ["gqa_induction", "induction"]

N_WORDS = 18
N_TOKENS = N_WORDS + 2
N_CTX = 24
LENGTH = 11
GAIN = 6.0


def induction(*, n: int = 32, seed: int = 0) -> Toy:
    """An induction circuit of two heads among 14 decoys, in an attention-only GPT-2 with learned positions.

    ``a0.h3`` attends to the token before by position (Q and K), and copies which token it was (V) into a
    subspace of its own. ``a1.h5`` looks for the place where that is the current token (Q: token; K: previous
    token) and says the token that stands there (V). All other heads write to a subspace that neither of them
    reads: ``a0.h6`` attends like the one and ``a1.h2`` like the other, ``a0.h0`` attends to earlier copies of
    the current token, and the rest read at random.

    Parameters
    ----------
    n
        Number of prompt pairs, ``... A B ... A`` against ``... C D ... C``.
    seed
        Decides their words. The weights are always the same.

    Returns
    -------
    Toy
        Its norms are linear (see `mechinterp.toys.weights`), so that the truth is exact.

    Examples
    --------
    >>> toy = induction()
    >>> toy
    Toy induction: 2 layers of 8 heads, 32 pairs, true circuit 5 edges by resample, 5 edges by mean, 7 edges by zero
    >>> print(*toy.truth["resample"])
    embed->a0.h3<v> embed->a1.h5<q> a0.h3->a1.h5<k> embed->a1.h5<v> a1.h5->logits
    >>> toy.heads
    ('a0.h3', 'a1.h5')
    """
    n_heads, d_head = 8, 28
    sizes = {"token": N_TOKENS, "previous": N_TOKENS, "answer": N_TOKENS, "position": N_CTX}
    space = w.Features(sizes, total=n_heads * d_head // 2, paired=True)
    module = w.gpt2(space, n_layers=2, n_heads=n_heads, n_tokens=N_TOKENS, n_ctx=N_CTX, gain=GAIN)
    with torch.no_grad():
        module.transformer.wte.weight.copy_(space.write("token"))
        module.transformer.wpe.weight.copy_(space.write("position"))

    token = space.read("token") @ w.same(N_TOKENS, d_head)
    previous = space.read("previous") @ w.same(N_TOKENS, d_head)
    here = space.read("position") @ w.same(N_CTX, d_head)
    # Position s as a key looks like s + 1 as a query.
    next_one = space.read("position") @ torch.roll(torch.eye(N_CTX), 1, dims=1) @ w.same(N_CTX, d_head)

    def write(name: str) -> Tensor:
        return w.same(d_head, space.sizes[name]) @ space.write(name)

    back = {"q": w.sharp(here, 7.0), "k": next_one, "v": token}
    match = {"q": w.sharp(token, 5.0), "k": previous, "v": token}
    parts = {
        (0, 3): {**back, "out": write("previous")},
        (1, 5): {**match, "out": write("answer")},
        (0, 0): {"q": w.sharp(token, 5.0), "k": token, "v": token, "out": write("scratch")},
        (0, 6): {**back, "out": write("scratch")},
        (1, 2): {**match, "out": write("scratch")},
    }
    for layer in range(2):
        for head in range(n_heads):
            part = parts.get((layer, head)) or w.decoy(space, d_head, seed=n_heads * layer + head)
            w.set_gpt2_head(module, layer, head, **part)

    tokenizer = tokenizer_of(WORDS[:N_WORDS], "toy-words")
    model = loaded(module, tokenizer, "toy:induction")
    task = induction_pairs(tokenizer, n=n, seed=seed, length=LENGTH)
    carried = ("embed->a0.h3<v>", "a0.h3->a1.h5<k>", "embed->a1.h5<q>", "embed->a1.h5<v>", "a1.h5->logits")
    # Where the first head looks is the same in every prompt, so only zeros disturb it.
    truth = {"resample": carried, "mean": carried, "zero": (*carried, "embed->a0.h3<q>", "embed->a0.h3<k>")}
    return Toy(
        name="induction",
        model=model,
        task=task,
        truth=truths(model, task, truth),
        description="GPT-2: a previous-token head and an induction head among 14 decoys",
    )


def gqa_induction(*, n: int = 32, seed: int = 0) -> Toy:
    """The same circuit in Llama's shape: grouped queries, RMSNorm, and rotary positions instead of learned ones.

    ``a0.h2`` attends to the token before: its query and its keys are constants on the fast rotary planes, and
    the query is turned back by one position, so that the score over the distance D is the sum of cos(theta_i
    (D - 1)). Its key and value come from KV head ``a0.kv1``, which ``a0.h3`` uses as well, to no effect.
    ``a1.h1`` finds the place by content, on planes so slow that distance does not matter; it shares
    ``a1.kv0`` with ``a1.h0``, which attends to the same place but writes what nobody reads. The heads of the
    other KV heads read at random.

    Parameters
    ----------
    n, seed
        As for `induction`.

    Examples
    --------
    >>> print(*gqa_induction().truth["resample"])
    embed->a0.kv1<v> a0.h2->a1.kv0<k> embed->a1.kv0<v> embed->a1.h1<q> a1.h1->logits
    """
    n_heads, n_kv_heads, d_head, rope_theta = 4, 2, 64, 1e6
    sizes = {"token": N_TOKENS, "previous": N_TOKENS, "answer": N_TOKENS, "one": 1}
    space = w.Features(sizes, total=96, paired=False)
    module = w.llama(
        space,
        n_layers=2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        n_tokens=N_TOKENS,
        n_ctx=N_CTX,
        gain=GAIN,
        rope_theta=rope_theta,
    )
    with torch.no_grad():
        module.model.embed_tokens.weight.copy_(space.write("token") + space.write("one"))

    # Rotary turns dimensions i and i + d_head/2 together, by theta_i a position: the first are fast, the last slow.
    planes = d_head // 2
    fast = torch.arange(6)
    theta = rope_theta ** (-fast / planes)
    key, query = torch.zeros(2, d_head)
    key[fast] = 1.0
    query[fast], query[fast + planes] = theta.cos(), -theta.sin()
    slow = torch.cat([torch.zeros(N_TOKENS, planes - N_TOKENS), torch.eye(N_TOKENS)], dim=1)
    by_content = torch.cat([slow, torch.zeros_like(slow)], dim=1)

    one = space.read("one")
    token = space.read("token") @ w.same(N_TOKENS, d_head)

    def write(name: str) -> Tensor:
        return w.same(d_head, space.sizes[name]) @ space.write(name)

    for layer in range(2):
        noise = [w.decoy(space, d_head, seed=n_heads * layer + head) for head in range(n_heads)]
        for head, part in enumerate(noise):
            w.set_llama_head(module, layer, head, q=part["q"], out=part["out"])
        for kv_head, part in enumerate(noise[:n_kv_heads]):
            w.set_llama_kv(module, layer, kv_head, k=part["k"], v=part["v"])
    w.set_llama_kv(module, 0, 1, k=one * key, v=token)
    w.set_llama_head(module, 0, 2, q=w.sharp(one * query, 7.0), out=write("previous"))
    w.set_llama_kv(module, 1, 0, k=space.read("previous") @ by_content, v=token)
    match = w.sharp(space.read("token") @ by_content, 5.0)
    w.set_llama_head(module, 1, 1, q=match, out=write("answer"))
    w.set_llama_head(module, 1, 0, q=match, out=write("scratch"))

    tokenizer = tokenizer_of(WORDS[:N_WORDS], "toy-words")
    model = loaded(module, tokenizer, "toy:gqa_induction")
    task = induction_pairs(tokenizer, n=n, seed=seed, length=LENGTH)
    carried = ("embed->a0.kv1<v>", "a0.h2->a1.kv0<k>", "embed->a1.h1<q>", "embed->a1.kv0<v>", "a1.h1->logits")
    truth = {"resample": carried, "mean": carried, "zero": (*carried, "embed->a0.h2<q>", "embed->a0.kv1<k>")}
    return Toy(
        name="gqa_induction",
        model=model,
        task=task,
        truth=truths(model, task, truth),
        description="Llama: the same circuit with grouped queries, RMSNorm and rotary positions",
    )
