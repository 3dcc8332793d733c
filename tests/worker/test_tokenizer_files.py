"""Tokenizer files: a model's own, byte for byte, whatever our transformers would write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from everstep.engine import Model
from everstep.worker.protocol.tokenizer_files import decoder_file, tokenizer_files, write_tokenizer
from tests.runtime.local import home, pico
from tests.scenario import MODEL

__all__ = ["home", "pico"]
OWN = {
    "tokenizer.model": b"\x0a\x0e sentence pieces",
    "chat_template.jinja": "{{ 'é' }}\r\n".encode(),
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "special_tokens_map.json": b'{ "bos_token":"<s>" }',
    "generation_config.json": b"{}",
    "tokenization_own.py": b"class OwnTokenizer: ...",
    "own.vocabulary": b"a\nb\n",
}
OTHERS = {
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"weights",
    "secrets.json": b"{}",
    "rows.jsonl": b"{}",
    ".env": b"KEY=1",
    "checkpoint-5/tokenizer.json": b"{}",
}


class OwnTokenizer:
    """A tokenizer whose class names a file that no other one has."""

    vocab_files_names = {"vocab_file": "own.vocabulary"}  # noqa: RUF012


@pytest.fixture
def source(pico: Model, tmp_path: Path) -> Path:
    """A model's directory as transformers 4 wrote it."""
    directory = tmp_path / "model"
    shutil.copytree(pico.info.source, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=7))
    for name, content in (OWN | OTHERS).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def test_files_are_the_directorys_own(home: Path, pico: Model, source: Path) -> None:
    write_tokenizer(home, MODEL, OwnTokenizer(), source)
    expected = {"tokenizer.json", "tokenizer_config.json", "config.json", *OWN}
    found = tokenizer_files(home, MODEL)
    assert set(found) == expected
    assert found == {name: (source / name).read_bytes() for name in expected}


def test_unchanged_files_are_not_written_again(home: Path, pico: Model, source: Path) -> None:
    write_tokenizer(home, MODEL, pico.tokenizer, source)
    (before,) = (each.stat().st_ino for each in home.rglob("tokenizer.model"))
    write_tokenizer(home, MODEL, pico.tokenizer, source)
    assert [each.stat().st_ino for each in home.rglob("tokenizer.model")] == [before]
    (source / "tokenizer.model").write_bytes(b"another")
    write_tokenizer(home, MODEL, pico.tokenizer, source)
    assert tokenizer_files(home, MODEL)["tokenizer.model"] == b"another"


def test_service_decodes_with_the_loaded_tokenizer(home: Path, pico: Model, source: Path) -> None:
    (source / "tokenizer.json").unlink()
    write_tokenizer(home, MODEL, pico.tokenizer, source)
    assert "tokenizer.json" not in tokenizer_files(home, MODEL)
    assert json.loads(decoder_file(home, MODEL) or b"")["model"]["type"] == "BPE"
    write_tokenizer(home, MODEL, OwnTokenizer(), source)
    assert decoder_file(home, MODEL) is None
