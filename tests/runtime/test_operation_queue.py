"""OperationQueue: what a run reads of its queue, and what of it is held in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from everstep.ledger import Ledger, LedgerDamaged, NewOperation, Operation
from everstep.ledger.payload_log.contents import LOGGED_BYTES
from everstep.ledger.payload_log.segments import segments_path
from everstep.runtime.execution.operation_queue import PAGE_SIZE, OperationQueue

RUN = "s:train:0"
KIND = "sample"  # logged as passes are, but not read by the worker
LARGE = 2 * LOGGED_BYTES
FAR = 3 * PAGE_SIZE


class Reads:
    """A run's queue on a ledger, and how often it reads a page."""

    def __init__(self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ledger = ledger
        self.queue = OperationQueue(ledger, RUN)
        self.pages = 0
        read = ledger.operations

        async def counted(*arguments: Any, **options: Any) -> list[Operation]:
            self.pages += options.get("status") is None
            return await read(*arguments, **options)

        monkeypatch.setattr(ledger, "operations", counted)

    async def accept(self, seq_id: int, size: int = 10) -> Operation:
        """Accept an operation and add it to the queue, as an arrival is."""
        new = NewOperation(RUN, seq_id, KIND, bytes([seq_id % 251]) * size)
        operation, _ = await self.ledger.accept(new)
        self.queue.push(operation)
        return operation

    async def drain(self, first: int, upto: int) -> list[Operation]:
        """Take operations in order. All of them have to be there."""
        found = [await self.queue.next(seq_id) for seq_id in range(first, upto + 1)]
        return [each for each in found if each is not None]


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Any) -> None:
    async def opened() -> None:
        ledger = await Ledger.open(tmp_path / "ledger.sqlite")
        coroutine: Coroutine[Any, Any, None] = work(Reads(ledger, monkeypatch))
        await coroutine
        await ledger.close()

    asyncio.run(opened())


def test_arrivals_during_a_gap_read_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(reads: Reads) -> None:
        await reads.queue.reset()
        assert await reads.queue.next(1) is None
        before = reads.pages
        for seq_id in range(2, FAR):
            await reads.accept(seq_id)
            assert await reads.queue.next(1) is None
        assert reads.pages == before, "1 can't be in the ledger: it would have been pushed"
        await reads.accept(1)
        found = await reads.drain(1, FAR - 1)
        assert [each.seq_id for each in found] == list(range(1, FAR))
        assert reads.pages <= before + FAR // PAGE_SIZE + 1

    run(tmp_path, monkeypatch, work)


@pytest.mark.parametrize("order", ["forward", "backward", "inside out"])
def test_every_operation_comes_in_order_however_they_arrive(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(reads: Reads) -> None:
        arrivals = list(range(1, FAR + 1))
        if order == "backward":
            arrivals.reverse()
        if order == "inside out":
            arrivals.sort(key=lambda seq_id: abs(seq_id - FAR // 2))
        for seq_id in arrivals:
            await reads.accept(seq_id)
            assert len(reads.queue._held) <= PAGE_SIZE
        found = await reads.drain(1, FAR)
        assert [each.seq_id for each in found] == list(range(1, FAR + 1))
        assert not reads.queue

    run(tmp_path, monkeypatch, work)


def test_operation_that_arrives_while_a_page_is_read_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(reads: Reads) -> None:
        for seq_id in range(1, PAGE_SIZE + 1):
            await reads.accept(seq_id)
        await reads.queue.reset()
        first, *_ = await asyncio.gather(
            reads.queue.next(1), *[reads.accept(n) for n in range(PAGE_SIZE + 1, FAR + 1)]
        )
        assert first is not None
        assert len(await reads.drain(2, FAR)) == FAR - 1

    run(tmp_path, monkeypatch, work)


def test_retry_of_an_operation_that_was_taken_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(reads: Reads) -> None:
        first = await reads.accept(1)
        assert [each.seq_id for each in await reads.drain(1, 1)] == [1]
        reads.queue.push(first)
        assert not reads.queue, "else the run would wait for a gap that there is none of"
        assert await reads.queue.reset() == 1
        reads.queue.push(first)
        assert [each.seq_id for each in await reads.drain(1, 1)] == [1], "a recovery takes it again"

    run(tmp_path, monkeypatch, work)


def test_large_requests_wait_outside_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(reads: Reads) -> None:
        for seq_id in range(1, 9):
            await reads.accept(seq_id, LARGE)
        assert [each.payload for each in reads.queue._held.values()] == [b""] * 8
        found = await reads.drain(1, 4)
        assert [each.payload for each in found] == [bytes([n]) * LARGE for n in range(1, 5)]
        assert await reads.queue.reset() == 1
        found = await reads.drain(5, 8)
        assert [each.payload for each in found] == [bytes([n]) * LARGE for n in range(5, 9)]
        assert all(not each.payload for each in reads.queue._held.values())

    run(tmp_path, monkeypatch, work)


def test_damaged_request_is_found_when_its_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(reads: Reads) -> None:
        for seq_id in (1, 2):
            await reads.accept(seq_id, LARGE)
        (segment,) = segments_path(tmp_path / "ledger.sqlite").iterdir()
        whole = bytearray(segment.read_bytes())
        whole[-1] ^= 1
        segment.write_bytes(whole)
        first = await reads.queue.next(1)
        assert first is not None and first.payload == b"\1" * LARGE
        with pytest.raises(LedgerDamaged, match=f"request of operation 2 .* of {RUN} is damaged"):
            await reads.queue.next(2)

    run(tmp_path, monkeypatch, work)
