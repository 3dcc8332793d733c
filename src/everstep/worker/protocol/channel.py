"""Channel: framed messages over the socket pair between the service and a worker.

A frame is ``<header length: u32><body length: u64><header: JSON><body: bytes>``, little endian.
The header holds the call's id and the message (see `messages`). JSON and bytes only: reading a
frame can't execute anything, as unpickling could.

Large bodies go into spools on the service's side, a little at a time: joining, copying and freeing
one would hold up its event loop.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from everstep.spool import SPOOLED_BYTES, Data, Spool
from everstep.worker.protocol.codec import decode, encode
from everstep.worker.protocol.messages import Message

_FRAME = struct.Struct("<IQ")
_ID = "id"
_JOINED_BYTES = 64 << 10
_PART_BYTES = 256 << 10
NO_CALL = 0
"""The call id of messages that belong to no call; calls are numbered from 1."""


@dataclass(frozen=True)
class Envelope:
    """A message and the call that it belongs to."""

    call_id: int
    message: Message


def pack(call_id: int, message: Message) -> bytes:
    """Return the frame of a message."""
    return b"".join(_parts(call_id, message))


def _parts(call_id: int, message: Message) -> tuple[bytes, bytes]:
    """Return the frame of a message in two parts. The second is its body."""
    values, body = encode(message)
    header = json.dumps({_ID: call_id, **values}, separators=(",", ":")).encode()
    return _FRAME.pack(len(header), len(body)) + header, body


def _unpack(header: bytes, body: Data) -> Envelope:
    values = json.loads(header)
    return Envelope(values.pop(_ID), decode(values, body))


async def read_envelope(
    reader: asyncio.StreamReader, spool: Callable[[int], Awaitable[Spool]]
) -> Envelope | None:
    """Read one message, or None when the other side is gone.

    Args:
        reader: the socket.
        spool: waits until a large body of some bytes may be held, and returns what takes it.
    """
    body: Data = b""
    try:
        header_size, body_size = _FRAME.unpack(await reader.readexactly(_FRAME.size))
        header = await reader.readexactly(header_size)
        if body_size >= SPOOLED_BYTES:
            body = await spool(body_size)
            await _read_into(body, reader, body_size)
        elif body_size:
            body = await reader.readexactly(body_size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return _unpack(header, body)


async def _read_into(spool: Spool, reader: asyncio.StreamReader, size: int) -> None:
    try:
        while spool.size < size:
            part = await reader.read(min(size - spool.size, _PART_BYTES))
            if not part:
                raise ConnectionResetError("the other side is gone")
            spool.write(part)
    except BaseException:
        spool.close()
        raise


class BlockingChannel:
    """The worker's end: blocking reads in one thread, sends from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._stream = sock.makefile("rb", buffering=1 << 20)
        self._send_lock = threading.Lock()

    def send(self, call_id: int, message: Message) -> None:
        """Send one message. Raises OSError when the other side is gone."""
        head, body = _parts(call_id, message)
        with self._send_lock:
            if len(body) <= _JOINED_BYTES:
                self._sock.sendall(head + body)
            else:
                self._sock.sendall(head)
                self._sock.sendall(body)

    def receive(self) -> Envelope | None:
        """Wait for one message, or None when the other side is gone, for whatever reason.

        Then nothing is left to read: the socket is closed once its owner closes it.
        """
        envelope = None if self._stream.closed else self._read()
        if envelope is None:
            self._stream.close()
        return envelope

    def _read(self) -> Envelope | None:
        try:
            head = self._stream.read(_FRAME.size)
            if len(head) < _FRAME.size:
                return None
            header_size, body_size = _FRAME.unpack(head)
            header = self._stream.read(header_size)
            body = self._stream.read(body_size)
        except OSError:  # a service killed with unread replies resets the connection
            return None
        if len(header) < header_size or len(body) < body_size:
            return None
        return _unpack(header, body)
