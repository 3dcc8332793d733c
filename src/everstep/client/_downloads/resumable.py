"""Resumable downloads: fetch one file by its URL, continue after interruptions, verify it.

An incomplete file ``<name>`` has its entity tag beside it, in ``<name>.tag``. Only bytes of that
entity are appended (``Range``, ``If-Range``). If the entity has changed or has no tag, the download
starts over.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from everstep.addresses import without_proxies
from everstep.backoff import Backoff
from everstep.client._transport.errors import DownloadError, status_error
from everstep.client._transport.http import RETRIED, body_of
from everstep.durable_files import sync_file
from everstep.integers import parse_natural

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes downloaded so far, and the total bytes."""
_MAX_ATTEMPTS = 8
_BACKOFF = Backoff(initial=0.5, max=10.0, jitter=0.25)
_EXPIRED = (401, 403, 404, 410)
_RANGE_NOT_SATISFIABLE = 416


class RenewableUrl:
    """A file's URL, requested again when it stops working.

    Args:
        find: requests it from the service.
    """

    def __init__(self, find: Callable[[], str]) -> None:
        self._find = find
        self._url: str | None = None
        self._is_new = False

    @property
    def url(self) -> str:
        """The URL."""
        if self._url is None:
            self._url = self._find()
        return self._url

    def mark_working(self) -> None:
        """Record that the URL works."""
        self._is_new = False

    def renew(self) -> bool:
        """Discard the URL. Returns False if it was just renewed and has not worked since."""
        if self._is_new:
            return False
        self._url, self._is_new = None, True
        return True


@dataclass
class _PartialFile:
    """An incomplete file.

    Attributes:
        path: of the file.
    """

    path: Path

    @property
    def _tag_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.tag")

    @property
    def tag(self) -> str | None:
        """Entity tag of the file that this is a part of."""
        return self._tag_path.read_text(encoding="utf-8") if self._tag_path.exists() else None

    @property
    def size(self) -> int:
        """Bytes downloaded so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def begin(self, tag: str | None) -> None:
        """Discard the content and start a download of the entity with this tag."""
        self.path.unlink(missing_ok=True)
        self._tag_path.unlink(missing_ok=True)
        if tag is not None and not tag.startswith("W/"):
            self._tag_path.write_text(tag, encoding="utf-8")

    def finish(self, target: Path) -> None:
        """Move the complete file to its place, durably."""
        sync_file(self.path)
        self.path.replace(target)


class Downloader:
    """Downloads files without credentials: their URLs are signed.

    Args:
        progress: called with each file's progress.
        wait: sleeps for a number of seconds between two attempts.
    """

    def __init__(
        self, progress: Progress | None = None, wait: Callable[[float], None] = time.sleep
    ) -> None:
        self._progress = progress or (lambda *_: None)
        self._wait = wait
        timeout = httpx.Timeout(60.0, read=300.0, connect=10.0)
        self._client = httpx.Client(
            timeout=timeout, follow_redirects=True, mounts=without_proxies()
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def fetch(self, name: str, url: RenewableUrl, unfinished: Path, target: Path) -> None:
        """Download a file. For one that is already complete, only check that it is still current.

        Args:
            name: of the file, in errors and progress.
            url: of the file.
            unfinished: path of the incomplete file. Its tag stays beside it.
            target: path of the complete file.

        Raises:
            DownloadError: the download failed, or the file's size or checksum is wrong.
            APIStatusError: the service refuses the download.
        """
        if target.exists():
            target.replace(unfinished)
        part = _PartialFile(unfinished)
        failures = 0
        while True:
            before = part.size
            try:
                if self._receive(name, url, part):
                    part.finish(target)
                    return
                reason = "every request was refused or cut off"
            except httpx.TransportError as error:
                reason = repr(error)
            failures = 0 if part.size > before else failures + 1
            if failures >= _MAX_ATTEMPTS:
                raise DownloadError(f"{name} could not be downloaded: {reason}. Try again later.")
            self._wait(_BACKOFF.delay(failures))

    def _receive(self, name: str, url: RenewableUrl, part: _PartialFile) -> bool:
        """Send one request. Returns whether the file is complete."""
        headers = {"Accept-Encoding": "identity"}
        if part.size and (tag := part.tag) is not None:
            headers |= {"Range": f"bytes={part.size}-", "If-Range": tag}
        with self._client.stream("GET", url.url, headers=headers) as answer:
            status = answer.status_code
            if status == _RANGE_NOT_SATISFIABLE and part.size:
                return self._is_complete(name, answer, part)
            if status >= 400:
                if (status in _EXPIRED and url.renew()) or status in RETRIED or status >= 500:
                    return False
                answer.read()
                raise status_error(status, body_of(answer))
            url.mark_working()
            if status != 206 or _span(answer)[0] != part.size:
                part.begin(answer.headers.get("etag"))
                if status == 206:
                    return False  # another range than the requested one
            total = _span(answer)[1]
            self._progress(name, part.size, total)
            with part.path.open("ab") as file:
                for (
                    chunk
                ) in answer.iter_raw():  # unbuffered: a connection that breaks loses nothing
                    file.write(chunk)
                    self._progress(name, file.tell(), total)
            if total is not None and part.size < total:
                return False
            return self._verified(name, part, total, answer)

    def _is_complete(self, name: str, answer: httpx.Response, part: _PartialFile) -> bool:
        """Return whether the file is complete, when the server has no bytes beyond it."""
        total = _span(answer)[1]
        if total != part.size:
            part.begin(None)
            return False
        self._progress(name, part.size, total)
        return self._verified(name, part, total, answer)

    def _verified(
        self, name: str, part: _PartialFile, total: int | None, answer: httpx.Response
    ) -> bool:
        """Check a file's size and SHA-256. A wrong file is discarded."""
        size, digest = part.size, _sha256_of(answer)
        if total is not None and size != total:
            part.begin(None)
            raise DownloadError(f"{name} has {size} bytes instead of {total}.")
        if digest is not None:
            with part.path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").digest()
            if found != digest:
                part.begin(None)
                raise DownloadError(
                    f"{name} does not match the SHA-256 that the service sent; try again."
                )
        return True


def _span(answer: httpx.Response) -> tuple[int, int | None]:
    """Return the offset of a response's first byte, and the total size."""
    found = re.fullmatch(
        r"bytes (?:([0-9]{1,18})-[0-9]{1,18}|\*)/([0-9]{1,18}|\*)",
        answer.headers.get("content-range", ""),
    )
    if found is None:
        length = answer.headers.get("content-length")
        return 0, parse_natural(length or "") if answer.status_code == 200 else None
    return int(found[1] or 0), None if found[2] == "*" else int(found[2])


def _sha256_of(answer: httpx.Response) -> bytes | None:
    """Return the SHA-256 of the whole file if the response has it (RFC 9530)."""
    found = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", answer.headers.get("repr-digest", ""))
    return base64.b64decode(found[1]) if found else None
