"""What every implementation of the workers' seam does: a process on this machine, and a thread."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.engine.models.info import ModelInfo
from everstep.engine.models.pico import PICO_NAME
from everstep.runtime.errors import OperationFailed, WorkerLost
from everstep.runtime.settings import Settings
from everstep.runtime.workers.base import Call, Lease, Worker
from everstep.runtime.workers.forked_process import ForkLauncher
from everstep.runtime.workers.launch import Handle, Launcher
from everstep.runtime.workers.local_process import SpawnLauncher, worker_arguments
from everstep.runtime.workers.supervisor import SupervisedPool
from everstep.runtime.workers.thread import ThreadLauncher
from everstep.runtime.workers.zygote import VARIABLE, shared_path, shared_zygote
from everstep.vault import CheckpointId
from everstep.wire.errors import ErrorCategory
from everstep.wire.messages.streams import DrawnTokens
from everstep.worker.protocol import messages
from everstep.worker.protocol.channel import NO_CALL, BlockingChannel
from everstep.worker.protocol.heartbeat import SAMPLING, HeartbeatPage
from tests.runtime.local import Local, home, pico

__all__ = ["home", "pico"]
ADAPTER = {"rank": 4, "alpha": 8.0, "seed": 1}
INFO = ModelInfo("m", "path", "Arch", 256, 128, "f00d", (1,), "path", "cpu", "float32")


@dataclass
class Recording:
    """A launcher that keeps the handles of the workers that it started."""

    inner: Launcher
    handles: list[Any] = field(default_factory=list)

    async def launch(self, sock: socket.socket, page: HeartbeatPage) -> Handle:
        handle = await self.inner.launch(sock, page)
        self.handles.append(handle)
        return handle

    async def close(self) -> None:
        await self.inner.close()


class Subject:
    """A pool of one implementation, and how a test holds up and kills its workers."""

    def __init__(self, launcher: Launcher, hold: Callable[[Any], None]) -> None:
        self.launcher = Recording(launcher)
        self.pool = SupervisedPool(self.launcher, hang_seconds=300)
        self._hold = hold

    def hold(self) -> None:
        """Have the present worker execute nothing, until it is killed."""
        self._hold(self.launcher.handles[-1])

    def kill(self) -> None:
        """Kill the present worker."""
        self.launcher.handles[-1].kill()


def thread_subject(home: Path, pico: Model) -> Subject:
    local = Local(home, pico, name=PICO_NAME)
    return Subject(ThreadLauncher(local.serve), lambda _: local.steps.close())


def process_subject(home: Path, pico: Model) -> Subject:
    home.mkdir()
    arguments = worker_arguments(home, {PICO_NAME: PICO_NAME}, Settings(threads=1))
    launcher = ForkLauncher(arguments, SpawnLauncher(arguments))
    return Subject(launcher, lambda handle: os.kill(handle.pid, signal.SIGSTOP))


Make = Callable[[], Any]


@pytest.fixture(scope="module", params=["thread", pytest.param("process", marks=pytest.mark.slow)])
def implementation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """An implementation's name. Processes are forked from one zygote."""
    if request.param == "thread" or shared_path() is not None:
        yield request.param
        return
    directory = tmp_path_factory.mktemp("zygote")
    with shared_zygote(directory) as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(path))
        yield request.param


@pytest.fixture
def running(implementation: str, home: Path, pico: Model) -> Make:
    """A pool that is ready, for the duration of an `async with` block."""
    make = thread_subject if implementation == "thread" else process_subject

    @asynccontextmanager
    async def run() -> AsyncIterator[Subject]:
        subject = make(home, pico)
        subject.pool.start()
        try:
            await subject.pool.started()
            yield subject
        finally:
            await subject.pool.close()

    return run


async def new_run(lease: Lease, run: str = "run-1") -> messages.RunCreated:
    return await (await lease.call(messages.CreateRun(run, PICO_NAME, ADAPTER))).done


def sample(max_tokens: int) -> messages.Sample:
    request = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "num_samples": 1,
        "sampling_params": {"max_tokens": max_tokens, "seed": 3, "stop": []},
    }
    return messages.Sample(PICO_NAME, None, "sampler", 0, json.dumps(request).encode())


