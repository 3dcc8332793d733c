"""The Hugging Face hub: base models from it, exports to it.

``huggingface_hub`` chooses the hub and the token (``HF_ENDPOINT``, ``HF_TOKEN``,
``hf auth login``). The token is never printed.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from everstep.cli.common.errors import Refused

_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.safetensors", "LICENSE*"]


def base_directory(name: str) -> Path:
    """Return the directory of a base model, downloaded from the hub if it is not in the cache.

    Args:
        name: a directory, or a hub id.

    Raises:
        Refused: it is neither, or the download fails.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve()
    from huggingface_hub import snapshot_download

    failure = (
        f"The base model {name} is not a directory, and can't be downloaded from the hub; name "
        "its directory with --base-model DIR"
    )
    with _translate_errors(failure):
        return Path(snapshot_download(name, allow_patterns=_FILES))


def push(directory: Path, repository: str, *, public: bool, message: str) -> str:
    """Upload a directory in one commit. The repository is created if it does not exist.

    Args:
        directory: the directory.
        repository: ``owner/name``, or ``name`` for the user's own.
        public: whether a new repository is public. An existing one stays as it is.
        message: message of the commit.

    Returns:
        The repository's address.

    Raises:
        Refused: the hub refuses the upload. The text says why.
    """
    from huggingface_hub import HfApi

    again = f"retry the push with: {shlex.join(['hf', 'upload', repository, str(directory)])}"
    with _translate_errors(f"{directory} is complete; {again}. {repository} could not be pushed"):
        hub = HfApi()
        made = hub.create_repo(repository, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=made.repo_id, folder_path=directory, commit_message=message)
        return str(made)


@contextmanager
def _translate_errors(failure: str) -> Iterator[None]:
    """Translate the hub's errors into `Refused`, without the token."""
    from huggingface_hub import get_token

    try:
        yield
    except _hub_errors() as error:
        text = f"{failure}: {error}"
        token = get_token()
        raise Refused(text.replace(token, "<token>") if token else text) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's library raises. The HTTP library below it depends on its release."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    found: list[type[Exception]] = [HfHubHTTPError, HFValidationError, LocalEntryNotFoundError]
    for library in ("httpx", "httpx2"):
        if importlib.util.find_spec(library) is not None:
            found.append(importlib.import_module(library).HTTPError)
    return tuple(found)
