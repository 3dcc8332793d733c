"""Byte budgets: bytes in flight stay within the service's flags, in request order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import everstep
from everstep.client._transport.byte_budget import ByteBudget, prompt_bytes
from tests.client.fake_service import (
    GIVE_UP_SECONDS,
    MODEL,
    FakeService,
    Held,
    Lost,
    Refused,
    metadata,
)
from tests.client.fixtures import Clock

T = GIVE_UP_SECONDS
PARAMS = everstep.SamplingParams(max_tokens=3)


def datum(index: int = 0) -> everstep.Datum:
    """A datum of 32 bytes in a request: two tokens and two weights of 4, two targets of 8."""
    return everstep.Datum(
        model_input=everstep.ModelInput.from_ints([index, 1]),
        loss_fn_inputs={"target_tokens": [1, 2], "weights": [1.0, 1.0]},
    )


class Reservations:
    """Tasks that hold a reservation until they are released."""

    def __init__(self, total: int) -> None:
        self.budget = ByteBudget(total)
        self.holding: list[str] = []
        self._gates: dict[str, asyncio.Event] = {}

    def reserve(self, name: str, size: int) -> asyncio.Task[None]:
        self._gates[name] = asyncio.Event()

        async def hold() -> None:
            async with self.budget.reserve(size):
                self.holding.append(name)
                try:
                    await self._gates[name].wait()
                finally:
                    self.holding.remove(name)

        return asyncio.create_task(hold())

    async def settled_holders(self) -> list[str]:
        """Return the holders once all tasks are blocked."""
        for _ in range(10):
            await asyncio.sleep(0)
        return list(self.holding)

    async def release(self, name: str) -> list[str]:
        self._gates[name].set()
        return await self.settled_holders()


def test_bytes_are_reserved_in_request_order() -> None:
    async def script() -> None:
        held = Reservations(100)
        tasks = [held.reserve(n, s) for n, s in (("a", 60), ("b", 50), ("c", 40), ("d", 10))]
        assert await held.settled_holders() == ["a"]  # c and d would fit, but don't overtake b
        assert await held.release("a") == ["b", "c", "d"]
        for name in "bcd":
            await held.release(name)
        await asyncio.gather(*tasks)
        assert held.holding == []

    asyncio.run(script())


def test_oversized_reservation_gets_the_budget_alone() -> None:
    async def script() -> None:
        held = Reservations(100)
        tasks = [held.reserve(n, s) for n, s in (("a", 1), ("huge", 10**9), ("b", 1))]
        assert await held.settled_holders() == ["a"]
        assert await held.release("a") == ["huge"]
        assert await held.release("huge") == ["b"]
        await held.release("b")
        await asyncio.gather(*tasks)

    asyncio.run(script())


@pytest.mark.parametrize("moment", ["while it waits", "as it is granted", "while it holds"])
def test_cancelled_reservation_is_released(moment: str) -> None:
    async def script() -> None:
        held = Reservations(100)
        first, second, third = (
            held.reserve("a", 100),
            held.reserve("b", 100),
            held.reserve("c", 100),
        )
        assert await held.settled_holders() == ["a"]
        if moment == "as it is granted":
            first.cancel()
            await asyncio.sleep(0)  # a releases, b is granted but has not run yet
            assert held.holding == []
        elif moment == "while it holds":
            assert await held.release("a") == ["b"]
        second.cancel()
        if moment == "while it waits":
            assert await held.settled_holders() == ["a"]
            await held.release("a")
        assert await held.settled_holders() == ["c"]
        await held.release("c")
        await asyncio.gather(first, second, third, return_exceptions=True)
        async with held.budget.reserve(100):
            pass

    asyncio.run(asyncio.wait_for(script(), T))


def send_all_pending(client: Any) -> None:
    """Make a few requests, so that pending ones have been sent before."""
    for _ in range(3):
        client.get_server_capabilities()


def test_passes_stay_within_their_budget(fake: FakeService, client: Any) -> None:
    fake.config = {"fwdbwd_max_chunk_len": 1, "fwdbwd_dispatch_bytes_semaphore_size": 70}
    run = client.create_lora_training_client(MODEL).result(T)
    held = [Held() for _ in range(3)]
    for fault in held:
        fake.script("/forward_backward", fault)
    passed = run.forward_backward([datum(n) for n in range(5)], "cross_entropy")
    held[0].wait_for_arrival()
    held[1].wait_for_arrival()
    send_all_pending(client)
    assert len(fake.to("/forward_backward")) == 2  # of 32 bytes each
    held[0].release()
    held[2].wait_for_arrival()
    held[1].release()
    held[2].release()
    passed.result(T)
    assert fake.applied_ids()[1:] == [1, 2, 3, 4, 5]


def test_refused_pass_releases_its_bytes(fake: FakeService, client: Any) -> None:
    fake.config = {"fwdbwd_dispatch_bytes_semaphore_size": 1}
    run = client.create_lora_training_client(MODEL).result(T)
    fake.script("/forward_backward", Refused(400, consumes=True), Lost())
    with pytest.raises(everstep.BadRequestError):
        run.forward_backward([datum()], "cross_entropy").result(T)
    run.forward_backward([datum()], "cross_entropy").result(T)


def test_samples_stay_within_their_budget(fake: FakeService, client: Any) -> None:
    fake.config = {"sample_dispatch_bytes_semaphore_size": 50}
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    prompt = everstep.ModelInput.from_ints([1, 2, 3])
    assert prompt_bytes(prompt) == 30
    held = Held()
    fake.script("/asample", held)
    first, second = (sampler.sample(prompt, 1, PARAMS) for _ in range(2))
    held.wait_for_arrival()
    send_all_pending(client)
    assert len(fake.to("/asample")) == 1
    held.release()
    first.result(T)
    second.result(T)


def test_large_results_stay_within_their_budget(fake: FakeService, client: Any) -> None:
    fake.config = {"inflight_response_bytes_semaphore_size": 100}
    run = client.create_lora_training_client(MODEL).result(T)
    held = Held()
    for seq_id in (1, 2):
        fake.script("/retrieve_future", metadata(60), where=fake.polls_of(seq_id))
    fake.script(
        "/retrieve_future", held, where=lambda request: not request.body["allow_metadata_only"]
    )

    def fetched() -> int:
        polls = fake.to("/retrieve_future")
        return sum(not request.body["allow_metadata_only"] for request in polls)

    passes = [run.forward_backward([datum()], "cross_entropy") for _ in range(2)]
    held.wait_for_arrival()
    fake.arrived("/retrieve_future", 4)  # create_model, two sizes, one full result
    send_all_pending(client)
    assert fetched() == 1
    step = run.optim_step(everstep.AdamParams(learning_rate=0.1))
    step.result(T)  # a small result needs no budget
    held.release()
    for passed in passes:
        passed.result(T)
    assert fetched() == 2


# A busy service


def test_busy_service_is_retried_after_a_second(
    fake: FakeService, client: Any, clock: Clock
) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    fake.script("/asample", *[Refused(429)] * 2)
    sampler.sample(everstep.ModelInput.from_ints([1] * 13_107), 1, PARAMS).result(T)
    assert clock.waits == [1.0, 1.0]


def test_busy_service_is_retried_later_for_a_large_prompt(
    fake: FakeService, client: Any, clock: Clock
) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    fake.script("/asample", Refused(429))
    sampler.sample(everstep.ModelInput.from_ints([1] * 13_108), 1, PARAMS).result(T)
    assert clock.waits == [5.0]


def test_expired_sample_is_drawn_again_after_a_pause(
    fake: FakeService, client: Any, clock: Clock
) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    fake.script("/retrieve_future", Refused(410))
    sampler.sample(everstep.ModelInput.from_ints([1]), 1, PARAMS).result(T)
    assert clock.waits == [0.5]


@pytest.mark.parametrize(
    ("chunk", "size"),
    [
        (everstep.types.ImageChunk(data=b"12345", format="png"), 5),
        (everstep.types.DmelChunk(dmel=b"123"), 3),
        (everstep.types.ImageAssetPointerChunk(location="a://b", format="png"), 5),
    ],
    ids=lambda value: getattr(value, "type", ""),
)
def test_chunks_without_a_token_length_can_be_sampled(
    fake: FakeService, client: Any, chunk: Any, size: int
) -> None:
    prompt = everstep.ModelInput(chunks=[everstep.EncodedTextChunk(tokens=[1, 2]), chunk])
    assert prompt_bytes(prompt) == 20 + size
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    assert sampler.sample(prompt, 1, PARAMS).result(T).sequences[0].tokens == [0, 1, 2]
