"""The zygote as the processes that use it see it. Standard library only: it is started first."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everstep.worker.zygote import requests
from everstep.worker.zygote.fit import worker_environment

_TITLE_BYTES = 1024
_NO_LISTENER = "-1"
UNFIT = 3
"""The exit code of a zygote that can't fork: an import started a thread or the CUDA driver."""


class Zygote:
    """A zygote that this process owns, or one that it is connected to.

    Args:
        control: the socket that requests go to.
        process: the zygote's process, where this one started it.
    """

    def __init__(
        self, control: socket.socket, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.control = control
        self._process = process
        self._pid = None if process is None else process.pid

    @classmethod
    def start(cls, label: str = "", listener: socket.socket | None = None) -> Zygote:
        """Start a zygote. Returns while it is still importing. Requests wait until it is done.

        The kernel kills it when the thread that calls this ends.

        Args:
            label: shown in the process list, to tell zygotes apart.
            listener: a listening Unix socket, where other processes may connect.
        """
        ours, theirs = socket.socketpair()
        passed = [theirs.fileno()] + ([] if listener is None else [listener.fileno()])
        with theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "everstep.worker.zygote", str(theirs.fileno())),
                    _NO_LISTENER if listener is None else str(listener.fileno()),
                    *(str(os.getpid()), label, " " * _TITLE_BYTES),
                ],
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                # One that is shared must not find a terminal: its workers log to their services.
                stdout=None if listener is None else subprocess.DEVNULL,
                env=worker_environment(),
                start_new_session=True,
            )
        return cls(ours, process)

    @classmethod
    def connect(cls, path: Path) -> Zygote:
        """Connect to a zygote that another process owns. Raises OSError where there is none."""
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            control.connect(str(path))
        except OSError:
            control.close()
            raise
        return cls(control)

    @property
    def pid(self) -> int:
        """Its process id. Waits until it is known.

        Raises:
            OSError: the zygote is gone.
        """
        if self._pid is None:
            line = b""
            while not line.endswith(b"\n"):
                piece = self.control.recv(1)
                if not piece:
                    raise ConnectionResetError("the zygote is gone")
                line += piece
            self._pid = int(json.loads(line)["pid"])
        return self._pid

    @property
    def alive(self) -> bool:
        """Whether it can take requests, now or when it has imported all it imports."""
        if self._process is not None:
            return self._process.poll() is None
        watch = select.poll()
        watch.register(self.control, select.POLLHUP)
        return not watch.poll(0)

    def fork(self, arguments: Mapping[str, Any], channel: int, page: int) -> socket.socket:
        """Request a worker. Returns its status socket, see `requests`.

        Args:
            arguments: of `everstep.worker.main.serve`.
            channel: the descriptor of the worker's end of the channel.
            page: the descriptor of the heartbeat page.

        Raises:
            OSError: the zygote is gone.
        """
        umask = os.umask(0o077)
        os.umask(umask)
        request = requests.Request(arguments, worker_environment(), str(Path.cwd()), umask)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptors = requests.Descriptors(channel, page, 1, 2, theirs.fileno())
            try:
                requests.send(self.control, request, descriptors)
            except OSError:
                ours.close()
                raise
        return ours

    def close(self) -> int | None:
        """End the zygote if this process owns it, else disconnect. Its workers go on.

        Returns:
            The exit code of a zygote of our own: minus SIGKILL unless it had ended before.
        """
        self.control.close()
        if self._process is None:
            return None
        self._process.kill()
        return self._process.wait()
