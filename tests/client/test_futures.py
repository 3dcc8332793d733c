"""Futures: waiting in threads and coroutines, timeouts, cancellation, hooks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import multiprocessing
import threading
from typing import Any

import pytest

import everstep
from everstep.client._transport.futures import APIFuture, submit
from tests.client.fake_service import (
    GIVE_UP_SECONDS,
    MODEL,
    FakeService,
    Refused,
    failed,
)
from tests.client.fixtures import Clock

T = GIVE_UP_SECONDS
ADAM = everstep.AdamParams(learning_rate=0.1)


class Gate:
    """A coroutine that the test ends."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self._open = concurrent.futures.Future[Any]()

    async def work(self) -> Any:
        self.started.set()
        return await asyncio.wrap_future(self._open)

    def end(self, result: Any) -> None:
        self._open.set_result(result)

    def fail(self, error: Exception) -> None:
        self._open.set_exception(error)


@pytest.fixture
def gate() -> Gate:
    return Gate()


# Waiting


def test_result_waits_in_threads_and_coroutines(gate: Gate) -> None:
    future = APIFuture.of(gate.work())
    assert gate.started.wait(T) and not future.done()
    gate.end(5)
    assert future.result(T) == future.result() == 5
    assert future.done()

    async def read() -> list[int]:
        task = asyncio.create_task(future.coroutine())
        return [await future, await future.result_async(), await task, future.result()]

    assert asyncio.run(read()) == [5] * 4
    assert future.future().result() == 5


def test_several_waiters_get_one_result(gate: Gate) -> None:
    future = APIFuture.of(gate.work())

    async def read() -> list[int]:
        waiting = [asyncio.create_task(future.coroutine()) for _ in range(3)]
        await asyncio.sleep(0)
        gate.end(7)
        return list(await asyncio.gather(*waiting, future))

    assert asyncio.run(read()) == [7] * 4


def test_error_is_raised_by_every_way_to_wait(gate: Gate) -> None:
    future = APIFuture.of(gate.work())
    gate.fail(everstep.TinkerError("no"))

    async def read() -> None:
        with pytest.raises(everstep.TinkerError, match="no"):
            await future
        with pytest.raises(everstep.TinkerError, match="no"):
            await future.result_async(T)

    with pytest.raises(everstep.TinkerError, match="no"):
        future.result(T)
    asyncio.run(read())
    assert isinstance(future.future().exception(T), everstep.TinkerError)


