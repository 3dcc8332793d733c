"""A port of this machine that stays reserved while nothing listens on it."""

from __future__ import annotations

import socket
import sys
from typing import Self
from urllib.parse import urlsplit

_HOST = "127.0.0.1"


class Port:
    """A free port, for a service that is started on it again and again.

    On Linux a socket stays bound to the port beside the service's own socket. So the system gives
    the port to no other process between two starts, and a connection to it can't become one to
    itself.

    Args:
        number: the port. 0: any free one.

    Raises:
        OSError: another process uses it.
    """

    def __init__(self, number: int = 0) -> None:
        self._socket = socket.socket()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((_HOST, number))
        except OSError:
            self._socket.close()
            raise
        self.number: int = self._socket.getsockname()[1]
        if sys.platform != "linux":
            self._socket.close()

    @classmethod
    def like(cls, address: str) -> Self:
        """Return the port of an address, or another one if that is taken or there is none."""
        try:
            return cls(urlsplit(address).port or 0)
        except OSError:
            return cls()

    def close(self) -> None:
        """Release the port."""
        self._socket.close()
