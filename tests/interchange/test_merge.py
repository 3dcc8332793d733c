"""Merge: a merged model, loaded with transformers alone, has the engine's logprobs."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from everstep.engine import Model, RunState, load_model
from everstep.interchange import tensors
from everstep.interchange.base import BaseModel
from everstep.interchange.errors import DivergedAdapter, MergeError, UnreadableFile
from everstep.interchange.merge import merge
from everstep.interchange.numbers import Array
from everstep.interchange.peft_config import PeftAdapter
from everstep.wire.messages.passes import Example
from tests.engine.helpers import forward
from tests.interchange.conftest import noisy_run, write_adapter

PROMPTS = (
    "Every step that was acknowledged is kept.",
    "def add(a, b):\n    return a + b\n",
    "1, 1, 2, 3, 5, 8, 13",
)
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03}
"""Difference of a logprob: float32 sums in another order, or weights rounded to 8 bits."""


def check_logprobs(found: list[Array], expected: list[Array], tolerance: float) -> None:
    """Check that two results agree on every prompt."""
    assert len(found) == len(expected) == len(PROMPTS)
    for one, other in zip(found, expected, strict=True):
        assert one.size > 0
        assert np.abs(one - other).max() < tolerance


def engine_logprobs(model: Model, state: RunState) -> list[Array]:
    """Compute the logprobs of the prompts' bytes with the engine."""
    data = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in PROMPTS]
    passed = forward(model, state, [Example(t[:-1], {"target_tokens": t[1:]}) for t in data])
    return [np.asarray(output["logprobs"]) for output in passed.outputs]


@cache
def transformers_logprobs(directory: Path) -> list[Array]:
    """Compute the logprobs of the prompts' bytes with transformers, from a directory alone."""
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

    expected, base = engine_logprobs(model, state), transformers_logprobs(bases[family])
    check_logprobs(transformers_logprobs(tmp_path / "merged"), expected, TOLERANCE[dtype])
    for with_adapter, without in zip(expected, base, strict=True):
        assert np.abs(without - with_adapter).max() > 5 * TOLERANCE[dtype]
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged/generation_config.json").exists()


def test_what_the_adapter_does_not_change_keeps_its_bytes(
    llama: Model, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, merged = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(bases["llama"], base)
    merged.mkdir()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=7))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_bytes(b"{{ tools }}\r\n")
    (base / "generation_config.json").write_bytes(b'{ "eos_token_id":2}')
    adapter = PeftAdapter.open(write_adapter(noisy_run(llama, unembed=False), tmp_path / "adapter"))
    merge(BaseModel.open(base), adapter, "fp32", merged)
    names = [path.relative_to(base) for path in base.rglob("*") if path.is_file()]
    others = [name for name in names if name.suffix != ".safetensors"]
    assert len(others) >= 5
    for name in others:
        assert (merged / name).read_bytes() == (base / name).read_bytes()


def test_a_tied_head_that_the_adapter_changes_is_untied(
    tied: Model, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = PeftAdapter.open(write_adapter(noisy_run(tied), tmp_path / "adapter"))
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
    tied: Model, bases: dict[str, Path], tmp_path: Path
) -> None:
    state = noisy_run(tied, unembed=False)
    adapter = PeftAdapter.open(write_adapter(state, tmp_path / "adapter"))
    (tmp_path / "merged").mkdir()
    merge(BaseModel.open(bases["qwen3-tied"]), adapter, "bf16", tmp_path / "merged")

    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is True
    with safe_open(tmp_path / "merged/model.safetensors", "numpy") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  it is no mapping


