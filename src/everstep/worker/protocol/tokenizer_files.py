"""The served models' tokenizers as files, so that clients without a network can load them.

<home>/tokenizers/<model>/        the model's own files, byte for byte: other releases of
                                  transformers may not read what the worker's release writes
<home>/tokenizers/<model>.json    the tokenizer as the worker loaded it, with which the service
                                  decodes; absent if it is not a fast one
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from everstep.durable_files import replace_file

_NAMES = (
    "config.json",  # names the tokenizer's class where its own configuration doesn't
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenization*.py",
    "configuration*.py",
)
"""Files of a tokenizer by name. A directory may hold others, which are nobody's business."""


def write_tokenizer(home: Path, model_name: str, tokenizer: Any, source: str | Path) -> None:
    """Write the files of a tokenizer that the worker has loaded, unless they are there.

    The service may be reading an earlier worker's files, so files that are equal stay.

    Args:
        home: the service's home.
        model_name: the model's name.
        tokenizer: the tokenizer, of transformers.
        source: the directory or the hub id that it was loaded from.
    """
    directory = _directory(home, model_name)
    temporary = directory.with_name(f".{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    own = _own_directory(source)
    if own is None:
        tokenizer.save_pretrained(temporary)
    else:
        _copy(own, _own_files(own, tokenizer), temporary)
    if directory.exists() and _files(directory) == _files(temporary):
        shutil.rmtree(temporary)
    else:
        shutil.rmtree(directory, ignore_errors=True)
        temporary.replace(directory)
    _write_decoder(_decoder(home, model_name), tokenizer)


def tokenizer_files(home: Path, model_name: str) -> dict[str, bytes]:
    """Return a tokenizer's files by their paths in the model's directory."""
    return _files(_directory(home, model_name))


def decoder_file(home: Path, model_name: str) -> bytes | None:
    """Return the tokenizer as a ``tokenizer.json``, or None if it is not a fast one."""
    try:
        return _decoder(home, model_name).read_bytes()
    except FileNotFoundError:
        return None


def _own_directory(source: str | Path) -> Path | None:
    """Return the directory that a tokenizer was loaded from, or None if the cache lacks it."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(_NAMES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None


def _own_files(directory: Path, tokenizer: Any) -> Iterator[Path]:
    """Yield the tokenizer's files in a model's directory, also those that only its class names."""
    named = getattr(tokenizer, "vocab_files_names", None) or {}
    wanted = {path for pattern in _NAMES for path in directory.glob(pattern)}
    wanted |= {directory / name for name in named.values() if isinstance(name, str)}
    for path in sorted(wanted):
        if path.is_file() and ".index." not in path.name:
            yield path


def _copy(source: Path, files: Iterable[Path], target: Path) -> None:
    target.mkdir(parents=True)
    for path in files:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _write_decoder(path: Path, tokenizer: Any) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        path.unlink(missing_ok=True)
        return
    content = backend.to_str().encode()
    if not path.exists() or path.read_bytes() != content:
        replace_file(path, content)


def _directory(home: Path, model_name: str) -> Path:
    return home / "tokenizers" / hashlib.sha256(model_name.encode()).hexdigest()[:16]


def _decoder(home: Path, model_name: str) -> Path:
    directory = _directory(home, model_name)
    return directory.with_name(f"{directory.name}.json")


def _files(directory: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
