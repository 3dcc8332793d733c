"""One-process service: a service with its worker in a thread, forked in milliseconds.

SIGKILL ends service and worker at the same instant. Where a promise is about the order of what
reaches the disk and not about processes, that is enough, and a start costs a tenth of a real one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from everstep.testing.nursery import Child, Nursery
from tests.faults.keeper import Keeper

LOADED = (
    "everstep.server",
    "everstep.worker.commands",
    "pytest",
    "tests.runtime.local",
    "transformers.models.llama.modeling_llama",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.auto",
)
"""Modules that are imported before the fork."""


def serve(*, events: int, home: str, port: int, settings: dict[str, Any], log: str) -> None:
    """Serve a home until SIGTERM; the nursery calls this in a child.

    Args:
        events: the pipe whose end reports the child's end.
        home: the service's home directory.
        port: where it listens.
        settings: of the runtime.
        log: a file that output is appended to.
    """
    import torch
    import uvicorn

    from everstep import logs
    from everstep.engine import load_model
    from everstep.engine.models.pico import write_pico
    from everstep.server import create_app
    from tests.runtime.local import Local
    from tests.scenario import MODEL

    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    logs.configure(sys.stderr)
    torch.set_num_threads(1)
    directory = Path(home) / "models" / MODEL
    write_pico(directory)
    local = Local(Path(home), load_model(MODEL, str(directory), device="cpu"), **settings)
    app = create_app(local.open_runtime)
    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False)


class _Process:
    """A nursery's child with the methods of `subprocess.Popen` that a keeper uses.

    Args:
        child: the process.
        lock: held during a call of the nursery.
    """

    def __init__(self, child: Child, lock: threading.Lock) -> None:
        self._child = child
        self._lock = lock
        self._ended = threading.Event()
        self.stdin = Path(os.devnull).open("wb")  # noqa: SIM115  closed by the keeper
        self.pid = child.pid
        self.returncode = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._child.ended:
            self._child.lines()
        with self._lock:
            self._child.close()
            self._ended.set()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit code isn't known."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("service", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        with self._lock:
            if not self._ended.is_set():
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL it."""
        self.send_signal(signal.SIGKILL)


class OneProcessKeeper(Keeper):
    """A keeper whose services are forked, each in one process.

    Args:
        nursery: forks the services. It has imported `LOADED`.
        home: home directory of the services.
        settings: of the runtime.
        environment: more environment of the n-th start, counted from 0.
    """

    def __init__(
        self,
        nursery: Nursery,
        home: Path,
        settings: Mapping[str, Any],
        environment: Callable[[int], Mapping[str, str]],
    ) -> None:
        self._nursery = nursery
        self._settings = dict(settings)
        self._lock = threading.Lock()
        super().__init__(home, environment=environment)

    def kill_worker(self, number: int = signal.SIGKILL) -> None:
        """SIGKILL the service: its worker is a thread of it."""
        self.kill()

    def _start(self) -> Any:
        more = self._environment(self.starts)
        self.starts += 1
        arguments = {
            "home": str(self.home),
            "port": int(self.url.rsplit(":", 1)[1]),
            "settings": self._settings,
            "log": str(self.log),
        }
        with self._lock:
            child = self._nursery.start(f"{__name__}:serve", arguments, environment=more)
        return _Process(child, self._lock)
