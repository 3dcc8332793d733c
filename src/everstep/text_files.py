"""Text files that people write: UTF-8 with or without a byte order mark, errors by line."""

from __future__ import annotations

import codecs
from pathlib import Path

_OTHERS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
BYTE_ORDER_MARK = "\ufeff"


class TextFileError(ValueError):
    """A file is not text in UTF-8. The text names the file, the line and the correction."""


def read_text(path: Path) -> str:
    """Read a text file, without its byte order mark. Line ends are left as they are.

    Raises:
        TextFileError: it is not text in UTF-8.
        OSError: it can't be read.
    """
    return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, name: str) -> str:
    """Decode the content of a text file, without its byte order mark.

    Args:
        data: the content.
        name: the file's name, for error texts.

    Raises:
        TextFileError: it is not text in UTF-8.
    """
    for mark, encoding in _OTHERS:
        if data.startswith(mark):
            raise TextFileError(
                f"{name}: is not UTF-8 text but {encoding}; convert it with "
                f"'iconv -f {encoding} -t UTF-8'"
            )
    if (at := data.find(b"\0")) >= 0:
        raise TextFileError(
            f"{name}:{_line(data, at)}: has a NUL byte; a text file in UTF-8 has none (UTF-16 "
            "without a byte order mark and binary files do)"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Its offset does not count the byte order mark.
        at = error.start + len(data) - len(error.object)
        raise TextFileError(
            f"{name}:{_line(data, at)}: is not UTF-8 text: {error.reason} at byte {at}"
        ) from error


def _line(data: bytes, offset: int) -> int:
    """Return the number of the line that holds a byte, counted from 1."""
    return data.count(b"\n", 0, offset) + 1
