"""An object store that speaks S3: moto, in a process of its own, with faults between it and us.

``python -m tests.buckets.server`` prints its port and serves until standard input ends. A request
takes effect under one lock, so that conditional puts are as atomic as a real store's.

``POST /-/faults`` sets what happens to requests, of a method or of all, counted from now:

    lost reply    it takes effect, and the connection is reset
    late          the connection is reset; it takes effect at ``POST /-/late``
    reset         the connection is reset, nothing takes effect
    503           so is answered, and nothing takes effect
    503 done      so is answered, and it takes effect
    unconditional conditions of a put are not looked at, as some stores don't
"""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.buckets.bucket import BUCKET

Environ = dict[str, Any]
Start = Callable[..., Any]
_CONTROL = "/-/"


class Faulty:
    """Moto, with faults.

    Attributes:
        seen: how many requests were counted since the faults were set.
    """

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._fault: dict[str, Any] = {}
        self._late: list[Environ] = []
        self.seen = 0

    def __call__(self, environ: Environ, start: Start) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        if environ["PATH_INFO"].startswith(_CONTROL):
            return self._control(environ, start)
        with self._lock:
            return self._serve(environ, start, self._due(environ["REQUEST_METHOD"]))

    def _due(self, method: str) -> str | None:
        """The fault of a request, if it is its turn."""
        if self._fault.get("method", method) != method:
            return None
        self.seen += 1
        first = self._fault.get("first", 1)
        in_turn = first <= self.seen < first + self._fault.get("count", 1)
        return self._fault.get("fault") if in_turn else None

    def _serve(self, environ: Environ, start: Start, fault: str | None) -> Iterable[bytes]:
        if fault == "unconditional":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        elif fault == "late":
            self._late.append(environ)
        elif fault in ("lost reply", "503 done"):
            self._answer(environ, lambda *_: None)
        if fault in ("lost reply", "late", "reset"):
            reset(environ["werkzeug.socket"])
        if fault in ("503", "503 done"):
            start("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        return self._answer(environ, start)

    def _answer(self, environ: Environ, start: Start) -> list[bytes]:
        return [b"".join(self._moto(environ, start))]

    def _control(self, environ: Environ, start: Start) -> Iterable[bytes]:
        with self._lock:
            answer = {"seen": self.seen}
            if environ["PATH_INFO"] == "/-/late":
                late, self._late = self._late, []
                for each in late:
                    self._answer(each, lambda *_: None)
            elif environ["REQUEST_METHOD"] == "POST":
                self._fault = json.loads(environ["wsgi.input"].read())
                self.seen = 0
        content = json.dumps(answer).encode()
        start("200 OK", [("Content-Length", str(len(content)))])
        return [content]


def reset(connection: socket.socket) -> None:
    """End a connection without an answer."""
    connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Say nothing."""


def main() -> None:
    """Serve an empty bucket until standard input ends."""
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(BUCKET, "us-east-1")
    server = make_server("127.0.0.1", 0, Faulty(), threaded=True, request_handler=_Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
