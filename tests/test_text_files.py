"""Text files: byte order marks, other encodings, and errors by line."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from everstep.runtime.settings import Settings
from everstep.text_files import TextFileError, decode_text, read_text


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_utf8_is_read_with_and_without_a_byte_order_mark(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(mark + "é\r\n".encode())
    assert read_text(path) == "é\r\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("a".encode("utf-16"), "a.txt: is not UTF-8 text but UTF-16; convert it"),
        (codecs.BOM_UTF16_BE + b"\0a", "a.txt: is not UTF-8 text but UTF-16"),
        ("a".encode("utf-32"), "a.txt: is not UTF-8 text but UTF-32"),
        ("a\nb".encode("utf-16-le"), "a.txt:1: has a NUL byte"),
        (b"one\ntwo\n\0", "a.txt:3: has a NUL byte"),
        (b"one\ncaf\xe9", "a.txt:2: is not UTF-8 text: unexpected end of data at byte 7"),
        (codecs.BOM_UTF8 + b"\n\n\xff", "a.txt:3: is not UTF-8 text: invalid start byte at byte 5"),
    ],
)
def test_other_encodings_are_told_with_file_and_line(data: bytes, says: str) -> None:
    with pytest.raises(TextFileError) as refused:
        decode_text(data, "a.txt")
    assert str(refused.value).startswith(says)


def test_settings_file_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(codecs.BOM_UTF8 + b"max_inflight_samples = 7\r\n")
    assert Settings.load(tmp_path, ()).max_inflight_samples == 7
    path.write_bytes("max_inflight_samples = 7".encode("utf-16"))
    with pytest.raises(ValueError, match=r"settings\.toml: is not UTF-8 text but UTF-16"):
        Settings.load(tmp_path, ())
