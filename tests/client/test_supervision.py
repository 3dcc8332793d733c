"""The embedded service is started again when it ends; here a small program stands for it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import everstep
from everstep.client import _local
from everstep.client._local import LocalService

PATIENCE = 30.0
PROGRAM = """
import pathlib, socket, sys
home, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])
with (home / "starts").open("a") as starts:
    starts.write("started\\n")
if (home / "broken").exists():
    sys.exit("the disk is on fire")
if not (home / "slow").exists():
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    print(f"everstep: ready at http://127.0.0.1:{port}", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _small_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(home: Path, port: int, models: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-S", "-c", PROGRAM, str(home), str(port)]

    monkeypatch.setattr(_local, "_command", command)
    monkeypatch.setattr(_local, "_FIRST_PAUSE", 0.001)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalService]:
    service = LocalService(tmp_path)
    yield service
    service.close()


def starts(home: Path) -> int:
    return len((home / "starts").read_text().splitlines())


def port(service: LocalService) -> int:
    return int(service.address.rsplit(":", 1)[1])


def kill(service: LocalService) -> int:
    """Kill it; returns the process id that it had."""
    pid = service.pid
    os.kill(pid, signal.SIGKILL)
    return pid


def wait(service: LocalService, what: Any) -> None:
    with service._changed:
        assert service._changed.wait_for(what, PATIENCE)


def test_it_is_started_again_on_its_port_as_often_as_it_is_killed(
    local: LocalService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = local.address
    for count in range(1, 9):
        pid = kill(local)
        wait(local, lambda pid=pid: local.pid != pid and local._ready)
        socket.create_connection(("127.0.0.1", port(local)), PATIENCE).close()
        assert starts(tmp_path) == count + 1
    assert local.address == address and local.failure is None
    assert caplog.messages[0] == (
        "the embedded service ended (signal 9, Killed); it is started again"
    )


def test_it_is_started_again_where_it_was_started_with_what_it_was_given(
    local: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was = Path.cwd()
    monkeypatch.setenv("EVERSTEP_TESTS", "later")
    monkeypatch.chdir(tmp_path)
    pid = kill(local)
    wait(local, lambda: local.pid != pid and local._ready)
    process = Path(f"/proc/{local.pid}")
    if process.exists():
        assert (process / "cwd").readlink() == was
        assert b"EVERSTEP_TESTS" not in (process / "environ").read_bytes()


def test_pauses_grow_while_it_does_not_last() -> None:
    assert _local._pause(0) == _local._pause(1) == 0
    assert [_local._pause(n) * 1000 for n in (2, 3, 4, 5)] == [1, 2, 4, 8]
    assert _local._pause(1000) == _local._LONGEST_PAUSE


def test_a_start_that_fails_is_tried_again(
    local: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_local, "_STARTS", 10_000)
    monkeypatch.setattr(_local, "_LONGEST_PAUSE", 0.01)
    (tmp_path / "broken").touch()
    kill(local)
    wait(local, lambda: starts(tmp_path) >= 3)
    (tmp_path / "broken").unlink()
    wait(local, lambda: local._ready)
    assert local.failure is None


def test_a_service_that_cant_be_started_again_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = everstep.ServiceClient(base_url="local", home=tmp_path)
    other = everstep.ServiceClient(base_url=client.base_url)
    assert client._local is not None and client.local_pid == client._local.pid
    (tmp_path / "broken").touch()
    kill(client._local)
    for each in (client, other):
        with pytest.raises(everstep.LocalServiceError, match="the disk is on fire") as caught:
            each.get_server_capabilities().result(PATIENCE)
        assert f"kept in {tmp_path}" in str(caught.value)
    assert starts(tmp_path) == 1 + _local._STARTS
    assert caplog.records[-1].levelno == logging.ERROR
    (tmp_path / "broken").unlink()
    with everstep.ServiceClient(base_url="local", home=tmp_path) as new:
        assert new._local is not client._local and new.local_pid is not None
        client.close().result(PATIENCE)  # is not the new one's end
        assert new._local is not None and new._local._ready
    assert other.local_pid is None


def test_the_first_start_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(everstep.LocalServiceError, match="exit code 1 before it was ready"):
        LocalService(tmp_path)
    assert starts(tmp_path) == 1


@pytest.mark.parametrize("moment", ["ready", "starting", "pausing"])
def test_closed_it_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    local = LocalService(tmp_path)
    monkeypatch.setattr(_local, "_FIRST_PAUSE", 10 * PATIENCE)
    monkeypatch.setattr(_local, "_LONGEST_PAUSE", 10 * PATIENCE)
    if moment != "ready":
        (tmp_path / ("slow" if moment == "starting" else "broken")).touch()
        pid = kill(local)
        wait(local, lambda: local.pid != pid)
    last = local._process
    if moment == "pausing":
        last.wait(PATIENCE)
    local.close()
    assert not local._keeper.is_alive() and local._process is last
    assert last.returncode is not None and local.failure is None
    assert starts(tmp_path) <= (1 if moment == "ready" else 2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port(local)))


@pytest.mark.skipif(sys.platform != "linux", reason="the port is not held elsewhere")
def test_its_port_is_given_to_no_other_meanwhile(local: LocalService, tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    pid = kill(local)
    wait(local, lambda: local.pid != pid)
    with socket.socket() as taker, pytest.raises(OSError):
        taker.bind(("127.0.0.1", port(local)))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port(local)), PATIENCE)


def test_a_forked_child_does_not_end_it(local: LocalService) -> None:
    pid = local.pid
    child = multiprocessing.get_context("fork").Process(target=local.close)
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert local.pid == pid and local._process.poll() is None
