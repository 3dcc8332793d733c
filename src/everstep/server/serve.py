"""Serve: runs the service in the foreground until a signal stops it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from everstep.addresses import bracketed, connectable, http_url
from everstep.runtime import Runtime, Settings
from everstep.runtime.workers.local_process import local_process_pool
from everstep.server.app import create_app
from everstep.server.protocols import http_protocol
from everstep.server.protocols.malformed import MAX_HEAD_BYTES
from everstep.worker.zygote.owner import Zygote

_DRAIN_SECONDS = 5


class PortTaken(OSError):
    """The address is in use."""


class Server(uvicorn.Server):
    """Uvicorn's server with the order in which `run` stops it.

    Args:
        config: the application and its settings.
        stopping: the event to set when a stop begins, so that long polls end before open requests
            are awaited.
        report_stop: called when a stop begins.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        stopping: asyncio.Event,
        report_stop: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._stopping = stopping
        self._report_stop = report_stop
        self._signalled = False

    def once_serving(self, call: Callable[[], None]) -> None:
        """Call a function once the socket is served. The application is ready before that."""

        async def watch() -> None:
            while not (self.started or self.should_exit):  # noqa: ASYNC110  uvicorn has no event
                await asyncio.sleep(0.005)
            if self.started:
                call()

        self._watch = asyncio.get_running_loop().create_task(watch())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop the server. Ctrl-C after another signal stops it without closing the runtime.

        A first Ctrl-C never forces the stop, even while the server is stopping: standard input
        ends just before it, with the process that started this one.
        """
        first, self._signalled = not self._signalled, True
        super().handle_exit(sig, frame)
        if first:
            self.force_exit = False

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the long polls, then the open requests, then the application."""
        self._stopping.set()
        self._report_stop()
        await super().shutdown(sockets)


def run(
    home: Path,
    host: str,
    port: int,
    models: Mapping[str, str],
    ready: Callable[[str], None],
    *,
    settings: Settings | None = None,
    vault_url: str | None = None,
    until: Callable[[], None] | None = None,
    zygote: Zygote | None = None,
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        home: the directory of the service's data.
        host: the address to listen on.
        port: the port to listen on, or 0 for a free one.
        models: the models to serve: name → directory, hub id or ``everstep/pico``.
        ready: called once requests will succeed, with an address that reaches the service.
        settings: limits and intervals.
        vault_url: the bucket of the home's vault. None: its present location.
        until: also stop when this returns. It is called in a thread.
        zygote: a running zygote for this service's workers. None: one is found or started.
        stopping: called once a stop begins, also that of a start that failed.

    Raises:
        PortTaken: another process listens on the port.
        LedgerLocked: another service has the home.
        OperationFailed: a model can't be loaded.
        VaultError: the home can't have that vault.
        StoreFailed: the bucket does not answer, or can't hold a vault.
    """
    listener = listen(host, port)
    address = http_url(connectable(host), listener.getsockname()[1])
    failure: list[BaseException] = []

    async def open_runtime() -> Runtime:
        open_pool = partial(local_process_pool, zygote=zygote)
        return await Runtime.open(home, models, settings or Settings(), vault_url, open_pool)

    def fail(error: BaseException) -> None:
        failure.append(error)
        server.should_exit = True

    app = create_app(open_runtime, lambda: server.once_serving(lambda: ready(address)), fail)
    server = Server(
        uvicorn.Config(
            app,
            http=http_protocol(),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            loop="auto",  # uvloop where it is installed
            ws="none",
            log_config=None,
            access_log=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        ),
        app.state.stopping,
        stopping,
    )
    if until is not None:
        threading.Thread(target=_stop_after, args=(until, server), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _already_handled)
    with listener:
        server.run(sockets=[listener])
    if failure:
        raise failure[0]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket whose connections send small responses at once.

    Args:
        host: an IP address or a name.
        port: 0: a free one.

    Raises:
        PortTaken: another process listens on the port, or the machine has no such address.
    """
    # asyncio disables Nagle's algorithm only on sockets that name their protocol. With it, the body
    # of a response waits up to 40 ms for the acknowledgement of its headers.
    listener = None
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise PortTaken(
            f"Can't listen on {bracketed(host)}:{port}: {error.strerror}. Choose another --port, "
            "or stop the process that uses it."
        ) from error
    listener.listen(2048)
    return listener


def _already_handled(number: int, frame: FrameType | None) -> None:
    """Ignore a signal: uvicorn handles it first and then raises it for the previous handler."""


def stdin_closes() -> None:
    """Wait until standard input ends, as it does when the process that started this one dies."""
    # not `sys.stdin`: Python aborts when it ends while a thread holds the lock of its buffer
    while os.read(sys.stdin.fileno(), 4096):
        pass


def _stop_after(until: Callable[[], None], server: Server) -> None:
    until()
    server.should_exit = True
