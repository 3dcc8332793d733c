"""Payload log: what it acknowledged is there after any fault, and damage is never served."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

from everstep.ledger.payload_log.log import Location, PayloadLog, PayloadUnreadable
from everstep.ledger.payload_log.records import HEADER_BYTES, content_digest
from everstep.ledger.payload_log.segments import SegmentFiles, segment_path, segments_path
from everstep.testing import faulty
from everstep.testing.memoryfs import Log, Recorded

IDENTITY = "0123456789abcdef" * 2
SIZE = 5000


def files(home: Path, *, segment_bytes: int = 3 * SIZE) -> SegmentFiles:
    return SegmentFiles(home / "ledger.sqlite", IDENTITY, segment_bytes=segment_bytes)


def put(log: PayloadLog, content: bytes, *, settle: bool = True) -> Location:
    location = log.append(content, content_digest(content), "requests")
    if settle:
        log.settle(location)
    return location


def contents(count: int, size: int = SIZE) -> list[bytes]:
    return [random.Random(number).randbytes(size) for number in range(count)]


def segment(home: Path, number: int) -> Path:
    return segment_path(home / "ledger.sqlite", IDENTITY, number)


every_log = pytest.mark.parametrize("opened", [pytest.param(files, id="files")])


@every_log
def test_content_reads_as_it_was_appended(
    opened: Callable[[Path], PayloadLog], tmp_path: Path
) -> None:
    log = opened(tmp_path)
    written = contents(10)
    locations = [put(log, each) for each in written]
    assert [log.read(each) for each in locations] == written
    assert [each.digest for each in locations] == [content_digest(each) for each in written]
    assert len({each.segment for each in locations}) > 1
    log.close()


@every_log
def test_segment_is_droppable_once_it_is_full_released_and_settled(
    opened: Callable[[Path], PayloadLog], tmp_path: Path
) -> None:
    log = opened(tmp_path)
    first = put(log, contents(1)[0], settle=False)
    log.released([first.segment])
    assert log.droppable() == [], "it takes more contents"
    while put(log, contents(1)[0]).segment == first.segment:
        pass
    assert log.droppable() == [], "the row of the first may be on its way"
    log.settle(first)
    assert log.droppable() == [first.segment]
    assert log.droppable() == [], "each once"
    log.drop([first.segment])
    with pytest.raises(PayloadUnreadable, match="missing"):
        log.read(first)
    log.close()


def test_nothing_waits_for_a_content_that_is_being_written(tmp_path: Path) -> None:
    log = files(tmp_path)
    known = put(log, contents(1)[0], settle=False)
    begun, go_on, write = threading.Event(), threading.Event(), os.write

    def held(handle: int, data: bytes) -> int:
        begun.set()
        assert go_on.wait(60)
        return write(handle, data)

    with ThreadPoolExecutor(2) as threads, mock.patch.object(os, "write", held):
        appended = threads.submit(put, log, contents(2)[1])
        assert begun.wait(60)
        try:
            threads.submit(log.settle, known).result(60)
            assert threads.submit(log.read, known).result(60) == contents(1)[0]
        finally:
            go_on.set()
        assert log.read(appended.result(60)) == contents(2)[1]


def test_damaged_byte_anywhere_in_a_record_is_detected(tmp_path: Path) -> None:
    log = files(tmp_path)
    before, victim, after = (put(log, each) for each in contents(3))
    path = segment(tmp_path, victim.segment)
    whole = path.read_bytes()
    record = range(victim.offset, victim.offset + HEADER_BYTES + SIZE)
    for place in [*record[:HEADER_BYTES], *record[HEADER_BYTES::97]]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(PayloadUnreadable, match=path.name):
            log.read(victim)
        assert log.read(before) == contents(3)[0]
        assert log.read(after) == contents(3)[2]
    for end in (victim.offset, victim.offset + 5, victim.offset + HEADER_BYTES + SIZE - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(PayloadUnreadable, match="ends before it"):
            log.read(victim)


def test_record_of_another_place_is_never_served(tmp_path: Path) -> None:
    log = files(tmp_path)
    one, other = (put(log, each) for each in contents(2))
    with pytest.raises(PayloadUnreadable, match="another record"):
        log.read(Location(one.segment, one.offset, one.size, other.digest))
    with pytest.raises(PayloadUnreadable, match="no record"):
        log.read(Location(one.segment, one.offset + 1, one.size, one.digest))


@every_log
def test_copies_read_as_the_originals_and_damage_is_not_copied(
    opened: Callable[[Path], PayloadLog], tmp_path: Path
) -> None:
    log = opened(tmp_path)
    written = contents(7)
    originals = [put(log, each) for each in written]
    copies = log.copy(originals[1:6], "requests")
    assert [log.read(each) for each in copies] == written[1:6]
    assert len({each.segment for each in copies}) > 1
    assert {(each.segment, each.offset) for each in copies}.isdisjoint(
        (each.segment, each.offset) for each in originals
    )
    assert log.size(originals[0].segment) >= 3 * SIZE
    for at in copies:
        log.settle(at)
    log.drop([originals[0].segment])
    assert log.size(originals[0].segment) == 0
    with pytest.raises(PayloadUnreadable, match="missing"):
        log.copy([copies[0], originals[0]], "requests")
    log.close()


# Power cuts


def acknowledged(log: Log, position: int) -> list[Location]:
    """Return the contents that were acknowledged before an entry."""
    found = []
    for line in log.said(position):
        number, offset, size, digest = line.decode().split()
        found.append(Location(int(number), int(offset), int(size), bytes.fromhex(digest)))
    return found


def lost(home: Path, elsewhere: Path, forgotten: faulty.Sort | None = None) -> int:
    """Append under a recorder, and return how many power cuts lose an acknowledged content."""
    home.mkdir()
    with Recorded(home) as recorded, ExitStack() as stack:
        if forgotten is not None:
            stack.enter_context(faulty.without_fsync(forgotten))
        log = files(home)

        def acknowledge(at: Location) -> None:
            recorded.mark(f"{at.segment} {at.offset} {at.size} {at.digest.hex()}\n".encode())

        for each in contents(7):
            first = put(log, each)
            acknowledge(first)
        for at in log.copy([first], "requests"):
            log.settle(at)
            acknowledge(at)
        log.close()
    bad, chance, seen = 0, random.Random(1), 0
    for position in range(len(recorded.entries) + 1):
        for attempt in range(4):
            state = elsewhere / f"{position}-{attempt}"
            state.mkdir(parents=True)
            recorded.crash(position, chance, ordered=attempt % 2 == 0).write(state)
            after = files(state)
            known = acknowledged(recorded, position)
            seen += len(known)
            after.recover({each.segment for each in known})
            try:
                for location in known:
                    after.read(location)
                again = put(after, b"after" * 100)
                assert again.segment not in {each.segment for each in known}
                assert after.read(again) == b"after" * 100
            except PayloadUnreadable:
                bad += 1
            after.close()
    assert seen > 50
    return bad


def test_power_cut_at_any_call_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    assert lost(tmp_path / "home", tmp_path / "cuts") == 0


@pytest.mark.parametrize("sort", ["files", "directories"])
def test_power_cut_loses_contents_where_an_fsync_is_forgotten(
    sort: faulty.Sort, tmp_path: Path
) -> None:
    assert lost(tmp_path / "home", tmp_path / "cuts", sort) > 0


# Failing disks


def test_full_disk_gives_the_space_back_and_the_next_segment_goes_on(tmp_path: Path) -> None:
    log = files(tmp_path)
    kept = put(log, contents(1)[0])
    real = os.write

    def full(handle: int, data: bytes) -> int:
        if len(data) < SIZE:
            return real(handle, data)
        real(handle, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(os, "write", full), pytest.raises(OSError, match="space"):
        put(log, contents(2)[1])
    assert segment(tmp_path, kept.segment).stat().st_size == HEADER_BYTES + SIZE
    later = put(log, contents(2)[1])
    assert later.segment > kept.segment
    assert [log.read(each) for each in (kept, later)] == contents(2)


def test_segment_whose_fsync_failed_is_never_synced_again(tmp_path: Path) -> None:
    log = files(tmp_path)
    kept = put(log, contents(1)[0])
    with faulty.failing(tmp_path, "fsync", 1, errno.EIO) as failure:
        with pytest.raises(OSError, match="Input/output"):
            put(log, contents(2)[1])
        later = put(log, contents(2)[1])
    assert failure.fired
    assert failure.tried_again == []
    assert later.segment > kept.segment
    assert [log.read(each) for each in (kept, later)] == contents(2)


def test_contents_that_arrive_during_an_fsync_share_the_next_one(tmp_path: Path) -> None:
    log = files(tmp_path, segment_bytes=1 << 20)
    put(log, b"makes the segment")
    begun, gate, written = threading.Event(), threading.Event(), threading.Semaphore(0)
    synced: list[int] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 1:
            begun.set()
            assert gate.wait(60)
        real(handle)

    with (
        mock.patch.object(os, "fsync", fsync),
        mock.patch("everstep.ledger.payload_log.segments._WRITTEN", written.release),
        ThreadPoolExecutor(9) as pool,
    ):
        first = pool.submit(put, log, contents(1)[0])
        assert begun.wait(60)
        rest = [pool.submit(put, log, each) for each in contents(8)]
        for _ in range(9):
            assert written.acquire(timeout=60)
        gate.set()
        locations = [each.result(60) for each in rest]
        first.result(60)
    assert len(synced) == 2
    assert [log.read(each) for each in locations] == contents(8)


# Restarts


def test_restart_removes_what_nothing_names_and_begins_a_new_segment(tmp_path: Path) -> None:
    log = files(tmp_path, segment_bytes=1)
    locations = [put(log, each) for each in contents(4)]
    log.close()
    with segment(tmp_path, 4).open("ab") as torn:
        torn.write(b"torn")
    foreign = segment_path(tmp_path / "ledger.sqlite", "f" * 32, 9)
    foreign.write_bytes(b"of a database that was moved away")
    again = files(tmp_path)
    again.recover({2, 4})
    assert again.numbers() == [2, 4]
    assert foreign.exists()
    assert put(again, b"x").segment == 5
    assert [again.read(each) for each in (locations[1], locations[3])] == contents(4)[1::2]
    again.close()


def test_segment_that_rows_name_and_nobody_has_is_never_written_again(tmp_path: Path) -> None:
    log = files(tmp_path)
    log.recover({7})
    assert put(log, b"x").segment == 8
    log.close()


def test_home_without_large_contents_has_no_segments(tmp_path: Path) -> None:
    log = files(tmp_path)
    log.recover(set())
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert not segments_path(tmp_path / "ledger.sqlite").exists()
