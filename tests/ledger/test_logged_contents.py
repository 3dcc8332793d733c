"""Large requests and results: written once, beside the rows, and as durable and whole as they."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
import sqlite3
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from everstep.ledger import (
    Ledger,
    LedgerDamaged,
    NewOperation,
    NotWritten,
    Operation,
    QueueFull,
    SequenceConflict,
)
from everstep.ledger.payload_log import content, contents
from everstep.ledger.payload_log.contents import LOGGED_BYTES
from everstep.ledger.payload_log.records import content_digest
from everstep.ledger.payload_log.segments import SegmentFiles, segments_path
from everstep.spool import Spool
from everstep.testing import faulty

RUN = "s:train:0"
SIZE = 2 * LOGGED_BYTES
KIND = "forward_backward"
MIB = 1 << 20
NO_PAYLOAD = Operation("x", RUN, 9, KIND, b"", "pending", None, None, None, datetime.now(UTC), None)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def data(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def new(seq_id: int, size: int = SIZE, **also: Any) -> NewOperation:
    return NewOperation(RUN, seq_id, KIND, data(seq_id, size), **also)


@asynccontextmanager
async def opened(home: Path) -> AsyncIterator[Ledger]:
    ledger = await Ledger.open(home / "ledger.sqlite")
    try:
        yield ledger
    finally:
        await ledger.close()


async def filled(home: Path, count: int = 3) -> list[Operation]:
    """Fill a ledger with finished passes and a pending one, each in a segment of its own."""
    async with opened(home) as ledger:
        small_segments(ledger)
        for seq_id in range(1, count + 1):
            operation, _ = await ledger.accept(new(seq_id))
            await ledger.succeed(operation.request_id, data(-seq_id), "protobuf")
        await ledger.accept(new(count + 1))
        return await ledger.operations(RUN)


def small_segments(ledger: Ledger) -> None:
    """Have every content begin a new segment."""
    log = ledger._store.payloads
    assert isinstance(log, SegmentFiles)
    log._segment_bytes = 1


def segments(home: Path) -> dict[int, Path]:
    """Return the segments that are there, by number."""
    directory = segments_path(home / "ledger.sqlite")
    found = sorted(directory.iterdir()) if directory.exists() else []
    return {int(each.stem.rpartition("-")[2]): each for each in found}


def column(home: Path, name: str, request_id: str) -> Any:
    with sqlite3.connect(home / "ledger.sqlite") as database:
        query = f"SELECT {name} FROM operations WHERE request_id = ?"
        return database.execute(query, (request_id,)).fetchone()[0]


async def dropped(ledger: Ledger) -> None:
    """Wait until the segments are gone that are being dropped."""
    dropping = ledger.contents._dropping
    if dropping is not None:
        await dropping


# What is kept


def test_large_contents_survive_a_restart_and_lie_outside_of_the_database(tmp_path: Path) -> None:
    async def work() -> None:
        before = await filled(tmp_path)
        assert [each.payload for each in before] == [data(n) for n in (1, 2, 3, 4)]
        assert [each.result for each in before] == [data(-1), data(-2), data(-3), None]
        async with opened(tmp_path) as ledger:
            assert await ledger.operations(RUN) == before
            assert await ledger.operation_by_seq_id(RUN, 2) == before[1]
            future = await ledger.operation(before[0].request_id)
            assert future is not None and future.result == data(-1)
            bare = await ledger.operations(RUN, contents=False)
            assert [(each.payload, each.result) for each in bare] == [(b"", None)] * 4
            assert [await ledger.contents.fill(each) for each in bare] == before
            assert await ledger.find_damaged_rows() == []
        assert (tmp_path / "ledger.sqlite").stat().st_size < 4 * SIZE
        reader = await Ledger.open_read_only(tmp_path / "ledger.sqlite")
        assert await reader.operations(RUN) == before
        await reader.close()

    run(work())


def test_small_contents_make_no_segment(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            operation, _ = await ledger.accept(new(1, LOGGED_BYTES - 1))
            await ledger.succeed(operation.request_id, data(2, LOGGED_BYTES - 1), "json")
            await ledger.accept(new(2, inline=True))
            assert len(await ledger.operations(RUN)) == 2
        assert segments(tmp_path) == {}

    run(work())


def test_contents_of_earlier_releases_stay_readable_in_their_rows(tmp_path: Path) -> None:
    async def work() -> None:
        with mock.patch.object(contents, "LOGGED_BYTES", 1 << 40):
            before = await filled(tmp_path)
        assert segments(tmp_path) == {}
        async with opened(tmp_path) as ledger:
            assert await ledger.operations(RUN) == before
            again, is_new = await ledger.accept(new(4))
            assert (again, is_new) == (before[3], False)
            await ledger.succeed(again.request_id, data(-4), "protobuf")
            await ledger.prune(RUN, after=0, upto=2, kinds=[KIND])
            found = await ledger.operations(RUN)
            assert [each.payload for each in found] == [b"", b"", data(3), data(4)]
            assert [each.result for each in found] == [data(-n) for n in (1, 2, 3, 4)]
            assert (await ledger.accept(new(1)))[0].request_id == before[0].request_id

    run(work())


# Retries


def test_retry_writes_nothing_and_another_content_conflicts(tmp_path: Path) -> None:
    async def work() -> None:
        before = await filled(tmp_path)
        async with opened(tmp_path) as ledger:
            written = {n: path.stat().st_size for n, path in segments(tmp_path).items()}
            for seq_id in (1, 4):
                known, is_new = await ledger.accept(new(seq_id))
                assert (known, is_new) == (before[seq_id - 1], False)
                other = NewOperation(RUN, seq_id, KIND, data(99))
                with pytest.raises(SequenceConflict):
                    await ledger.accept(other)
                known, _ = await ledger.accept(other, match_payload=False)
                assert known == before[seq_id - 1], "the payload that was accepted"
            assert written == {n: path.stat().st_size for n, path in segments(tmp_path).items()}
            await ledger.prune(RUN, after=0, upto=1, kinds=[KIND])
            known, _ = await ledger.accept(new(1))
            assert (known.request_id, known.payload) == (before[0].request_id, data(1))
            with pytest.raises(SequenceConflict):
                await ledger.accept(NewOperation(RUN, 1, KIND, data(99)))
            with pytest.raises(SequenceConflict):
                await ledger.accept(NewOperation(RUN, 1, KIND, b"small"))

    run(work())


def test_same_requests_at_once_are_accepted_once(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            accepted = await asyncio.gather(*[ledger.accept(new(1)) for _ in range(4)])
            assert sorted(is_new for _, is_new in accepted) == [False, False, False, True]
            assert len({each.request_id for each, _ in accepted}) == 1
            assert {each.payload for each, _ in accepted} == {data(1)}

    run(work())


# Damage


def harms() -> dict[str, Callable[[Path], object]]:
    def flip(path: Path) -> None:
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    return {"flip": flip, "cut": cut, "remove": Path.unlink}


@pytest.mark.parametrize("harm", harms())
@pytest.mark.parametrize("part", ["request", "result"])
def test_damaged_content_names_its_operation_and_harms_no_other(
    part: str, harm: str, tmp_path: Path
) -> None:
    name = "payload" if part == "request" else "result"

    async def work() -> None:
        before = await filled(tmp_path)
        victim = before[1]
        number = column(tmp_path, f"{name}_segment", victim.request_id)
        harms()[harm](segments(tmp_path)[number])
        expected = rf"The {part} of operation 2 \({KIND}\) of {RUN} is damaged: .*{number:010d}"
        async with opened(tmp_path) as ledger:
            with pytest.raises(LedgerDamaged, match=expected):
                await ledger.operations(RUN)
            with pytest.raises(LedgerDamaged, match=expected):
                await ledger.operation_by_seq_id(RUN, 2)
            if part == "result":
                with pytest.raises(LedgerDamaged, match=expected):
                    await ledger.operation(victim.request_id)
            else:
                future = await ledger.operation(victim.request_id)
                assert future is not None and future.result == victim.result
            assert await ledger.operation_by_seq_id(RUN, 3) == before[2]
            (found,) = await ledger.find_damaged_rows()
            assert f"The {part} of operation 2" in found
            failed = await ledger.mark_corrupted(RUN, "damaged")
            assert [each.seq_id for each in failed] == [4]

    run(work())


@pytest.mark.parametrize("name", ["segment", "offset", "size", "digest"])
@pytest.mark.parametrize("part", ["payload", "result"])
def test_damaged_location_is_detected(part: str, name: str, tmp_path: Path) -> None:
    async def work() -> None:
        before = await filled(tmp_path)
        with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
            other = before[2].request_id
            database.execute(
                f"UPDATE operations SET {part}_{name} = (SELECT {part}_{name} FROM operations "
                "WHERE request_id = ?) WHERE request_id = ?",
                (other, before[1].request_id),
            )
            if name != "digest":
                database.execute(
                    f"UPDATE operations SET {part}_{name} = {part}_{name} + 1 WHERE request_id = ?",
                    (before[1].request_id,),
                )
        async with opened(tmp_path) as ledger:
            with pytest.raises(LedgerDamaged, match="operation 2 "):
                await ledger.operations(RUN)

    run(work())


# Away


def test_pruning_drops_segments_that_nothing_names(tmp_path: Path) -> None:
    async def work() -> None:
        before = await filled(tmp_path)
        numbers = [column(tmp_path, "payload_segment", each.request_id) for each in before]
        async with opened(tmp_path) as ledger:
            await ledger.prune(RUN, after=0, upto=2, kinds=[KIND])
            await dropped(ledger)
            assert {*numbers[:2]}.isdisjoint(segments(tmp_path))
            assert {*numbers[2:]} <= segments(tmp_path).keys()
            found = await ledger.operations(RUN)
            assert [each.result for each in found] == [each.result for each in before]
            assert [each.payload for each in found[2:]] == [data(3), data(4)]
            assert await ledger.find_damaged_rows() == []
        async with opened(tmp_path) as ledger:
            assert await ledger.operations(RUN) == found

    run(work())


def test_segment_stays_as_long_as_one_request_in_it_is_needed(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            for seq_id in (1, 2):
                operation, _ = await ledger.accept(new(seq_id))
                await ledger.succeed(operation.request_id, b"{}", "json")
            small_segments(ledger)
            await ledger.accept(new(3))
            assert len(segments(tmp_path)) == 2, "the first has both passes, and is full"
            await ledger.prune(RUN, after=0, upto=1, kinds=[KIND])
            await dropped(ledger)
            found = await ledger.operations(RUN)
            assert [each.payload for each in found] == [b"", data(2), data(3)]
            await ledger.prune(RUN, after=1, upto=2, kinds=[KIND])
            await dropped(ledger)
            assert len(segments(tmp_path)) == 1

    run(work())


def test_held_request_stays_where_it_is_however_often_its_row_is_pruned(tmp_path: Path) -> None:
    async def work() -> None:
        before = await filled(tmp_path)
        bare = before[0].without_contents()
        async with opened(tmp_path) as ledger:
            async with ledger.contents.held(bare) as found, ledger.contents.held(bare):
                assert found is not None
                part, at = found
                await ledger.prune(RUN, after=0, upto=1, kinds=[KIND])
                await dropped(ledger)
                await ledger.prune(RUN, after=1, upto=2, kinds=[KIND])
                await dropped(ledger)
                assert at.segment in segments(tmp_path)
                with part.path.open("rb") as file:
                    file.seek(part.offset)
                    assert file.read(at.size) == data(1)
                assert (at.size, at.digest) == (SIZE, content_digest(data(1)))
            await dropped(ledger)
            assert at.segment not in segments(tmp_path), "once it is let go of"
            async with ledger.contents.held(bare) as found:
                assert found is None, "it was dropped"
            async with ledger.contents.held(await rebuilt(ledger, 3)) as found:
                assert found is not None
            async with ledger.contents.held(NO_PAYLOAD) as found:
                assert found is None

    async def rebuilt(ledger: Ledger, seq_id: int) -> Operation:
        return (await ledger.operations(RUN, contents=False))[seq_id - 1]

    run(work())


def test_request_that_is_held_while_its_segment_is_dropped_is_kept(tmp_path: Path) -> None:
    """It is held after its segment was found to be unnamed, before it is removed."""

    async def work() -> None:
        before = await filled(tmp_path)
        async with opened(tmp_path) as ledger:
            log = ledger._store.payloads
            at = before[0].payload_at
            assert isinstance(log, SegmentFiles) and at is not None
            log.droppable()  # those of before the restart
            log.released([at.segment])
            assert log.droppable() == [at.segment]
            assert log.hold(at)
            log.drop([at.segment])
            assert log.read(at) == data(1)
            assert log.settle(at), "it is to be dropped now"
            assert log.droppable() == [at.segment]
            log.drop([at.segment])
            assert not log.hold(at)

    run(work())


def test_payload_that_is_pruned_with_its_result_goes_with_its_segment(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            small_segments(ledger)
            first, _ = await ledger.accept(new(1))
            await ledger.accept(new(2))
            assert len(segments(tmp_path)) == 2
            ended = await ledger.succeed(first.request_id, data(-1), "protobuf", prune=True)
            assert (ended.result, ended.payload) == (data(-1), b"")
            await dropped(ledger)
            found = await ledger.operations(RUN)
            assert [each.payload for each in found] == [b"", data(2)]
            assert found[0].pruned
            assert len(segments(tmp_path)) == 2, "of the second request, and of the result"

    run(work())


def test_dropped_results_of_samples_go_with_their_segments(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            small_segments(ledger)
            ended = []
            for seq_id in range(3):
                request = NewOperation("s:sample:0", seq_id, "sample", b"{}", is_sample=True)
                sample, _ = await ledger.accept(request)
                ended.append(
                    await ledger.samples.recorded.succeed(
                        sample.request_id, data(seq_id), seconds=0.0, recorded=None
                    )
                )
            (first, *_) = await ledger.samples.completions("s:sample:0", range(9), 0, 9)
            assert first.size == SIZE
            ids = [each.request_id for each in ended[:2]]
            await ledger.samples.drop_results("s:sample:0", range(9), ids)
            await dropped(ledger)
            assert len(segments(tmp_path)) == 1
            found = await ledger.operations("s:sample:0")
            assert [each.result for each in found] == [None, None, data(2)]
            assert [each.retrieved for each in found] == [True, True, False]
            assert await ledger.find_damaged_rows() == []

    run(work())


def test_failed_commit_leaves_nothing_that_a_restart_keeps(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            with (
                mock.patch.object(
                    type(ledger._store), "run", side_effect=NotWritten("the disk is full")
                ),
                pytest.raises(NotWritten),
            ):
                await ledger.accept(new(1))
            assert len(segments(tmp_path)) == 1
            assert await ledger.operations(RUN) == []
        async with opened(tmp_path) as ledger:
            assert segments(tmp_path) == {}

    run(work())


def test_cancelled_request_does_not_keep_its_segment(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            log = ledger._store.payloads
            assert isinstance(log, SegmentFiles)
            begun, gate, append = threading.Event(), threading.Event(), log.append

            def held(*arguments: Any) -> Any:
                begun.set()
                assert gate.wait(60)
                return append(*arguments)

            with mock.patch.object(log, "append", held):
                request = asyncio.create_task(ledger.accept(new(1)))
                assert await asyncio.to_thread(begun.wait, 60)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)
                assert request.cancelled()
                gate.set()
                await asyncio.to_thread(ledger.contents._threads.shutdown)
            assert len(segments(tmp_path)) == 1, "it was written"
            assert not log._unsettled

    run(work())


# Failing disks


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_failing_disk_refuses_the_request_and_keeps_the_others(call: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            small_segments(ledger)
            first, _ = await ledger.accept(new(1))
            failing = faulty.failing(tmp_path, call, 1, errno.ENOSPC)
            with failing as failure, pytest.raises(NotWritten, match="space"):
                await ledger.accept(new(2))
            assert failure.fired
            accepted, is_new = await ledger.accept(new(2))
            assert is_new
            failing = faulty.failing(tmp_path, call, 1, errno.ENOSPC)
            with failing, pytest.raises(NotWritten, match="space"):
                await ledger.succeed(first.request_id, data(-1), "protobuf")
            await ledger.succeed(first.request_id, data(-1), "protobuf")
            found = await ledger.operations(RUN)
            assert [each.payload for each in found] == [data(1), data(2)]
            assert [each.result for each in found] == [data(-1), None]
            assert accepted.request_id == found[1].request_id

    run(work())


# Costs, in bytes


@pytest.mark.parametrize("size", [MIB, 16 * MIB])
def test_pass_is_written_once_from_its_acceptance_to_its_pruning(size: int, tmp_path: Path) -> None:
    log = tmp_path / "ledger.sqlite-wal"
    passes = 3

    async def work() -> None:
        async with opened(tmp_path) as ledger:
            pragma = "PRAGMA wal_autocheckpoint=0"
            await ledger._store.run(lambda c: c.exec_driver_sql(pragma).scalar())
            small_segments(ledger)
            before, written = log.stat().st_size, 0
            for seq_id in range(passes):
                accepted, _ = await ledger.accept(new(seq_id, size))
                await ledger.succeed(accepted.request_id, b"{}", "json")
                written += max(segments(tmp_path).items())[1].stat().st_size
                await ledger.prune(RUN, after=seq_id - 1, upto=seq_id, kinds=[KIND])
            written += log.stat().st_size - before
            assert passes * size < written < 1.1 * passes * size

    run(work())


def test_change_of_status_touches_no_content(tmp_path: Path) -> None:
    """What it costs others does not depend on the size of the pass."""

    async def work() -> None:
        async with opened(tmp_path) as ledger:
            accepted, _ = await ledger.accept(new(1, 16 * MIB))
            log = ledger._store.payloads
            forbidden = AssertionError("the content was read")
            wal = tmp_path / "ledger.sqlite-wal"
            before = wal.stat().st_size
            with (
                mock.patch.object(log, "read", side_effect=forbidden),
                mock.patch.object(content, "content_digest", side_effect=forbidden),
            ):
                await ledger.succeed(accepted.request_id, b"{}", "json")
                await ledger.prune(RUN, after=0, upto=1, kinds=[KIND])
            assert wal.stat().st_size - before < 64 << 10

    run(work())


async def synced(work: Awaitable[Any]) -> list[Path]:
    """Return the files that Python code synced meanwhile. SQLite's own are not among them."""
    with faulty.without_fsync(0) as called:
        await work
        return list(called)


