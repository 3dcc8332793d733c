"""Models with random weights, written as files: small ones for a CPU, 1 to 8 billion for a GPU."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from everstep.engine.models.pico import write_pico

_IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
_LLAMA3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 8_192}
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "97m": {
        "vocab_size": 32_000,
        "hidden_size": 640,
        "intermediate_size": 1_792,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "max_position_embeddings": 2_048,
    },
    "1b": {
        **_LLAMA3,
        "hidden_size": 2_048,
        "intermediate_size": 8_192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
    "3b": {
        **_LLAMA3,
        "hidden_size": 3_072,
        "intermediate_size": 8_192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
    },
    "8b": {
        **_LLAMA3,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
"""Sizes of Llamas by name."""


def write_random_model(
    directory: Path, name: str, *, dtype: str = "float32", device: str = "cpu"
) -> None:
    """Write a Llama with random weights and the tokenizer of the built-in model.

    Args:
        directory: where its files are written.
        name: its size.
        dtype: of the weights.
        device: where they are drawn.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    begin = time.perf_counter()
    torch.manual_seed(7)
    config = LlamaConfig(**SIZES[name], **_IDS)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    module.save_pretrained(directory)
    tokenizer = directory / "tokenizer"
    write_pico(tokenizer)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    shutil.rmtree(tokenizer)
    seconds = time.perf_counter() - begin
    print(f"{name}: {module.num_parameters() / 1e9:.2f} B written in {seconds:.0f} s", flush=True)
