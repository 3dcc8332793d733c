"""Embedded service: it starts with a client and stops with its process, however that ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import everstep
from everstep.vault import Vault
from everstep.wire.paths import parse_path
from tests.conftest import Service
from tests.scenario import MODEL, data, train

pytestmark = pytest.mark.slow
PATIENCE = 60.0
CLIENT = """
import sys, everstep
service = everstep.ServiceClient(base_url="local", home=sys.argv[1])
run = service.create_lora_training_client("everstep/pico", rank=4, seed=1).result()
print(service.local_pid, service.base_url, run.model_id, flush=True)
sys.stdin.readline()
print("going", flush=True)
"""
KILLS_ITS_SERVICE = """
import os, signal, sys, everstep
service = everstep.ServiceClient(base_url="local", home=sys.argv[1])
local, pid = service._local, service.local_pid
os.kill(pid, signal.SIGKILL)
with local._changed:
    local._changed.wait_for(lambda: local.pid != pid)
print(local.pid, service.base_url, "-", flush=True)
sys.stdin.readline()
"""


class Script:
    """A client in a separate process, up to the point where it prints its service."""

    def __init__(self, home: Path, program: str = CLIENT) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(home)],
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
        """Wait until every process of the service has exited."""
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
    """List the living processes of a session, which a service leads."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] not in "ZX":
                    found.append(int(entry.name))
    return found


@pytest.fixture
def script(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Script]:
    if not hasattr(os, "pidfd_open"):
        pytest.skip("needs pidfd_open")
    script = Script(tmp_path / "home", getattr(request, "param", CLIENT))
    yield script
    script.clean_up()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/api/v1/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_embedded_service_stops_with_its_last_client(tmp_path: Path) -> None:
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


def test_no_process_survives_a_killed_client(script: Script) -> None:
    assert script.service in script.all and answers(script.url)
    script.process.send_signal(signal.SIGKILL)
    assert script.process.wait(PATIENCE) == -signal.SIGKILL
    assert script.service_is_gone()
    assert not answers(script.url)


@pytest.mark.parametrize("script", [KILLS_ITS_SERVICE], indirect=True)
def test_no_process_survives_a_client_killed_during_a_restart(
    script: Script,
) -> None:
    script.process.send_signal(signal.SIGKILL)
    assert script.process.wait(PATIENCE) == -signal.SIGKILL
    assert script.service_is_gone()
    assert not answers(script.url)


def test_no_process_survives_a_script_without_close(script: Script) -> None:
    out, _ = script.process.communicate("\n", PATIENCE)
    assert out == "going\n" and script.process.returncode == 0
    assert script.service_is_gone()


def test_failed_start_reports_the_reason(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("not a directory")
    with pytest.raises(everstep.LocalServiceError, match="can't be used as a home"):
        everstep.ServiceClient(base_url="local", home=tmp_path / "home")


KILLED_AFTER = {2: "the pass", 5: "the step", 8: "the results", 9: "the pass"}
STEPS = 12


def loop(
    service: everstep.ServiceClient, kill: Callable[[], None] = lambda: None
) -> tuple[list[Any], str]:
    """Train with a save and a sample, killing the service as `KILLED_AFTER` says.

    Returns:
        All numbers in order, and the path of the last checkpoint.
    """
    run: Any = service.create_lora_training_client(MODEL, rank=4, seed=7).result()
    seen: list[Any] = []
    saved = None
    for step in range(STEPS):
        passed = run.forward_backward(data(everstep, shift=step), "cross_entropy")
        _kill_after("the pass", step, kill)
        stepped = run.optim_step(everstep.AdamParams(learning_rate=0.01, weight_decay=0.1))
        _kill_after("the step", step, kill)
        if step == STEPS // 2:
            saved = run.save_state("middle")
        output = passed.result()
        seen.append([output.metrics["loss:sum"]])
        seen += [each["logprobs"].tolist() for each in output.loss_fn_outputs]
        stepped.result()
        _kill_after("the results", step, kill)
    assert saved is not None
    saved.result()
    sampler = run.save_weights_and_get_sampling_client().result()
    params = everstep.SamplingParams(max_tokens=8, seed=1, temperature=1.0)
    sampled = sampler.sample(everstep.ModelInput.from_ints([1, 2, 3]), 1, params)
    kill()
    seen.append(sampled.result().sequences[0].tokens)
    return seen, run.save_state("end").result().path


def _kill_after(point: str, step: int, kill: Callable[[], None]) -> None:
    if KILLED_AFTER.get(step) == point:
        kill()


def saved_files(home: Path, path: str) -> dict[str, str]:
    """Return the checksums of a checkpoint's weights and optimizer state."""
    at = parse_path(path)
    files = Vault(home / "vault", writer=False).manifest(at.kind, at.run_id, at.name).files
    return {name: each.blake3 for name, each in files.items() if name.endswith(".safetensors")}


@pytest.mark.long(reason="services are started, killed and recovered")
def test_killed_service_recovers_with_identical_results(tmp_path: Path, service: Service) -> None:
    with everstep.ServiceClient(base_url=service.url) as client:
        expected, end = loop(client)
    killed = []
    home = tmp_path / "home"
    with everstep.ServiceClient(base_url="local", home=home) as client:

        def kill() -> None:
            local = client._local
            assert local is not None
            with local._changed:  # a new process may be killed while it starts
                assert local._changed.wait_for(lambda: local.pid not in killed, PATIENCE)
            killed.append(local.pid)
            os.kill(local.pid, signal.SIGKILL)

        url = client.base_url
        seen, killed_end = loop(client, kill)
        assert client.base_url == url and client.local_pid not in killed
    assert len(set(killed)) == len(KILLED_AFTER) + 1
    assert seen == expected
    hashes = saved_files(home, killed_end)
    assert len(hashes) == 2 and hashes == saved_files(service.home, end)
    assert not answers(url)


def test_service_starts_on_the_home_without_configuration(tmp_path: Path) -> None:
    """As a newcomer's script begins: no address, no key, no service."""
    program = """
import everstep
with everstep.ServiceClient() as service:
    run = service.create_lora_training_client("everstep/pico", rank=4).result()
    print(service.local_pid is not None, run.save_state("x").result().path)
"""
    unset = ("TINKER_BASE_URL", "TINKER_API_KEY")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    environment |= {"EVERSTEP_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE * 4,
        check=True,
    )
    local, path = ran.stdout.split()
    assert local == "True"
    saved = parse_path(path)
    assert Vault(tmp_path / "home" / "vault").manifest("training", saved.run_id, saved.name)
