"""The zygote: workers that are forked from it are those that would have been spawned."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import everstep
from everstep import types
from everstep.engine.models.pico import PICO_NAME
from everstep.runtime.errors import WorkerLost
from everstep.runtime.settings import Settings
from everstep.runtime.workers.local_process import local_process_pool
from everstep.runtime.workers.supervisor import SupervisedPool
from everstep.runtime.workers.zygote import OFF, VARIABLE, shared_path, shared_zygote
from everstep.spool import taken
from everstep.vault import Vault
from everstep.wire.codecs.proto import encode_training_pass
from everstep.wire.messages.passes import TrainingPass
from everstep.worker.protocol import messages
from everstep.worker.zygote.fit import differences
from everstep.worker.zygote.owner import Zygote
from tests.processes import processes_of, worker_of, zygote_of
from tests.scenario import data
from tests.waiting import eventually, eventually_async

pytestmark = pytest.mark.slow
ADAPTER = {"rank": 4, "alpha": 8.0, "seed": 1}
SAMPLE = {
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
    "num_samples": 2,
    "sampling_params": {"max_tokens": 20, "seed": 3, "stop": []},
}
MANIFEST = {
    "kind": "snapshot",
    "run_id": "run-1",
    "name": "saved",
    "base_model": PICO_NAME,
    "base_fingerprint": "",
    "lora": ADAPTER,
    "optimizer": {"type": "adamw"},
    "user_metadata": None,
    "run_metadata": {},
    "expires_at": None,
    "position": 6,
    "request_id": None,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A zygote for all tests of this module, unless the session has one."""
    path = shared_path()
    if path is not None:
        yield path
        return
    with shared_zygote(tmp_path_factory.mktemp("zygote")) as path:
        yield path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    directory = tmp_path / "home"
    directory.mkdir()
    return directory


def pool_of(home: Path) -> SupervisedPool:
    return local_process_pool(home, {PICO_NAME: PICO_NAME}, Settings(threads=1))


async def results(home: Path) -> list[str]:
    """Digests of all that a worker gives: passes, optimizer steps, a sample, a checkpoint."""
    pool = pool_of(home)
    pool.start()
    try:
        await pool.started()
        lease = await pool.acquire("run-1", PICO_NAME)
        found = [str(dict(lease.worker.environment)).encode()]
        await (await lease.call(messages.CreateRun("run-1", PICO_NAME, ADAPTER))).done
        for shift in range(3):
            passed = await lease.call(messages.TrainingPass("run-1", encoded_pass(shift)))
            found.append(await taken((await passed.done).body))
            step = messages.OptimStep("run-1", {"learning_rate": 0.01, "weight_decay": 0.1})
            found.append(str((await (await lease.call(step)).done).metrics).encode())
        sampled = await lease.call(
            messages.Sample(PICO_NAME, None, "s", 1, json.dumps(SAMPLE).encode())
        )
        found.append(await taken((await sampled.done).body))
        await (await lease.call(messages.SaveRun("run-1", MANIFEST, []))).done
    finally:
        await pool.close()
    files = Vault(home / "vault").manifest("snapshot", "run-1", "saved").files
    assert len(files) == 3
    found += [f"{name} {ref.blake3}".encode() for name, ref in sorted(files.items())]
    return [hashlib.sha256(each).hexdigest() for each in found]


def encoded_pass(shift: int) -> bytes:
    request = types.ForwardBackwardRequest(
        model_id="run-1",
        seq_id=shift + 1,
        forward_backward_input=types.ForwardBackwardInput(
            data=data(everstep, shift=shift), loss_fn="cross_entropy"
        ),
    )
    return encode_training_pass(TrainingPass.from_request(request))


def name_of(pid: int) -> str:
    """A process's name, as `ps` shows it."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_forked_and_spawned_workers_give_the_same_bits(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[str]] = {}
    for value in (OFF, str(shared)):
        monkeypatch.setenv(VARIABLE, value)
        home = tmp_path / f"home-{len(found)}"
        home.mkdir()
        found[value] = asyncio.run(results(home))
    spawned, forked = found.values()
    assert len(spawned) == 11
    assert forked == spawned


def test_forked_worker_is_listed_as_a_worker_and_its_end_is_known_exactly(
    home: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(shared))

    async def check() -> None:
        pool = pool_of(home)
        pool.start()
        await pool.started()
        how = {signal.SIGKILL: "was killed (SIGKILL)", signal.SIGSEGV: "SIGSEGV"}
        for count, number in enumerate(how, start=1):
            lease = await pool.acquire("run-1", PICO_NAME)
            pid = worker_of(home)
            assert pid is not None
            assert lease.worker.id == f"process {pid}"
            assert name_of(pid) == "everstep-worker"
            assert os.getsid(pid) == pid
            os.kill(pid, number)
            call = await lease.call(messages.DropRun("run-1"))
            with pytest.raises(WorkerLost):
                await call.done
            await eventually_async("its end is known", lambda count=count: len(pool.ends) == count)  # type: ignore[misc]
            assert how[number] in pool.ends[-1]
        await pool.acquire("run-1", PICO_NAME)
        await pool.close()
        assert pool.ends[-1] == "ended with exit code 0"
        assert not processes_of(home)

    asyncio.run(check())


def test_worker_outlives_its_zygote_which_is_replaced(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)

    async def check() -> None:
        pool = pool_of(home)
        pool.start()
        await pool.started()
        lease = await pool.acquire("run-1", PICO_NAME)
        first = zygote_of(home)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await eventually_async("another zygote", lambda: zygote_of(home) not in (None, first))
        await (await lease.call(messages.CreateRun("run-1", PICO_NAME, ADAPTER))).done
        worker = worker_of(home)
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        replaced = await pool.acquire("run-1", PICO_NAME)
        while replaced.epoch == 1:
            await asyncio.sleep(0)
            replaced = await pool.acquire("run-1", PICO_NAME)
        assert pool.ends == ["ended"], "its parent was gone, nobody knows how"
        await pool.close()
        assert not processes_of(home)

    asyncio.run(check())


OWNER = """
import asyncio, sys
from pathlib import Path
from tests.worker.test_zygote import pool_of

async def main():
    pool = pool_of(Path(sys.argv[1]))
    pool.start()
    await pool.started()
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_neither_zygote_nor_worker_outlives_a_killed_service(home: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(home)], stdout=subprocess.PIPE, env=environment
    ) as owner:
        try:
            assert owner.stdout is not None
            assert b"ready\n" in iter(owner.stdout.readline, b"")
            assert worker_of(home) is not None
            assert zygote_of(home) is not None
        finally:
            owner.kill()
    eventually("their ends", lambda: not processes_of(home))


def test_zygote_of_another_environment_is_not_shared(
    home: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zygote = Zygote.connect(shared)
    assert differences(zygote.pid) == []
    monkeypatch.setenv("EVERSTEP_ANYTHING", "read late")
    assert differences(zygote.pid) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("LD_PRELOAD", "")
    assert differences(zygote.pid) == ["$LD_PRELOAD", "$OMP_NUM_THREADS"]
    monkeypatch.undo()
    assert differences(zygote.pid) == []
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if soft != 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
        try:
            assert differences(zygote.pid) == ["limits"]
        finally:
            resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    zygote.close()


def test_service_with_another_environment_starts_its_own_zygote(
    home: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(shared))
    monkeypatch.setenv("OMP_DYNAMIC", "false")

    async def check() -> None:
        pool = pool_of(home)
        pool.start()
        await pool.started()
        assert zygote_of(home) is not None
        await pool.close()
        assert not processes_of(home)

    asyncio.run(check())