def test_large_request_takes_one_more_fsync_and_a_small_one_none(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await ledger.accept(new(1))
            commits = ledger.commits
            calls = await synced(ledger.accept(new(2)))
            assert [each.suffix for each in calls] == [".segment"]
            assert await synced(ledger.accept(new(3, 100))) == []
            assert ledger.commits - commits <= 3, "a look at the queue, and the rows"

    run(work())


# Spools


def spooled(content: bytes) -> Spool:
    spool = Spool()
    spool.write(content)
    return spool


def test_contents_in_spools_are_kept_as_those_in_memory(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            for seq_id, size in ((1, SIZE), (2, 10)):
                large = size >= LOGGED_BYTES
                sent = NewOperation(RUN, seq_id, KIND, spooled(data(seq_id, size)))
                operation, is_new = await ledger.accept(sent)
                row = b"" if large else data(seq_id, size)
                assert (operation.payload, is_new) == (row, True)
                assert (operation.payload_at is not None) == large
                again, is_new = await ledger.accept(sent)
                assert (again.request_id, is_new) == (operation.request_id, False)
                same, is_new = await ledger.accept(new(seq_id, size))
                assert (same.request_id, same.payload, is_new) == (
                    operation.request_id,
                    data(seq_id, size),
                    False,
                )
                with pytest.raises(SequenceConflict):
                    await ledger.accept(NewOperation(RUN, seq_id, KIND, spooled(data(9, size))))
                result = spooled(data(-seq_id, size))
                ended = await ledger.succeed(operation.request_id, result, "protobuf")
                assert ended.result == (None if large else data(-seq_id, size))
                future = await ledger.operation(operation.request_id)
                assert future is not None and future.result == data(-seq_id, size)
            found = await ledger.operations(RUN)
            assert [each.payload for each in found] == [data(1), data(2, 10)]
            assert await ledger.find_damaged_rows() == []

    run(work())


def test_retry_in_a_spool_matches_a_row_of_an_earlier_release(tmp_path: Path) -> None:
    async def work() -> None:
        with mock.patch.object(contents, "LOGGED_BYTES", 1 << 40):
            before = await filled(tmp_path)
        async with opened(tmp_path) as ledger:
            known, is_new = await ledger.accept(NewOperation(RUN, 4, KIND, spooled(data(4))))
            assert (known.request_id, is_new) == (before[3].request_id, False)
            with pytest.raises(SequenceConflict):
                await ledger.accept(NewOperation(RUN, 4, KIND, spooled(data(5))))
            await ledger.succeed(known.request_id, b"{}", "json")
            await ledger.prune(RUN, after=0, upto=4, kinds=[KIND])
            assert not (await ledger.accept(NewOperation(RUN, 4, KIND, spooled(data(4)))))[1]
            with pytest.raises(SequenceConflict):
                await ledger.accept(NewOperation(RUN, 4, KIND, spooled(data(5))))

    run(work())


def test_content_in_a_spool_is_never_copied_into_the_interpreter(tmp_path: Path) -> None:
    """Freeing 64 MiB takes its lock for 6 ms."""
    size = 16 * MIB

    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await ledger.accept(new(1))
            content, result = spooled(data(2, size)), spooled(data(3, size))
            tracemalloc.start()
            try:
                operation, _ = await ledger.accept(NewOperation(RUN, 2, KIND, content))
                await ledger.accept(NewOperation(RUN, 2, KIND, content))
                await ledger.succeed(operation.request_id, result, "protobuf")
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < MIB
            assert (await ledger.operations(RUN))[1].payload == data(2, size)

    run(work())


# The queue's bound


def test_queue_is_bounded_by_bytes_and_never_refuses_what_others_wait_for(tmp_path: Path) -> None:
    limit = 3 * SIZE

    async def work() -> None:
        async with opened(tmp_path) as ledger:
            for seq_id in (1, 3, 4):
                await ledger.accept(new(seq_id), max_queued=limit)
            with pytest.raises(QueueFull, match=f"{3 * SIZE} bytes of requests of {RUN}"):
                await ledger.accept(new(5), max_queued=limit)
            assert not (await ledger.accept(new(3), max_queued=limit))[1], "a retry"
            assert (await ledger.accept(new(2), max_queued=limit))[1], "3 and 4 wait for it"
            assert (await ledger.accept(new(5, 100), max_queued=limit))[1], "a small one"
            for each in (await ledger.operations(RUN))[:2]:
                await ledger.succeed(each.request_id, b"{}", "json")
            assert (await ledger.accept(new(6), max_queued=limit))[1]
            with pytest.raises(QueueFull):
                await ledger.accept(new(7), max_queued=limit)
            other = NewOperation("s:train:1", 1, KIND, data(1))
            assert (await ledger.accept(other, max_queued=limit))[1]

    run(work())


def test_a_pass_larger_than_the_queue_is_accepted_alone(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            assert (await ledger.accept(new(1), max_queued=1))[1]

    run(work())


def test_copy_of_a_home_with_its_segments_reads_alike(tmp_path: Path) -> None:
    async def work() -> None:
        before = await filled(tmp_path / "home")
        shutil.copytree(tmp_path / "home", tmp_path / "copy")
        async with opened(tmp_path / "copy") as ledger:
            assert await ledger.operations(RUN) == before

    (tmp_path / "home").mkdir()
    run(work())
