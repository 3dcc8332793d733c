"""Embedded service: the service of a home, shared by the processes that use it.

The first process that needs it starts it, in a process of its own. The others attach to it. It ends
with the last of them, however they end, and evicts its runs. If it is killed or crashes before,
exactly one of them starts it again, on the same port and home, and it resumes its runs: clients
that wait for it only notice a pause. If someone stops it, it stays stopped, and their calls raise
LocalServiceError. `everstep.service_home` says how that is agreed on.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic, sleep

from everstep import service_home
from everstep.backoff import Backoff
from everstep.client._transport.errors import LocalServiceError
from everstep.client._transport.local_port import Port
from everstep.client._transport.progress import Progress
from everstep.client._transport.service_process import exit_reason, is_ready, log_tail
from everstep.service_home import Lock, ServiceRecord

_log = logging.getLogger("everstep.client")
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.25
_STOP_POLL_SECONDS = 0.02
_STABLE_SECONDS = 5.0
"""A service that was ready for this long is restarted without delay."""
_RESTART_BACKOFF = Backoff(initial=0.25, max=10.0)
_MAX_STARTS = 5
"""Consecutive failed starts after which the service is given up."""


class EmbeddedService:
    """This process's share of a home's service, and the thread that starts it again.

    A service that someone runs on the home with ``everstep serve`` is used as it is. It does not
    end with its clients, and is not started again by them.

    Args:
        home: the service's home directory.
        models: ``NAME=PATH_OR_HUB_ID`` of the models to serve. None: everstep/pico, or what the
            running service serves.

    Attributes:
        address: its URL.
        failure: the reason why it was given up. None while it is supervised.
        users: number of clients that hold it.

    Raises:
        LocalServiceError: the service did not start, with the end of its log, or the one that runs
            serves other models.
    """

    def __init__(self, home: Path, models: tuple[str, ...] = ()) -> None:
        self.failure: LocalServiceError | None = None
        self.users = 0
        self._owner = os.getpid()
        self._home = home
        self._models = models
        self._directory = Path.cwd()
        self._environment = dict(os.environ)
        self._port: Port | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._record: ServiceRecord | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._clients = self._lease()
        try:
            self._attach_or_start()
        except BaseException:
            self._release()
            raise
        self._supervisor = threading.Thread(
            target=self._supervise, name="everstep service", daemon=True
        )
        if self._embedded:
            self._supervisor.start()
        else:
            self._clients.close()
        atexit.register(self.close)

    @property
    def address(self) -> str:
        """The service's URL."""
        return "" if self._record is None else self._record.address

    @property
    def pid(self) -> int:
        """Process id of the current service process."""
        return 0 if self._record is None else self._record.process

    @property
    def _embedded(self) -> bool:
        return self._record is not None and self._record.embedded

    def close(self) -> None:
        """Give up this process's share, and wait for the service to stop if it was the last.

        The service evicts its runs, and resumes them at its next start.
        """
        atexit.unregister(self.close)
        if os.getpid() != self._owner:
            return  # a forked child's copy: the parent has the share
        self._closing.set()
        process = self._process
        if process is not None and process.pid != self.pid:
            process.kill()  # it is starting: no run was loaded that could be evicted
        last = self._embedded and self._is_last()
        self._release()
        if last:
            self._await_stop()
        elif process is not None and process.poll() is None:
            _left_running.append(process)
        if self._supervisor.is_alive():
            self._supervisor.join(_STOP_SECONDS)

    def forget(self) -> None:
        """Close the locks in a forked child: the service shall not wait for it."""
        self._clients.close()

    def _lease(self) -> Lock:
        """Take a share of the service, once no service is stopping."""
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            lock = service_home.clients_lock(self._home)
        except OSError as error:
            raise LocalServiceError(f"{self._home} can't be used as a home: {error}") from error
        try:
            with Progress(f"waiting for the service on {self._home} to stop"):
                lock.share()
        except BaseException:
            lock.close()
            raise
        return lock

    def _is_last(self) -> bool:
        """Give up the share. Returns whether the service now has no client."""
        if self._clients.hold(wait=False):
            return True
        return not self._clients.share(wait=False)  # then the service has it: it is stopping

    def _release(self) -> None:
        self._clients.close()
        if self._port is not None:
            self._port.close()

    def _await_stop(self) -> None:
        """Wait for the end of a service without clients, and kill it if it does not end."""
        deadline = monotonic() + _STOP_SECONDS
        path = self._home / "service.run.lock"
        while service_home.is_held(path):
            if monotonic() > deadline:
                _log.warning("the embedded service does not stop; killing process %d", self.pid)
                os.kill(self.pid, signal.SIGKILL)
                break
            sleep(_STOP_POLL_SECONDS)
        if self._process is not None:
            self._process.wait(_STOP_SECONDS)  # its lock is free: it is gone, or about to be

    def _reap(self) -> int | None:
        """Return the exit code of the service if this process started it and it has ended."""
        process = self._process
        code = None if process is None else process.poll()
        return code if process is not None and process.pid == self.pid else None

    def _supervise(self) -> None:
        """Start the service again when it ends, until this share is closed or it can't start."""
        quick_exits = 0
        ready_at = monotonic()
        while not self._closing.wait(_POLL_SECONDS):
            if self._is_unchanged():
                continue
            if service_home.was_stopped(self._home):
                self._give_up(
                    f"The service on {self._home} was stopped ('everstep serve stop', or SIGTERM). "
                    f"All acknowledged work is kept in {self._home}. A new client starts it again."
                )
                return
            stable = monotonic() - ready_at > _STABLE_SECONDS
            quick_exits = 0 if stable else quick_exits + 1
            _log.warning("the embedded service %s; restarting it", self._how_it_ended())
            if not (self._restart(quick_exits) and self._embedded):
                return
            ready_at = monotonic()

    def _how_it_ended(self) -> str:
        process = self._process
        if process is None or process.pid != self.pid:
            return "has ended"  # another process started it
        return exit_reason(process.wait())  # its lock is free: it is gone, or about to be

    def _is_unchanged(self) -> bool:
        found = service_home.running(self._home)
        return found is not None and found.process == self.pid and self._reap() is None

    def _restart(self, quick_exits: int) -> bool:
        """Start the service again, or attach to the one that another client has started.

        Args:
            quick_exits: number of consecutive exits soon after a start.

        Returns:
            False if the share was closed or the service given up.
        """
        last: LocalServiceError | None = None
        for failed in range(_MAX_STARTS):
            if self._closing.wait(_restart_delay(quick_exits + failed)):
                return False
            try:
                self._attach_or_start()
            except LocalServiceError as error:
                last = error
            else:
                return True
        if not self._closing.is_set():
            self._give_up(
                f"The embedded service exited, and {_MAX_STARTS} attempts to restart it failed. "
                f"All acknowledged work is kept in {self._home}. {last}"
            )
        return False

    def _give_up(self, reason: str) -> None:
        self.failure = LocalServiceError(reason)
        _log.error("%s", self.failure)

    def _attach_or_start(self) -> None:
        """Attach to the service that runs, or start it. Others wait meanwhile."""
        with (
            service_home.start_lock(self._home) as starting,
            Progress(f"starting a service on {self._home}"),
        ):
            starting.hold()
            if self._closing.is_set():
                raise LocalServiceError("The client was closed.")
            found = service_home.running_on(self._home)
            if found is None:
                found = self._start(starting)
            self._require(found, self._models)
            self._adopt(found)

    def _adopt(self, record: ServiceRecord) -> None:
        with self._changed:
            if self._record is not None and self._record.address != record.address:
                _moved[self._record.address] = record.address
            self._record = record
            self._changed.notify_all()

    def require(self, models: tuple[str, ...]) -> None:
        """Raise LocalServiceError unless the service has these models and the process's settings.

        Args:
            models: ``NAME=PATH_OR_HUB_ID`` of each.
        """
        if self._record is not None:
            self._require(self._record, models)

    def _require(self, record: ServiceRecord, models: tuple[str, ...]) -> None:
        wrong = [f"model {spec}" for spec in models if not record.serves(spec)]
        wrong += [f"{name}={value}" for name, value in record.other_settings(self._environment)]
        if wrong:
            raise LocalServiceError(
                f"The service that runs on {self._home} does not have {', '.join(wrong)}: it is "
                f"{record.describe()}. Stop it or close its clients, and it is started as you "
                "want it; or use another home: ServiceClient(home=…), EVERSTEP_HOME."
            )

    def _start(self, starting: Lock) -> ServiceRecord:
        """Start a service, hand the start lock over to it, and wait until it is ready."""
        before = self._record
        models, directory, environment = self._models, str(self._directory), self._environment
        if before is not None:  # as it was, whoever started it
            models, directory = before.specs(), before.directory
            environment = {**environment, **before.environment()}
        if self._port is None:
            self._port = Port.like(self.address)
        command = _command(self._home, self._port.number, models, starting.handle)
        path = service_home.begin_log(self._home)
        try:
            with path.open("ab") as log:
                begin = log.tell()
                self._process = process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=directory,
                    env=environment,
                    start_new_session=True,
                    pass_fds=() if starting.handle is None else (starting.handle,),
                )
        except OSError as error:
            raise LocalServiceError(
                f"The embedded service could not be started: {error}"
            ) from error
        with self._changed:
            self._changed.notify_all()
        if is_ready(process) and (found := service_home.running(self._home)) is not None:
            return found
        raise LocalServiceError(
            f"The embedded service {exit_reason(process.wait())} before it became ready. Last "
            f"lines of {path}:\n" + log_tail(path, begin)
        )


