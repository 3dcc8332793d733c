"""S3 server: moto in a separate process, with faults between it and its clients.

``python -m tests.buckets.server`` prints its port and serves until standard input ends. A request
takes effect under one lock, so that conditional puts are as atomic as a real store's.

``POST /-/faults`` sets the fault of coming requests, of one method or of all:

    lost reply    the request takes effect, and the connection is reset
    late          the connection is reset, and the request takes effect at ``POST /-/late``
    reset         the connection is reset, and the request has no effect
    503           the status is 503, and the request has no effect
    503 done      the status is 503, and the request takes effect
    unconditional conditions of a put are ignored, as by some stores
"""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.buckets.bucket import BUCKET

Environ = dict[str, Any]
Start = Callable[..., Any]
_CONTROL = "/-/"


class Faulty:
    """A moto application with faults.

    Attributes:
        seen: number of counted requests since the fault was set.
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
        """Count a request and return its fault, if it has one."""
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
    """Close a connection without a response."""
    connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Log nothing."""


def main() -> None:
    """Serve an empty bucket until standard input ends."""
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(BUCKET, "us-east-1")
    server = make_server("127.0.0.1", 0, Faulty(), threaded=True, request_handler=_Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
