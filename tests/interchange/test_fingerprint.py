"""Fingerprint: files of a base model match the model that a checkpoint was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, Qwen2Config

from everstep.engine import Model, load_model
from everstep.interchange import tensors
from everstep.interchange.base import BaseModel
from everstep.interchange.fingerprint import KNOWN_FAMILIES, matches_fingerprint
from tests.engine.conftest import GROUPED, write_model
from tests.interchange.conftest import FAMILIES

MORE = (
    MistralConfig(**GROUPED, sliding_window=None),
    Qwen2Config(**GROUPED),
)


def changed(base: Path, copy: Path, change: Any, **config: Any) -> BaseModel:
    """Copy a base model with other weights or another configuration."""
    shutil.copytree(base, copy)
    weights = load_file(copy / "model.safetensors")
    save_file(change(weights), copy / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(values))
    return BaseModel.open(copy)


def test_the_files_fingerprint_equals_the_loaded_models(
    model: Model, family: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 1024)
    base = BaseModel.open(bases[family])
    assert matches_fingerprint(base, model.info.fingerprint, "float32")
    assert not matches_fingerprint(base, model.info.fingerprint, "bfloat16")


@pytest.mark.parametrize("config", MORE, ids=[each.model_type for each in MORE])
def test_the_fingerprint_of_other_known_families_matches(
    tmp_path: Path, tokenizer: Any, config: Any
) -> None:
    directory = write_model(tmp_path / "base", config, tokenizer)
    fingerprint = load_model("more", str(directory), device="cpu").info.fingerprint
    assert matches_fingerprint(BaseModel.open(directory), fingerprint, "float32")


def test_every_known_family_is_tested() -> None:
    assert {each.model_type for each in (*FAMILIES.values(), *MORE)} == set(KNOWN_FAMILIES)


def test_an_unknown_family_gives_no_answer(bases: dict[str, Path], tmp_path: Path) -> None:
    base = changed(bases["llama"], tmp_path / "a", dict, model_type="of-tomorrow")
    assert matches_fingerprint(base, "0" * 64, "float32") is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_fingerprint_depends_on_the_served_dtype(bases: dict[str, Path], dtype: str) -> None:
    model = load_model("llama", str(bases["llama"]), device="cpu", dtype=dtype)
    assert matches_fingerprint(BaseModel.open(bases["llama"]), model.info.fingerprint, dtype)


def test_another_weight_or_configuration_is_another_model(
    llama: Model, bases: dict[str, Path], tmp_path: Path
) -> None:
    fingerprint = llama.info.fingerprint

    def one_bit(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = "model.norm.weight"
        return weights | {name: torch.nextafter(weights[name], torch.tensor(9.0))}

    same = changed(bases["llama"], tmp_path / "a", dict, transformers_version="0.1")
    assert matches_fingerprint(same, fingerprint, "float32")
    assert not matches_fingerprint(
        changed(bases["llama"], tmp_path / "b", one_bit), fingerprint, "float32"
    )
    other = changed(bases["llama"], tmp_path / "c", dict, rope_theta=5.0)
    assert not matches_fingerprint(other, fingerprint, "float32")


@pytest.mark.parametrize("name", ["gpt2", "qwen3-tied", "llama"])
def test_files_without_the_prefix_of_names_match(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    fingerprint = load_model(name, str(bases[name]), device="cpu").info.fingerprint

    def bare(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            n if n.startswith("lm_head") else n.partition(".")[2]: w for n, w in weights.items()
        }

    assert matches_fingerprint(
        changed(bases[name], tmp_path / "bare", bare), fingerprint, "float32"
    )