def _command(home: Path, port: int, models: tuple[str, ...], starting: int | None) -> list[str]:
    command = [sys.executable, "-P", "-m", "everstep.cli", "serve", "--port", str(port)]
    command += ["--home", str(home), "--until-unused", "--start-lock", str(starting)]
    for model in models:
        command += ["--model", model]
    return command


def _restart_delay(failures: int) -> float:
    """Return the seconds to wait before a start, after a number of consecutive failures."""
    return _RESTART_BACKOFF.delay(failures - 2) if failures > 1 else 0.0


_services: dict[tuple[int, Path], EmbeddedService] = {}
_moved: dict[str, str] = {}
_left_running: list[subprocess.Popen[bytes]] = []
"""Children that serve other processes now. Python complains about those that nobody refers to."""
_lock = threading.Lock()


def _forget_inherited() -> None:
    for service in _services.values():
        service.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_inherited)


def default_home() -> Path:
    """Return ``EVERSTEP_HOME``, or ``~/.everstep``.

    Raises:
        LocalServiceError: this user has no home directory.
    """
    try:
        return Path(os.environ.get("EVERSTEP_HOME") or "~/.everstep").expanduser()
    except RuntimeError as error:
        raise LocalServiceError(
            "The embedded service needs a directory: HOME is not set, and this user has no home "
            "directory. Give home=…, or set EVERSTEP_HOME."
        ) from error


def acquire(home: Path, models: tuple[str, ...]) -> EmbeddedService:
    """Return the process's share of the service on a home, starting the service if there is none.

    Raises:
        LocalServiceError: it did not start, or serves other models.
    """
    key = (os.getpid(), home.resolve())
    with _lock:
        if key not in _services or _services[key].failure is not None:
            _services[key] = EmbeddedService(home.resolve(), models)
        service = _services[key]
        service.require(models)
        service.users += 1
        return service


def release(service: EmbeddedService) -> None:
    """Release a share. The last user to do so gives it up."""
    with _lock:
        service.users -= 1
        if service.users > 0:
            return
        for key, known in list(_services.items()):
            if known is service:
                del _services[key]
        service.close()


def current_address(address: str) -> str:
    """Return the present address of the service that was at an address. It moves if it must."""
    while address in _moved:
        address = _moved[address]
    return address


def failure_at(address: str) -> LocalServiceError | None:
    """Return why the embedded service at an address was given up, or None if it was not."""
    for service in list(_services.values()):
        if service.address == address:
            return service.failure
    return None
