"""Tiny base models of several families, and adapters written by the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.qwen3_moe import Qwen3MoeConfig

from everstep.engine import AdapterConfig, Model, load_model
from everstep.engine.models.pico import write_pico
from everstep.engine.run_state import RunState
from tests.engine.conftest import CONFIGS, GROUPED, write_model
from tests.engine.helpers import files

FAMILIES = {
    **CONFIGS,
    "qwen3-moe": Qwen3MoeConfig(
        **GROUPED,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        tie_word_embeddings=False,
    ),
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("pico") / "pico"
    write_pico(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: write_model(root / name, config, tokenizer) for name, config in FAMILIES.items()}


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(family: str, bases: dict[str, Path]) -> Model:
    return load_model(family, str(bases[family]), device="cpu")


@pytest.fixture(scope="session")
def llama(bases: dict[str, Path]) -> Model:
    """The model for tests that do not depend on the family."""
    return load_model("llama", str(bases["llama"]), device="cpu")


@pytest.fixture(scope="session")
def tied(bases: dict[str, Path]) -> Model:
    """A model whose output head is tied to its input embeddings."""
    return load_model("tied", str(bases["qwen3-tied"]), device="cpu")


def noisy_run(model: Model, *, unembed: bool = True, size: float = 0.05) -> RunState:
    """Create a run whose adapter changes every logit."""
    config = AdapterConfig(rank=4, alpha=12.0, seed=5, train_unembed=unembed)
    state = model.new_run(config)
    noise = torch.Generator().manual_seed(11)
    state.arena.buffers["params"].normal_(0, size, generator=noise)
    return state


def write_adapter(state: RunState, directory: Path) -> Path:
    """Write a run's adapter as the service saves it."""
    directory.mkdir(parents=True, exist_ok=True)
    content, _ = files(state, optimizer=False)
    for name, data in content.items():
        (directory / name).write_bytes(data)
    return directory
