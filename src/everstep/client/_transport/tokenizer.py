"""Tokenizers: the service's own files if it offers them, otherwise the hub's."""

from __future__ import annotations

import base64
import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from everstep.addresses import exempt_loopback, is_loopback, route
from everstep.client._transport.errors import APIStatusError, TinkerError
from everstep.client._transport.futures import submit
from everstep.client._transport.http import Http
from everstep.conversations import error_words, without_mark


def load_tokenizer(http: Http, model_name: str, tokenizer_id: str | None = None) -> Any:
    """Load a model's tokenizer. Needs transformers.

    Args:
        http: the service. Its files are right even if only the service knows the model's name,
            or the hub can't be reached.
        model_name: the service's name of the model.
        tokenizer_id: hub id or directory, used if the service offers no files.

    Raises:
        TinkerError: transformers isn't installed, or can't load the tokenizer.
    """
    try:
        import transformers  # noqa: F401  it takes seconds
    except ImportError as error:
        raise TinkerError("get_tokenizer needs transformers: pip install transformers") from error
    files = submit(_files(http, model_name)).result()
    if not files:
        if is_loopback(urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname):
            exempt_loopback(os.environ)  # the hub's library asks through the environment's proxies
        return _load(model_name, tokenizer_id or _hub_id(model_name))
    with tempfile.TemporaryDirectory(prefix="everstep-tokenizer-") as directory:
        for name, content in files.items():
            path = _inside(Path(directory), name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
        return _load(model_name, directory)


def _load(model_name: str, source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return without_mark(AutoTokenizer.from_pretrained(source))
    except Exception as error:
        raise TinkerError(
            f"The tokenizer of {model_name} can't be loaded: {error_words(error)}"
        ) from error


def _inside(directory: Path, name: str) -> Path:
    """Return the path of a file in a directory, also for a name that would lead out of it."""
    parts = PurePosixPath(name).parts
    return directory.joinpath(*(part for part in parts if part not in ("/", "..")))


async def _files(http: Http, model_name: str) -> dict[str, str]:
    """Fetch the files that the service offers, base64 by name, or None if it lacks the endpoint."""
    try:
        response = await http.request("GET", route("tokenizers", *model_name.split("/")))
    except APIStatusError:
        return {}
    files: dict[str, str] = response.json()["files"]
    return files


def _hub_id(model_name: str) -> str:
    """Return ``org/model`` of ``org/model/variant`` and ``model:revision``."""
    return "/".join(model_name.partition(":")[0].split("/")[:2])
