"""Stored requests: large requests that a worker reads where the service keeps them.

A command names the part of a file of the home instead of holding the request. A worker that can't
read it says so, and the service sends the bytes: one on another machine doesn't see the home.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from everstep.worker.protocol.errors import RequestUnreadable

_CHUNK_BYTES = 1 << 30
"""Of one system call: Linux transfers no more than 2 GiB at a time."""


class StoredRequest(NamedTuple):
    """The part of a file that holds a request.

    Attributes:
        path: the file, relative to the home.
        offset: where the request begins.
        size: its bytes.
        digest: its BLAKE3, in hexadecimal.
    """

    path: str
    offset: int
    size: int
    digest: str


def read_request(home: Path, body: bytes, stored: StoredRequest | None) -> bytes:
    """Return the request of a command, verified where it is stored.

    It is read, not mapped: the decoders copy a mapping, and a bad sector under it would end the
    process instead of raising an error.

    Args:
        home: of the service.
        body: the request, where the command holds it.
        stored: where it lies, or None where the command holds it.

    Raises:
        RequestUnreadable: it is missing, can't be read, or is not what was written.
    """
    if stored is None:
        return body
    path = home / stored.path
    try:
        request = _read(path, stored)
    except OSError as error:
        raise RequestUnreadable(f"{path} can't be read: {error}") from error
    if blake3(request).hexdigest() != stored.digest:
        raise RequestUnreadable(f"{path}, offset {stored.offset}: it is not what was written")
    return request


def _read(path: Path, stored: StoredRequest) -> bytes:
    parts, at = [], stored.offset
    end = stored.offset + stored.size
    with path.open("rb", buffering=0) as file:
        while at < end and (part := os.pread(file.fileno(), min(end - at, _CHUNK_BYTES), at)):
            parts.append(part)
            at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
