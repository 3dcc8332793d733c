"""Supervision: the embedded service is restarted when it exits. A small program replaces it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import everstep
from everstep import service_home
from everstep.backoff import Backoff
from everstep.client._transport import embedded_service
from everstep.client._transport.embedded_service import EmbeddedService
from tests.waiting import eventually

PATIENCE = 30.0
MAX_DELAY = embedded_service._RESTART_BACKOFF.max
PROGRAM = """
import fcntl, json, os, pathlib, socket, sys
home, port, starting = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
os.set_inheritable(starting, False)
with (home / "starts").open("a") as starts:
    starts.write("started\\n")
if (home / "broken").exists():
    sys.exit("the disk is on fire")
running = (home / "service.run.lock").open("a")
fcntl.flock(running, fcntl.LOCK_EX)
if not (home / "slow").exists():
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    address = f"http://127.0.0.1:{port}"
    record = {"address": address, "process": os.getpid(), "embedded": True}
    record |= {"models": {"a": "b"}, "settings": {"replay_seconds": 30.0}}
    record |= {"directory": os.getcwd()}
    (home / "new").write_text(json.dumps(record))
    (home / "new").rename(home / "service.json")
    fcntl.flock(starting, fcntl.LOCK_UN)
    print(f"everstep: ready at {address}", flush=True)
clients = (home / "service.clients.lock").open("a")
fcntl.flock(clients, fcntl.LOCK_EX)
(home / "service.json").unlink(missing_ok=True)
"""
SECOND = """
import sys
from pathlib import Path
from everstep.client._transport import embedded_service
program, home = sys.argv[1], Path(sys.argv[2])
embedded_service._command = lambda home, port, models, starting: [
    sys.executable, "-S", "-c", program, str(home), str(port), str(starting)
]
service = embedded_service.EmbeddedService(home)
print(service.pid, flush=True)
for line in sys.stdin:
    with service._changed:
        service._changed.wait_for(lambda: service.pid != int(line))
    print(service.pid, flush=True)
"""


class Second:
    """Another process that uses the service of a home."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SECOND, PROGRAM, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pid(self) -> int:
        """Return the service's process as it next reports it."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def pid_other_than(self, pid: int) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{pid}\n")
        self.process.stdin.flush()
        return self.pid()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)


@pytest.fixture
def start_second(tmp_path: Path) -> Iterator[Callable[[], Second]]:
    started: list[Second] = []

    def start() -> Second:
        started.append(Second(tmp_path))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture(autouse=True)
def _small_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(home: Path, port: int, models: tuple[str, ...], starting: int | None) -> list[str]:
        return [sys.executable, "-S", "-c", PROGRAM, str(home), str(port), str(starting)]

    monkeypatch.setattr(embedded_service, "_command", command)
    monkeypatch.setattr(embedded_service, "_RESTART_BACKOFF", Backoff(0.001, MAX_DELAY))
    monkeypatch.setattr(embedded_service, "_POLL_SECONDS", 0.001)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[EmbeddedService]:
    service = EmbeddedService(tmp_path)
    yield service
    service.close()


def starts(home: Path) -> int:
    return len((home / "starts").read_text().splitlines())


def port(service: EmbeddedService) -> int:
    return int(service.address.rsplit(":", 1)[1])


def kill(service: EmbeddedService) -> int:
    """Kill the service's process and return its process id."""
    pid = service.pid
    os.kill(pid, signal.SIGKILL)
    return pid


def restarted(service: EmbeddedService, pid: int) -> Callable[[], bool]:
    return lambda: service.pid != pid


def wait(service: EmbeddedService, condition: Callable[[], bool]) -> None:
    with service._changed:
        assert service._changed.wait_for(condition, PATIENCE)