def test_pool_is_ready_with_models_and_environment(running: Make) -> None:
    async def check() -> None:
        async with running() as subject:
            pool = subject.pool
            assert pool.ready
            assert list(pool.models) == [PICO_NAME]
            lease = await pool.acquire("run-1", PICO_NAME)
            assert lease.epoch == 1
            assert lease.valid
            assert dict(lease.worker.models) == dict(pool.models)
            assert "torch" in lease.worker.environment
            assert await pool.for_model(PICO_NAME) == lease
        assert not pool.ready
        assert not lease.valid
        assert list(lease.worker.models) == [PICO_NAME], "they stay readable"
        with pytest.raises(WorkerLost):
            await pool.acquire("run-1", PICO_NAME)

    asyncio.run(check())


def test_calls_are_answered_in_order(running: Make) -> None:
    async def check() -> None:
        async with running() as subject:
            lease = await subject.pool.acquire("run-1", PICO_NAME)
            assert (await new_run(lease)).bytes > 0
            step = messages.OptimStep("run-1", {"learning_rate": 0.01})
            calls = [await lease.call(step) for _ in range(3)]
            replies = [await call.done for call in calls]
            assert [reply.metrics["optimizer_step"] for reply in replies] == [1.0, 2.0, 3.0]
            assert all(call.captured.done() for call in calls)

    asyncio.run(check())


def test_failed_command_raises_and_the_worker_goes_on(running: Make) -> None:
    async def check() -> None:
        async with running() as subject:
            lease = await subject.pool.acquire("run-1", PICO_NAME)
            source = CheckpointId("training", "run-1", "missing")
            call = await lease.call(
                messages.RestoreRun("run-1", PICO_NAME, ADAPTER, source, optimizer=True)
            )
            with pytest.raises(OperationFailed) as raised:
                await call.done
            assert raised.value.category == ErrorCategory.SERVER
            with pytest.raises(OperationFailed):
                await call.captured
            assert (await new_run(lease)).bytes > 0

    asyncio.run(check())


def test_watched_sample_streams_its_tokens(running: Make) -> None:
    async def check() -> None:
        async with running() as subject:
            lease = await subject.pool.for_model(PICO_NAME)
            drawn: list[DrawnTokens] = []
            call = await lease.call(sample(200))
            call.on_drawn = drawn.extend
            lease.worker.watch(call, 0)
            reply = await call.done
            assert reply.body
            assert drawn, "the sample was watched while it was drawn"
            assert [each.position for each in drawn] == list(range(len(drawn)))
            lease.worker.watch(call, 0)  # it has ended: no effect
            assert (await (await lease.call(sample(2))).done).body

    asyncio.run(check())


def test_cancelled_sample_never_resolves(running: Make) -> None:
    async def check() -> None:
        async with running() as subject:
            lease = await subject.pool.for_model(PICO_NAME)
            cancelled = await lease.call(sample(100_000))
            lease.worker.cancel(cancelled)
            lease.worker.cancel(cancelled)  # no error
            assert (await (await lease.call(sample(2))).done).body
            assert not cancelled.done.done()

    asyncio.run(check())


def test_calls_of_a_lost_worker_raise_and_its_lease_is_refused(running: Make) -> None:
    async def check() -> None:
        async with running() as subject:
            pool = subject.pool
            lost: list[tuple[Worker, WorkerLost]] = []
            pool.on_lost(lambda worker, error: lost.append((worker, error)))
            lease = await pool.acquire("run-1", PICO_NAME)
            await new_run(lease)
            subject.hold()
            sampled = await lease.call(sample(2))
            calls: list[Call[Any]] = [sampled, await lease.call(messages.DropRun("run-1"))]
            subject.kill()
            for call in calls:
                with pytest.raises(WorkerLost, match="was killed \\(SIGKILL\\)"):
                    await call.done
            assert [worker for worker, _ in lost] == [lease.worker]
            assert not lease.valid
            with pytest.raises(WorkerLost):
                await lease.call(messages.DropRun("run-1"))

            replaced = await pool.acquire("run-1", PICO_NAME)
            assert replaced.epoch == 2
            assert replaced.worker.id != lease.worker.id
            with pytest.raises(WorkerLost):
                await lease.call(messages.DropRun("run-1"))
            replaced.worker.cancel(sampled)  # a call of another worker: no effect

    asyncio.run(check())


