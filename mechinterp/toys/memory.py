"""A hand-set key-value memory: MLPs that know twelve facts, and two heads that ask them."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from mechinterp.tasks import Task
from mechinterp.toys import weights as w
from mechinterp.toys.prompts import spelled
from mechinterp.toys.toy import Fact, Toy, loaded, truths
from mechinterp.toys.words import tokenizer_of

__all__ = ["memory"]

RELATIONS: Final = ("capital", "language")
KNOWN: Final = {
    "france": ("paris", "french"),
    "japan": ("tokyo", "japanese"),
    "italy": ("rome", "italian"),
    "egypt": ("cairo", "arabic"),
    "spain": ("madrid", "spanish"),
    "poland": ("warsaw", "polish"),
}
SUBJECTS: Final = tuple(KNOWN)
CUE: Final = "is"
N_CTX: Final = 16
D_MLP: Final = 32
# Steep enough to tell two matches from one, not so steep that GELU has no gradient left.
SLOPE: Final = 2.5


def memory() -> Toy:
    """Twelve facts in the neurons of two MLPs: who brings subject and relation, and which neuron answers?

    Prompts are ``<s> the capital of france is``. ``a0.h1`` attends from the last word to the subject and
    brings it, ``a0.h2`` brings the relation. ``m0`` knows the capitals and ``m1`` the languages, with one
    neuron a fact: its key is the sum of the subject's and the relation's direction, with a threshold between
    one match and two; its value is the answer's direction (``toy.facts`` says which neuron). The other
    neurons and six heads write to a subspace that nobody reads; ``a0.h3`` and ``a1.h1`` attend to the subject
    like ``a0.h1``.

    The task asks every fact, against every prompt with another subject and the other relation: 60 pairs,
    nothing is drawn.

    Examples
    --------
    >>> toy = memory()
    >>> for edge in toy.truth["resample"]:
    ...     print(edge)
    embed->a0.h1<v>
    embed->a0.h2<v>
    a0.h1->m0
    a0.h2->m0
    a0.h1->m1
    a0.h2->m1
    m0->logits
    m1->logits
    >>> print(toy.facts[0])
    capital of france: paris (L0, neuron 0)
    """
    answers = [answer for both in KNOWN.values() for answer in both]
    tokenizer = tokenizer_of(("the", "of", CUE, *RELATIONS, *SUBJECTS, *answers), "toy-words")
    ids: dict[str, int] = tokenizer.get_vocab()
    n_tokens, n_heads, d_head = len(tokenizer), 4, 40
    sizes = {"token": n_tokens, "subject": len(SUBJECTS), "relation": len(RELATIONS), "answer": n_tokens}
    space = w.Features(sizes, total=n_heads * d_head // 2, paired=True)
    module = w.gpt2(space, n_layers=2, n_heads=n_heads, n_tokens=n_tokens, n_ctx=N_CTX, gain=6.0, d_mlp=D_MLP)
    with torch.no_grad():
        module.transformer.wte.weight.copy_(space.write("token"))
        # Positions are in the scratch space: only decoys read them.
        module.transformer.wpe.weight.copy_(space.write("scratch")[:N_CTX])

    def bring(words: tuple[str, ...], out: Tensor) -> dict[str, Tensor]:
        """Attend from the cue to one of these words, and write which one it is."""
        chosen = [ids[word] for word in words]
        which = torch.zeros(n_tokens, d_head)
        which[chosen, torch.arange(len(chosen))] = 1.0
        return {
            # Other words ask as well, faintly, so that no prompt leaves the keys without a reader.
            "q": w.sharp(space.read("token") @ w.pick(n_tokens, [ids[CUE]], d_head, rest=0.1), 5.0),
            "k": space.read("token") @ w.pick(n_tokens, chosen, d_head),
            "v": space.read("token") @ which,
            "out": w.same(d_head, len(out)) @ out,
        }

    parts = {
        (0, 1): bring(SUBJECTS, space.write("subject")),
        (0, 2): bring(RELATIONS, space.write("relation")),
        (0, 3): bring(SUBJECTS, space.write("scratch")),
        (1, 1): bring(SUBJECTS, space.write("scratch")),
    }
    for layer in range(2):
        for head in range(n_heads):
            part = parts.get((layer, head)) or w.decoy(space, d_head, seed=n_heads * layer + head)
            w.set_gpt2_head(module, layer, head, **part)
    facts = _remember(module, space, ids)

    model = loaded(module, tokenizer, "toy:memory")
    task = _task(tokenizer)
    asked = (
        *("embed->a0.h1<v>", "embed->a0.h2<v>"),
        *("a0.h1->m0", "a0.h2->m0", "a0.h1->m1", "a0.h2->m1"),
        *("m0->logits", "m1->logits"),
    )
    # The prompts have one form, so where the heads look is the same in all of them.
    looked = ("embed->a0.h1<q>", "embed->a0.h1<k>", "embed->a0.h2<q>", "embed->a0.h2<k>")
    return Toy(
        name="memory",
        model=model,
        task=task,
        truth=truths(model, task, {"resample": asked, "mean": asked, "zero": asked + looked}),
        description="GPT-2: two MLPs that hold twelve facts, and the two heads that ask them",
        facts=facts,
    )


@torch.no_grad()
def _remember(module: Any, space: w.Features, ids: dict[str, int]) -> tuple[Fact, ...]:
    """Set both MLPs, the first to know the first relation, the second the second; returns what they know."""
    generator = torch.Generator().manual_seed(0)
    facts: list[Fact] = []
    for layer, relation in enumerate(RELATIONS):
        mlp = module.transformer.h[layer].mlp
        mlp.c_fc.weight.copy_(torch.randn(space.d_model, D_MLP, generator=generator) * 0.5)
        to_scratch = torch.randn(D_MLP, space.sizes["scratch"], generator=generator)
        to_scratch /= (D_MLP * space.sizes["scratch"]) ** 0.5
        mlp.c_proj.weight.copy_(to_scratch @ space.write("scratch"))
        for row, subject in enumerate(SUBJECTS):
            answer = KNOWN[subject][layer]
            # 5 and D_MLP have no common divisor: the facts lie scattered among the other neurons.
            neuron = 5 * row % D_MLP
            key = space.read("subject")[:, row] + space.read("relation")[:, layer]
            mlp.c_fc.weight[:, neuron] = SLOPE * key
            mlp.c_fc.bias[neuron] = -SLOPE * 1.5
            mlp.c_proj.weight[neuron] = space.write("answer")[ids[answer]]
            facts.append(Fact(subject, relation, answer, layer, neuron))
    return tuple(facts)


def _task(tokenizer: Any) -> Task:
    strings = spelled(tokenizer)
    ids = {word: index for index, word in strings.items()}

    def prompt(relation: str, subject: str) -> list[int]:
        return [ids[word] for word in ("<s>", "the", relation, "of", subject, CUE)]

    clean, corrupt, right, wrong = [], [], [], []
    for subject in SUBJECTS:
        for column, relation in enumerate(RELATIONS):
            for other in SUBJECTS:
                if other == subject:
                    continue
                clean.append(prompt(relation, subject))
                corrupt.append(prompt(RELATIONS[1 - column], other))
                right.append(ids[KNOWN[subject][column]])
                wrong.append(ids[KNOWN[other][1 - column]])
    n = len(clean)
    return Task(
        name="memory",
        clean=clean,
        corrupt=corrupt,
        right=right,
        wrong=wrong,
        positions={"relation": [2] * n, "subject": [4] * n, "end": [5] * n},
        provenance={"generator": "toys", "n": n},
        texts=tuple(" ".join(strings[token] for token in row[1:]) for row in clean),
        strings=strings,
    )
