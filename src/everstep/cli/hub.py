"""The Hugging Face hub: base models from it, exports to it.

Which hub, and with which token, is up to ``huggingface_hub`` (``HF_ENDPOINT``, ``HF_TOKEN``,
``hf auth login``). The token is never printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from everstep.cli.errors import Refused

_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.safetensors", "LICENSE*"]


def base_directory(name: str) -> Path:
    """The files of a base model: in a directory, or of the hub, from its cache if they are there.

    Args:
        name: a directory, or a hub id.

    Raises:
        Refused: it is neither, or can't be fetched.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve()
    from huggingface_hub import snapshot_download

    what = (
        f"The base model {name} is no directory here, and can't be had from the hub; say where it "
        "is with --base-model DIR"
    )
    with _told(what):
        return Path(snapshot_download(name, allow_patterns=_FILES))


def push(directory: Path, repository: str, *, public: bool, message: str) -> str:
    """Upload a directory in one commit, into a repository that is made if need be.

    Args:
        directory: what is uploaded.
        repository: ``owner/name``, or ``name`` for one's own.
        public: whether a repository that is made is public; one that exists stays as it is.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        Refused: the hub doesn't take it; the text says why.
    """
    from huggingface_hub import HfApi

    again = f"push it with 'hf upload {repository} {directory}' when it can be"
    with _told(f"{directory} is whole; {again}. {repository} could not be pushed"):
        hub = HfApi()
        made = hub.create_repo(repository, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=made.repo_id, folder_path=directory, commit_message=message)
        return str(made)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn the hub's errors into ours."""
    import httpx
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError) as error:
        text = f"{what}: {error}"
        token = get_token()
        raise Refused(text.replace(token, "<token>") if token else text) from error
