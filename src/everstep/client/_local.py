"""The embedded service: a child process that is kept running for the clients that use it.

When its process ends without having been asked to, it is started again on the same port and home;
it then goes on with its runs, and clients that were waiting for it notice a pause. It ends with
this process, however that ends: its standard input closes.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import monotonic

from everstep.client._errors import LocalServiceError

READY = "everstep: ready at "
_log = logging.getLogger("everstep.client")
_HOST = "127.0.0.1"
_LOG_LINES = 15
_LOG_BYTES = 64 * 1024
_STOP_SECONDS = 60.0
_STEADY_SECONDS = 5.0
"""A service that was ready for so long is started again at once."""
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 10.0
_STARTS = 5
"""So many starts in a row that fail are enough."""


class LocalService:
    """One embedded service, and the thread that starts it again.

    Args:
        home: where it keeps everything.
        models: ``NAME=PATH_OR_HUB_ID`` of what it serves; none: everstep/pico.

    Attributes:
        address: where it is, for as long as it is wanted.
        failure: why it is given up, if it is.
        users: how many clients hold it.

    Raises:
        LocalServiceError: it did not start; the text ends with its log.
    """

    def __init__(self, home: Path, models: tuple[str, ...] = ()) -> None:
        self.address = ""
        self.failure: LocalServiceError | None = None
        self.users = 0
        self._owner = os.getpid()
        self._home = home
        self._directory = Path.cwd()
        self._environment = dict(os.environ)
        self._port = _Port()
        self._command = _command(home, self._port.number, models)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the service
        self._changed = threading.Condition()
        self._closing = self._ready = False
        try:
            self._process = self._start()
            self._await_ready(self._process)
        except BaseException:
            self._port.close()
            self._log.close()
            raise
        self._keeper = threading.Thread(target=self._keep, name="everstep service", daemon=True)
        self._keeper.start()
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        """Process id of the service as it runs now."""
        return self._process.pid

    def close(self) -> None:
        """Stop the service for good; it parks its runs and goes on with them at its next start."""
        atexit.unregister(self.close)
        if os.getpid() != self._owner:
            return  # a forked child's copy: the service is not its own
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if self._ready:
                _close_input(self._process)
            else:
                self._process.kill()  # it has begun nothing that could be parked
        self._keeper.join(_STOP_SECONDS)
        if self._keeper.is_alive():
            self._process.kill()
            self._keeper.join()
        self._port.close()
        self._log.close()

    def _keep(self) -> None:
        """Start the service again, whenever it ends, until it is closed or can't be started."""
        quick = 0
        while True:
            code = self._process.wait()
            _close(self._process)
            if self._closing:
                return
            quick = 0 if monotonic() - self._ready_at > _STEADY_SECONDS else quick + 1
            _log.warning("the embedded service ended (%s); it is started again", _end(code))
            if not self._start_again(quick):
                return

    def _start_again(self, quick: int) -> bool:
        """Whether the service is ready again; False: it is closed, or given up.

        Args:
            quick: how many times in a row it ended soon.
        """
        last: LocalServiceError | None = None
        for failed in range(_STARTS):
            try:
                with self._changed:
                    if self._changed.wait_for(lambda: self._closing, _pause(quick + failed)):
                        return False
                    self._ready = False
                    self._process = self._start()
                    self._changed.notify_all()
                self._await_ready(self._process)
            except LocalServiceError as error:
                last = error
            else:
                return True
        if not self._closing:
            self.failure = LocalServiceError(
                f"The embedded service ended, and {_STARTS} attempts to start it again failed. "
                f"What it had acknowledged is kept in {self._home}. {last}"
            )
            _log.error("%s", self.failure)
        return False

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,  # its end tells the service that we are gone
                stdout=subprocess.PIPE,
                stderr=self._log,
                cwd=self._directory,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            raise LocalServiceError(f"The embedded service can't be started: {error}") from error

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is not None:
            for line in process.stdout:
                text = line.decode(errors="replace").strip()
                if text.startswith(READY):
                    with self._changed:
                        self.address = text.removeprefix(READY)
                        self._ready, self._ready_at = True, monotonic()
                        self._changed.notify_all()
                    return
        code = process.wait()
        _close(process)
        raise LocalServiceError(
            f"The embedded service ended with {_end(code)} before it was ready. It needs "
            "`pip install 'everstep[server]'`. Its last words:\n" + self._last_words()
        )

    def _last_words(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), _LOG_BYTES, max(0, size - _LOG_BYTES))
        return "\n".join(tail.decode(errors="replace").splitlines()[-_LOG_LINES:])


class _Port:
    """A free port that stays ours while nobody listens on it.

    Where the system allows it, a socket keeps it bound beside the service's own: no other process
    is given it in between, nor does a connection to it become one to itself.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((_HOST, 0))
        self.number: int = self._socket.getsockname()[1]
        if sys.platform != "linux":
            self._socket.close()

    def close(self) -> None:
        """Give it back."""
        self._socket.close()


def _command(home: Path, port: int, models: tuple[str, ...]) -> list[str]:
    command = [sys.executable, "-m", "everstep.cli", "serve", "--port", str(port)]
    command += ["--home", str(home), "--until-stdin-closes"]
    for model in models:
        command += ["--model", model]
    return command


def _pause(failures: int) -> float:
    """Seconds before the next start, after so many in a row that did not last: none at first."""
    return min(_FIRST_PAUSE * 2.0 ** (failures - 2), _LONGEST_PAUSE) if failures > 1 else 0.0


def _end(code: int) -> str:
    """How a process ended, in words."""
    return f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"


def _close_input(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()  # nothing was written: nothing to flush, and so no error


def _close(process: subprocess.Popen[bytes]) -> None:
    _close_input(process)
    if process.stdout is not None:
        process.stdout.close()


_services: dict[tuple[int, Path, tuple[str, ...]], LocalService] = {}
_lock = threading.Lock()


def default_home() -> Path:
    """``EVERSTEP_HOME``, or ``~/.everstep``."""
    return Path(os.environ.get("EVERSTEP_HOME", "~/.everstep")).expanduser()


def acquire(home: Path, models: tuple[str, ...]) -> LocalService:
    """The process's service on a home, started when there is none."""
    key = (os.getpid(), home.resolve(), models)
    with _lock:
        if key not in _services or _services[key].failure is not None:
            _services[key] = LocalService(home, models)
        _services[key].users += 1
        return _services[key]


def release(service: LocalService) -> None:
    """Give a service back; the last to do so stops it."""
    with _lock:
        service.users -= 1
        if service.users > 0:
            return
        for key, known in list(_services.items()):
            if known is service:
                del _services[key]
        service.close()


def failure_at(address: str) -> LocalServiceError | None:
    """Why the embedded service at an address is given up; None: it isn't, or there is none."""
    for service in list(_services.values()):
        if service.address == address:
            return service.failure
    return None
