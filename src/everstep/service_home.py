"""The service of a home: who serves there, and which processes use it.

<home>/service.json            the service: its address, process, models and settings
<home>/service.log             the log of a service that runs in the background
<home>/service.log.1           what came before, of a long log
<home>/service.run.lock        held by the service as long as its process lives
<home>/service.start.lock      held while a service starts, until it is ready or has failed
<home>/service.clients.lock    shared by the processes that use a service which ends with them

The locks are the kernel's (``flock``): however a process ends, its locks are released. A service
that clients started waits for the exclusive lock on the clients' file. It gets it when the last
client is gone, and holds it until it has stopped: a new client waits for that, and starts another.
Only the holder of the start lock looks for a service and starts one, so two never start at once.
The process that starts one hands the lock over to it: it is free when the service is ready or
dead, even if that process dies in between.

The record names the holder of the run lock whenever that lock is held (`claim`). A service that
stops in an orderly way removes it; one that was killed, crashed or failed to start leaves it.
Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from everstep.durable_files import replace_file

_RECORD = "service.json"
_LOG = "service.log"
_RUN_LOCK = "service.run.lock"
_START_LOCK = "service.start.lock"
_CLIENTS_LOCK = "service.clients.lock"
_MAX_LOG_BYTES = 16 << 20


@dataclass(frozen=True)
class ServiceRecord:
    """A service, as it describes itself.

    Attributes:
        address: its URL. Empty until it is ready.
        process: its process id. 0 until it holds the run lock.
        embedded: whether clients started it, and it ends with the last of them.
        models: the source of each model, by name.
        settings: all its settings, by name.
        directory: its working directory, to which its models' paths are relative.
        ready: whether it accepts requests, or is starting.
        since: when it became ready, or began to start, in ISO 8601.
        version: its release.
        log: the file that it logs to. Empty: its standard error is something else.
        stopping: whether it has begun to stop.
    """

    address: str
    process: int
    embedded: bool = False
    models: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    directory: str = ""
    ready: bool = True
    since: str = ""
    version: str = ""
    log: str = ""
    stopping: bool = False

    def describe(self) -> str:
        """Say who serves."""
        kind = "which its clients started and which ends with the last of them; " * self.embedded
        models = ", ".join(sorted(self.models)) or "unknown models"
        return f"process {self.process} at {self.address} ({kind}it serves {models})"

    def serves(self, spec: str) -> bool:
        """Return whether it serves a model: ``NAME=PATH_OR_HUB_ID``, or a name."""
        name, equals, source = spec.partition("=")
        return self.models.get(name) == (source if equals else name)

    def specs(self) -> tuple[str, ...]:
        """Return its models as ``NAME=PATH_OR_HUB_ID``."""
        return tuple(f"{name}={source}" for name, source in self.models.items())

    def other_settings(self, environment: Mapping[str, str]) -> list[tuple[str, str]]:
        """List the variables of an environment that ask for other settings than it has."""
        wanted = ((name, environment.get(variable_of(name), "")) for name in self.settings)
        return [
            (variable_of(name), value)
            for name, value in wanted
            if value and not _same(value, self.settings[name])
        ]

    def environment(self) -> dict[str, str]:
        """Return variables that give a service its settings."""
        return {variable_of(k): str(v) for k, v in self.settings.items() if v is not None}


def variable_of(setting: str) -> str:
    """Return the name of the environment variable that gives a setting."""
    return f"EVERSTEP_{setting.upper()}"


def _same(text: str, value: object) -> bool:
    try:
        return float(text) == float(str(value))
    except ValueError:
        return text.strip().casefold() == str(value).casefold()


class Lock:
    """A lock of the kernel's on a file, which is created if needed. It is not held yet.

    Args:
        path: the file.
        handle: an open file that another process has handed over with its lock.

    Raises:
        OSError: the file can't be opened.
    """

    def __init__(self, path: Path, handle: int | None = None) -> None:
        if handle is None:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.set_inheritable(handle, False)
        self.handle: int | None = handle

    def share(self, *, wait: bool = True) -> bool:
        """Hold the lock together with others. Returns False if that would need to wait."""
        import fcntl

        return self._lock(fcntl.LOCK_SH, wait)

    def hold(self, *, wait: bool = True) -> bool:
        """Hold the lock alone. Returns False if that would need to wait."""
        import fcntl

        return self._lock(fcntl.LOCK_EX, wait)

    def unlock(self) -> None:
        """Release the lock, also for the processes that it was handed over to."""
        import fcntl

        if self.handle is not None:
            fcntl.flock(self.handle, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file, which releases the lock unless another process has it as well."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self, kind: int, wait: bool) -> bool:
        import fcntl

        if self.handle is None:
            return False
        try:
            fcntl.flock(self.handle, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def run_lock(home: Path) -> Lock:
    """Open the lock that a service holds as long as its process lives."""
    return Lock(home / _RUN_LOCK)


def start_lock(home: Path, handle: int | None = None) -> Lock:
    """Open the lock that is held while a service starts."""
    return Lock(home / _START_LOCK, handle)


def clients_lock(home: Path) -> Lock:
    """Open the lock that clients share."""
    return Lock(home / _CLIENTS_LOCK)


def claim(home: Path, record: ServiceRecord, lock: Lock) -> None:
    """Take a home for a service that starts: hold its run lock, and record it.

    The record of a service that was killed is replaced before that. Otherwise its process id, which
    may be another process's by now, would look like the holder's.

    Args:
        home: the home. The caller holds its start lock, and no service runs there.
        record: the service.
        lock: the run lock.
    """
    publish(home, replace(record, process=0))
    lock.hold()
    publish(home, record)


def publish(home: Path, record: ServiceRecord) -> None:
    """Record a service that holds the run lock."""
    replace_file(home / _RECORD, json.dumps(asdict(record)).encode())


def withdraw(home: Path) -> None:
    """Remove the record: the service has stopped in an orderly way."""
    (home / _RECORD).unlink(missing_ok=True)


def was_stopped(home: Path) -> bool:
    """Return whether the last service on a home was stopped, rather than killed."""
    record = recorded(home)
    return not (home / _RECORD).exists() if record is None else record.stopping


def recorded(home: Path) -> ServiceRecord | None:
    """Return the last service that was recorded and not withdrawn. It may have been killed."""
    try:
        record = ServiceRecord(**json.loads((home / _RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    sound = isinstance(record.address, str) and isinstance(record.process, int)
    return record if sound and isinstance(record.models, dict) else None


def living(home: Path) -> ServiceRecord | None:
    """Return the service whose process runs on a home, ready or not, or None."""
    # The lock first: a service that takes the home in between has replaced the record by then.
    return recorded(home) if is_held(home / _RUN_LOCK) else None


def running(home: Path) -> ServiceRecord | None:
    """Return the service that runs on a home and is ready, or None."""
    record = living(home)
    return record if record is not None and record.ready else None


def running_on(home: Path) -> ServiceRecord | None:
    """Return the service that runs on a home and is ready. Waits for the end of one that stops.

    Args:
        home: the home. The caller holds its start lock.
    """
    found = running(home)
    if found is None or not found.stopping:
        return found
    with run_lock(home) as lock:
        lock.share()
    return None


def is_starting(home: Path) -> bool:
    """Return whether a service starts on a home, or a client looks for the one that runs."""
    return is_held(home / _START_LOCK)


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock on a file alone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # the home may be read-only
    except OSError:
        return False
    with Lock(path, handle) as lock:
        return not lock.share(wait=False)


def run_lock_path(home: Path) -> Path:
    """Return the file of the run lock, which the service has open."""
    return home / _RUN_LOCK


def clients_lock_path(home: Path) -> Path:
    """Return the file of the clients' lock, which each client of an embedded service has open."""
    return home / _CLIENTS_LOCK


def log_path(home: Path) -> Path:
    """Return the log of services that run in the background."""
    return home / _LOG


def former_log_path(home: Path) -> Path:
    """Return where a long log is put aside."""
    return home / f"{_LOG}.1"


def begin_log(home: Path) -> Path:
    """Return the log for a service that is about to start. A long one is put aside first."""
    path = log_path(home)
    with contextlib.suppress(OSError):
        if path.stat().st_size > _MAX_LOG_BYTES:
            path.replace(former_log_path(home))
    return path


def bound_log(home: Path, max_bytes: int = _MAX_LOG_BYTES) -> None:
    """Put a long log aside while it is written to.

    It is copied and emptied in place: the service and its workers have it open, to append to it.

    Args:
        home: the home.
        max_bytes: the size above which it is long.
    """
    path, former = log_path(home), former_log_path(home)
    with contextlib.suppress(OSError):
        if path.stat().st_size > max_bytes:
            copy = former.with_suffix(".new")
            shutil.copyfile(path, copy)
            copy.replace(former)
            os.truncate(path, 0)


def log_of(home: Path, handle: int) -> str:
    """Return the home's log if an open file is that, otherwise an empty text."""
    path = log_path(home)
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(handle), path.stat()):
            return str(path)
    return ""
