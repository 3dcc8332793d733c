"""Keeper: starts a service again whenever it ends, as a process manager would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.processes import processes_of, worker_of
from tests.scenario import disconnect

GIVE_UP_SECONDS = 120.0


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Keeper:
    """Keeps a service running on one home and one port.

    Args:
        home: its home directory.
        settings: ``name=value`` of the runtime's settings.
        environment: further variables of the n-th start, counted from 0.
        models: ``NAME=PATH`` of each served model.
        log: file for the service's log. None: a file beside the home.
        arguments: further arguments of `everstep serve`.
    """

    def __init__(
        self,
        home: Path,
        *settings: str,
        environment: Callable[[int], Mapping[str, str]] = lambda start: {},
        models: tuple[str, ...] = (),
        log: Path | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.home = home
        self.log = log or home.parent / f"{home.name}.log"
        self.starts = 0
        self.url = f"http://127.0.0.1:{free_port()}"
        self._arguments = [sys.executable, "-m", "everstep.cli", "serve", "--home", str(home)]
        self._arguments += ["--port", self.url.rsplit(":", 1)[1], "--until-stdin-closes"]
        self._arguments += arguments
        for setting in settings:
            self._arguments += ["--set", setting]
        for model in models:
            self._arguments += ["--model", model]
        self._environment = environment
        self._stopping = False
        self._paused = False
        self._changed = threading.Condition()
        self._http = httpx.Client(timeout=5, verify=False, trust_env=False)
        self._process = self._start()
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._thread.start()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The service's process id."""
        return self._process.pid

    @property
    def worker_pid(self) -> int:
        """The worker's process id. Waits until there is a worker."""
        return int(self.wait_until(lambda: worker_of(self.home)))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the service for good. Returns its exit code."""
        with self._changed:
            self._stopping = True
            self._process.send_signal(number)
            self._changed.notify_all()
        self._thread.join(GIVE_UP_SECONDS)
        in_time = not self._thread.is_alive()
        self._process.kill()
        self._thread.join(GIVE_UP_SECONDS)
        self._http.close()
        disconnect(self.url)
        assert in_time, "the service did not end"
        self.wait_until(lambda: not self.left_behind())
        return self._process.returncode

    def left_behind(self) -> list[int]:
        """Return the processes that name the home in their arguments: none may outlive it."""
        return list(processes_of(self.home))

    def kill(self) -> None:
        """SIGKILL the service, and wait until it was started again."""
        with self._changed:
            before = self.starts
            self._process.kill()
            assert self._changed.wait_for(lambda: self.starts > before, GIVE_UP_SECONDS)

    def kill_both(self) -> None:
        """SIGKILL worker and service at once, and wait until they were started again."""
        self.kill_worker()
        self.kill()

    def pause(self) -> None:
        """SIGKILL the service and don't start it again before `resume`."""
        with self._changed:
            self._paused = True
            self._process.kill()
            self._process.wait(GIVE_UP_SECONDS)

    def resume(self) -> None:
        """Start a paused service again."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def kill_worker(self, number: int = signal.SIGKILL) -> None:
        """Send the worker a signal."""
        os.kill(self.worker_pid, number)

    def ready(self) -> bool:
        """Return whether requests will succeed."""
        try:
            return self._http.get(f"{self.url}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def wait_ready(self) -> None:
        """Wait until requests will succeed."""
        self.wait_until(self.ready)

    def wait_until(self, found: Callable[[], Any]) -> Any:
        """Poll for something outside this process. Returns the first true result."""
        until = time.monotonic() + GIVE_UP_SECONDS
        while not (result := found()):
            assert time.monotonic() < until, self.log.read_text()[-5000:]
            time.sleep(0.02)  # another process changes it: there is no event
        return result

    def _start(self) -> subprocess.Popen[bytes]:
        more = self._environment(self.starts)
        self.starts += 1
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._arguments,
                stdin=subprocess.PIPE,  # closed when the tests end: the service ends then
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **more},
            )

    def _keep(self) -> None:
        while True:
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or not self._paused)
                if self._stopping:
                    return
                self._process = self._start()
                self._changed.notify_all()
