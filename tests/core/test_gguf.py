"""The GGUF loader, against the models that files were written from and transformers' own reader."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mechinterp.core import gguf as loader
from mechinterp.core.gguf import cache_dir, load_gguf
from mechinterp.errors import ModelError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Byte-level BPE writes a space as Ġ; two merges are enough to see that merges are read at all.
TOKENS = [*SPECIAL, *(chr(i) for i in range(33, 127)), "Ġ", "Ċ", "in", "Ġin"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MECHINTERP_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def write_llama(path: Path, model: LlamaForCausalLM, **changes: Any) -> Path:
    """Write a Llama as llama.cpp's converter does, independently of the loader; `changes` spoil it."""
    c = model.config
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_name("Tiny")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(changes.get("n_layers", c.num_hidden_layers))
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(changes.get("n_rotary", c.head_dim))
    write_tokenizer(writer, changes.get("pre", "smollm"), add_bos=changes.get("add_bos", False))
    names = {f"model.layers.{{i}}.{theirs}": f"blk.{{i}}.{ours}" for ours, theirs in loader._LLAMA_BLOCK.items()}
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    for i in range(c.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"{theirs.format(i=i)}.weight"]
            for part, n_heads in (("attn_q", c.num_attention_heads), ("attn_k", c.num_key_value_heads)):
                if ours.endswith(part):  # LlamaModel.permute of convert_hf_to_gguf.py
                    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, weight.shape[1])
                    weight = halves.swapaxes(1, 2).reshape(weight.shape)
            add_tensor(writer, f"{ours.format(i=i)}.weight", weight, changes.get("quantized"))
    add_tensor(writer, "token_embd.weight", state["model.embed_tokens.weight"])
    add_tensor(writer, "output_norm.weight", state["model.norm.weight"])
    if not changes.get("tied"):
        add_tensor(writer, "output.weight", state["lm_head.weight"])
    if changes.get("rope_freqs"):
        add_tensor(writer, "rope_freqs.weight", np.ones(8, dtype=np.float32))
    return finish(writer, path)


def write_tokenizer(writer: gguf.GGUFWriter, pre: str, *, add_bos: bool = False) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(["i n", "Ġ in"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(add_bos)


def add_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, quantized: str | None = None) -> None:
    if quantized and weight.ndim == 2:
        kind = gguf.GGMLQuantizationType[quantized]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, np.ascontiguousarray(weight))


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: Any, d_vocab: int = len(TOKENS)) -> torch.Tensor:
    tokens = (torch.arange(3 * 17).reshape(3, 17) * 997 + 5) % d_vocab
    with torch.no_grad():
        return model(tokens).logits


# What comes out ------------------------------------------------------------------------------------------


def test_logits_are_those_of_the_model_that_was_written(tmp_path: Path, cache: Path, llama: LlamaForCausalLM) -> None:
    model, _, info = load_gguf(write_llama(tmp_path / "tiny.gguf", llama))
    assert torch.equal(logits(model), logits(llama))
    assert (info.name, info.architecture, info.quantization, info.cached) == ("Tiny", "llama", "F32", False)
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.rms_norm_eps == 1e-5


