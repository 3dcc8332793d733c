"""Running the service in the foreground."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import uvicorn

from everstep.runtime import Runtime, Settings
from everstep.server.app import create_app

_DRAIN_SECONDS = 5


class PortTaken(OSError):
    """The address is in use."""


class Server(uvicorn.Server):
    """Uvicorn's server, as `run` stops it.

    Args:
        config: the application, and how it is served.
        stopping: set as a stop begins, so that long polls end before open requests are waited for.
    """

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping
        self._signalled = False

    def once_serving(self, call: Callable[[], None]) -> None:
        """Call once the socket is taken up: the application is ready before that."""

        async def watch() -> None:
            while not (self.started or self.should_exit):  # noqa: ASYNC110  uvicorn has no event
                await asyncio.sleep(0.005)
            if self.started:
                call()

        self._watch = asyncio.get_running_loop().create_task(watch())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; on Ctrl-C after another signal: without closing the runtime.

        A first Ctrl-C is none too many where the server stops already: with the process that
        started this one, standard input ends just before.
        """
        first, self._signalled = not self._signalled, True
        super().handle_exit(sig, frame)
        if first:
            self.force_exit = False

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the long polls, the open requests, then the application."""
        self._stopping.set()
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
    until_stdin_closes: bool = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        home: everything the service keeps.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        models: what is served: name → directory, hub id or ``everstep/pico``.
        ready: called with the address once requests will succeed.
        settings: limits and intervals.
        vault_url: the bucket that the home's vault lies in; None: where it lay so far.
        until_stdin_closes: stop as well when standard input ends, as it does when the process
            that started this one dies.

    Raises:
        PortTaken: another process listens there.
        LedgerLocked: another service has the home.
        OperationFailed: a model can't be loaded.
        VaultError: the home can't have that vault.
        StoreFailed: the bucket does not answer, or can't hold a vault.
    """
    listener = _listen(host, port)
    address = f"http://{host}:{listener.getsockname()[1]}"
    failure: list[BaseException] = []

    async def open_runtime() -> Runtime:
        return await Runtime.open(home, models, settings or Settings(), vault_url)

    def fail(error: BaseException) -> None:
        failure.append(error)
        server.should_exit = True

    app = create_app(open_runtime, lambda: server.once_serving(lambda: ready(address)), fail)
    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        ),
        app.state.stopping,
    )
    if until_stdin_closes:
        threading.Thread(target=_stop_at_eof, args=(server,), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _already_handled)
    with listener:
        server.run(sockets=[listener])
    if failure:
        raise failure[0]


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise PortTaken(
            f"Can't listen on {host}:{port}: {error.strerror}. Choose another --port, or stop what "
            "uses it."
        ) from error
    listener.listen(2048)
    return listener


def _already_handled(number: int, frame: FrameType | None) -> None:
    """Uvicorn stops on the signal, then raises it again for whoever was there before it."""


def _stop_at_eof(server: Server) -> None:
    # not `sys.stdin`: Python aborts when it ends while a thread holds the lock of its buffer
    while os.read(sys.stdin.fileno(), 4096):
        pass
    server.should_exit = True
