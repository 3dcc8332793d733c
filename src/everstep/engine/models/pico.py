"""``everstep/pico``: a small base model that needs no download.

A Llama with a byte-level tokenizer. It is built from integers alone, so its files have the same
bytes on every machine. Its weights are random and not trained.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PICO_NAME = "everstep/pico"
_VOCABULARY = 259
_BOS, _EOS, _PAD = 256, 257, 258
_HIDDEN = 128
_LAYERS = 2
_HEADS = 4
_MLP = 384
_CONTEXT = 2048
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_pico(directory: Path) -> None:
    """Write the model's files atomically, unless the directory holds the same bytes already.

    Args:
        directory: target. AutoTokenizer and AutoModelForCausalLM can load it afterwards.
    """
    files = _files()
    if _is_complete(directory, files):
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        if directory.exists() and not _is_complete(directory, files):
            shutil.rmtree(directory)
        temporary.replace(directory)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not _is_complete(directory, files):  # another process may have written it first
            raise


def _is_complete(directory: Path, files: Mapping[str, bytes]) -> bool:
    """Compare all bytes: a power cut may leave files without content."""
    try:
        return all((directory / name).read_bytes() == files[name] for name in files)
    except FileNotFoundError:
        return False


def _files() -> dict[str, bytes]:
    return {
        "config.json": _json(_config()),
        "generation_config.json": _json(
            {"bos_token_id": _BOS, "eos_token_id": _EOS, "pad_token_id": _PAD}
        ),
        "tokenizer.json": _json(_tokenizer()),
        "tokenizer_config.json": _json(_tokenizer_config()),
        "model.safetensors": _weights(),
    }


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": _CONTEXT,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
        "pad_token_id": _PAD,
        "torch_dtype": "float32",
    }


def _weights() -> bytes:
    """Encode uniform weights from Philox counters as safetensors."""
    from safetensors.numpy import save

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for layer in range(_LAYERS):
        base = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{base}.self_attn.{name}.weight"] = (_HIDDEN, _HIDDEN)
        shapes[f"{base}.mlp.gate_proj.weight"] = (_MLP, _HIDDEN)
        shapes[f"{base}.mlp.up_proj.weight"] = (_MLP, _HIDDEN)
        shapes[f"{base}.mlp.down_proj.weight"] = (_HIDDEN, _MLP)
        shapes[f"{base}.input_layernorm.weight"] = (_HIDDEN,)
        shapes[f"{base}.post_attention_layernorm.weight"] = (_HIDDEN,)
    shapes["model.norm.weight"] = (_HIDDEN,)
    shapes["lm_head.weight"] = (_VOCABULARY, _HIDDEN)
    content: bytes = save(
        {name: _tensor(index, shape) for index, (name, shape) in enumerate(shapes.items())}
    )
    return content


def _tensor(index: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return a norm's ones, or a counter's integers scaled by a power of two: exact everywhere."""
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    words = np.random.Philox(key=index).random_raw(int(np.prod(shape)))
    signed = (words >> np.uint64(40)).astype(np.int64) - (1 << 23)
    scale = 2.0**-23 if index == 0 else 2.0**-26  # embeddings ±1, projections ±1/8
    return (signed.astype(np.float64) * scale).astype(np.float32).reshape(shape)


def _tokenizer() -> dict[str, Any]:
    """Map each byte to the token of the same id. Begin, end and padding follow."""
    alphabet = _byte_alphabet()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    special = [
        {
            "id": token,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, text in ((_BOS, "<|begin|>"), (_EOS, "<|end|>"), (_PAD, "<|pad|>"))
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def _byte_alphabet() -> dict[int, str]:
    """Return the printable character of each byte in byte-level BPE, as defined by GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in alphabet]
    return {**alphabet, **{byte: chr(256 + index) for index, byte in enumerate(others)}}


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": _CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