def test_without_an_output_matrix_the_embedding_is_tied(tmp_path: Path, cache: Path, llama: LlamaForCausalLM) -> None:
    model, _, _ = load_gguf(write_llama(tmp_path / "tiny.gguf", llama, tied=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, llama.model.embed_tokens.weight)


@pytest.mark.parametrize(("kind", "levels"), [("Q8_0", 254), ("Q4_1", 15)])
def test_quantised_weights_are_within_half_a_step(
    kind: str, levels: int, tmp_path: Path, cache: Path, llama: LlamaForCausalLM
) -> None:
    model, _, info = load_gguf(write_llama(tmp_path / "tiny.gguf", llama, quantized=kind))
    assert info.quantization == kind
    for name, truth in llama.state_dict().items():
        if "_proj" in name:
            blocks = truth.reshape(-1, 32)
            width = 2 * blocks.abs().amax(1) if kind == "Q8_0" else blocks.amax(1) - blocks.amin(1)
            error = (model.state_dict()[name] - truth).reshape(-1, 32).abs().amax(1)
            # Scale and offset are themselves rounded, to float16.
            assert (error <= 0.5 * width / levels + 2e-3).all(), name
    assert not torch.equal(logits(model), logits(llama))


def test_another_architecture_goes_through_transformers(tmp_path: Path, cache: Path) -> None:
    torch.manual_seed(5)
    # transformers takes no length from a GPT-2 file but its default of 1024.
    config = GPT2Config(vocab_size=len(TOKENS), n_positions=1024, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager")
    truth = GPT2LMHeadModel(config).eval()
    path = tmp_path / "gpt2.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(1024)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(128)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    write_tokenizer(writer, "gpt-2")
    ours = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm"}
    ours |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    for name, tensor in truth.transformer.state_dict().items():
        weight = tensor.numpy()
        if name.startswith("h."):
            _, i, rest = name.split(".", 2)
            part, suffix = rest.rsplit(".", 1)
            add_tensor(writer, f"blk.{i}.{ours[part]}.{suffix}", weight.T if ".c_" in name else weight)
        else:
            part, suffix = name.rsplit(".", 1)
            top = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}[part]
            add_tensor(writer, f"{top}.{suffix}", weight)
    model, tokenizer, info = load_gguf(finish(writer, path))
    assert info.architecture == "gpt2"
    assert torch.equal(logits(model), logits(truth))
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    # GPT-2 splits words, not digits; its own beginning of sequence is left as the file has it.
    assert tokenizer.tokenize("in in") == ["in", "Ġin"]
    assert tokenizer.bos_token == "<|im_start|>"


def test_tokenizer(tmp_path: Path, cache: Path, llama: LlamaForCausalLM) -> None:
    _, tokenizer, info = load_gguf(write_llama(tmp_path / "tiny.gguf", llama))
    assert tokenizer.tokenize("in in 1984<|im_end|>") == ["in", "Ġin", "Ġ", "1", "9", "8", "4", "<|im_end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        SPECIAL[0],
        SPECIAL[2],
        SPECIAL[2],
    )
    assert Path(tokenizer.name_or_path) == info.folder
    assert tokenizer("in").input_ids == [TOKENS.index("in")]


def test_a_file_that_wants_its_bos_gets_it(tmp_path: Path, cache: Path, llama: LlamaForCausalLM) -> None:
    _, tokenizer, _ = load_gguf(write_llama(tmp_path / "tiny.gguf", llama, add_bos=True))
    assert tokenizer("in").input_ids == [0, TOKENS.index("in")]


# The cache -----------------------------------------------------------------------------------------------


def test_second_load_reads_the_cache_only(
    tmp_path: Path, cache: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_llama(tmp_path / "tiny.gguf", llama)
    first, _, info = load_gguf(path)
    monkeypatch.setattr(loader, "_convert", None)
    second, _, again = load_gguf(path)
    assert torch.equal(logits(first), logits(second))
    assert again == dataclasses.replace(info, cached=True)
    # One folder and no leftovers of the conversion.
    assert list(cache.iterdir()) == [info.folder]


def test_editing_a_loaded_model_leaves_the_cache_alone(tmp_path: Path, cache: Path, llama: LlamaForCausalLM) -> None:
    path = write_llama(tmp_path / "tiny.gguf", llama)
    model, _, _ = load_gguf(path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(logits(load_gguf(path)[0]), logits(llama))


def test_files_of_one_name_and_size_do_not_share_a_folder(tmp_path: Path, cache: Path, llama: LlamaForCausalLM) -> None:
    path = write_llama(tmp_path / "tiny.gguf", llama)
    load_gguf(path)
    content = bytearray(path.read_bytes())
    content[-64:] = struct.pack("<16f", *range(16))
    path.write_bytes(content)
    model, _, info = load_gguf(path)
    assert not info.cached
    assert not torch.equal(logits(model), logits(llama))


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def lose_a_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def spoil_the_manifest(folder: Path) -> None:
    (folder / "mechinterp-gguf.json").write_text("[]")


@pytest.mark.parametrize("damage", [truncate, lose_a_file, spoil_the_manifest])
def test_a_damaged_folder_is_made_again(
    damage: Callable[[Path], None], tmp_path: Path, cache: Path, llama: LlamaForCausalLM
) -> None:
    path = write_llama(tmp_path / "tiny.gguf", llama)
    _, _, info = load_gguf(path)
    damage(info.folder)
    model, _, again = load_gguf(path)
    assert not again.cached
    assert torch.equal(logits(model), logits(llama))
    assert list(cache.iterdir()) == [info.folder]


def test_a_folder_of_the_right_sizes_that_does_not_load(tmp_path: Path, cache: Path, llama: LlamaForCausalLM) -> None:
    path = write_llama(tmp_path / "tiny.gguf", llama)
    _, _, info = load_gguf(path)
    weights = info.folder / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    with pytest.raises(ModelError) as caught:
        load_gguf(path)
    assert str(caught.value).startswith(f"The converted model in {info.folder} cannot be loaded (")
    assert str(caught.value).endswith("Delete that folder and load tiny.gguf again.")


def test_the_other_process_was_faster(
    tmp_path: Path, cache: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_llama(tmp_path / "tiny.gguf", llama)
    convert, racing = loader._convert, [True]

    def convert_while_another_does(source: Path, sha256: str, folder: Path) -> None:
        convert(source, sha256, folder)
        if racing and racing.pop():
            load_gguf(path)

    monkeypatch.setattr(loader, "_convert", convert_while_another_does)
    model, _, info = load_gguf(path)
    assert torch.equal(logits(model), logits(llama))
    assert list(cache.iterdir()) == [info.folder]


def test_without_cache_nothing_is_kept(tmp_path: Path, cache: Path, llama: LlamaForCausalLM) -> None:
    model, tokenizer, info = load_gguf(write_llama(tmp_path / "tiny.gguf", llama), cache=False)
    assert torch.equal(logits(model), logits(llama))
    assert Path(tokenizer.name_or_path) == info.folder
    assert not info.cached
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError) as caught:
        load_gguf(write_llama(tmp_path / "tiny.gguf", llama))
    assert str(caught.value) == (
        f"tiny.gguf cannot be kept in {tmp_path / 'file' / 'cache'} (Not a directory); it takes 4 bytes "
        "a parameter. Make room there, set MECHINTERP_CACHE to another folder, or load with cache=False."
    )


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "{home}/.cache/mechinterp"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/mechinterp"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "{home}/Library/Caches/mechinterp"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/mechinterp"),
        ("win32", {}, "{home}/AppData/Local/mechinterp"),
        ("linux", {"MECHINTERP_CACHE": "~/here"}, "{home}/here"),
    ],
)
def test_cache_dir(platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MECHINTERP_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loader.sys, "platform", platform)
    assert cache_dir() == Path(expected.format(home=Path.home()))


