"""Tiny models of several families, written once a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3 import Qwen3Config

from everstep.engine import Model, load_model
from everstep.engine.models.pico import write_pico

torch.set_num_threads(1)
SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": 258,
    "initializer_range": 0.1,  # strong enough for a wrong attention to show in the logits
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
WINDOW = 8
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=259,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        eos_token_id=257,
        bos_token_id=256,
        initializer_range=0.1,
    ),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "gemma2": Gemma2Config(  # windows in every other layer, softcapped scores and logits
        **GROUPED, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(
        **GROUPED,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def write_model(directory: Path, config: PretrainedConfig, tokenizer: Any) -> Path:
    """Write a randomly initialised model's files."""
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pico") / "pico"
    write_pico(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(pico: Path) -> Any:
    return AutoTokenizer.from_pretrained(pico)


@pytest.fixture(scope="session")
def directories(
    tmp_path_factory: pytest.TempPathFactory, pico: Path, tokenizer: Any
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    written = {n: write_model(root / n, config, tokenizer) for n, config in CONFIGS.items()}
    return {"pico": pico, **written}


@pytest.fixture(scope="session", params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(family: str, directories: dict[str, Path]) -> Model:
    return load_model(family, str(directories[family]), device="cpu")


@pytest.fixture(scope="session")
def llama(directories: dict[str, Path]) -> Model:
    """The model for tests that do not depend on the family."""
    return load_model("llama", str(directories["llama"]), device="cpu")
