"""Resumable downloads from a server that cuts connections, refuses, changes the file and lies."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.client import DownloadError
from everstep.client._downloads.resumable import Downloader, Progress, RenewableUrl
from everstep.client._transport.errors import APIStatusError, NotFoundError
from tests.profiles import example_count

CONTENT = bytes(range(256)) * 1024


class Files:
    """A server with one file and scripted misbehaviour.

    Attributes:
        content: of the file. Tag and digest follow from it unless they are given.
        cuts: numbers of bytes after which the responses are cut, one after the other.
        refusals: statuses of the responses before the first that sends bytes.
        seen: the ranges that were requested.
    """

    def __init__(self) -> None:
        self.content = CONTENT
        self.cuts: list[int] = []
        self.refusals: list[int] = []
        self.tag: str | None = ""
        self.digest: bytes | None = None
        self.says_size = True
        self.ranges = True
        self.seen: list[str | None] = []

    @property
    def etag(self) -> str | None:
        return f'"{hashlib.md5(self.content).hexdigest()}"' if self.tag == "" else self.tag

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers["range"]
        self.seen.append(asked)
        if self.refusals:
            handler.send_response(self.refusals.pop(0))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start, size = 0, len(self.content)
        found = re.fullmatch(r"bytes=(\d+)-", asked or "")
        partial = self.ranges and found and handler.headers["if-range"] == self.etag
        if partial and found:
            start = int(found[1])
        handler.send_response(200 if not partial else 206 if start < size else 416)
        if partial:
            span = f"{start}-{size - 1}" if start < size else "*"
            handler.send_header("Content-Range", f"bytes {span}/{size}")
        self._send(handler, self.content[start:])

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        if self.etag is not None:
            handler.send_header("ETag", self.etag)
        if self.digest is not None:
            digest = base64.b64encode(self.digest).decode()
            handler.send_header("Repr-Digest", f"md5=:AA==:, sha-256=:{digest}:")
        if self.says_size:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        cut = self.cuts.pop(0) if self.cuts else len(body)
        handler.wfile.write(body[:cut])
        handler.close_connection = True


@contextmanager
def served() -> Iterator[tuple[Files, str]]:
    files = Files()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield files, f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[tuple[Files, str]]:
    with served() as both:
        yield both


def fetch(
    url: str,
    directory: Path,
    progress: Progress | None = None,
    renewable: RenewableUrl | None = None,
) -> bytes:
    """Download the file without waiting between attempts."""
    downloader = Downloader(progress, wait=lambda _: None)
    try:
        source = renewable or RenewableUrl(lambda: url)
        downloader.fetch("file", source, directory / "part", directory / "file")
    finally:
        downloader.close()
    assert {path.name for path in directory.iterdir()} <= {"file", "part.tag"}
    return (directory / "file").read_bytes()


def test_download_reports_progress_and_is_kept_while_current(
    server: tuple[Files, str], tmp_path: Path
) -> None:
    files, url = server
    files.digest = hashlib.sha256(CONTENT).digest()
    reported: list[tuple[str, int, int | None]] = []
    assert fetch(url, tmp_path, progress=lambda *each: reported.append(each)) == CONTENT
    assert (reported[0], reported[-1]) == (
        ("file", 0, len(CONTENT)),
        ("file", len(CONTENT), len(CONTENT)),
    )
    assert fetch(url, tmp_path) == CONTENT
    assert files.seen == [None, f"bytes={len(CONTENT)}-"], "a current file is not downloaded again"
    files.content = CONTENT[::-1]
    files.digest = hashlib.sha256(files.content).digest()
    assert fetch(url, tmp_path) == CONTENT[::-1], "a changed file is"


@example_count(25)
@given(cuts=st.lists(st.integers(0, len(CONTENT)), max_size=6))
def test_download_survives_any_number_of_cuts(
    cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with served() as (files, url):
        files.cuts = list(cuts)
        files.digest = hashlib.sha256(CONTENT).digest()
        assert fetch(url, tmp_path_factory.mktemp("fetch")) == CONTENT
        got = 0
        for asked, cut in zip(files.seen[1:], cuts, strict=False):
            got = min(got + cut, len(CONTENT))
            assert asked == (f"bytes={got}-" if got else None), "it continues where it was cut"


def test_checksum_detects_a_cut_without_a_size(server: tuple[Files, str], tmp_path: Path) -> None:
    files, url = server
    files.says_size, files.digest = False, hashlib.sha256(CONTENT).digest()
    files.cuts = [1000]
    with pytest.raises(DownloadError, match="does not match the SHA-256"):
        fetch(url, tmp_path)
    assert fetch(url, tmp_path) == CONTENT


def test_download_resumes_after_an_interruption(server: tuple[Files, str], tmp_path: Path) -> None:
    files, url = server
    files.cuts, files.refusals = [1000], []
    with pytest.raises(KeyboardInterrupt):
        fetch(url, tmp_path, progress=stop_at(1000))
    assert fetch(url, tmp_path) == CONTENT
    assert files.seen[-1] == "bytes=1000-"


def stop_at(size: int) -> Any:
    def progress(name: str, there: int, total: int | None) -> None:
        if there >= size:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("tag", ["", None, 'W/"weak"'], ids=["tag", "no tag", "weak tag"])
def test_parts_of_two_entities_are_never_joined(
    server: tuple[Files, str], tmp_path: Path, tag: str | None
) -> None:
    files, url = server
    files.tag, files.cuts = tag, [1000]
    with pytest.raises(KeyboardInterrupt):
        fetch(url, tmp_path, progress=stop_at(1000))
    files.content = CONTENT[::-1]
    assert fetch(url, tmp_path) == CONTENT[::-1]


def test_server_without_ranges_gets_full_requests(
    server: tuple[Files, str], tmp_path: Path
) -> None:
    files, url = server
    files.ranges, files.cuts = False, [1000, 2000]
    assert fetch(url, tmp_path) == CONTENT


def test_complete_file_is_only_verified(server: tuple[Files, str], tmp_path: Path) -> None:
    files, url = server
    files.digest = hashlib.sha256(CONTENT).digest()
    (tmp_path / "part").write_bytes(CONTENT)
    (tmp_path / "part.tag").write_text(str(files.etag))
    assert fetch(url, tmp_path) == CONTENT
    assert files.seen == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_transient_errors_are_retried(
    server: tuple[Files, str], tmp_path: Path, status: int
) -> None:
    files, url = server
    files.refusals = [status] * 5
    assert fetch(url, tmp_path) == CONTENT
    files.refusals = [status] * 100
    (tmp_path / "file").unlink()
    with pytest.raises(DownloadError, match="Try again later"):
        fetch(url, tmp_path)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_expired_url_is_renewed_once(
    server: tuple[Files, str], tmp_path: Path, status: int
) -> None:
    files, url = server
    given: list[str] = []

    def find() -> str:
        given.append(url)
        return url

    renewable = RenewableUrl(find)
    files.refusals = [status]
    assert fetch(url, tmp_path, renewable=renewable) == CONTENT
    assert len(given) == 2
    (tmp_path / "file").unlink()
    files.refusals = [status] * 2
    with pytest.raises(APIStatusError) as raised:
        fetch(url, tmp_path, renewable=renewable)
    assert (raised.value.status_code, isinstance(raised.value, NotFoundError)) == (
        status,
        status == 404,
    )


def test_file_with_a_wrong_checksum_is_discarded(server: tuple[Files, str], tmp_path: Path) -> None:
    files, url = server
    files.digest = hashlib.sha256(b"other").digest()
    with pytest.raises(DownloadError, match="does not match the SHA-256"):
        fetch(url, tmp_path)
    assert list(tmp_path.iterdir()) == []
    files.digest = hashlib.sha256(CONTENT).digest()
    assert fetch(url, tmp_path) == CONTENT
