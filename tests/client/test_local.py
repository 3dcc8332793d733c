"""The embedded service: begins with a client and ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import everstep
from tests.scenario import MODEL, train

pytestmark = pytest.mark.slow
PATIENCE = 60.0
CLIENT = """
import sys, everstep
service = everstep.ServiceClient(base_url="local", home=sys.argv[1])
run = service.create_lora_training_client("everstep/pico", rank=4, seed=1).result()
print(service._local.pid, service.base_url, run.model_id, flush=True)
sys.stdin.readline()
print("going", flush=True)
"""


class Script:
    """A client in a process of its own, up to the point where it has a run."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        pid, self.url, self.run_id = self.process.stdout.readline().split()
        self.service = int(pid)
        self.all = processes_of(self.service)
        self.watched = [os.pidfd_open(pid) for pid in self.all]

    def service_is_gone(self) -> bool:
        """Wait for the end of every process of the service."""
        for watched in self.watched:
            if not select.select([watched], [], [], PATIENCE)[0]:
                return False
        return not processes_of(self.service)

    def clean_up(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        for pid in processes_of(self.service):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for watched in self.watched:
            os.close(watched)


def processes_of(leader: int) -> list[int]:
    """The living processes of a session: a service leads one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] not in "ZX":
                    found.append(int(entry.name))
    return found


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    if not hasattr(os, "pidfd_open"):
        pytest.skip("needs pidfd_open")
    script = Script(tmp_path / "home")
    yield script
    script.clean_up()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/api/v1/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_an_embedded_service_trains_and_ends_with_its_last_client(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = everstep.ServiceClient(base_url="local", home=home)
    second = everstep.ServiceClient(base_url="local", home=home)
    assert first.base_url == second.base_url
    run: Any = first.create_lora_training_client(MODEL, rank=4, seed=1).result()
    train(everstep, run, 1)
    first.close().result()
    assert answers(second.base_url)
    second.close().result()
    assert not answers(second.base_url)


def test_no_process_is_left_when_the_client_is_killed(script: Script) -> None:
    assert script.service in script.all and answers(script.url)
    script.process.send_signal(signal.SIGKILL)
    assert script.process.wait(PATIENCE) == -signal.SIGKILL
    assert script.service_is_gone()
    assert not answers(script.url)


def test_no_process_is_left_when_the_script_forgets_to_close(script: Script) -> None:
    out, _ = script.process.communicate("\n", PATIENCE)
    assert out == "going\n" and script.process.returncode == 0
    assert script.service_is_gone()


def test_a_service_that_cant_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("not a directory")
    with pytest.raises(everstep.LocalServiceError, match="exit code"):
        everstep.ServiceClient(base_url="local", home=tmp_path / "home")
