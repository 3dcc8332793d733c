"""Request bodies: decompression with a bound."""

from __future__ import annotations

import zlib

import zstandard

from everstep.wire.errors import BodyTooLarge, InvalidRequest


def decompress(body: bytes, encoding: str | None, limit: int) -> bytes:
    """Undo a body's Content-Encoding.

    Args:
        body: the bytes that came.
        encoding: ``zstd``, ``gzip``, ``identity`` or None.
        limit: most bytes that may come out.

    Raises:
        BodyTooLarge: more would come out; nothing beyond the limit is produced.
        InvalidRequest: the encoding is unknown, or the bytes are damaged.
    """
    if encoding in (None, "", "identity"):
        out = body
    elif encoding == "zstd":
        out = _zstd(body, limit)
    elif encoding == "gzip":
        out = _gzip(body, limit)
    else:
        raise InvalidRequest(f"Content-Encoding {encoding!r} is not known; use zstd or gzip.")
    if len(out) > limit:
        raise BodyTooLarge(
            f"The request body is larger than {limit} bytes. Send fewer or shorter datums."
        )
    return out


def _zstd(body: bytes, limit: int) -> bytes:
    try:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            return reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise InvalidRequest(f"The body is not valid zstd: {error}") from error


def _gzip(body: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        return stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequest(f"The body is not valid gzip: {error}") from error
