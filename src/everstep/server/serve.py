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

    app = create_app(open_runtime, lambda: _when_serving(server, lambda: ready(address)), fail)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
    )
    _end_polls_first(server, app.state.stopping)
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


def _when_serving(server: uvicorn.Server, call: Callable[[], None]) -> None:
    """Call once the server has taken up its socket: the application is ready before that."""

    async def watch() -> None:
        while not (server.started or server.should_exit):  # noqa: ASYNC110  uvicorn has no event
            await asyncio.sleep(0.005)
        if server.started:
            call()

    task = asyncio.get_running_loop().create_task(watch())
    server.__dict__["ready_task"] = task


def _end_polls_first(server: uvicorn.Server, stopping: asyncio.Event) -> None:
    """Let a stop end the long polls before it waits for open requests."""
    shutdown = server.shutdown

    async def stop(sockets: list[socket.socket] | None = None) -> None:
        stopping.set()
        await shutdown(sockets)

    server.shutdown = stop  # type: ignore[method-assign]


def _already_handled(number: int, frame: FrameType | None) -> None:
    """Uvicorn stops on the signal, then raises it again for whoever was there before it."""


def _stop_at_eof(server: uvicorn.Server) -> None:
    # not `sys.stdin`: Python aborts when it ends while a thread holds the lock of its buffer
    while os.read(sys.stdin.fileno(), 4096):
        pass
    server.should_exit = True
