"""The embedded service: a child process for the life of the clients that use it."""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from everstep.client._errors import LocalServiceError

READY = "everstep: ready at "
_LOG_LINES = 15
_STOP_SECONDS = 60.0


class LocalService:
    """One embedded service.

    Args:
        home: where it keeps everything.
        models: ``NAME=PATH_OR_HUB_ID`` of what it serves; none: everstep/pico.

    Raises:
        LocalServiceError: it did not start; the text ends with its log.
    """

    def __init__(self, home: Path, models: tuple[str, ...] = ()) -> None:
        arguments = [sys.executable, "-m", "everstep.cli", "serve", "--port", "0"]
        arguments += ["--home", str(home), "--until-stdin-closes"]
        for model in models:
            arguments += ["--model", model]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the service
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,  # its end tells the service that we are gone
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self.address = self._await_ready()
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        """Process id of the service."""
        return self._process.pid

    def close(self) -> None:
        """Stop the service; it parks its runs and goes on with them at its next start."""
        atexit.unregister(self.close)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _await_ready(self) -> str:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                text = line.decode(errors="replace").strip()
                if text.startswith(READY):
                    return text.removeprefix(READY)
        code = self._process.wait()
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
        self._log.close()
        raise LocalServiceError(
            f"The embedded service ended with exit code {code} before it was ready. It needs "
            "`pip install 'everstep[server]'`. Its last words:\n" + "\n".join(tail)
        )


_services: dict[tuple[int, Path, tuple[str, ...]], LocalService] = {}
_users: dict[tuple[int, Path, tuple[str, ...]], int] = {}
_lock = threading.Lock()


def default_home() -> Path:
    """``EVERSTEP_HOME``, or ``~/.everstep``."""
    return Path(os.environ.get("EVERSTEP_HOME", "~/.everstep")).expanduser()


def acquire(home: Path, models: tuple[str, ...]) -> LocalService:
    """The process's service on a home, started when there is none."""
    key = (os.getpid(), home.resolve(), models)
    with _lock:
        if key not in _services:
            _services[key] = LocalService(home, models)
        _users[key] = _users.get(key, 0) + 1
        return _services[key]


def release(service: LocalService) -> None:
    """Give a service back; the last to do so stops it."""
    with _lock:
        for key, known in list(_services.items()):
            if known is service:
                _users[key] -= 1
                if _users[key] == 0:
                    del _services[key], _users[key]
                    service.close()
