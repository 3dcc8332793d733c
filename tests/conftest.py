"""Fixtures: a real service process and a real S3 server, shared by the tests that need one."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.buckets.bucket import Bucket, Server
from tests.scenario import disconnect

# A shell's background jobs ignore Ctrl-C, and so would what the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

READY = "everstep: ready at "
GRACE = 10.0


class Service:
    """A real service process on a home directory."""

    def __init__(self, home: Path, *models: str) -> None:
        self.home = home
        self.url = ""  # known once it is ready
        arguments = [sys.executable, "-m", "everstep.cli", "serve", "--port", "0"]
        arguments += ["--home", str(home), "--until-stdin-closes"]  # it ends with us, however
        for model in models:
            arguments += ["--model", model]
        self.log = home.parent / f"{home.name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        try:
            self.url = self._wait_ready()
        except BaseException:
            self.kill()
            raise

    def _wait_ready(self) -> str:
        for line in self.process.stdout:
            text = line.decode().strip()
            if text.startswith(READY):
                return text.removeprefix(READY)
        raise RuntimeError(f"the service did not start:\n{self.log.read_text()}")

    def stop(self) -> int:
        """End it as a user would, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it without warning."""
        self.process.kill()
        self.process.wait(60)
        disconnect(self.url)
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that don't restart it."""
    running = Service(tmp_path_factory.mktemp("service") / "home")
    yield running
    with contextlib.suppress(ProcessLookupError):
        running.stop()


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Every process that a test starts ends with it; where it doesn't, it is killed and told."""
    before = children()
    yield
    left = {}
    for pid in children() - before:
        with contextlib.suppress(OSError):  # it ended
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"multiprocessing" in command or ends(pid):  # Python's own helpers stay
                continue
            os.kill(pid, signal.SIGKILL)
            left[pid] = command
    assert not left, "processes that the test did not end"


def ends(pid: int) -> bool:
    """Whether a process is about to end: a library may have asked a program for something."""
    watched = os.pidfd_open(pid)
    try:
        return bool(select.select([watched], [], [], GRACE)[0])
    finally:
        os.close(watched)


def children() -> set[int]:
    """The ids of this process's living children."""
    found = set()
    for task in Path("/proc/self/task").glob("*/children"):
        of_task = ""
        with contextlib.suppress(OSError):  # the thread ended
            of_task = task.read_text()
        for child in of_task.split():
            with contextlib.suppress(OSError):  # it ended
                state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX":
                    found.add(int(child))
    return found


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """One S3 server for all tests; the environment of every process has it as the endpoint."""
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server
    server.close()


@pytest.fixture
def bucket(s3_server: Server) -> Iterator[Bucket]:
    """A bucket of the test's own."""
    bucket = Bucket(s3_server)
    yield bucket
    bucket.fault()
