"""The stop of polls: those that wait end, and those that need not wait give their results."""

from __future__ import annotations

import asyncio

import pytest

from everstep.server.stopping import Stopping


async def never(ended: list[str]) -> str:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append("cancelled")
    return "never"


async def at_once() -> str:
    return "result"


def test_polls_end_when_the_service_stops() -> None:
    async def work() -> None:
        stopping, ended = Stopping(), list[str]()
        polls = [asyncio.ensure_future(stopping.unless_set(never(ended))) for _ in range(3)]
        tasks = len(asyncio.all_tasks())
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == tasks, "a poll starts no task"
        assert not ended
        stopping.set()
        stopping.set()
        assert await asyncio.gather(*polls) == [None] * 3
        assert ended == ["cancelled"] * 3

    asyncio.run(work())


def test_poll_that_begins_during_the_stop_gives_a_result_that_is_there() -> None:
    async def work() -> None:
        stopping, ended = Stopping(), list[str]()
        stopping.set()
        assert await stopping.unless_set(at_once()) == "result"
        assert await stopping.unless_set(never(ended)) is None

    asyncio.run(work())


def test_poll_passes_on_its_own_errors_and_a_cancellation() -> None:
    async def fail() -> None:
        raise TimeoutError("its own")

    async def work() -> None:
        stopping, ended = Stopping(), list[str]()
        with pytest.raises(TimeoutError, match="its own"):
            await stopping.unless_set(fail())
        poll = asyncio.ensure_future(stopping.unless_set(never(ended)))
        await asyncio.sleep(0)
        poll.cancel()
        with pytest.raises(asyncio.CancelledError):
            await poll
        stopping.set()

    asyncio.run(work())
