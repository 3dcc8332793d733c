"""Archives: a checkpoint's tar, its address and its content."""

from __future__ import annotations

import tarfile
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from everstep.client._transport.errors import DownloadError
from everstep.client._transport.http import body_of
from everstep.durable_files import sync_file

_LIFETIME = timedelta(minutes=15)
"""Assumed lifetime of an address whose expiry the service does not send."""


def archive_url(response: httpx.Response) -> Any:
    """Return the address and its expiry, from a JSON response or a redirect."""
    if "location" not in response.headers:
        return body_of(response)
    try:
        expires = parsedate_to_datetime(response.headers["expires"])
    except (KeyError, ValueError):
        expires = datetime.now(UTC) + _LIFETIME
    return {"url": response.headers["location"], "expires": expires}


def unpack(archive: Path, directory: Path) -> list[Path]:
    """Extract the files of a tar, durably, and return them.

    Args:
        archive: the tar.
        directory: an empty directory.

    Raises:
        DownloadError: the archive is not a tar, or contains anything but files and directories.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not (member.isreg() or member.isdir()):
                    raise DownloadError(
                        f"{archive.name} contains {member.name!r}, which is not a regular file."
                    )
                tar.extract(member, directory, filter="data")
    except tarfile.TarError as error:
        raise DownloadError(f"{archive.name} can't be unpacked: {error}") from error
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    for file in files:
        sync_file(file)
    return files
