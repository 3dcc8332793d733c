"""Fetching one file by an address: gone on with after any interruption, verified, then there.

A file that is not complete lies as ``<name>`` beside ``<name>.tag``, the entity tag of what it is
the beginning of. Only bytes of that are added to it (``Range``, ``If-Range``); where the service
has others by now, or no tag, it is begun again.
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from everstep.client._errors import DownloadError, status_error
from everstep.client._http import RETRIED, body_of

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, how many bytes of it are there, and how many there will be."""
_ATTEMPTS = 8
_FIRST_DELAY = 0.5
_LONGEST_DELAY = 10.0
_EXPIRED = (401, 403, 404, 410)
_BEHIND = 416


class Address:
    """Where a file can be fetched; asked for again when it no longer works.

    Args:
        find: asks the service for it.
    """

    def __init__(self, find: Callable[[], str]) -> None:
        self._find = find
        self._url: str | None = None
        self._is_new = False

    @property
    def url(self) -> str:
        """The address."""
        if self._url is None:
            self._url = self._find()
        return self._url

    def works(self) -> None:
        """Note that something was found there."""
        self._is_new = False

    def renew(self) -> bool:
        """Have it asked for again; returns False where that was done, and did not help."""
        if self._is_new:
            return False
        self._url, self._is_new = None, True
        return True


@dataclass
class _Part:
    """What is there of a file.

    Attributes:
        path: where it lies.
    """

    path: Path

    @property
    def _tag_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.tag")

    @property
    def tag(self) -> str | None:
        """The entity tag of what it is a part of."""
        return self._tag_path.read_text() if self._tag_path.exists() else None

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return self.path.stat().st_size if self.path.exists() else 0

    def begin(self, tag: str | None) -> None:
        """Throw away what is there; what comes is a part of what has this tag."""
        self.path.unlink(missing_ok=True)
        self._tag_path.unlink(missing_ok=True)
        if tag is not None and not tag.startswith("W/"):
            self._tag_path.write_text(tag)

    def finish(self, target: Path) -> None:
        """Put the complete file, durably, where it belongs."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        self.path.replace(target)


class Fetcher:
    """Fetches files without credentials: addresses carry their own.

    Args:
        progress: told how far each file is.
        wait: between attempts, for so many seconds.
    """

    def __init__(
        self, progress: Progress | None = None, wait: Callable[[float], None] = time.sleep
    ) -> None:
        self._progress = progress or (lambda *_: None)
        self._wait = wait
        timeout = httpx.Timeout(60.0, read=300.0, connect=10.0)
        self._client = httpx.Client(timeout=timeout, follow_redirects=True)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def fetch(self, name: str, address: Address, unfinished: Path, target: Path) -> None:
        """Fetch a file; of a complete one that is there it is only asked whether it still is.

        Args:
            name: what it is called in what is told of it.
            address: where it is.
            unfinished: where it lies until it is complete; its tag stays there.
            target: where it belongs.

        Raises:
            DownloadError: it could not be had, or is not what the service says of it.
            APIStatusError: the service refuses it.
        """
        if target.exists():
            target.replace(unfinished)
        part = _Part(unfinished)
        vain = 0
        while True:
            before = part.size
            try:
                if self._receive(name, address, part):
                    part.finish(target)
                    return
                reason = "it was refused again and again, or broken off"
            except httpx.TransportError as error:
                reason = repr(error)
            vain = 0 if part.size > before else vain + 1
            if vain >= _ATTEMPTS:
                raise DownloadError(f"{name} could not be fetched: {reason}. Try again later.")
            delay = min(_FIRST_DELAY * 2.0**vain, _LONGEST_DELAY)
            self._wait(delay * random.uniform(0.75, 1.0))

    def _receive(self, name: str, address: Address, part: _Part) -> bool:
        """One request; returns whether the file is complete."""
        headers = {"Accept-Encoding": "identity"}
        if part.size and (tag := part.tag) is not None:
            headers |= {"Range": f"bytes={part.size}-", "If-Range": tag}
        with self._client.stream("GET", address.url, headers=headers) as answer:
            status = answer.status_code
            if status == _BEHIND and part.size:
                return self._is_all(name, answer, part)
            if status >= 400:
                if (status in _EXPIRED and address.renew()) or status in RETRIED or status >= 500:
                    return False
                answer.read()
                raise status_error(status, body_of(answer))
            address.works()
            if status != 206 or _span(answer)[0] != part.size:
                part.begin(answer.headers.get("etag"))
                if status == 206:
                    return False  # not what was asked for
            total = _span(answer)[1]
            self._progress(name, part.size, total)
            with part.path.open("ab") as file:
                for chunk in answer.iter_raw():  # as it comes: what is cut off keeps all of it
                    file.write(chunk)
                    self._progress(name, file.tell(), total)
            if total is not None and part.size < total:
                return False
            return self._verified(name, part, total, answer)

    def _is_all(self, name: str, answer: httpx.Response, part: _Part) -> bool:
        """Whether what is there is the whole file, of which nothing more is to be had."""
        total = _span(answer)[1]
        if total != part.size:
            part.begin(None)
            return False
        self._progress(name, part.size, total)
        return self._verified(name, part, total, answer)

    def _verified(self, name: str, part: _Part, total: int | None, answer: httpx.Response) -> bool:
        """Whether a file is what the service says of it; one that isn't is thrown away."""
        size, digest = part.size, _sha256_of(answer)
        if total is not None and size != total:
            part.begin(None)
            raise DownloadError(f"{name} has {size} bytes instead of {total}.")
        if digest is not None:
            with part.path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").digest()
            if found != digest:
                part.begin(None)
                raise DownloadError(f"{name} does not hash to what the service says; try again.")
        return True


def _span(answer: httpx.Response) -> tuple[int, int | None]:
    """Where an answer's bytes begin, and how many there are of the whole."""
    found = re.fullmatch(
        r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", answer.headers.get("content-range", "")
    )
    if found is None:
        length = answer.headers.get("content-length")
        return 0, int(length) if length is not None and answer.status_code == 200 else None
    return int(found[1] or 0), None if found[2] == "*" else int(found[2])


def _sha256_of(answer: httpx.Response) -> bytes | None:
    """The SHA-256 of the whole, where the service says it (RFC 9530)."""
    found = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", answer.headers.get("repr-digest", ""))
    return base64.b64decode(found[1]) if found else None
