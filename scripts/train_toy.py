"""Train the toy of `mechinterp.toys.trained()` again: an attention-only transformer that learns induction.

Run: python scripts/train_toy.py [FILE]     (default: mechinterp/data/trained.safetensors; about a minute)

Prompts are ``<s> r1 ... rL r1 ... rL r1 ...``: L different random words, again and again. Only what can be
known counts in the loss: everything from the second round on. L differs from prompt to prompt, so that no
fixed distance between a word and its repetition can be learnt. Everything is seeded; with one thread, the
same machine gives the same file, byte by byte.

Positions are rotary on purpose: with learned ones the model finds other ways, without a head for the word
before.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mechinterp.toys.trained import WEIGHTS, blank, write

SEED = 0
STEPS = 800
BATCH = 64
LENGTH = 32
SHORTEST, LONGEST = 4, 15
LEARNING_RATE = 2e-3
WARMUP = 100


def rounds(generator: torch.Generator, batch: int, d_vocab: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[batch LENGTH]``, and where the next token can be known, ``[batch LENGTH - 1]``."""
    # Ids 0 and 1 are <s> and <unk>.
    order = torch.rand(batch, d_vocab - 2, generator=generator).argsort(dim=1) + 2
    period = torch.randint(SHORTEST, LONGEST + 1, (batch, 1), generator=generator)
    place = torch.arange(LENGTH - 1)
    tokens = order.gather(1, place % period)
    tokens = torch.cat([torch.zeros(batch, 1, dtype=torch.long), tokens], dim=1)
    return tokens, torch.arange(LENGTH - 1) > period


def main(path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = blank().train()
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / WARMUP, 1.0) * (1 - step / STEPS))
    began = time.perf_counter()
    for step in range(STEPS):
        tokens, known = rounds(generator, BATCH, model.config.vocab_size)
        logits = model(tokens, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits[known], tokens[:, 1:][known])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            accuracy = (logits[known].argmax(-1) == tokens[:, 1:][known]).float().mean()
            seconds = time.perf_counter() - began
            print(f"step {step:5d}  loss {loss:.4f}  accuracy {accuracy:.4f}  {seconds:.0f} s", flush=True)
    write(model, path, {"seed": SEED, "steps": STEPS, "batch": BATCH, "torch": torch.__version__})
    print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS)
