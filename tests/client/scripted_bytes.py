"""A service that answers with scripted bytes, whatever is asked."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.client.fake_service import GIVE_UP_SECONDS

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSE = None
"""An answer after which the connection is closed."""
Answer = list[bytes | None]


@dataclass
class Peer:
    """The service.

    Attributes:
        answers: parts of the answer to each request. The last is repeated.
        ended: set when a client has closed a connection.
        to_x: the answer to requests for ``/x``, if it differs.
        requests: each request's head, with the number of its connection.
    """

    answers: list[Answer]
    to_x: Answer | None = None
    requests: list[tuple[int, bytes]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    url: str = ""

    @property
    def connections(self) -> list[int]:
        """The number of each request's connection."""
        return [number for number, _ in self.requests]

    def serve(self, listener: socket.socket) -> None:
        """Accept connections until the listener is closed."""
        with suppress(OSError):
            for number in itertools.count():
                accepted, _ = listener.accept()
                threading.Thread(target=self._answer, args=(accepted, number), daemon=True).start()

    def _answer(self, accepted: socket.socket, number: int) -> None:
        with accepted, accepted.makefile("rb") as stream, suppress(OSError):
            while head := _head(stream):
                index = len(self.requests)
                self.requests.append((number, head))
                self.arrived.release()
                answer = self.answers[min(index, len(self.answers) - 1)]
                if self.to_x is not None and b"/x " in head:
                    answer = self.to_x
                for part in answer:
                    if part is CLOSE:
                        return
                    accepted.sendall(part)
            self.ended.set()


def _head(stream: Any) -> bytes:
    lines = list(iter(stream.readline, b"\r\n"))[:50] if stream.peek(1) else []
    head = b"".join(lines)
    for line in lines:
        if line.lower().startswith(b"content-length:"):
            stream.read(int(line.partition(b":")[2]))
    return head


@contextmanager
def peer(*answers: Answer) -> Iterator[Peer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = Peer(list(answers))
        found.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=found.serve, args=(listener,), daemon=True)
        thread.start()
        yield found
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(GIVE_UP_SECONDS)