@pytest.mark.parametrize("name", ["gpt2", "qwen3-tied", "llama"])
def test_base_files_without_the_prefix_of_names_can_be_merged(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """As gpt2 on the hub: files of the model without its head."""
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

    found = transformers_logprobs(tmp_path / "merged")
    check_logprobs(found, engine_logprobs(model, state), TOLERANCE["fp32"])


def test_shards_keep_their_names_and_the_index_lists_every_weight(
    tied: Model, bases: dict[str, Path], tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(bases["qwen3-tied"]).save_pretrained(
        sharded, max_shard_size="40KB"
    )
    state = noisy_run(tied)
    adapter = PeftAdapter.open(write_adapter(state, tmp_path / "adapter"))
    merged = tmp_path / "merged"
    merged.mkdir()
    merge(BaseModel.open(sharded), adapter, "bf16", merged)

    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in merged.glob("*.safetensors")) == shards
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    there: dict[str, str] = {}
    for shard in shards:
        with safe_open(merged / shard, "pt") as file:
            there |= dict.fromkeys(file.keys(), shard)
    assert index["weight_map"] == there
    assert there["lm_head.weight"] == there["model.embed_tokens.weight"]
    check_logprobs(transformers_logprobs(merged), engine_logprobs(tied, state), TOLERANCE["bf16"])


def many_shards(directory: Path, count: int, rows: int, width: int) -> int:
    """Write a model of many shards. Returns the size of one."""
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


def test_memory_is_bounded_by_a_chunk_of_a_shard(
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
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 256 << 10)
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

    assert peak < size  # the size of one of twelve shards
    with safe_open(tmp_path / "merged/model-00012-of-00012.safetensors", "pt") as file:
        last = file.get_tensor("model.layers.11.self_attn.q_proj.weight")
    assert last.dtype == torch.bfloat16 and bool((last == 11 + 2 * 2).all())


def test_a_missing_head_is_not_mistaken_for_a_tied_one(
    llama: Model, bases: dict[str, Path], tmp_path: Path
) -> None:
    """The configuration says that the head is not tied."""
    adapter = write_adapter(noisy_run(llama), tmp_path / "adapter")
    shutil.copytree(bases["llama"], tmp_path / "base")
    with safe_open(bases["llama"] / "model.safetensors", "numpy") as file:
        content = {k: file.get_tensor(k) for k in file.keys() if k != "lm_head.weight"}  # noqa: SIM118
    save_file(content, tmp_path / "base/model.safetensors")
    assert "no weight of lm_head" in refusal(tmp_path / "base", adapter, tmp_path)


def refusal(base: Path, adapter: Path, tmp_path: Path) -> str:
    (tmp_path / "merged").mkdir()
    with pytest.raises((DivergedAdapter, MergeError, UnreadableFile)) as caught:
        merge(BaseModel.open(base), PeftAdapter.open(adapter), "fp32", tmp_path / "merged")
    return str(caught.value)


def test_an_adapter_of_another_model_is_rejected(
    llama: Model, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = write_adapter(noisy_run(llama), tmp_path / "adapter")
    assert "no weight of model.layers.0" in refusal(bases["gpt2"], adapter, tmp_path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "its weights hold NaN or infinity in "),
        (float("inf"), "its weights hold NaN or infinity in "),
        (3e38, "merged with it, model.layers.0.self_attn.q_proj.weight holds NaN or infinity"),
    ],
    ids=str,
)
def test_a_diverged_adapter_is_rejected(
    llama: Model, bases: dict[str, Path], tmp_path: Path, value: float, words: str
) -> None:
    state = noisy_run(llama)
    state.arena.buffers["params"][:200] = value
    adapter = write_adapter(state, tmp_path / "adapter")
    found = refusal(bases["llama"], adapter, tmp_path)
    assert found.startswith("This adapter has diverged: ")
    assert words in found


def test_a_quantized_base_is_rejected(llama: Model, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(noisy_run(llama), tmp_path / "adapter")
    shutil.copytree(bases["llama"], tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    assert "quantized" in refusal(tmp_path / "base", adapter, tmp_path)


def test_pickled_weights_are_not_read(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UnreadableFile, match="save_pretrained"):
        BaseModel.open(tmp_path)
