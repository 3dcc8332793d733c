"""Compaction: what is kept on the disk is bounded by what rows name, and nothing is ever lost."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from everstep.failpoints import VARIABLE
from everstep.ledger import Ledger, LedgerDamaged, NewOperation
from everstep.ledger.payload_log.records import HEADER_BYTES
from everstep.ledger.payload_log.segments import SegmentFiles
from everstep.testing import faulty
from tests.ledger.test_logged_contents import (
    KIND,
    RUN,
    SIZE,
    column,
    data,
    dropped,
    new,
    opened,
    run,
    segments,
)

PER_SEGMENT = 10
SEGMENT_BYTES = PER_SEGMENT * (SIZE + HEADER_BYTES)
KEPT_EVERY = 5
"""Of the contents of a segment, so that two are left: less than half."""


def small(ledger: Ledger) -> SegmentFiles:
    """Have ten contents fill a segment."""
    log = ledger._store.payloads
    assert isinstance(log, SegmentFiles)
    log._segment_bytes = SEGMENT_BYTES
    return log


async def fill(ledger: Ledger, count: int) -> None:
    """Fill segments with finished passes, in the order of their sequence ids, from 1."""
    small(ledger)
    for seq_id in range(1, count + 1):
        operation, _ = await ledger.accept(new(seq_id))
        await ledger.succeed(operation.request_id, b"{}", "json")


async def thin_out(ledger: Ledger, count: int) -> None:
    """Prune all passes but every fifth."""
    for seq_id in range(1, count + 1):
        if seq_id % KEPT_EVERY:
            await ledger.prune(RUN, after=seq_id - 1, upto=seq_id, kinds=[KIND])
    await dropped(ledger)


def size(home: Path) -> int:
    return sum(each.stat().st_size for each in segments(home).values())


async def check(ledger: Ledger, count: int) -> None:
    """Check that every pass is there that was not pruned."""
    found = {each.seq_id: each.payload for each in await ledger.operations(RUN)}
    kept = range(KEPT_EVERY, count + 1, KEPT_EVERY)
    assert {seq_id: found[seq_id] for seq_id in kept} == {seq_id: data(seq_id) for seq_id in kept}
    assert await ledger.find_damaged_rows() == []


def test_disk_use_is_bounded_by_what_is_left(tmp_path: Path) -> None:
    count = 8 * PER_SEGMENT + 1
    live = count // KEPT_EVERY * (SIZE + HEADER_BYTES)

    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await fill(ledger, count)
            assert size(tmp_path) > 4.5 * live
            await thin_out(ledger, count)
            assert size(tmp_path) < 2 * live + SEGMENT_BYTES
            await check(ledger, count)
        async with opened(tmp_path) as ledger:
            assert size(tmp_path) < 2 * live + SEGMENT_BYTES
            await check(ledger, count)

    run(work())


def test_results_are_moved_behind_other_results(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            small(ledger)
            ids = []
            for seq_id in range(2 * PER_SEGMENT):
                request = NewOperation("s:sample:0", seq_id, "sample", b"{}", is_sample=True)
                sample, _ = await ledger.accept(request)
                ids.append(sample.request_id)
                await ledger.samples.recorded.succeed(
                    sample.request_id, data(seq_id), seconds=0.0, recorded=None
                )
            await ledger.samples.drop_results("s:sample:0", range(99), ids[1:PER_SEGMENT])
            await dropped(ledger)
            assert len(segments(tmp_path)) == 2
            future = await ledger.operation(ids[0])
            assert future is not None and future.result == data(0)
            found = await ledger.operations("s:sample:0")
            assert [each.result for each in found[PER_SEGMENT:]] == [
                data(n) for n in range(PER_SEGMENT, 2 * PER_SEGMENT)
            ]

    run(work())


def test_segment_that_is_half_full_is_not_copied(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await fill(ledger, PER_SEGMENT + 1)
            before = {number: path.stat().st_size for number, path in segments(tmp_path).items()}
            await ledger.prune(RUN, after=0, upto=PER_SEGMENT // 2, kinds=[KIND])
            await dropped(ledger)
            found = {number: path.stat().st_size for number, path in segments(tmp_path).items()}
            assert found == before
            await ledger.prune(RUN, after=0, upto=PER_SEGMENT // 2 + 1, kinds=[KIND])
            await dropped(ledger)
            assert min(segments(tmp_path)) > min(before)

    run(work())


def test_what_a_worker_reads_stays_and_an_operation_in_hand_finds_what_was_moved(
    tmp_path: Path,
) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await fill(ledger, PER_SEGMENT + 1)
            old = (await ledger.operations(RUN, contents=False))[KEPT_EVERY - 1]
            async with ledger.contents.held(old) as found:
                assert found is not None
                await thin_out(ledger, PER_SEGMENT)
                part, at = found
                assert part.path.exists()
            await dropped(ledger)
            assert not part.path.exists()
            assert (await ledger.contents.fill(old)).payload == data(KEPT_EVERY)
            async with ledger.contents.held(old) as found:
                assert found is not None
                assert (found[1].digest, found[1] != at) == (at.digest, True)

    run(work())


# Faults


KILLED = """
import asyncio, sys
from pathlib import Path
from tests.ledger import test_compaction as t

