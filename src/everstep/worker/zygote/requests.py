"""Requests to a zygote: a JSON document with the descriptors of the worker that is to be forked.

A request is ``<length: u32><JSON>`` on a stream socket. The descriptors travel with its first
bytes. The zygote answers on the request's own status socket (``SOCK_SEQPACKET``): first
``{"pid": …}`` together with a pidfd, or ``{"error": …}``. Then, when the worker has ended,
``{"code": …}``. The end of the status socket without a code means that the zygote is gone.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_LENGTH = struct.Struct("<I")
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Request:
    """The settings of a worker that is to be forked.

    Attributes:
        arguments: of `everstep.worker.main.serve`.
        environment: its environment variables.
        directory: its working directory.
        umask: its file mode creation mask.
    """

    arguments: Mapping[str, Any]
    environment: Mapping[str, str]
    directory: str
    umask: int


@dataclass(frozen=True)
class Descriptors:
    """The descriptors of a request, in the order in which they are sent."""

    channel: int
    page: int
    stdout: int
    stderr: int
    status: int

    def close(self) -> None:
        """Close all of them."""
        for descriptor in asdict(self).values():
            os.close(descriptor)


def send(control: socket.socket, request: Request, descriptors: Descriptors) -> None:
    """Send a request. Raises OSError when the zygote is gone."""
    content = json.dumps(asdict(request)).encode(errors="surrogateescape")
    head = _LENGTH.pack(len(content))
    socket.send_fds(control, [head], list(asdict(descriptors).values()))
    control.sendall(content)


def receive(control: socket.socket) -> tuple[Request, Descriptors] | None:
    """Wait for a request, or None when the other side is gone.

    Raises:
        ValueError: it is no request.
    """
    head, descriptors, _, _ = socket.recv_fds(
        control, _LENGTH.size, len(Descriptors.__annotations__)
    )
    if not head:
        return None
    try:
        (length,) = _LENGTH.unpack(head)
        if length > _MAX_BYTES:
            raise ValueError(f"a request of {length} bytes")
        content = bytearray()
        while len(content) < length:
            piece = control.recv(length - len(content))
            if not piece:
                raise ValueError("a request that was cut off")
            content += piece
        request = Request(**json.loads(bytes(content)))
        return request, Descriptors(*descriptors)
    except (OSError, struct.error, TypeError, ValueError) as error:
        for descriptor in descriptors:
            os.close(descriptor)
        raise ValueError(str(error)) from error
