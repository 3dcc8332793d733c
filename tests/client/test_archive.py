"""Archives of other services: extraction stays inside of its directory."""

from __future__ import annotations

import io
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from everstep.client import DownloadError
from everstep.client._transport.archive import archive_url, unpack


def tar(path: Path, *members: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(
    name: str, size: int = 1, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.size, found.type, found.linkname = size, kind, link
    return found


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_unpack_extracts_files(tmp_path: Path, mode: str) -> None:
    archive = tar(tmp_path / "a.tar", member("a"), member("b/c", 3), mode=mode)
    files = unpack(archive, tmp_path / "out")
    assert [file.relative_to(tmp_path / "out").as_posix() for file in files] == ["a", "b/c"]
    assert files[1].read_bytes() == b"xxx"


@pytest.mark.parametrize(
    "bad",
    [
        member("../evil"),
        member("/tmp/../evil/../../evil"),
        member("link", 0, tarfile.SYMTYPE, "/etc/passwd"),
        member("hard", 0, tarfile.LNKTYPE, "a"),
        member("pipe", 0, tarfile.FIFOTYPE),
        member("device", 0, tarfile.CHRTYPE),
    ],
    ids=lambda each: each.name,
)
def test_unpack_rejects_links_devices_and_outside(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    archive = tar(tmp_path / "a.tar", member("a"), bad)
    with pytest.raises(DownloadError):
        unpack(archive, tmp_path / "out")
    assert not list(tmp_path.parent.rglob("evil"))


@pytest.mark.parametrize("content", [b"", b"no tar", bytes(100)])
def test_unpack_rejects_content_that_is_no_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DownloadError, match=r"a\.tar"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


def test_archive_url_is_read_from_json_or_a_redirect() -> None:
    body = {"url": "http://x", "expires": "2026-01-01T00:00:00Z"}
    assert archive_url(httpx.Response(200, json=body)) == body
    until = "Thu, 01 Jan 2026 00:00:00 GMT"
    moved = httpx.Response(302, headers={"Location": "http://x", "Expires": until})
    assert archive_url(moved) == {"url": "http://x", "expires": datetime(2026, 1, 1, tzinfo=UTC)}
    for headers in ({}, {"Expires": "0"}):
        moved = httpx.Response(302, headers={"Location": "http://x", **headers})
        assert archive_url(moved)["expires"] > datetime.now(UTC)
