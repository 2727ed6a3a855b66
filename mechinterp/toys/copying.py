"""Hand-set copying: one head says a name, one head holds back, and decoys attend to the same name."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from mechinterp.errors import TaskError
from mechinterp.tasks import Task
from mechinterp.toys import weights as w
from mechinterp.toys.prompts import spelled
from mechinterp.toys.toy import Toy, loaded, truths
from mechinterp.toys.words import tokenizer_of

__all__ = ["copy"]

NAMES = ("anna", "brian", "carla", "david", "emily", "frank", "grace", "henry")
FILLERS = ("the", "and", "then", "with", "near", "from")
CUE = "say"
LENGTH = 8
N_CTX = 16


def copy(*, n: int = 32, seed: int = 0) -> Toy:
    """A head that copies a name, a weaker one that suppresses it, and six decoys: attention is not explanation.

    Prompts are ``<s> with then near anna from the say``, and the answer is the name. ``a1.h2`` attends from
    the cue to the name and says it; ``a0.h1`` attends to it as well and says it with a factor of -0.3, as
    negative name movers do. ``a0.h2`` and ``a1.h1`` have the very same attention pattern, and the first
    writes three times as much as the copying head, but into a subspace that nobody reads. The other four read
    at random and write there, too.

    The three truths differ, which is the point of it. A counterfactual with another name in the same place is
    seen on V only. The mean over prompts blurs where the name stands, so it is seen on K, too; the cue is the
    same everywhere, so only zeros are seen on Q.

    Parameters
    ----------
    n
        Number of prompt pairs.
    seed
        Decides their words. The weights are always the same.

    Examples
    --------
    >>> toy = copy()
    >>> print(*toy.truth["resample"])
    embed->a0.h1<v> embed->a1.h2<v> a0.h1->logits a1.h2->logits
    >>> [len(circuit) for circuit in toy.truth.values()]
    [4, 6, 8]
    """
    words = (*NAMES, *FILLERS, CUE)
    tokenizer = tokenizer_of(words, "toy-words")
    n_tokens, n_heads, d_head = len(tokenizer), 4, 32
    sizes = {"token": n_tokens, "answer": n_tokens, "position": N_CTX}
    space = w.Features(sizes, total=n_heads * d_head // 2, paired=True)
    module = w.gpt2(space, n_layers=2, n_heads=n_heads, n_tokens=n_tokens, n_ctx=N_CTX, gain=6.0)
    with torch.no_grad():
        module.transformer.wte.weight.copy_(space.write("token"))
        module.transformer.wpe.weight.copy_(space.write("position"))

    names = [tokenizer.convert_tokens_to_ids(name) for name in NAMES]
    cue = tokenizer.convert_tokens_to_ids(CUE)
    to_name = {
        # Other words ask as well, faintly, so that no prompt leaves the keys without a reader.
        "q": w.sharp(space.read("token") @ w.pick(n_tokens, [cue], d_head, rest=0.1), 5.0),
        "k": space.read("token") @ w.pick(n_tokens, names, d_head),
        "v": space.read("token") @ w.same(n_tokens, d_head),
    }

    def write(name: str) -> Tensor:
        return w.same(d_head, space.sizes[name]) @ space.write(name)

    parts = {
        (0, 1): {**to_name, "out": -0.3 * write("answer")},
        (1, 2): {**to_name, "out": write("answer")},
        (0, 2): {**to_name, "out": 3.0 * write("scratch")},
        (1, 1): {**to_name, "out": write("scratch")},
    }
    for layer in range(2):
        for head in range(n_heads):
            part = parts.get((layer, head)) or w.decoy(space, d_head, seed=n_heads * layer + head)
            w.set_gpt2_head(module, layer, head, **part)

    model = loaded(module, tokenizer, "toy:copy")
    task = _task(tokenizer, n=n, seed=seed)
    said = ("embed->a0.h1<v>", "embed->a1.h2<v>", "a0.h1->logits", "a1.h2->logits")
    found = ("embed->a0.h1<k>", "embed->a1.h2<k>")
    asked = ("embed->a0.h1<q>", "embed->a1.h2<q>")
    truth = {"resample": said, "mean": said + found, "zero": said + found + asked}
    return Toy(
        name="copy",
        model=model,
        task=task,
        truth=truths(model, task, truth),
        description="GPT-2: a copying head, a suppressing head, and decoys that attend to the same place",
    )


def _task(tokenizer: object, *, n: int, seed: int) -> Task:
    if n < 1:
        raise TaskError(f"a toy was asked for {n} pairs: n is at least 1.")
    strings = spelled(tokenizer)
    ids = {word: index for index, word in strings.items()}
    generator = random.Random(seed)
    clean, corrupt, right, wrong, places = [], [], [], [], []
    for _ in range(n):
        name, other = generator.sample(NAMES, 2)
        place = generator.randrange(1, LENGTH - 1)
        row = ["<s>", *generator.choices(FILLERS, k=LENGTH - 2), CUE]
        row[place] = name
        clean.append([ids[word] for word in row])
        row[place] = other
        corrupt.append([ids[word] for word in row])
        right.append(ids[name])
        wrong.append(ids[other])
        places.append(place)
    return Task(
        name="copy",
        clean=clean,
        corrupt=corrupt,
        right=right,
        wrong=wrong,
        positions={"name": places, "end": [-1] * n},
        provenance={"generator": "toys", "n": n, "seed": seed},
        texts=tuple(" ".join(strings[token] for token in row[1:]) for row in clean),
        strings=strings,
    )