# What doesn't need a model: a thread that speaks the protocol, and does as the test says.


def one_worker(act: Callable[[BlockingChannel, HeartbeatPage], None]) -> ThreadLauncher:
    """A launcher of workers that become ready and then do as the test says."""

    def serve(sock: socket.socket, page: HeartbeatPage) -> None:
        channel = BlockingChannel(sock)
        channel.send(NO_CALL, messages.Ready([INFO], {}))
        act(channel, page)

    return ThreadLauncher(serve)


def test_hung_worker_is_killed_and_only_its_call_is_blamed() -> None:
    released = threading.Event()

    def hang(channel: BlockingChannel, page: HeartbeatPage) -> None:
        received = [channel.receive() for _ in range(2)]
        assert received[0] is not None
        page.begin(received[0].call_id)
        assert released.wait(60)

    async def check() -> None:
        pool = SupervisedPool(one_worker(hang), hang_seconds=0.2)
        pool.start()
        lease = await pool.acquire("run-1", "m")
        calls = [await lease.call(messages.DropRun(run)) for run in ("run-1", "run-2")]
        errors = await asyncio.gather(*(call.done for call in calls), return_exceptions=True)
        released.set()
        assert "hung" in pool.ends[0]
        assert [isinstance(e, WorkerLost) and e.blamed for e in errors] == [True, False]
        await pool.close()

    asyncio.run(check())


def test_worker_that_makes_steps_is_not_hung() -> None:
    def work(channel: BlockingChannel, page: HeartbeatPage) -> None:
        envelope = channel.receive()
        assert envelope is not None
        ended = threading.Event()
        threading.Timer(1.0, ended.set).start()
        while not ended.wait(0.01):
            page.begin(envelope.call_id)
        channel.send(envelope.call_id, messages.RunDropped())
        page.rest()
        channel.receive()

    async def check() -> None:
        pool = SupervisedPool(one_worker(work), hang_seconds=0.2)
        pool.start()
        lease = await pool.acquire("run-1", "m")
        await (await lease.call(messages.DropRun("run-1"))).done
        assert not pool.ends
        await pool.close()

    asyncio.run(check())


@pytest.mark.parametrize("sampling", [False, True])
def test_only_what_was_executed_is_blamed_for_a_death(sampling: bool) -> None:
    def die(channel: BlockingChannel, page: HeartbeatPage) -> None:
        received = [channel.receive() for _ in range(3)]
        assert received[1] is not None
        page.begin(SAMPLING if sampling else received[1].call_id)
        raise RuntimeError("the worker dies")

    async def check() -> None:
        pool = SupervisedPool(one_worker(die), hang_seconds=300)
        pool.start()
        lease = await pool.acquire("run-1", "m")
        calls: list[Call[Any]] = [
            await lease.call(messages.DropRun("run-1")),
            await lease.call(messages.DropRun("run-2")),
            await lease.call(sample(2)),
        ]
        errors = await asyncio.gather(*(call.done for call in calls), return_exceptions=True)
        blamed = [isinstance(each, WorkerLost) and each.blamed for each in errors]
        assert blamed == ([False, False, True] if sampling else [False, True, False])
        assert "exit code 1" in str(errors[0])
        await pool.close()

    asyncio.run(check())


def test_first_worker_that_is_unusable_fails_the_start() -> None:
    def serve(sock: socket.socket, page: HeartbeatPage) -> None:
        BlockingChannel(sock).send(NO_CALL, messages.Unusable("model 'm' can't be loaded"))

    async def check() -> None:
        launcher = ThreadLauncher(serve)
        pool = SupervisedPool(launcher, hang_seconds=300)
        pool.start()
        with pytest.raises(OperationFailed, match="model 'm' can't be loaded"):
            await pool.started()
        with pytest.raises(WorkerLost):
            await pool.acquire("run-1", "m")
        await pool.close()
        assert len(launcher.handles) == 1, "it is not tried again"

    asyncio.run(check())
