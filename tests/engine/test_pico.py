"""everstep/pico: the same bytes on every machine, and a lossless byte-level tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from everstep.engine import AdamParams, AdapterConfig, Model, SampleSpec, load_model, optim_step
from everstep.engine.models import pico as pico_module
from everstep.engine.models.pico import write_pico
from tests.engine.helpers import backward, examples, forward, prompt, sample
from tests.profiles import example_count

HASHES = {
    "config.json": "0fa609987077b422bfa6006d2d995a8e34bf3d2b9b82a78663d1fa9a6a7ec41c",
    "generation_config.json": "85e3bfe1a3290a562f8ea1159d9575d98849d4ae26f8223437ec2bbb7996a605",
    "model.safetensors": "74a01bf62d2c815f6f7f4cbe0e4a6ae525c8142df5d4613327f5e33fa905d08d",
    "tokenizer.json": "f97f1ab254b1fcf6d7981ad640bb593ac66daf1b4fbd22b739c98472a8425ab6",
    "tokenizer_config.json": "860b627ea56fa2f1ed55caa7ff7643ff909828006b89dd7badd12ce50fe942b6",
}
FINGERPRINT = "28eed9de3edb61d8e949615d32de24e90ac62ed8c3789fa9d4aa2336280367b2"


@pytest.fixture(scope="module")
def served(pico: Path) -> Model:
    return load_model("everstep/pico", str(pico), device="cpu")


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def test_pico_files_have_fixed_bytes(pico: Path) -> None:
    assert hashes(pico) == HASHES


def test_pico_has_a_fixed_fingerprint(served: Model) -> None:
    assert served.info.fingerprint == FINGERPRINT
    assert served.info.vocab_size == 259
    assert served.info.max_context_length == 2048
    assert served.info.eos_token_ids == (257,)
    assert served.info.architecture == "LlamaForCausalLM"


def test_fingerprints_of_different_models_differ(pico: Path, served: Model, tmp_path: Path) -> None:
    def changed(name: str, weight: float = 0.0, **config: object) -> str:
        directory = tmp_path / name
        shutil.copytree(pico, directory)
        values = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**values, **config}))
        tensors = load_file(directory / "model.safetensors")
        tensors["model.norm.weight"][3] += weight
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return load_model("m", str(directory), device="cpu").info.fingerprint

    assert changed("elsewhere") == served.info.fingerprint
    assert changed("version", transformers_version="9.9") == served.info.fingerprint
    others = {changed("weights", 1e-3), changed("rope", rope_theta=20000.0), changed("same")}
    assert len(others) == 3


def test_writing_pico_again_changes_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "models" / "pico"
    write_pico(directory)
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    write_pico(directory)
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert [path.name for path in directory.parent.iterdir()] == ["pico"], "nothing is left over"


def test_a_partly_written_directory_is_completed(tmp_path: Path) -> None:
    directory = tmp_path / "pico"
    write_pico(directory)
    (directory / "model.safetensors").unlink()
    (directory / "config.json").write_bytes(bytes((directory / "config.json").stat().st_size))
    write_pico(directory)
    assert hashes(directory) == HASHES


def test_concurrent_writers_leave_one_complete_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, weights = tmp_path / "pico", pico_module._weights
    inode = []

    def slow() -> bytes:
        monkeypatch.setattr(pico_module, "_weights", weights)
        write_pico(directory)  # the other one is faster
        inode.append(directory.stat().st_ino)
        return weights()

    monkeypatch.setattr(pico_module, "_weights", slow)
    write_pico(directory)
    assert hashes(directory) == HASHES
    assert [directory.stat().st_ino] == inode, "the other's files stay, it may be reading them"
    assert [path.name for path in tmp_path.iterdir()] == ["pico"]


def test_transformers_loads_pico(pico: Path) -> None:
    module, report = AutoModelForCausalLM.from_pretrained(
        pico, dtype=torch.float32, output_loading_info=True
    )
    assert {"missing_keys", "unexpected_keys"} <= report.keys()
    assert not any(report.values()), "no weight is missing, unexpected or of another shape"
    logits = module(torch.arange(256).unsqueeze(0)).logits
    assert logits.isfinite().all()
    assert 0.1 < float(logits.detach().std()) < 10
    weights = load_file(pico / "model.safetensors")
    assert len({tensor.numpy().tobytes() for tensor in weights.values() if tensor.ndim > 1}) == sum(
        tensor.ndim > 1 for tensor in weights.values()
    ), "no two matrices are the same"


def test_pico_can_be_trained(served: Model) -> None:
    state = served.new_run(AdapterConfig(rank=8))
    data = examples(1, (20,))
    first = forward(served, state, data).metrics["loss:sum"]
    for _ in range(10):
        backward(served, state, data)
        optim_step(state, AdamParams(learning_rate=0.01))
    assert forward(served, state, data).metrics["loss:sum"] < 0.3 * first
    assert len(sample(served, SampleSpec(prompt(), 2, max_tokens=3)).sequences) == 2


# The tokenizer


@given(st.text())
@example("")
@example(" leading, trailing ")
@example("tabs\tand\r\nlines\n\n")
@example("isn ' t . , !")
@example("日本語 · emoji 👩‍🚀 · \x00 \x7f \ufeff \u2028")
@example("<|begin|")
@example_count(60)
def test_any_text_survives_encoding_and_decoding(tokenizer: Any, text: str) -> None:
    assume(not any(token in text for token in tokenizer.all_special_tokens))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_token_ids_are_byte_values(tokenizer: Any) -> None:
    assert len(tokenizer) == 259
    assert tokenizer.encode("Az 0") == [65, 122, 32, 48]
    assert tokenizer.decode([0xE2, 0x82, 0xAC]) == "€"
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd", "half a character"


def test_special_tokens_follow_the_bytes(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        256,
        257,
        258,
    )
    assert tokenizer.encode("a<|end|>b") == [97, 257, 98]
    assert tokenizer.decode([97, 257, 98]) == "a<|end|>b"
    assert tokenizer.decode([256, 97, 257], skip_special_tokens=True) == "a"


def test_the_chat_template_formats_a_conversation(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "user: Hi\nassistant: Ho\n"
    text = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text == "user: Hi\nassistant: "


def test_transformers_reads_the_configuration(pico: Path) -> None:
    assert json.loads((pico / "config.json").read_text())["model_type"] == "llama"
    assert AutoTokenizer.from_pretrained(pico).model_max_length == 2048
