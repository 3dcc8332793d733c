"""The process of a home's service, and the processes that use it, as the system shows them."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shlex
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Self

from everstep import service_home
from everstep.service_home import ServiceRecord

_PROC = Path("/proc")
_POLL_SECONDS = 0.05
_COMMAND_LENGTH = 60


class ServiceProcess:
    """The process of the service on a home, which can't be taken for another with the same id.

    Once a process has ended, its id may become another's. On Linux the process is first opened, and
    then seen to have the home's run lock: what was opened is the service. Elsewhere the lock is
    looked at right before each signal.

    Args:
        home: the home.
        record: the service that `service_home.living` has returned.

    Raises:
        ProcessLookupError: the service has ended.
        PermissionError: it is another user's.
    """

    def __init__(self, home: Path, record: ServiceRecord) -> None:
        self._home = home
        self._record = record
        self._handle = _open(record.process)
        if not self._is_service():
            self.close()
            raise ProcessLookupError(errno.ESRCH, "the service has ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor of the process."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def terminate(self) -> None:
        """Send SIGTERM to the service, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, signal.SIGTERM)
            elif self._is_service():
                os.kill(self._record.process, signal.SIGTERM)

    def wait(self, seconds: float) -> bool:
        """Wait for the service's end. Returns whether it has ended."""
        if self._handle is not None:
            watched = select.poll()
            watched.register(self._handle, select.POLLIN)
            return bool(watched.poll(seconds * 1000))
        deadline = monotonic() + seconds
        while self._is_service():
            if monotonic() >= deadline:
                return False
            sleep(_POLL_SECONDS)
        return True

    def _is_service(self) -> bool:
        found = service_home.living(self._home)
        if found is None or found.process != self._record.process:
            return False
        try:
            return _has_open(found.process, service_home.run_lock_path(self._home))
        except ProcessLookupError:
            return False
        except OSError:
            return True  # not to be seen, as without /proc: the lock and the record say so


def _open(process: int) -> int | None:
    """Open a process, which keeps its id from becoming another's. None where the system can't."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(process)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EINVAL):
            return None
        raise


@dataclass(frozen=True)
class Client:
    """A process that uses an embedded service.

    Attributes:
        process: its process id.
        command: its command line, shortened.
    """

    process: int
    command: str


def clients_of(home: Path, service: int) -> list[Client]:
    """List the processes that use an embedded service, as far as this user may see them.

    Args:
        home: its home.
        service: its own process id. It has the clients' lock open as well.
    """
    path = service_home.clients_lock_path(home)
    return [
        Client(process, _command(process))
        for process in sorted(_processes())
        if process not in (service, os.getpid()) and _uses(process, path)
    ]


def memory_of(process: int) -> int | None:
    """Return the memory of a process and those that it started, in bytes. None if unknown.

    Pages that they share are counted once.
    """
    found = [_resident(each) for each in _with_descendants(process)]
    known = [each for each in found if each is not None]
    return sum(known) if known else None


def _processes() -> Iterator[int]:
    with contextlib.suppress(OSError):
        yield from (int(each.name) for each in _PROC.iterdir() if each.name.isdigit())


def _uses(process: int, path: Path) -> bool:
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        return _has_open(process, path)
    return False


def _has_open(process: int, path: Path) -> bool:
    """Return whether a process has a file open.

    Raises:
        ProcessLookupError: it has ended.
        OSError: the system doesn't show that.
    """
    directory = _PROC / str(process) / "fd"
    try:
        found = list(directory.iterdir())
    except FileNotFoundError as error:
        if not _PROC.joinpath("self", "fd").is_dir():
            raise
        raise ProcessLookupError(errno.ESRCH, "it has ended") from error
    for each in found:
        with contextlib.suppress(OSError):  # it was closed in between
            if each.readlink() == path:
                return True
    return False


def _command(process: int) -> str:
    try:
        words = (_PROC / str(process) / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    line = shlex.join(word.decode(errors="replace") for word in words)
    return line if len(line) <= _COMMAND_LENGTH else line[: _COMMAND_LENGTH - 1] + "…"


def _with_descendants(process: int) -> Iterator[int]:
    yield process
    for tasks in (_PROC / str(process) / "task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread ended
            for child in tasks.read_text().split():
                yield from _with_descendants(int(child))


def _resident(process: int) -> int | None:
    with contextlib.suppress(OSError):
        for line in (_PROC / str(process) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return None
