"""A service that is started again whenever it ends, as a process manager would do."""

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

from tests.scenario import disconnect

GIVE_UP_SECONDS = 120.0


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Keeper:
    """Keeps a service running on one home and one port.

    Args:
        home: its home directory.
        settings: ``name=value`` of the runtime.
        environment: more environment of the n-th start, counted from 0.
        models: ``NAME=PATH`` of what is served.
        log: what it logs to; None: a file beside the home.
        arguments: more of them.
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
        """The worker's process id; waits until there is one."""
        return int(self.wait_until(self._worker))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and start it no more; returns its exit code."""
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
        """Processes that name the home in their arguments: none may outlive its service."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (process / "cmdline").read_bytes()
            except OSError:
                continue  # it ended
            if f'"{self.home}"'.encode() in arguments:
                found.append(int(process.name))
        return found

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
        """SIGKILL the service, and leave it dead."""
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
        """Whether requests will succeed."""
        try:
            return self._http.get(f"{self.url}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def wait_ready(self) -> None:
        """Wait until requests will succeed."""
        self.wait_until(self.ready)

    def wait_until(self, found: Callable[[], Any]) -> Any:
        """Look again and again for something outside this process; returns what was found."""
        until = time.monotonic() + GIVE_UP_SECONDS
        while not (result := found()):
            assert time.monotonic() < until, self.log.read_text()[-5000:]
            time.sleep(0.02)  # there is nothing to be woken by
        return result

    def _worker(self) -> int | None:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        try:
            found = children.read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # the service ended
            return None
        return int(found[-1]) if found else None

    def _start(self) -> subprocess.Popen[bytes]:
        more = self._environment(self.starts)
        self.starts += 1
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._arguments,
                stdin=subprocess.PIPE,  # its end tells the service that we are gone
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **more},
            )

    def _keep(self) -> None:
        while True:
            self._process.wait()
            self._process.stdin.close()
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or not self._paused)
                if self._stopping:
                    return
                self._process = self._start()
                self._changed.notify_all()
