"""One file, fetched from a server that breaks off, refuses, changes its mind and lies."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.client import DownloadError
from everstep.client._errors import APIStatusError, NotFoundError
from everstep.client._fetching import Address, Fetcher

CONTENT = bytes(range(256)) * 1024


class Files:
    """A server with one file, as honest as it is told to be.

    Attributes:
        cuts: after how many bytes the answers break off, one after the other.
        refusals: statuses of the answers before the first that gives bytes.
        content: of the file; tag and digest follow from it unless they are given.
        seen: the ranges that were asked for.
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
        partial = self.ranges and asked and handler.headers["if-range"] == self.etag
        if partial:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
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


def fetch(url: str, directory: Path, **also: Any) -> bytes:
    """Fetch the file as a caller does who gives up at nothing."""
    fetcher = Fetcher(also.get("progress"), wait=lambda _: None)
    try:
        address = also.get("address") or Address(lambda: url)
        fetcher.fetch("file", address, directory / "part", directory / "file")
    finally:
        fetcher.close()
    assert {path.name for path in directory.iterdir()} <= {"file", "part.tag"}
    return (directory / "file").read_bytes()


def test_a_file_is_fetched_and_told_of(server: tuple[Files, str], tmp_path: Path) -> None:
    files, url = server
    files.digest = hashlib.sha256(CONTENT).digest()
    told: list[tuple[str, int, int | None]] = []
    assert fetch(url, tmp_path, progress=lambda *each: told.append(each)) == CONTENT
    assert (told[0], told[-1]) == (("file", 0, len(CONTENT)), ("file", len(CONTENT), len(CONTENT)))
    assert fetch(url, tmp_path) == CONTENT
    assert files.seen == [None, f"bytes={len(CONTENT)}-"], "what is there is not fetched again"
    files.content = CONTENT[::-1]
    files.digest = hashlib.sha256(files.content).digest()
    assert fetch(url, tmp_path) == CONTENT[::-1], "unless it is something else by now"


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, len(CONTENT)), max_size=6))
def test_however_often_it_breaks_off_the_file_is_whole(
    cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with served() as (files, url):
        files.cuts = list(cuts)
        files.digest = hashlib.sha256(CONTENT).digest()
        assert fetch(url, tmp_path_factory.mktemp("fetch")) == CONTENT
        got = 0
        for asked, cut in zip(files.seen[1:], cuts, strict=False):
            got = min(got + cut, len(CONTENT))
            assert asked == (f"bytes={got}-" if got else None), "it goes on where it was"


def test_without_a_size_the_hash_tells_what_was_cut(
    server: tuple[Files, str], tmp_path: Path
) -> None:
    files, url = server
    files.says_size, files.digest = False, hashlib.sha256(CONTENT).digest()
    files.cuts = [1000]
    with pytest.raises(DownloadError, match="does not hash"):
        fetch(url, tmp_path)
    assert fetch(url, tmp_path) == CONTENT


def test_another_process_goes_on_where_one_was_killed(
    server: tuple[Files, str], tmp_path: Path
) -> None:
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
def test_parts_of_two_files_are_never_put_together(
    server: tuple[Files, str], tmp_path: Path, tag: str | None
) -> None:
    files, url = server
    files.tag, files.cuts = tag, [1000]
    with pytest.raises(KeyboardInterrupt):
        fetch(url, tmp_path, progress=stop_at(1000))
    files.content = CONTENT[::-1]
    assert fetch(url, tmp_path) == CONTENT[::-1]


def test_a_server_without_ranges_is_asked_for_all(
    server: tuple[Files, str], tmp_path: Path
) -> None:
    files, url = server
    files.ranges, files.cuts = False, [1000, 2000]
    assert fetch(url, tmp_path) == CONTENT


def test_what_is_all_there_is_only_verified(server: tuple[Files, str], tmp_path: Path) -> None:
    files, url = server
    files.digest = hashlib.sha256(CONTENT).digest()
    (tmp_path / "part").write_bytes(CONTENT)
    (tmp_path / "part.tag").write_text(str(files.etag))
    assert fetch(url, tmp_path) == CONTENT
    assert files.seen == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_refusals_that_pass_are_waited_for(
    server: tuple[Files, str], tmp_path: Path, status: int
) -> None:
    files, url = server
    files.refusals = [status] * 5
    assert fetch(url, tmp_path) == CONTENT
    files.refusals = [status] * 100
    (tmp_path / "file").unlink()
    with pytest.raises(DownloadError, match="again later"):
        fetch(url, tmp_path)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_an_address_that_expired_is_asked_for_again(
    server: tuple[Files, str], tmp_path: Path, status: int
) -> None:
    files, url = server
    given: list[str] = []
    address = Address(lambda: given.append(url) or url)  # type: ignore[func-returns-value]
    files.refusals = [status]
    assert fetch(url, tmp_path, address=address) == CONTENT
    assert len(given) == 2
    (tmp_path / "file").unlink()
    files.refusals = [status] * 2
    with pytest.raises(APIStatusError) as raised:
        fetch(url, tmp_path, address=address)
    assert (raised.value.status_code, isinstance(raised.value, NotFoundError)) == (
        status,
        status == 404,
    )


def test_a_file_that_is_not_what_the_server_says_is_not_kept(
    server: tuple[Files, str], tmp_path: Path
) -> None:
    files, url = server
    files.digest = hashlib.sha256(b"other").digest()
    with pytest.raises(DownloadError, match="does not hash"):
        fetch(url, tmp_path)
    assert list(tmp_path.iterdir()) == []
    files.digest = hashlib.sha256(CONTENT).digest()
    assert fetch(url, tmp_path) == CONTENT