def test_timeouts_raise_the_builtin_and_do_not_cancel(gate: Gate) -> None:
    future = APIFuture.of(gate.work())
    with pytest.raises(TimeoutError):
        future.result(0)
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)

    async def read() -> None:
        with pytest.raises(TimeoutError):
            await future.result_async(0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(future, 0.01)

    asyncio.run(read())
    assert not future.done() and not future.future().cancelled()
    gate.end(1)
    assert future.result(T) == 1


def test_cancelled_waiter_does_not_cancel_the_request(gate: Gate) -> None:
    future = APIFuture.of(gate.work())

    async def read() -> None:
        task = asyncio.create_task(future.coroutine())
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(read())
    assert not future.done()
    gate.end(1)
    assert future.result(T) == 1


def test_standard_library_future_can_be_awaited_and_cancelled(gate: Gate) -> None:
    other = Gate()
    first, second = APIFuture.of(gate.work()), APIFuture.of(other.work())
    gate.end(1)
    futures = [first.future(), second.future()]
    done, left = concurrent.futures.wait(futures, T, return_when="FIRST_COMPLETED")
    assert done == {futures[0]} and left == {futures[1]}
    called = threading.Event()
    futures[1].add_done_callback(lambda future: called.set())
    assert futures[1].cancel() and called.wait(T)
    with pytest.raises(concurrent.futures.CancelledError):
        second.result(T)

    async def read() -> None:
        with pytest.raises((asyncio.CancelledError, concurrent.futures.CancelledError)):
            await second

    asyncio.run(read())


def test_blocking_result_in_a_coroutine_warns(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    future: APIFuture[int] = APIFuture.of(gate.work())

    async def block() -> int:
        threading.Timer(0.01, gate.end, [3]).start()
        return future.result(T)

    with caplog.at_level(logging.WARNING, "everstep.client"):
        assert asyncio.run(block()) == 3
    assert "await the future instead" in caplog.text
    caplog.clear()

    async def read() -> int:
        return future.result()

    assert asyncio.run(read()) == 3
    assert not caplog.records  # a result that is done doesn't block


def test_blocking_result_in_a_notebook_does_not_warn(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As IPython does, so that code can see that it is typed."""
    monkeypatch.setattr("sys.ps1", "In : ", raising=False)
    future = APIFuture.of(gate.work())

    async def cell() -> Any:
        threading.Timer(0.01, gate.end, (5,)).start()
        return future.result(T)

    assert asyncio.run(cell()) == 5
    assert caplog.messages == []


def test_future_shows_its_state(gate: Gate) -> None:
    future = APIFuture.of(gate.work())
    assert repr(future) == "<APIFuture: pending>"
    gate.end([1])
    future.result(T)
    assert repr(future) == "<APIFuture: [1]>"
    failing = Gate()
    failed_one = APIFuture.of(failing.work())
    failing.fail(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        failed_one.result(T)
    assert repr(failed_one) == "<APIFuture: failed: ValueError('no')>"


def test_clients_show_what_they_are(client: Any, run: Any) -> None:
    session = client.holder.opened
    assert repr(client) == f"<ServiceClient {client.base_url}: session {session}>"
    assert repr(run) == f"<TrainingClient {run.model_id}: {MODEL}>"
    assert repr(client.create_rest_client()) == f"<RestClient {client.base_url}>"


def test_blocking_result_on_the_clients_loop_raises(gate: Gate) -> None:
    future: APIFuture[int] = APIFuture.of(gate.work())

    async def on_the_loop() -> int:
        return future.result()

    with pytest.raises(RuntimeError, match="own event loop"):
        submit(on_the_loop()).result(T)
    gate.end(4)
    assert future.result(T) == 4
    assert submit(on_the_loop()).result(T) == 4


def test_forked_child_gets_its_own_loop() -> None:
    async def pid() -> int:
        import os

        return os.getpid()

    def child(pipe: Any) -> None:
        pipe.send(submit(pid()).result(T))

    assert submit(pid()).result(T) == multiprocessing.current_process().pid
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    assert ours.poll(T) and ours.recv() == process.pid
    process.join(T)
    assert process.exitcode == 0


def test_client_future_can_be_used_as_the_client(fake: FakeService, client: Any) -> None:
    created = client.create_lora_training_client(MODEL)
    with pytest.warns(FutureWarning):
        model_id = created.model_id
    assert model_id == created.result(T).model_id
    assert not hasattr(created, "__no_such__") and not hasattr(created, "_no_such")
    with pytest.warns(FutureWarning), pytest.raises(AttributeError):
        created.no_such  # noqa: B018


def test_client_works_in_coroutines(fake: FakeService, client: Any) -> None:
    async def script() -> list[Any]:
        run = await client.create_lora_training_client(MODEL)
        futures = [run.optim_step(ADAM) for _ in range(3)]
        steps = [await future for future in futures]
        older = await (await run.optim_step_async(ADAM))
        sampler = await run.save_weights_and_get_sampling_client_async()
        sampled = await asyncio.wait_for(
            sampler.sample(
                everstep.ModelInput.from_ints([1]), 1, everstep.SamplingParams(max_tokens=3)
            ),
            T,
        )
        return [
            *(step.metrics["step:max"] for step in [*steps, older]),
            sampled.sequences[0].tokens,
        ]

    assert asyncio.run(script()) == [1.0, 2.0, 3.0, 4.0, [0, 1, 2]]
    assert asyncio.run(script())[0] == 1.0  # another loop, same client


# Hooks


class Hooked:
    """A client whose events are recorded."""

    def __init__(self, fake: FakeService, *more: Any) -> None:
        self.events: list[everstep.RequestEvent] = []
        self.client = everstep.ServiceClient(
            base_url=fake.url, api_key="tml-test", hooks=[*more, self.events.append]
        )


def test_hook_gets_every_operation(fake: FakeService, clock: Clock) -> None:
    hooked = Hooked(fake)
    run = hooked.client.create_lora_training_client(MODEL).result(T)
    run.optim_step(ADAM).result(T)
    run.save_state("a").result(T)
    sampler = run.save_weights_and_get_sampling_client().result(T)
    sampler.sample(
        everstep.ModelInput.from_ints([1]), 1, everstep.SamplingParams(max_tokens=3)
    ).result(T)
    path = "tinker://session-0:train:0/weights/a"
    hooked.client.create_training_client_from_state(path, weights_access_token="secret").result(T)
    seen = [(e.request_type, e.run_id, e.seq_id, e.outcome, e.error) for e in hooked.events]
    run_id = "session-0:train:0"
    assert seen == [
        ("CreateModel", run_id, 0, "succeeded", None),
        ("OptimStep", run_id, 1, "succeeded", None),
        ("SaveWeights", run_id, 2, "succeeded", None),
        ("SaveWeightsForSampler", run_id, 3, "succeeded", None),
        ("Sample", None, 0, "succeeded", None),
        ("LoadWeights", "session-0:train:1", 1, "succeeded", None),
    ]
    assert [e.sampler_id for e in hooked.events] == [None] * 4 + ["session-0:sample:0", None]
    assert not any(secret in repr(hooked.events) for secret in ("secret", "tml-test"))
    assert {event.session_id for event in hooked.events} == {"session-0"}
    assert all(0 <= event.duration_s < T for event in hooked.events)
    hooked.client.close().result(T)


def test_hook_gets_failures(fake: FakeService, clock: Clock) -> None:
    hooked = Hooked(fake)
    fake.script("/create_model", Refused(400))
    with pytest.raises(everstep.BadRequestError):
        hooked.client.create_lora_training_client(MODEL).result(T)
    (refused,) = hooked.events
    assert (refused.run_id, refused.outcome) == ("session-0:train:0", "failed")
    hooked.events.clear()
    run = hooked.client.create_lora_training_client(MODEL).result(T)
    fake.script("/retrieve_future", failed("too long"), where=fake.polls_of(1))
    fake.script("/save_weights", Refused(400, consumes=True))
    fake.hold_result(3, run.model_id)
    with pytest.raises(everstep.RequestFailedError):
        run.optim_step(ADAM).result(T)
    with pytest.raises(everstep.BadRequestError):
        run.save_state("a").result(T)
    seen = [(e.request_type, e.seq_id, e.outcome, e.error) for e in hooked.events[1:]]
    assert seen == [
        ("OptimStep", 1, "failed", "too long"),
        ("SaveWeights", 2, "failed", "Error code: 400 - {'detail': 'scripted'}"),
    ]
    cancelled = run.optim_step(ADAM)
    fake.arrived("/optim_step", 2)
    cancelled.future().cancel()
    submit(asyncio.sleep(0)).result(T)
    fake.release_result(3, run.model_id)
    run.optim_step(ADAM).result(T)
    assert [(e.outcome, e.error) for e in hooked.events[3:]] == [
        ("failed", "CancelledError"),
        ("succeeded", None),
    ]
    hooked.client.close().result(T)


def test_raising_hook_is_logged_and_ignored(
    fake: FakeService, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(event: everstep.RequestEvent) -> None:
        raise ValueError("a hook's own")

    hooked = Hooked(fake, wrong)
    run = hooked.client.create_lora_training_client(MODEL).result(T)
    assert run.optim_step(ADAM).result(T).metrics == {"step:max": 1.0}
    assert len(hooked.events) == 2  # later hooks are called
    assert "a hook's own" in caplog.text
    hooked.client.close().result(T)


def test_hook_that_blocks_on_the_client_gets_an_error(
    fake: FakeService, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(event: everstep.RequestEvent) -> None:
        if event.request_type == "OptimStep":
            run.save_state("a").result(T)

    hooked = Hooked(fake, wrong)
    run: Any = hooked.client.create_lora_training_client(MODEL).result(T)
    assert run.optim_step(ADAM).result(T).metrics == {"step:max": 1.0}
    assert "own event loop" in caplog.text
    hooked.client.close().result(T)


def test_refused_session_is_reported_once(fake: FakeService, clock: Clock) -> None:
    hooked = Hooked(fake)
    fake.script("/create_session", Refused(401))
    with pytest.raises(everstep.AuthenticationError):
        hooked.client.create_lora_training_client(MODEL).result(T)
    assert len(fake.to("/create_session")) == 1
    (event,) = hooked.events
    assert (event.outcome, event.session_id, event.seq_id) == ("failed", "", 0)
    assert hooked.client.create_lora_training_client(MODEL).result(T).model_id
    hooked.client.close().result(T)
