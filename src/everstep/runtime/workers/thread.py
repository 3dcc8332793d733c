"""Threads as workers, for tests: the same socket and messages, without a process.

The runtime does not import torch, so the function that serves the socket is an argument.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from everstep.logs import get_logger
from everstep.worker.protocol.heartbeat import HeartbeatPage

_log = get_logger("everstep.worker")
Serve = Callable[[socket.socket, HeartbeatPage], None]
"""Serves a worker's end of the socket pair until the service closes the other end."""


class ThreadLauncher:
    """Starts a thread for every worker. Implements `Launcher`.

    Args:
        serve: called in the thread. An exception counts as exit code 1.

    Attributes:
        handles: the threads that were started, the latest last.
    """

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self.handles: list[ThreadHandle] = []

    async def launch(self, sock: socket.socket, page: HeartbeatPage) -> ThreadHandle:
        """See `Launcher.launch`."""
        handle = ThreadHandle(
            f"thread {len(self.handles) + 1}",
            self._serve,
            sock.dup(),
            HeartbeatPage(os.dup(page.descriptor)),
        )
        self.handles.append(handle)
        return handle

    async def close(self) -> None:
        """See `Launcher.close`."""


class ThreadHandle:
    """A worker's thread. Implements `Handle`.

    A thread can't be killed. `kill` closes its socket and reports the end at once. The thread
    itself ends when it next uses the socket.
    """

    def __init__(self, name: str, serve: Serve, sock: socket.socket, page: HeartbeatPage) -> None:
        self.id = name
        self._serve = serve
        self._sock = sock
        self._page = page
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[int] = self._loop.create_future()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """See `Handle.kill`. Call it on the event loop.

        Args:
            number: the signal that `wait` reports.
        """
        self._finish(-number)
        self._hang_up()

    async def wait(self) -> int:
        """See `Handle.wait`."""
        return await asyncio.shield(self._end)

    def _run(self) -> None:
        code = 1
        try:
            self._serve(self._sock, self._page)
            code = 0
        except Exception:  # noqa: BLE001  as the end of a process: it is reported by its exit code
            _log.exception("a worker's thread failed")
        finally:
            self._hang_up()
            self._sock.close()
            self._page.close()
            with suppress(RuntimeError):  # it was killed, and the event loop is closed
                self._loop.call_soon_threadsafe(self._finish, code)

    def _finish(self, code: int) -> None:
        if not self._end.done():
            self._end.set_result(code)

    def _hang_up(self) -> None:
        with suppress(OSError):  # it is closed
            self._sock.shutdown(socket.SHUT_RDWR)