def test_killed_service_is_restarted_on_its_port_every_time(
    local: EmbeddedService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = local.address
    for count in range(1, 9):
        pid = kill(local)
        wait(local, restarted(local, pid))
        socket.create_connection(("127.0.0.1", port(local)), PATIENCE).close()
        assert starts(tmp_path) == count + 1
    assert local.address == address and local.failure is None
    assert caplog.messages[0] == (
        "the embedded service was killed by signal 9 (Killed); restarting it"
    )


def test_restart_keeps_working_directory_and_environment(
    local: EmbeddedService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was = Path.cwd()
    monkeypatch.setenv("EVERSTEP_TESTS", "later")
    monkeypatch.chdir(tmp_path)
    pid = kill(local)
    wait(local, restarted(local, pid))
    process = Path(f"/proc/{local.pid}")
    if process.exists():
        assert (process / "cwd").readlink() == was
        assert b"EVERSTEP_TESTS" not in (process / "environ").read_bytes()


def test_restart_delays_grow_while_the_service_keeps_exiting() -> None:
    assert embedded_service._restart_delay(0) == embedded_service._restart_delay(1) == 0
    assert [embedded_service._restart_delay(n) * 1000 for n in (2, 3, 4, 5)] == [1, 2, 4, 8]
    assert embedded_service._restart_delay(1000) == MAX_DELAY == 10.0


def test_failed_restart_is_retried(
    local: EmbeddedService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_service, "_MAX_STARTS", 10_000)
    monkeypatch.setattr(embedded_service, "_RESTART_BACKOFF", Backoff(0.001, max=0.01))
    (tmp_path / "broken").touch()
    pid = kill(local)
    wait(local, lambda: starts(tmp_path) >= 3)
    (tmp_path / "broken").unlink()
    wait(local, restarted(local, pid))
    assert local.failure is None


def test_service_that_cannot_be_restarted_raises_for_its_clients(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = everstep.ServiceClient(base_url="local", home=tmp_path)
    other = everstep.ServiceClient(base_url=client.base_url)
    assert client._local is not None and client.local_pid == client._local.pid
    (tmp_path / "broken").touch()
    kill(client._local)
    for each in (client, other):
        with pytest.raises(everstep.LocalServiceError, match="the disk is on fire") as caught:
            each.get_server_capabilities()
        assert f"kept in {tmp_path}" in str(caught.value)
    assert starts(tmp_path) == 1 + embedded_service._MAX_STARTS
    assert caplog.records[-1].levelno == logging.ERROR
    (tmp_path / "broken").unlink()
    with everstep.ServiceClient(base_url="local", home=tmp_path) as new:
        assert new._local is not client._local and new.local_pid is not None
        client.close().result(PATIENCE)  # does not stop the new one
        assert new._local is not None and service_home.running(tmp_path) is not None
    assert other.local_pid is None


def test_service_that_was_stopped_is_not_restarted(tmp_path: Path, local: EmbeddedService) -> None:
    service_home.withdraw(tmp_path)  # as one does that stops in an orderly way
    kill(local)
    eventually("the end of supervision", lambda: local.failure is not None)
    assert f"The service on {tmp_path} was stopped" in str(local.failure)
    assert f"All acknowledged work is kept in {tmp_path}" in str(local.failure)
    assert starts(tmp_path) == 1
    local.close()
    with everstep.ServiceClient(base_url="local", home=tmp_path):
        assert starts(tmp_path) == 2


def test_first_start_is_not_retried(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(
        everstep.LocalServiceError, match="exited with code 1 before it became ready"
    ):
        EmbeddedService(tmp_path)
    assert starts(tmp_path) == 1


@pytest.mark.parametrize("moment", ["ready", "starting", "pausing"])
def test_closed_service_stays_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    local = EmbeddedService(tmp_path)
    number = port(local)
    if moment != "ready":
        (tmp_path / ("slow" if moment == "starting" else "broken")).touch()
        if moment == "pausing":
            long = Backoff(10 * PATIENCE, 10 * PATIENCE)
            monkeypatch.setattr(embedded_service, "_RESTART_BACKOFF", long)
        first = local._process
        kill(local)
        wait(local, lambda: local._process is not first)
    last = local._process
    assert last is not None
    if moment == "pausing":
        last.wait(PATIENCE)
    local.close()
    assert not local._supervisor.is_alive() and local._process is last
    assert last.wait(PATIENCE) is not None and local.failure is None
    assert starts(tmp_path) <= (1 if moment == "ready" else 2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", number))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reserves the port")
def test_port_stays_reserved_during_a_restart(local: EmbeddedService, tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    first = local._process
    kill(local)
    wait(local, lambda: local._process is not first)
    with socket.socket() as taker, pytest.raises(OSError):
        taker.bind(("127.0.0.1", port(local)))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port(local)), PATIENCE)


def test_close_in_a_forked_child_does_not_stop_the_service(
    tmp_path: Path, local: EmbeddedService
) -> None:
    pid = local.pid
    child = multiprocessing.get_context("fork").Process(target=local.close)
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert local.pid == pid and service_home.running(tmp_path) is not None


def test_second_process_attaches_and_keeps_the_service(
    tmp_path: Path, start_second: Callable[[], Second]
) -> None:
    first = EmbeddedService(tmp_path)
    second = start_second()
    assert second.pid() == first.pid
    first.close()
    assert service_home.running(tmp_path) is not None and starts(tmp_path) == 1
    second.kill()
    lock = tmp_path / "service.run.lock"
    eventually("the end of a service without clients", lambda: not service_home.is_held(lock))


def test_processes_that_start_at_once_start_one_service(
    tmp_path: Path, start_second: Callable[[], Second]
) -> None:
    pids = {each.pid() for each in [start_second() for _ in range(3)]}
    assert len(pids) == starts(tmp_path) == 1


def test_one_of_two_clients_restarts_a_service_that_was_killed(
    tmp_path: Path, local: EmbeddedService, start_second: Callable[[], Second]
) -> None:
    second = start_second()
    assert second.pid() == local.pid
    for count in (2, 3):
        address, pid = local.address, kill(local)
        wait(local, restarted(local, pid))
        assert second.pid_other_than(pid) == local.pid
        assert starts(tmp_path) == count and local.address == address


def test_service_outlives_the_killed_process_that_started_it(
    tmp_path: Path, start_second: Callable[[], Second]
) -> None:
    first = start_second()
    pid = first.pid()
    local = EmbeddedService(tmp_path)
    first.kill()
    assert local.pid == pid and service_home.running(tmp_path) is not None
    kill(local)
    wait(local, restarted(local, pid))
    assert starts(tmp_path) == 2
    local.close()


def test_client_that_is_killed_during_a_start_leaves_it_to_the_next(
    tmp_path: Path, start_second: Callable[[], Second]
) -> None:
    (tmp_path / "slow").touch()
    first, starting = start_second(), tmp_path / "starts"
    lock = tmp_path / "service.start.lock"
    eventually("the start", lambda: service_home.is_held(lock) and starting.exists())
    (tmp_path / "slow").unlink()
    first.kill()
    local = EmbeddedService(tmp_path)
    assert service_home.running(tmp_path) is not None
    local.close()


def test_other_models_or_settings_than_the_running_service_has_are_refused(
    tmp_path: Path, local: EmbeddedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.require(("a=b",))
    with pytest.raises(everstep.LocalServiceError, match="does not have model c=d: it is process"):
        EmbeddedService(tmp_path, ("a=b", "c=d"))
    monkeypatch.setenv("EVERSTEP_REPLAY_SECONDS", "30")
    EmbeddedService(tmp_path).close()
    monkeypatch.setenv("EVERSTEP_REPLAY_SECONDS", "5")
    with pytest.raises(everstep.LocalServiceError, match="EVERSTEP_REPLAY_SECONDS=5"):
        EmbeddedService(tmp_path)
    assert service_home.running(tmp_path) is not None and starts(tmp_path) == 1


def test_forked_child_does_not_keep_the_service(tmp_path: Path) -> None:
    client = everstep.ServiceClient(base_url="local", home=tmp_path)
    context = multiprocessing.get_context("fork")
    done = context.Event()
    child = context.Process(target=done.wait)
    child.start()
    client.close().result(PATIENCE)
    assert not service_home.is_held(tmp_path / "service.run.lock") and child.is_alive()
    done.set()
    child.join(PATIENCE)