# What is refused -----------------------------------------------------------------------------------------


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_gguf(tmp_path)
    assert str(caught.value) == f"There is no GGUF file at {tmp_path}. Give the path of the .gguf file itself."


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "pointer.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError) as caught:
        load_gguf(path)
    assert str(caught.value) == (
        f"{path} is not a GGUF file: it begins with b'vers', not with b'GGUF'. A Git LFS pointer "
        "has to be downloaded first; of a Hugging Face model, give the folder."
    )


@pytest.mark.parametrize("keep", [6, 500, 20_000, -100])
def test_a_file_cut_short(keep: int, tmp_path: Path, cache: Path, llama: LlamaForCausalLM) -> None:
    path = write_llama(tmp_path / "tiny.gguf", llama)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError) as caught:
        load_gguf(path)
    assert str(caught.value).startswith(f"{path} is damaged or cut short, the GGUF reader stopped with ")
    assert str(caught.value).endswith("Compare its size with the original's and download or install it again.")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_freqs": True},
            "tiny.gguf (llama) stretches its rotary frequencies (rope_freqs.weight), which GGUF does not "
            "describe fully. Load the original weights from a Hugging Face folder instead.",
        ),
        (
            {"n_rotary": 8},
            "The GGUF file rotates 8 of 16 dimensions of a head, where a Llama rotates all. "
            "Load the original weights from a Hugging Face folder instead.",
        ),
        (
            {"n_layers": 3},
            "tiny.gguf lacks 9 tensors of 3 Llama layers, first 'blk.2.attn_k.weight'. "
            "If it is one part of a split model, merge its parts with llama-gguf-split.",
        ),
        (
            {"pre": "chatglm-bpe"},
            "tiny.gguf has the pre-tokenizer 'chatglm-bpe'; known here are 'smollm', 'gpt-2'. "
            "Load the original weights from a Hugging Face folder instead.",
        ),
    ],
)
def test_files_that_would_be_read_wrongly(
    changes: dict[str, Any], message: str, tmp_path: Path, cache: Path, llama: LlamaForCausalLM
) -> None:
    with pytest.raises(ModelError) as caught:
        load_gguf(write_llama(tmp_path / "tiny.gguf", llama, **changes))
    assert str(caught.value) == message
    assert list(cache.iterdir()) == []


def test_an_unknown_architecture(tmp_path: Path, cache: Path, llama: LlamaForCausalLM) -> None:
    with pytest.raises(ModelError) as caught:
        load_gguf(write_llama(tmp_path / "tiny.gguf", llama, architecture="rwkv6"))
    assert str(caught.value) == (
        "tiny.gguf has architecture 'rwkv6', which neither this loader nor transformers can read "
        "(ValueError: GGUF model with architecture rwkv6 is not supported yet.). "
        "Load the original weights from a Hugging Face folder instead."
    )
