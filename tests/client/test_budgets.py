"""How much a client has under way: not more bytes than the service asks for, in order, for all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import everstep
from everstep.client._budgets import ByteBudget, prompt_bytes
from tests.client.conftest import Clock
from tests.client.fake_service import (
    GIVE_UP_SECONDS,
    MODEL,
    FakeService,
    Held,
    Lost,
    Refused,
    metadata,
)

T = GIVE_UP_SECONDS
PARAMS = everstep.SamplingParams(max_tokens=3)


def datum(index: int = 0) -> everstep.Datum:
    """32 bytes in a request: two tokens and two weights of 4, two targets of 8."""
    return everstep.Datum(
        model_input=everstep.ModelInput.from_ints([index, 1]),
        loss_fn_inputs={"target_tokens": [1, 2], "weights": [1.0, 1.0]},
    )


class Reservations:
    """Tasks that reserve, and hold until they are let go."""

    def __init__(self, total: int) -> None:
        self.budget = ByteBudget(total)
        self.holding: list[str] = []
        self._gates: dict[str, asyncio.Event] = {}

    def ask(self, name: str, size: int) -> asyncio.Task[None]:
        self._gates[name] = asyncio.Event()

        async def hold() -> None:
            async with self.budget.reserve(size):
                self.holding.append(name)
                try:
                    await self._gates[name].wait()
                finally:
                    self.holding.remove(name)

        return asyncio.create_task(hold())

    async def settle(self) -> list[str]:
        """What is held once nothing moves any more."""
        for _ in range(10):
            await asyncio.sleep(0)
        return list(self.holding)

    async def let_go(self, name: str) -> list[str]:
        self._gates[name].set()
        return await self.settle()


def test_bytes_are_reserved_in_the_order_of_asking() -> None:
    async def script() -> None:
        held = Reservations(100)
        tasks = [held.ask(n, s) for n, s in (("a", 60), ("b", 50), ("c", 40), ("d", 10))]
        assert await held.settle() == ["a"]  # c and d would fit, and don't pass b
        assert await held.let_go("a") == ["b", "c", "d"]
        for name in "bcd":
            await held.let_go(name)
        await asyncio.gather(*tasks)
        assert held.holding == []

    asyncio.run(script())


def test_what_is_larger_than_the_budget_is_alone() -> None:
    async def script() -> None:
        held = Reservations(100)
        tasks = [held.ask(n, s) for n, s in (("a", 1), ("huge", 10**9), ("b", 1))]
        assert await held.settle() == ["a"]
        assert await held.let_go("a") == ["huge"]
        assert await held.let_go("huge") == ["b"]
        await held.let_go("b")
        await asyncio.gather(*tasks)

    asyncio.run(script())


@pytest.mark.parametrize("moment", ["while it waits", "as it is granted", "while it holds"])
def test_a_cancelled_reservation_leaves_no_byte_behind(moment: str) -> None:
    async def script() -> None:
        held = Reservations(100)
        first, second, third = held.ask("a", 100), held.ask("b", 100), held.ask("c", 100)
        assert await held.settle() == ["a"]
        if moment == "as it is granted":
            first.cancel()
            await asyncio.sleep(0)  # a gives back, b is granted and has not run yet
            assert held.holding == []
        elif moment == "while it holds":
            assert await held.let_go("a") == ["b"]
        second.cancel()
        if moment == "while it waits":
            assert await held.settle() == ["a"]
            await held.let_go("a")
        assert await held.settle() == ["c"]
        await held.let_go("c")
        await asyncio.gather(first, second, third, return_exceptions=True)
        async with held.budget.reserve(100):
            pass

    asyncio.run(asyncio.wait_for(script(), T))


def one_more_round(client: Any) -> None:
    """Whatever was to be sent has been sent."""
    for _ in range(3):
        client.get_server_capabilities().result(T)


def test_passes_are_sent_within_their_budget(fake: FakeService, client: Any) -> None:
    fake.config = {"fwdbwd_max_chunk_len": 1, "fwdbwd_dispatch_bytes_semaphore_size": 70}
    run = client.create_lora_training_client(MODEL).result(T)
    held = [Held() for _ in range(3)]
    for fault in held:
        fake.script("/forward_backward", fault)
    passed = run.forward_backward([datum(n) for n in range(5)], "cross_entropy")
    held[0].wait_for_arrival()
    held[1].wait_for_arrival()
    one_more_round(client)
    assert len(fake.to("/forward_backward")) == 2  # of 32 bytes each
    held[0].let_go()
    held[2].wait_for_arrival()
    held[1].let_go()
    held[2].let_go()
    passed.result(T)
    assert fake.applied_ids()[1:] == [1, 2, 3, 4, 5]


def test_a_pass_that_is_refused_gives_its_bytes_back(fake: FakeService, client: Any) -> None:
    fake.config = {"fwdbwd_dispatch_bytes_semaphore_size": 1}
    run = client.create_lora_training_client(MODEL).result(T)
    fake.script("/forward_backward", Refused(400, consumes=True), Lost())
    with pytest.raises(everstep.BadRequestError):
        run.forward_backward([datum()], "cross_entropy").result(T)
    run.forward_backward([datum()], "cross_entropy").result(T)


def test_samples_are_sent_within_their_budget(fake: FakeService, client: Any) -> None:
    fake.config = {"sample_dispatch_bytes_semaphore_size": 50}
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    prompt = everstep.ModelInput.from_ints([1, 2, 3])
    assert prompt_bytes(prompt) == 30
    held = Held()
    fake.script("/asample", held)
    first, second = (sampler.sample(prompt, 1, PARAMS) for _ in range(2))
    held.wait_for_arrival()
    one_more_round(client)
    assert len(fake.to("/asample")) == 1
    held.let_go()
    first.result(T)
    second.result(T)


def test_large_results_are_fetched_when_there_is_room_for_them(
    fake: FakeService, client: Any
) -> None:
    fake.config = {"inflight_response_bytes_semaphore_size": 100}
    run = client.create_lora_training_client(MODEL).result(T)
    held = Held()
    for place in (1, 2):
        fake.script("/retrieve_future", metadata(60), where=fake.polls_of(place))
    fake.script(
        "/retrieve_future", held, where=lambda request: not request.body["allow_metadata_only"]
    )

    def fetched() -> int:
        polls = fake.to("/retrieve_future")
        return sum(not request.body["allow_metadata_only"] for request in polls)

    passes = [run.forward_backward([datum()], "cross_entropy") for _ in range(2)]
    held.wait_for_arrival()
    fake.arrived("/retrieve_future", 4)  # of create_model, two sizes, one in full
    one_more_round(client)
    assert fetched() == 1
    step = run.optim_step(everstep.AdamParams(learning_rate=0.1))
    step.result(T)  # what is small needs no room
    held.let_go()
    for passed in passes:
        passed.result(T)
    assert fetched() == 2


# A busy service


def test_a_busy_service_is_asked_again_after_a_second(
    fake: FakeService, client: Any, clock: Clock
) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    fake.script("/asample", *[Refused(429)] * 2)
    sampler.sample(everstep.ModelInput.from_ints([1] * 13_107), 1, PARAMS).result(T)
    assert clock.waits == [1.0, 1.0]


def test_a_busy_service_is_given_more_time_for_a_large_prompt(
    fake: FakeService, client: Any, clock: Clock
) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    fake.script("/asample", Refused(429))
    sampler.sample(everstep.ModelInput.from_ints([1] * 13_108), 1, PARAMS).result(T)
    assert clock.waits == [5.0]


def test_a_sample_that_is_gone_is_drawn_anew_after_a_pause(
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
def test_what_has_no_length_in_tokens_is_sampled_from(
    fake: FakeService, client: Any, chunk: Any, size: int
) -> None:
    prompt = everstep.ModelInput(chunks=[everstep.EncodedTextChunk(tokens=[1, 2]), chunk])
    assert prompt_bytes(prompt) == 20 + size
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    assert sampler.sample(prompt, 1, PARAMS).result(T).sequences[0].tokens == [0, 1, 2]
