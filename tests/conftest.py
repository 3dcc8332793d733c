"""Fixtures: a real service process and a real S3 server, shared by the tests that need one."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from everstep.worker.zygote import shared
from tests import budget, devices, helpers, profiles, scratch
from tests.buckets.bucket import Bucket, Server
from tests.scenario import disconnect

# A shell's background jobs ignore Ctrl-C; processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["profiles"]  # imported for its effect: Hypothesis's settings

READY = "everstep: ready at "
GRACE = 10.0
KEPT = (b"multiprocessing", b"everstep.server.offload")
"""Processes that outlive a test: Python's own helpers, and that of a module's service."""


def pytest_configure(config: pytest.Config) -> None:
    """Register the time budget, and choose the place of temporary directories."""
    budget.register(config)
    scratch.choose(config)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    devices.skip_without_cuda(item)


class Service:
    """A real service process on a home directory.

    Args:
        home: the directory.
        models: ``NAME=PATH`` of each served model.
        device: that it computes on. None: as it chooses.
    """

    def __init__(self, home: Path, *models: str, device: str | None = None) -> None:
        self.home = home
        self.url = ""  # set once it is ready
        arguments = [sys.executable, "-m", "everstep.cli", "serve", "--port", "0"]
        arguments += ["--home", str(home), "--until-stdin-closes"]  # it ends with this process
        for model in models:
            arguments += ["--model", model]
        if device is not None:
            arguments += ["--set", f"device={device}"]
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
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode().strip()
            if text.startswith(READY):
                return text.removeprefix(READY)
        raise RuntimeError(f"the service did not start:\n{self.log.read_text()}")

    def stop(self) -> int:
        """Stop it as a user would; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL it."""
        self.process.kill()
        self.process.wait(60)
        disconnect(self.url)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture(scope="session", autouse=True)
def zygote(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Let all services of a session with slow tests fork their workers from one zygote."""
    slow = any(item.get_closest_marker("slow") for item in request.session.items)
    if not slow or sys.platform != "linux" or shared.VARIABLE in os.environ:
        yield
        return
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        with pytest.MonkeyPatch.context() as start:
            start.setenv("OMP_NUM_THREADS", "1")  # as services have it, or they would not share it
            path = stack.enter_context(shared.shared_zygote(tmp_path_factory.mktemp("zygote")))
        patch.setenv(shared.VARIABLE, str(path))
        yield


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that neither stop it nor depend on its other contents."""
    running = Service(tmp_path_factory.mktemp("service") / "home")
    yield running
    with contextlib.suppress(ProcessLookupError):
        running.stop()


@pytest.fixture(autouse=True)
def no_process_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves a process behind, and kill the process."""
    before = children()
    yield
    left = {}
    for pid in children() - before - helpers.KEPT:
        with contextlib.suppress(OSError):  # it ended
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if any(name in command for name in KEPT) or ends(pid):
                continue
            os.kill(pid, signal.SIGKILL)
            left[pid] = command
    assert not left, "processes that the test did not end"


def ends(pid: int) -> bool:
    """Return whether a process ends by itself within the grace period."""
    watched = os.pidfd_open(pid)
    try:
        return bool(select.select([watched], [], [], GRACE)[0])
    finally:
        os.close(watched)


def children() -> set[int]:
    """Return the ids of this process's living children."""
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
    """One S3 server for all tests; the environment names it as the endpoint."""
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server
    server.close()


@pytest.fixture
def bucket(s3_server: Server) -> Iterator[Bucket]:
    """A bucket for one test."""
    bucket = Bucket(s3_server)
    yield bucket
    bucket.fault()
