"""Fixtures: a real service process, shared by the tests that need one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

READY = "everstep: ready at "


class Service:
    """A real service process on a home directory."""

    def __init__(self, home: Path, *models: str) -> None:
        self.home = home
        arguments = [sys.executable, "-m", "everstep.cli", "serve", "--port", "0"]
        arguments += ["--home", str(home)]
        for model in models:
            arguments += ["--model", model]
        self.log = home.parent / f"{home.name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                arguments,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode().strip()
            if text.startswith(READY):
                self.url = text.removeprefix(READY)
                return
        raise RuntimeError(f"the service did not start:\n{self.log.read_text()}")

    def stop(self) -> int:
        """End it as a user would, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process.stdout.close()
        return code

    def kill(self) -> None:
        """End it without warning."""
        self.process.kill()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that don't restart it."""
    running = Service(tmp_path_factory.mktemp("service") / "home")
    yield running
    with contextlib.suppress(ProcessLookupError):
        running.stop()