async def work():
    async with t.opened(Path(sys.argv[1])) as ledger:
        await t.fill(ledger, t.PER_SEGMENT + 1)
        await t.thin_out(ledger, t.PER_SEGMENT)

asyncio.run(work())
"""


@pytest.mark.parametrize("moment", ["copied", "moved"])
def test_kill_during_compaction_loses_nothing(moment: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={**os.environ, VARIABLE: f"ledger.compaction.{moment}=kill"},
        cwd=Path(__file__).parents[2],
        timeout=120,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL

    async def work() -> None:
        async with opened(tmp_path) as ledger:
            small(ledger)
            await check(ledger, PER_SEGMENT)
            await ledger.accept(new(PER_SEGMENT + 2))
            await thin_out(ledger, PER_SEGMENT + 1)
            live = 3 * (SIZE + HEADER_BYTES)
            assert size(tmp_path) <= 2 * live, "it is compacted with the next drop"
            await check(ledger, PER_SEGMENT)

    run(work())


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_failing_disk_leaves_everything_where_it_is(call: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await fill(ledger, PER_SEGMENT + 1)
            with faulty.failing(tmp_path, call, 1, errno.ENOSPC) as failure:
                await thin_out(ledger, PER_SEGMENT)
            assert failure.fired
            await check(ledger, PER_SEGMENT)
            await ledger.prune(RUN, after=PER_SEGMENT, upto=PER_SEGMENT + 1, kinds=[KIND])
            await dropped(ledger)
            await check(ledger, PER_SEGMENT)

    run(work())


def flip(home: Path, request_id: str) -> None:
    path = segments(home)[column(home, "payload_segment", request_id)]
    whole = bytearray(path.read_bytes())
    whole[column(home, "payload_offset", request_id) + HEADER_BYTES + 5] ^= 1
    path.write_bytes(whole)


def forge(home: Path, request_id: str) -> None:
    with sqlite3.connect(home / "ledger.sqlite") as database:
        database.execute(
            "UPDATE operations SET payload_offset = 'x' WHERE request_id = ?", (request_id,)
        )


@pytest.mark.parametrize("harm", [flip, forge])
def test_damage_is_not_moved_and_is_still_named(
    harm: Callable[[Path, str], None], tmp_path: Path
) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await fill(ledger, PER_SEGMENT + 1)
            victim = (await ledger.operations(RUN))[KEPT_EVERY - 1]
        first = min(segments(tmp_path))
        harm(tmp_path, victim.request_id)
        async with opened(tmp_path) as ledger:
            await thin_out(ledger, PER_SEGMENT)
            assert first in segments(tmp_path), "for inspection"
            with pytest.raises(LedgerDamaged, match=f"operation {KEPT_EVERY} "):
                await ledger.operation_by_seq_id(RUN, KEPT_EVERY)
            whole = await ledger.operation_by_seq_id(RUN, 2 * KEPT_EVERY)
            assert whole is not None and whole.payload == data(2 * KEPT_EVERY)

    run(work())


def test_row_that_is_pruned_while_its_content_is_copied_names_no_copy(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            log = small(ledger)
            await fill(ledger, PER_SEGMENT + 1)
            loop, copy = asyncio.get_running_loop(), log.copy

            def pruned_meanwhile(*arguments: object) -> object:
                pruning = ledger.prune(RUN, after=0, upto=KEPT_EVERY, kinds=[KIND])
                copies = copy(*arguments)  # type: ignore[arg-type]
                asyncio.run_coroutine_threadsafe(pruning, loop).result(60)
                return copies

            with mock.patch.object(log, "copy", pruned_meanwhile):
                await thin_out(ledger, PER_SEGMENT)
            found = await ledger.operations(RUN)
            assert found[KEPT_EVERY - 1].pruned
            assert column(tmp_path, "payload_segment", found[KEPT_EVERY - 1].request_id) is None
            assert found[2 * KEPT_EVERY - 1].payload == data(2 * KEPT_EVERY)
            assert await ledger.find_damaged_rows() == []

    run(work())
