"""Nursery: a process that has imported what its children need, and forks them in milliseconds.

Failpoints are armed in each child, from its own environment.

    with Nursery() as nursery:
        child = nursery.start("package.module:function", {"home": "/x"}, environment={...})
        for line in child.lines(): ...
        child.kill()

The function gets ``events``, a file descriptor to report to, and the arguments.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from everstep import failpoints

LOADED = (
    "alembic.command",
    "alembic.ddl.sqlite",
    "alembic.runtime.environment",
    "asyncio",
    "blake3",
    "everstep.testing.workload",
    "pydantic",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "sqlite3",
)
_LARGEST = 1 << 16
_PATIENCE = 30.0


class Child:
    """A child process and its reports.

    Attributes:
        pid: its process id.
        ended: whether it has closed its end of the pipe.
    """

    def __init__(self, nursery: Nursery, pid: int, events: int) -> None:
        self._nursery = nursery
        self._events = events
        self._rest = b""
        self._reaped = False
        self.pid = pid
        self.ended = False

    def lines(self, timeout: float | None = None) -> list[bytes]:
        """Return complete lines. Waits for the first ones, or for the end."""
        if self.ended or not select.select([self._events], [], [], timeout)[0]:
            return []
        data = os.read(self._events, _LARGEST)
        self.ended = not data
        *whole, self._rest = (self._rest + data).split(b"\n")
        return whole

    def kill(self) -> list[bytes]:
        """Send SIGKILL and wait for the end. Return the lines that were still in the pipe."""
        if not self._reaped:
            os.kill(self.pid, signal.SIGKILL)
            self._nursery.reap(self.pid)
            self._reaped = True
        lines = []
        while not self.ended:
            lines += self.lines()
        return lines

    def close(self) -> None:
        """Kill it and forget it."""
        self.kill()
        os.close(self._events)


class Nursery:
    """Where children come from. Ends with the process that made it, and they with it.

    Args:
        loaded: modules that children find imported.
    """

    def __init__(self, loaded: tuple[str, ...] = LOADED) -> None:
        self._loaded = loaded

    def __enter__(self) -> Nursery:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), *self._loaded]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()
        try:
            self._process.wait(_PATIENCE)
        finally:
            self._process.kill()

    def start(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        events: int | None = None,
    ) -> Child:
        """Start a child.

        Args:
            target: ``module:function``.
            arguments: its keyword arguments, as JSON.
            environment: added to its environment, from which its failpoints are armed.
            events: file descriptor for its reports, None for the returned child.
        """
        ours, theirs = os.pipe()
        order = {"target": target, "arguments": arguments, "environment": environment or {}}
        handle = theirs if events is None else events
        try:
            socket.send_fds(self._line, [json.dumps(order).encode()], [handle, theirs])
        finally:
            os.close(theirs)
        return Child(self, int(self._line.recv(_LARGEST)), ours)

    def reap(self, pid: int) -> None:
        """Wait until a child is gone."""
        self._line.send(json.dumps({"reap": pid}).encode())
        if not self._line.recv(_LARGEST):
            raise RuntimeError("the nursery ended")


def _serve(line: socket.socket) -> None:
    while True:
        data, handles, _, _ = socket.recv_fds(line, _LARGEST, 2)
        if not data:
            _end()
        order = json.loads(data)
        if "reap" in order:
            os.waitpid(order["reap"], 0)
            line.send(b"gone")
            continue
        pid = os.fork()
        if pid == 0:
            line.close()
            _live(order, *handles)
        for handle in handles:
            os.close(handle)
        line.send(str(pid).encode())


def _live(order: dict[str, Any], events: int, _lifeline: int) -> None:
    code = 1
    try:
        os.environ.update(order["environment"])
        failpoints.rearm()
        module, _, function = order["target"].partition(":")
        getattr(importlib.import_module(module), function)(events=events, **order["arguments"])
        code = 0
    except Exception:  # noqa: BLE001  a child that dies says so; its parent knows what it means
        traceback.print_exc()
    finally:
        os._exit(code)


def _end() -> None:
    """End with all children."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    os.setpgid(0, 0)
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # pages that children share stay shared
    _serve(socket.socket(fileno=int(sys.argv[1])))
