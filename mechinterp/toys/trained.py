"""The trained toy: what a small model learns when induction is all there is to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from mechinterp.errors import FileFormatError
from mechinterp.toys.prompts import induction_pairs
from mechinterp.toys.toy import Toy, loaded
from mechinterp.toys.words import WORDS, tokenizer_of

__all__ = ["WEIGHTS", "blank", "trained", "write"]

WEIGHTS: Final = Path(__file__).parents[1] / "data" / "trained.safetensors"
FORMAT: Final = {"format": "mechinterp-toy", "version": "1"}


def blank() -> Any:
    """The module that `scripts/train_toy.py` trains: 2 layers of 4 heads, MLPs that write nothing and stay so."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2,
        n_head=4,
        n_embd=64,
        n_inner=4,
        vocab_size=len(WORDS) + 2,
        n_positions=48,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "eager"
    module = GPT2LMHeadModel(config)
    for block in module.transformer.h:
        # Freezing alone is not enough: weight decay and a later fine-tuning must find nothing to move.
        for parameter in block.mlp.parameters():
            torch.nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    return module.eval()


def write(module: Any, path: Path, trained_with: dict[str, object]) -> None:
    """Save the weights, and what they were trained with, as safetensors."""
    from safetensors.torch import save_file

    kept = {name: value.contiguous() for name, value in module.state_dict().items() if _is_kept(name)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, path, metadata=FORMAT | {key: str(value) for key, value in trained_with.items()})


def _is_kept(name: str) -> bool:
    # The unembedding is the embedding (tied), and the MLPs are zero.
    return name != "lm_head.weight" and ".mlp." not in name


def _read(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"cannot read the weights of the trained toy from {path} ({error}). Run: make toys") from error
    if any(said.get(key) != value for key, value in FORMAT.items()):
        raise FileFormatError(f"{path} is not a toy of version {FORMAT['version']}. Run: make toys")
    module = blank()
    missing, unexpected = module.load_state_dict(weights, strict=False)
    lost = [name for name in missing if _is_kept(name)]
    if lost or unexpected:
        raise FileFormatError(f"{path} does not fit the trained toy: {', '.join([*lost, *unexpected])}. Run: make toys")
    return module.requires_grad_(True)


def trained(*, n: int = 32, seed: int = 0) -> Toy:
    """What does a circuit look like that nobody planted?

    An attention-only GPT-2 of 2 layers and 4 heads with a real LayerNorm, trained by ``scripts/train_toy.py`` on
    random words repeated again and again, until it says what followed the last word before. It has learnt induction
    by itself, so its circuit can be found but is not known: ``truth`` is empty. It loads and runs in well under a second.

    Parameters
    ----------
    n
        Number of prompt pairs: 12 random words, then the first 6 again. The counterfactual has other words in place of
        the sixth (both times) and of the seventh, which is the answer.
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
    return Toy(name="trained", model=model, task=task, description=trained.__doc__.strip().splitlines()[0])  # type: ignore[union-attr]
