"""An address for a service in the test's process, where commands find it as that of its home."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from everstep import service_home
from everstep.service_home import ServiceRecord
from tests.runtime.local import Local

_HOP_BY_HOP = {"connection", "content-length", "host", "transfer-encoding", "content-encoding"}


@contextmanager
def listening(local: Local) -> Iterator[str]:
    """Forward requests from a free port to a service, and yield its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            response = local.http.request(
                self.command,
                f"http://test{self.path}",
                content=self.rfile.read(size),
                headers={k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP},
            )
            self.send_response(response.status_code)
            for name, value in response.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content)

        do_GET = do_POST = do_PUT = do_DELETE = _forward

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        with service_home.run_lock(local.home) as lock:
            lock.hold()
            service_home.publish(local.home, ServiceRecord(address, os.getpid()))
            yield address
            service_home.withdraw(local.home)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
