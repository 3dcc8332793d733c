"""Records: the form of a content in a segment file.

    <magic: 8 bytes> <size: u64> <BLAKE3 of the content: 32> <BLAKE2b-128 of these 48 bytes: 16>
    <content>

So a record says by itself whether it is whole, without the row that names it.
"""

from __future__ import annotations

import hashlib
import struct

from blake3 import blake3

from everstep.ledger.payload_log.log import Location, PayloadUnreadable

_MAGIC = b"evpaylg1"
_HEAD = struct.Struct("<8sQ32s")
_CHECK_BYTES = 16
HEADER_BYTES = _HEAD.size + _CHECK_BYTES


def content_digest(content: bytes | memoryview) -> bytes:
    """Hash a content."""
    return blake3(content).digest()


def header(size: int, digest: bytes) -> bytes:
    """Return the header of a record."""
    head = _HEAD.pack(_MAGIC, size, digest)
    return head + _check(head)


def check_record(head: bytes, size: int, digest: bytes, location: Location) -> None:
    """Check a record that was read at a location.

    Args:
        head: its header.
        size: bytes of the content that were there.
        digest: the BLAKE3 of these.
        location: as its row keeps it.

    Raises:
        PayloadUnreadable: it is not the record that the location names, or not whole.
    """
    if len(head) < HEADER_BYTES or size < location.size:
        raise PayloadUnreadable("the segment ends before it")
    values, check = head[: _HEAD.size], head[_HEAD.size :]
    magic, *written = _HEAD.unpack(values)
    if _check(values) != check or magic != _MAGIC:
        raise PayloadUnreadable("no record begins there")
    if written != [location.size, location.digest]:
        raise PayloadUnreadable("another record lies there")
    if digest != location.digest:
        raise PayloadUnreadable("its bytes are not those that were written")


def _check(head: bytes) -> bytes:
    return hashlib.blake2b(head, digest_size=_CHECK_BYTES).digest()
