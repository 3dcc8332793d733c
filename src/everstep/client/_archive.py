"""Checkpoints as tars: the address of one, and what is in it."""

from __future__ import annotations

import os
import tarfile
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from everstep.client._errors import DownloadError
from everstep.client._http import body_of

_LIFETIME = timedelta(minutes=15)
"""Of an address, where the service does not say it."""


def archive_url_of(answer: httpx.Response) -> Any:
    """The address and its end, from a service that sends JSON, or from one that redirects."""
    if "location" not in answer.headers:
        return body_of(answer)
    try:
        expires = parsedate_to_datetime(answer.headers["expires"])
    except (KeyError, ValueError):
        expires = datetime.now(UTC) + _LIFETIME
    return {"url": answer.headers["location"], "expires": expires}


def unpack(archive: Path, directory: Path) -> list[Path]:
    """Take the files out of a tar, durably; returns them.

    Args:
        archive: the tar.
        directory: an empty one.

    Raises:
        DownloadError: it is no tar, or it holds something else than files of its own.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not (member.isreg() or member.isdir()):
                    raise DownloadError(f"{archive.name} holds {member.name!r}, which is no file.")
                tar.extract(member, directory, filter="data")
    except tarfile.TarError as error:
        raise DownloadError(f"{archive.name} can't be unpacked: {error}") from error
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return files
