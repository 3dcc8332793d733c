"""The served models' tokenizers as files, so that clients without a network can load them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any


def write_tokenizer(home: Path, model_name: str, tokenizer: Any) -> None:
    """Write a tokenizer that the worker has loaded, unless it is there byte for byte.

    The service may be reading what an earlier worker wrote, so a file that is right stays.
    """
    directory = _directory(home, model_name)
    temporary = directory.with_name(f".{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    if directory.exists() and _files(directory) == _files(temporary):
        shutil.rmtree(temporary)
        return
    shutil.rmtree(directory, ignore_errors=True)
    temporary.replace(directory)


def tokenizer_files(home: Path, model_name: str) -> dict[str, bytes]:
    """A tokenizer's files by name."""
    return _files(_directory(home, model_name))


def _directory(home: Path, model_name: str) -> Path:
    return home / "tokenizers" / hashlib.sha256(model_name.encode()).hexdigest()[:16]


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}
