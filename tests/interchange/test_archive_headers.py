"""Adapter archives of strangers: lying headers are named, and nothing is read beyond the file."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from everstep.interchange.archive import MAX_HEADER_BYTES, unpack
from everstep.interchange.errors import InterchangeError, UnreadableFile
from everstep.interchange.peft_config import ADAPTER, ADAPTER_CONFIG

DIGITS = b"9" * 5000


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return one block of a header. A negative size is written as GNU tar does, in base 256."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def pax(record: bytes) -> bytes:
    """Return a pax header with one record, as it is, and the member that it belongs to."""
    padded = record + bytes(-len(record) % tarfile.BLOCKSIZE)
    head = header("pax", len(record), tarfile.XHDTYPE)
    return head + padded + header(ADAPTER_CONFIG, 2) + b"{}".ljust(tarfile.BLOCKSIZE, b"\0")


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


END = bytes(2 * tarfile.BLOCKSIZE)


@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (header(ADAPTER, -300_000_000), "-300000000 as the size"),
        (header("x", -512, tarfile.XHDTYPE), "header of -512 bytes"),
        (header("x", -512, tarfile.GNUTYPE_LONGNAME), "header of -512 bytes"),
        (header("x", MAX_HEADER_BYTES + 1, tarfile.XGLTYPE), "the maximum is"),
        (header(ADAPTER, 1 << 62), "cut off"),
        (header("other", 1 << 62), "cut off"),
        (pax(record(b"size", DIGITS)), "as the size of a file"),
        (pax(record(b"size", b"-1")), "as the size of a file"),
        (pax(record(b"size", "٣".encode())), "as the size of a file"),
        (pax(record(b"size", b"9223372036854775807")), "cut off"),
        (pax(DIGITS + b" size=1\n"), "can't be read"),
        (pax(b"-9 size=1\n"), "can't be read"),
        (pax("٩ size=1\n".encode()), "can't be read"),
        (pax(b"size=1\n"), "can't be read"),
    ],
)
def test_lying_header_is_rejected(archive: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(archive + END)
    (tmp_path / "out").mkdir()
    with pytest.raises(UnreadableFile, match=says):
        unpack(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("key", [b"mtime", b"uid", b"comment"])
def test_other_records_may_be_anything(key: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pax(record(key, DIGITS)) + END)
    (tmp_path / "out").mkdir()
    with pytest.raises(InterchangeError, match=f"holds no {ADAPTER}"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert (tmp_path / "out" / ADAPTER_CONFIG).read_bytes() == b"{}"
