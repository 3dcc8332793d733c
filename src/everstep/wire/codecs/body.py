"""Body codec: bounded decompression of request bodies.

A truncated body is rejected, never parsed in part: a protobuf message that is cut between two
fields is a valid message with fewer datums.
"""

from __future__ import annotations

import zlib

import zstandard

from everstep.wire.errors import BodyTooLarge, InvalidRequest


def decompress(body: bytes, encoding: str | None, limit: int) -> bytes:
    """Undo a body's Content-Encoding.

    Args:
        body: the bytes as received.
        encoding: ``zstd``, ``gzip``, ``identity`` or None.
        limit: the maximum size of the result in bytes.

    Raises:
        BodyTooLarge: the result would be larger. Not much more than the limit is ever held.
        InvalidRequest: the encoding is unknown, or the bytes are damaged, truncated or followed
            by others.
    """
    name = (encoding or "identity").strip().lower()
    if name == "identity":
        return _bounded(body, limit)
    if name == "zstd":
        return _zstd(body, limit)
    if name in ("gzip", "x-gzip"):
        return _gzip(body, limit)
    raise InvalidRequest(f"Content-Encoding {encoding!r} is not known; use zstd or gzip.")


def head(body: bytes, encoding: str | None, size: int) -> bytes:
    """Return the first decompressed bytes of a body, or none if they can't be decompressed.

    Args:
        body: its bytes as received, or the first of them.
        encoding: as for `decompress`.
        size: the number of bytes to return.
    """
    name = (encoding or "identity").strip().lower()
    try:
        if name == "zstd":
            with zstandard.ZstdDecompressor().stream_reader(body) as reader:
                return reader.read(size)
        if name in ("gzip", "x-gzip"):
            return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(body, size)
    except (zstandard.ZstdError, zlib.error):
        return b""
    return body[:size] if name == "identity" else b""


def too_large(limit: int) -> BodyTooLarge:
    """Return the error for a body over a limit in bytes."""
    return BodyTooLarge(
        f"The request body is larger than {limit} bytes. Send fewer or shorter datums."
    )


def _zstd(body: bytes, limit: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor()
    try:
        size = zstandard.get_frame_parameters(body).content_size
        if size != zstandard.CONTENTSIZE_UNKNOWN:
            if size > limit:
                raise too_large(limit)
            return decompressor.decompress(body, allow_extra_data=False)
        with decompressor.stream_reader(body) as reader:
            out = _bounded(reader.read(limit + 1), limit)
        # The reader returns the data of a truncated frame. Only this shows whether it is complete.
        frame = decompressor.decompressobj()
        frame.decompress(body)
    except zstandard.ZstdError as error:
        raise InvalidRequest(f"The body is not valid zstd: {error}") from error
    return _whole(out, "zstd", ended=frame.eof, rest=frame.unused_data)


def _gzip(body: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        out = _bounded(stream.decompress(body, limit + 1), limit)
    except zlib.error as error:
        raise InvalidRequest(f"The body is not valid gzip: {error}") from error
    return _whole(out, "gzip", ended=stream.eof, rest=stream.unused_data)


def _whole(out: bytes, encoding: str, *, ended: bool, rest: bytes) -> bytes:
    if not ended:
        raise InvalidRequest(f"The body is not valid {encoding}: it ends early. Send it again.")
    if rest:
        raise InvalidRequest(f"The body is not valid {encoding}: {len(rest)} bytes follow its end.")
    return out


def _bounded(out: bytes, limit: int) -> bytes:
    if len(out) > limit:
        raise too_large(limit)
    return out
