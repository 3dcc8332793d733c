"""Launchers: how a worker is started, ended, and how its end is described."""

from __future__ import annotations

import signal
import socket
from typing import Protocol

from everstep.worker.protocol.heartbeat import HeartbeatPage


class Handle(Protocol):
    """A worker that was launched."""

    @property
    def id(self) -> str:
        """Identifies it in logs: its process id, say."""

    def kill(self) -> None:
        """End it at once, as by SIGKILL. No error if it has ended."""

    async def wait(self) -> int | None:
        """Wait for its end. Returns the exit code, or minus the signal that ended it.

        None: it has ended, and its exit code can't be known.
        """


class Launcher(Protocol):
    """Starts workers that serve a socket."""

    async def launch(self, sock: socket.socket, page: HeartbeatPage) -> Handle:
        """Start a worker.

        Args:
            sock: the worker's end of the socket pair. The caller closes its copy afterwards.
            page: where the worker records its progress. The caller closes its copy when the worker
                has ended.

        Raises:
            OSError: it could not be started.
        """

    async def close(self) -> None:
        """Free the launcher's resources. A launch in progress raises OSError.

        Workers that were launched aren't ended. A second call does nothing.
        """


def killed_from_outside(code: int | None, *, hung: bool, out_of_memory: bool) -> bool:
    """Return whether a worker was killed, and neither for what it did nor for lack of memory."""
    return code in (-signal.SIGKILL, -signal.SIGTERM) and not (hung or out_of_memory)


def describe_end(code: int | None, *, hung: bool, out_of_memory: bool) -> str:
    """Describe how a worker ended, in words that fit behind “the worker”."""
    if hung:
        return "hung: it made no step for too long, and was killed"
    if code is None:
        return "ended"
    if code == -signal.SIGKILL:
        return "ran out of memory and was killed" if out_of_memory else "was killed (SIGKILL)"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"
