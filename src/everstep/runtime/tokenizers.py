"""The served models' tokenizers as files, so that clients without a network can load them."""

from __future__ import annotations

import hashlib
from pathlib import Path


def tokenizer_directory(home: Path, model_name: str) -> Path:
    """Where the worker writes a model's tokenizer when it loads the model."""
    return home / "tokenizers" / hashlib.sha256(model_name.encode()).hexdigest()[:16]


def tokenizer_files(home: Path, model_name: str) -> dict[str, bytes]:
    """A tokenizer's files by name."""
    directory = tokenizer_directory(home, model_name)
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}
