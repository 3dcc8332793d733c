"""A merged model, loaded with transformers alone, says what the engine says of the adapter."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from everstep.engine import Model, load_model
from everstep.interchange import tensors
from everstep.interchange.base import BaseModel
from everstep.interchange.errors import CannotMerge, Unreadable
from everstep.interchange.merge import merge
from everstep.interchange.peft_config import PeftAdapter
from everstep.wire.passes import Example
from tests.engine.helpers import forward
from tests.interchange.conftest import noisy_run, write_adapter

PROMPTS = (
    "Every step that was acknowledged is kept.",
    "def add(a, b):\n    return a + b\n",
    "1, 1, 2, 3, 5, 8, 13",
)
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03}
"""Of a logprob: float32 sums in another order; weights that were rounded to 8 bits."""


def engine_logprobs(model: Model, state: Any) -> list[np.ndarray]:
    """What the engine, and so the service, gives for each next byte of the prompts."""
    data = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in PROMPTS]
    passed = forward(model, state, [Example(t[:-1], {"target_tokens": t[1:]}) for t in data])
    return [np.asarray(output["logprobs"]) for output in passed.outputs]


def merged_logprobs(directory: Path) -> list[np.ndarray]:
    """What transformers gives, from the directory alone."""
    merged, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    found = []
    for text in PROMPTS:
        ids = torch.tensor([list(text.encode())])
        with torch.no_grad():
            scores = torch.log_softmax(merged(ids[:, :-1]).logits.float(), -1)
        found.append(scores[0].gather(-1, ids[0, 1:, None])[:, 0].numpy())
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("unembed", [True, False], ids=["unembed", "layers"])
def test_a_merged_model_gives_the_engines_logprobs(
    model: Model, family: str, bases: dict[str, Path], tmp_path: Path, dtype: str, unembed: bool
) -> None:
    state = noisy_run(model, unembed=unembed)
    adapter = PeftAdapter.open(write_adapter(state, tmp_path / "adapter"))
    (tmp_path / "merged").mkdir()
    merge(BaseModel.open(bases[family]), adapter, dtype, tmp_path / "merged")

    wanted, base = engine_logprobs(model, state), merged_logprobs(bases[family])
    for expected, found, without in zip(
        wanted, merged_logprobs(tmp_path / "merged"), base, strict=True
    ):
        assert np.abs(found - expected).max() < TOLERANCE[dtype]
        assert np.abs(without - expected).max() > 5 * TOLERANCE[dtype]  # the adapter matters
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged/generation_config.json").exists()


def test_a_tied_head_that_the_adapter_changes_becomes_a_weight_of_its_own(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model("tied", str(bases["qwen3-tied"]), device="cpu")
    adapter = PeftAdapter.open(write_adapter(noisy_run(model), tmp_path / "adapter"))
    (tmp_path / "merged").mkdir()
    merge(BaseModel.open(bases["qwen3-tied"]), adapter, "fp32", tmp_path / "merged")

    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    with safe_open(bases["qwen3-tied"] / "model.safetensors", "numpy") as file:
        embeddings = file.get_tensor("model.embed_tokens.weight")
    with safe_open(tmp_path / "merged/model.safetensors", "numpy") as file:
        assert np.array_equal(file.get_tensor("model.embed_tokens.weight"), embeddings)
        head = file.get_tensor("lm_head.weight")
    delta = adapter.b("lm_head") @ adapter.a("lm_head") * np.float32(3.0)
    assert np.allclose(head, embeddings + delta, atol=1e-6)


def test_a_tied_model_stays_tied_where_the_adapter_leaves_the_head_alone(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model("tied", str(bases["qwen3-tied"]), device="cpu")
    state = noisy_run(model, unembed=False)
    adapter = PeftAdapter.open(write_adapter(state, tmp_path / "adapter"))
    (tmp_path / "merged").mkdir()
    merge(BaseModel.open(bases["qwen3-tied"]), adapter, "bf16", tmp_path / "merged")

    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is True
    with safe_open(tmp_path / "merged/model.safetensors", "numpy") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  it is no mapping


@pytest.mark.parametrize("name", ["gpt2", "qwen3-tied", "llama"])
def test_base_files_without_the_first_part_of_names_are_understood(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """As gpt2 is on the hub: the files of the model without its head."""
    model = load_model(name, str(bases[name]), device="cpu")
    bare = tmp_path / "bare"
    shutil.copytree(bases[name], bare)
    with safe_open(bases[name] / "model.safetensors", "numpy") as file:
        content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    content = {
        key if key.startswith("lm_head") else key.partition(".")[2]: value
        for key, value in content.items()
    }
    save_file(content, bare / "model.safetensors", metadata={"format": "pt"})
    state = noisy_run(model)
    adapter = PeftAdapter.open(write_adapter(state, tmp_path / "adapter"))
    (tmp_path / "merged").mkdir()
    merge(BaseModel.open(bare), adapter, "fp32", tmp_path / "merged")

    pairs = zip(merged_logprobs(tmp_path / "merged"), engine_logprobs(model, state), strict=True)
    assert all(np.abs(found - wanted).max() < TOLERANCE["fp32"] for found, wanted in pairs)


def test_shards_keep_their_names_and_the_index_says_where_everything_is(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model("tied", str(bases["qwen3-tied"]), device="cpu")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(bases["qwen3-tied"]).save_pretrained(
        sharded, max_shard_size="40KB"
    )
    state = noisy_run(model)
    adapter = PeftAdapter.open(write_adapter(state, tmp_path / "adapter"))
    merged = tmp_path / "merged"
    merged.mkdir()
    merge(BaseModel.open(sharded), adapter, "bf16", merged)

    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in merged.glob("*.safetensors")) == shards
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    there = {}
    for shard in shards:
        with safe_open(merged / shard, "pt") as file:
            there |= dict.fromkeys(file.keys(), shard)
    assert index["weight_map"] == there
    assert there["lm_head.weight"] == there["model.embed_tokens.weight"]
    pairs = zip(merged_logprobs(merged), engine_logprobs(model, state), strict=True)
    assert all(np.abs(found - wanted).max() < TOLERANCE["bf16"] for found, wanted in pairs)


def many_shards(directory: Path, count: int, rows: int, width: int) -> int:
    """A made-up model of many shards; returns the bytes of one."""
    directory.mkdir()
    weight_map = {}
    for index in range(count):
        name = f"model.layers.{index}.self_attn.q_proj.weight"
        shard = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: np.full((rows, width), index, np.float32)}, directory / shard)
        weight_map[name] = shard
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return rows * width * 4


def test_never_more_than_a_piece_of_a_shard_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width, count = 4096, 256, 12
    size = many_shards(tmp_path / "base", count, rows, width)
    pairs = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{end}.weight": np.ones(
            shape, np.float32
        )
        for i in range(count)
        for end, shape in (("A", (2, width)), ("B", (rows, 2)))
    }
    (tmp_path / "adapter").mkdir()
    save_file(pairs, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    monkeypatch.setattr(tensors, "PIECE_BYTES", 256 << 10)
    (tmp_path / "merged").mkdir()
    tracemalloc.start()
    merge(
        BaseModel.open(tmp_path / "base"),
        PeftAdapter.open(tmp_path / "adapter"),
        "bf16",
        tmp_path / "merged",
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < size  # of one shard; all of them are twelve times as much
    with safe_open(tmp_path / "merged/model-00012-of-00012.safetensors", "pt") as file:
        last = file.get_tensor("model.layers.11.self_attn.q_proj.weight")
    assert last.dtype == torch.bfloat16 and bool((last == 11 + 2 * 2).all())


def test_a_head_that_is_missing_is_not_taken_for_a_tied_one(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """As where the model's configuration says that the head is a weight of its own."""
    model = load_model("llama", str(bases["llama"]), device="cpu")
    adapter = write_adapter(noisy_run(model), tmp_path / "adapter")
    shutil.copytree(bases["llama"], tmp_path / "base")
    with safe_open(bases["llama"] / "model.safetensors", "numpy") as file:
        content = {k: file.get_tensor(k) for k in file.keys() if k != "lm_head.weight"}  # noqa: SIM118
    save_file(content, tmp_path / "base/model.safetensors")
    assert "no weight of lm_head" in refusal(tmp_path / "base", adapter, tmp_path)


def refusal(base: Path, adapter: Path, tmp_path: Path) -> str:
    (tmp_path / "merged").mkdir()
    with pytest.raises((CannotMerge, Unreadable)) as caught:
        merge(BaseModel.open(base), PeftAdapter.open(adapter), "fp32", tmp_path / "merged")
    return str(caught.value)


def test_an_adapter_of_another_model_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load_model("llama", str(bases["llama"]), device="cpu")
    adapter = write_adapter(noisy_run(model), tmp_path / "adapter")
    assert "no weight of model.layers.0" in refusal(bases["gpt2"], adapter, tmp_path)


def test_a_quantized_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load_model("llama", str(bases["llama"]), device="cpu")
    adapter = write_adapter(noisy_run(model), tmp_path / "adapter")
    shutil.copytree(bases["llama"], tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    assert "quantized" in refusal(tmp_path / "base", adapter, tmp_path)


def test_pickled_weights_are_not_read(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(Unreadable, match="save_pretrained"):
        BaseModel.open(tmp_path)
