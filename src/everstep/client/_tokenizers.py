"""Tokenizers: the service's own files where it offers them, else the hub's."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from everstep.client._errors import APIStatusError, TinkerError
from everstep.client._futures import submit
from everstep.client._http import Http


def load_tokenizer(http: Http, model_name: str, tokenizer_id: str | None = None) -> Any:
    """A model's tokenizer; needs transformers.

    Args:
        http: the service. Its files are right even where the model's name is only its own, and
            where the hub can't be reached.
        model_name: as the service calls it.
        tokenizer_id: on the hub, or a directory; for a service that offers no files.

    Raises:
        TinkerError: transformers isn't installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise TinkerError("get_tokenizer needs `pip install transformers`.") from error
    files = submit(_files(http, model_name)).result()
    if not files:
        return AutoTokenizer.from_pretrained(tokenizer_id or _hub_id(model_name))
    with tempfile.TemporaryDirectory(prefix="everstep-tokenizer-") as directory:
        for name, content in files.items():
            (Path(directory) / Path(name).name).write_bytes(base64.b64decode(content))
        return AutoTokenizer.from_pretrained(directory)


async def _files(http: Http, model_name: str) -> dict[str, str]:
    """The files that the service offers, base64 by name; none where it doesn't know the call."""
    try:
        response = await http.request("GET", f"/tokenizers/{quote(model_name)}")
    except APIStatusError:
        return {}
    files: dict[str, str] = response.json()["files"]
    return files


def _hub_id(model_name: str) -> str:
    """``org/model`` of ``org/model/variant`` and ``model:revision``."""
    return "/".join(model_name.partition(":")[0].split("/")[:2])
