"""Bits do not depend on where a tensor lies: in a file, in a message, among other rows."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import everstep
from everstep.engine import AdamParams, AdapterConfig, Model, SampleSpec, load_model, optim_step
from everstep.engine.alignment import ALIGNMENT, align_module, aligned, tensor_from
from everstep.engine.models import load_checks
from tests.engine.conftest import SMALL, write_model
from tests.engine.helpers import backward, buffers, examples, prompt, sample_all

RATE = AdamParams(learning_rate=0.01)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model of one layer whose weights, in a file, follow one another at every alignment."""
    sizes = {"hidden_size": 40, "intermediate_size": 50, "num_hidden_layers": 1}
    config = AutoConfig.for_model("llama", **{**SMALL, **sizes}, tie_word_embeddings=False)
    return write_model(tmp_path_factory.mktemp("small") / "small", config, tokenizer)


@pytest.fixture
def quick_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load without the checks, which have nothing to do with where weights lie."""
    monkeypatch.setattr(load_checks, "check_model", lambda *arguments: None)


def move_weights(source: Path, target: Path, offset: int) -> None:
    """Copy a model whose weights then begin this many bytes after a multiple of 64."""
    if not target.exists():
        shutil.copytree(source, target)
    content = (source / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip()
    header += b" " * ((offset - 8 - len(header)) % ALIGNMENT)
    moved = len(header).to_bytes(8, "little") + header + content[end:]
    (target / "model.safetensors").write_bytes(moved)


def bits(model: Model) -> str:
    """Hash training steps on one token and on several, and a sample."""
    digest = hashlib.sha256()
    state = model.new_run(AdapterConfig(rank=4, seed=3))
    for length in (1, 9):
        result = backward(model, state, examples(1, (length,)))
        for output in result.outputs:
            digest.update(output["logprobs"].tobytes())
        optim_step(state, RATE)
    for buffer in buffers(state).values():
        digest.update(buffer)
    drawn = sample_all(model, [(SampleSpec(prompt(), max_tokens=2, use_eos=False), None)])[0]
    digest.update(drawn.sequences[0].logprobs.tobytes())
    return digest.hexdigest()


@pytest.mark.usefixtures("quick_load")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_file_whose_weights_begin_anywhere_gives_the_same_bits(
    small: Path, tmp_path: Path, dtype: str
) -> None:
    # In float32 one row's products differ; halves are read by kernels that load anywhere.
    offsets = range(ALIGNMENT) if dtype == "float32" else (0, 1, 2, 8, 16, 32, 62)
    found = {}
    for offset in offsets:
        move_weights(small, tmp_path / "moved", offset)
        model = load_model("small", str(tmp_path / "moved"), device="cpu", dtype=dtype)
        found[offset] = (model.info.fingerprint, bits(model))
    assert len(set(found.values())) == 1, found


@pytest.mark.usefixtures("quick_load")
def test_other_formats_and_shards_give_the_same_bits(
    small: Path, tmp_path: Path, tokenizer: Any
) -> None:
    base = AutoModelForCausalLM.from_pretrained(small)
    weights = base.state_dict()
    (tmp_path / "shards").mkdir()
    base.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shutil.copytree(small, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    columns = {  # as some tools save a transposed weight
        name: weight.t().contiguous().t() if weight.ndim == 2 else weight
        for name, weight in weights.items()
    }
    torch.save(columns, tmp_path / "bin" / "pytorch_model.bin")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    found = {
        source: (model.info.fingerprint, bits(model))
        for source in (small, tmp_path / "shards", tmp_path / "bin")
        for model in [load_model("small", str(source), device="cpu")]
    }
    assert len(set(found.values())) == 1, found


def test_aligned_weights_stay_mapped_and_shared_ones_stay_shared(
    small: Path, tmp_path: Path
) -> None:
    class Tied(nn.Module):
        def __init__(self, at: int) -> None:
            super().__init__()
            storage = torch.zeros(1024)
            self.first = nn.Parameter(storage[at : at + 64].view(8, 8), requires_grad=False)
            self.second = nn.Parameter(storage[at : at + 64].view(8, 8), requires_grad=False)
            self.third = nn.Parameter(self.first.data.t(), requires_grad=False)

    placed, moved = Tied(16), Tied(3)
    before = placed.first.data_ptr()
    for module in (placed, moved):
        align_module(module)
        assert module.first.data_ptr() == module.second.data_ptr()
        assert all(p.is_contiguous() for p in module.parameters())
        assert all(p.data_ptr() % ALIGNMENT == 0 for p in module.parameters())
    assert placed.first.data_ptr() == before


def test_arrays_of_messages_and_files_are_copied_into_aligned_memory() -> None:
    content = np.arange(100, dtype=np.float32).tobytes()
    for offset in range(1, 64, 7):
        raw = b"\0" * offset + content
        array = np.frombuffer(memoryview(raw)[offset:], np.float32)
        tensor = tensor_from(array)
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert tensor.tolist() == array.tolist()
    view = tensor[1:]
    assert aligned(view).data_ptr() % ALIGNMENT == 0
    assert aligned(tensor) is tensor


def test_sampler_of_an_adapter_in_unaligned_memory_has_the_same_bits(llama: Model) -> None:
    state = llama.new_run(AdapterConfig(rank=4, seed=5))
    state.arena.buffers["params"].normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    capture = state.capture(optimizer=False)
    content = b"".join(bytes(c) for c in capture.files()["adapter_model.safetensors"])
    capture.release()
    spec = SampleSpec(prompt(), max_tokens=4, use_eos=False)
    found = set()
    for offset in range(0, 64, 4):
        raw = memoryview(bytearray(offset) + content)[offset:]
        adapter = llama.load_adapter(state.layout.config, raw)
        places = [w.data_ptr() % ALIGNMENT for pair in adapter.weights.values() for w in pair]
        assert places and not any(places)
        found.add(sample_all(llama, [(spec, adapter)])[0].sequences[0].logprobs.tobytes())
    assert len(found) == 1


def test_sample_has_the_same_bits_in_any_row(tmp_path: Path, tokenizer: Any) -> None:
    # A row of all heads is no multiple of 64 bytes long.
    sizes = {"hidden_size": 102, "num_attention_heads": 3, "num_hidden_layers": 1}
    config = AutoConfig.for_model("llama", **{**SMALL, **sizes})
    model = load_model("odd", str(write_model(tmp_path / "odd", config, tokenizer)), device="cpu")
    mine = (SampleSpec(prompt(), max_tokens=8, use_eos=False), None)
    alone = sample_all(model, [mine])[0]
    for others in range(1, 4):
        many = SampleSpec(prompt(9), num_samples=others, max_tokens=24, use_eos=False)
        among = sample_all(model, [(many, None), mine])[1]
        assert among.sequences[0].logprobs.tobytes() == alone.sequences[0].logprobs.tobytes()


def _lines_of_the_engine() -> Iterator[tuple[str, str]]:
    for path in sorted(Path(everstep.__file__).parent.rglob("*.py")):
        if path.name != "alignment.py":
            for line in path.read_text().splitlines():
                yield f"{path.name}: {line.strip()}", line


def test_no_tensor_is_made_over_memory_that_torch_did_not_allocate() -> None:
    views = ("torch.from_numpy", "torch.frombuffer", "torch.as_tensor", "torch.from_file")
    lines = list(_lines_of_the_engine())
    assert lines
    assert [where for where, line in lines if any(view in line for view in views)] == []
