"""The pipe between the service and its worker: framed messages over a socket pair.

A frame is ``<header length: u32><body length: u64><header: JSON><body: bytes>``, little endian.
JSON and bytes only: nothing that is read can execute anything, as pickle could.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_FRAME = struct.Struct("<IQ")


@dataclass(frozen=True)
class Message:
    """One message: a small JSON header and, where arrays travel, a body."""

    header: Mapping[str, Any]
    body: bytes = field(default=b"", repr=False)


def pack(message: Message) -> bytes:
    """Return the frame of a message."""
    header = json.dumps(message.header, separators=(",", ":")).encode()
    return _FRAME.pack(len(header), len(message.body)) + header + message.body


async def read_message(reader: asyncio.StreamReader) -> Message | None:
    """Read one message; None when the other side is gone."""
    try:
        header_size, body_size = _FRAME.unpack(await reader.readexactly(_FRAME.size))
        header = json.loads(await reader.readexactly(header_size))
        body = await reader.readexactly(body_size) if body_size else b""
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return Message(header, body)


class BlockingChannel:
    """The worker's end: blocking reads in one thread, sends from any."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._stream = sock.makefile("rb", buffering=1 << 20)
        self._send_lock = threading.Lock()

    def send(self, header: Mapping[str, Any], body: bytes = b"") -> None:
        """Send one message; raises OSError when the other side is gone."""
        frame = pack(Message(header, body))
        with self._send_lock:
            self._sock.sendall(frame)

    def receive(self) -> Message | None:
        """Wait for one message; None when the other side is gone, however it went."""
        try:
            head = self._stream.read(_FRAME.size)
            if len(head) < _FRAME.size:
                return None
            header_size, body_size = _FRAME.unpack(head)
            header = self._stream.read(header_size)
            body = self._stream.read(body_size)
        except OSError:  # killed with something of ours unread, it resets the connection
            return None
        if len(header) < header_size or len(body) < body_size:
            return None
        return Message(json.loads(header), body)
