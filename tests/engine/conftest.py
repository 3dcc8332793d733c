"""Tiny models of several families, written once a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.gpt2 import GPT2Config
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3 import Qwen3Config

from everstep.engine import Model, load_model
from everstep.engine.pico import write_pico

torch.set_num_threads(1)
_SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 257,
    "bos_token_id": 256,
}
CONFIGS = {
    "llama": LlamaConfig(**_SMALL, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**_SMALL, head_dim=8, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**_SMALL, head_dim=8, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=257
    ),
}


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    write_pico(root / "pico")
    tokenizer = AutoTokenizer.from_pretrained(root / "pico")
    for name, config in CONFIGS.items():
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in ("pico", *CONFIGS)}


@pytest.fixture(scope="session", params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(family: str, directories: dict[str, Path]) -> Model:
    return load_model(family, str(directories[family]), device="cpu")
