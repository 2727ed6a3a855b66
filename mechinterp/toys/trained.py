"""The trained toy: what a small model learns when induction is all there is to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from mechinterp.errors import FileFormatError
from mechinterp.toys.prompts import induction_pairs
from mechinterp.toys.toy import Toy, loaded
from mechinterp.toys.words import WORDS, tokenizer_of

__all__ = ["WEIGHTS", "blank", "trained", "write"]

WEIGHTS: Final = Path(__file__).parents[1] / "data" / "trained.safetensors"
FORMAT: Final = "mechinterp-toy"
VERSION: Final = 1
DESCRIPTION: Final = "Llama: attention only, trained on repeated words; its circuit is not known"


def blank() -> Any:
    """The module that is trained: 2 layers of 4 heads, rotary positions, MLPs that write nothing and stay so."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        hidden_size=64,
        intermediate_size=4,
        vocab_size=len(WORDS) + 2,
        max_position_embeddings=48,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "eager"
    module = LlamaForCausalLM(config)
    for block in module.model.layers:
        for parameter in block.mlp.parameters():
            torch.nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    return module.eval()


def write(module: Any, path: Path, trained_with: dict[str, object]) -> None:
    """Save the weights, and what they were trained with, as safetensors."""
    from safetensors.torch import save_file

    kept = {name: value.contiguous() for name, value in module.state_dict().items() if _is_kept(name)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry, as JSON: safetensors writes several in any order, and the same training gives the same file.
    said = {"format": FORMAT, "version": VERSION, **trained_with}
    save_file(kept, path, metadata={"mechinterp": json.dumps(said)})


def _is_kept(name: str) -> bool:
    # The MLPs are zero.
    return ".mlp." not in name


def _read(path: Path) -> Any:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get("mechinterp", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        message = f"cannot read the weights of the trained toy from {path} ({error}). Run: make toys"
        raise FileFormatError(message) from error
    if (said.get("format"), said.get("version")) != (FORMAT, VERSION):
        raise FileFormatError(f"{path} is not a toy of version {VERSION}. Run: make toys")
    with torch.random.fork_rng(devices=[]):
        module = blank()
    missing, unexpected = module.load_state_dict(weights, strict=False)
    lost = [name for name in missing if _is_kept(name)]
    if lost or unexpected:
        named = ", ".join([*lost, *unexpected])
        raise FileFormatError(f"{path} does not fit the trained toy: {named}. Run: make toys")
    return module.requires_grad_(True)


def trained(*, n: int = 32, seed: int = 0) -> Toy:
    """What does a circuit look like that nobody planted?

    An attention-only transformer of 2 layers and 4 heads in Llama's shape (a real RMSNorm, rotary positions),
    trained by ``scripts/train_toy.py`` on random words repeated again and again, until it says what followed
    the last word before. It has learnt induction by itself: heads of the first layer attend to the word before,
    heads of the second to what followed the current word last time. Nobody planted that: ``truth`` is empty.

    Parameters
    ----------
    n
        Number of prompt pairs: 12 random words, then the first 6 again. The counterfactual has other words in
        place of the sixth (both times) and of the seventh, which is the answer.
    seed
        Decides the words of the prompts. The weights are always the same.

    Raises
    ------
    FileFormatError
        The file with the weights is missing or broken.

    Examples
    --------
    >>> toy = trained()
    >>> toy.task
    Task induction: 32 pairs of 19 tokens, differ at 3 positions, metric logit_diff
    >>> dict(toy.truth)
    {}
    """
    tokenizer = tokenizer_of(WORDS, "toy-words")
    model = loaded(_read(WEIGHTS), tokenizer, "toy:trained")
    task = induction_pairs(tokenizer, n=n, seed=seed, length=12, repeat=6)
    return Toy(name="trained", model=model, task=task, description=DESCRIPTION)
