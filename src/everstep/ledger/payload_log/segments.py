"""Segment files: a payload log in a directory beside the database.

    ledger.sqlite.payloads/<identity of the database>-<number>.segment

A segment takes records until it has its size, or the process ends, or a write to it fails. The next
process begins with a new one, so a torn end is never written behind. Segments of another database,
one that was moved away, are left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from blake3 import blake3

from everstep.durable_files import sync_directory
from everstep.failpoints import Failpoint
from everstep.ledger.payload_log.log import FilePart, Location, PayloadUnreadable, Stream
from everstep.ledger.payload_log.records import (
    HEADER_BYTES,
    check_record,
    content_digest,
    header,
)

SEGMENT_BYTES = 32 << 20
_WRITE_BYTES = 8 << 20
_PART_BYTES = 1 << 20
_WRITTEN = Failpoint("ledger.payload.written", "a payload is in its segment, not durable")
_SYNCED = Failpoint("ledger.payload.synced", "a payload is durable, no row names it")


def segments_path(database: Path) -> Path:
    """Return the directory of a database's segments."""
    return database.with_name(database.name + ".payloads")


def segment_path(database: Path, identity: str, number: int) -> Path:
    """Return the path of a segment."""
    return segments_path(database) / f"{identity}-{number:010d}.segment"


class _Segment:
    """A segment that this process writes.

    Each is written by one thread at a time (``writing``), and synced by one (``syncing``).
    """

    def __init__(self, number: int, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self.number = number
        self.handle = os.open(path, flags, 0o600)
        self.end = 0
        self.written = 0  # records
        self.synced = 0
        self.failed = False
        self.writing = threading.Lock()
        self.syncing = threading.Lock()

    def write(self, record: Iterable[bytes | memoryview]) -> tuple[int, int]:
        """Write a record. After an error the segment takes no more.

        Returns:
            Where it begins, and its number.
        """
        with self.writing:
            self._check()
            begin = self.end
            try:
                for part in record:
                    self._write(part)
                    self.end += len(part)
            except BaseException:
                self.failed = True
                with contextlib.suppress(OSError):  # give the space back
                    os.ftruncate(self.handle, begin)
                raise
            self.written += 1
            return begin, self.written

    def _write(self, part: bytes | memoryview) -> None:
        at = 0
        with memoryview(part) as whole:
            while at < len(whole):
                with whole[at : at + _WRITE_BYTES] as view:  # released: the part may be a mapping
                    at += os.write(self.handle, view)

    def _check(self) -> None:
        if self.failed:
            raise OSError(f"an earlier write to payload segment {self.number} failed")

    def sync(self, record: int) -> None:
        """Make the records up to one durable. A sync that began behind it serves it as well."""
        with self.syncing:
            if self.synced >= record:
                return
            self._check()
            upto = self.written
            try:
                os.fsync(self.handle)
            except OSError:
                self.failed = True  # the kernel may have marked its pages clean
                raise
            self.synced = upto


class SegmentFiles:
    """A `PayloadLog` of files.

    Args:
        database: the path of the database.
        identity: the id of the database.
        segment_bytes: a segment of this size takes no more records.
    """

    def __init__(
        self, database: Path, identity: str, *, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self._database = database
        self._identity = identity
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self._next = 1
        self._active: dict[Stream, _Segment] = {}
        self._open: dict[int, _Segment] = {}
        self._unsettled: Counter[int] = Counter()
        self._released: set[int] = set()
        self._dropped: set[int] = set()

    def recover(self, named: Collection[int]) -> None:
        """Remove the segments that no row names, and number new ones behind all others.

        Args:
            named: the segments that rows name.
        """
        there = set(self.numbers())
        self.drop(there.difference(named))
        self._released.update(named)  # whether they hold enough is looked at with the first drop
        self._next = max(there.union(named), default=0) + 1

    def numbers(self) -> list[int]:
        """Return the numbers of the segments that are there."""
        directory = segments_path(self._database)
        pattern = re.compile(rf"{self._identity}-(\d{{10,}})\.segment")
        names = [each.name for each in directory.iterdir()] if directory.is_dir() else []
        return sorted(int(found[1]) for found in map(pattern.fullmatch, names) if found)

    def append(self, content: bytes | memoryview, digest: bytes, stream: Stream) -> Location:
        """Write a content and return once it is durable. See `PayloadLog.append`."""
        segment = self._take(stream)
        try:
            offset, record = segment.write((header(len(content), digest), content))
            _WRITTEN()
            segment.sync(record)
            _SYNCED()
        except BaseException:
            self._settle(segment.number)
            raise
        return Location(segment.number, offset, len(content), digest)

    def copy(self, locations: Sequence[Location], stream: Stream) -> list[Location]:
        """Write contents again, and return once all are durable. See `PayloadLog.copy`."""
        for each in locations:
            self.verify(each)
        copies: list[Location] = []
        last: dict[_Segment, int] = {}
        try:
            for each in locations:
                segment = self._take(stream)
                copies.append(Location(segment.number, 0, each.size, each.digest))
                offset, last[segment] = segment.write(self._parts(each))
                copies[-1] = Location(segment.number, offset, each.size, each.digest)
            for segment, record in last.items():
                segment.sync(record)
        except BaseException:
            for each in copies:
                self._settle(each.segment)
            raise
        return copies

    def _take(self, stream: Stream) -> _Segment:
        """Return the segment that takes the next record of a stream, and keep it."""
        with self._lock:  # not while it is written: `settle` must not wait for that
            segment = self._segment(stream)
            self._unsettled[segment.number] += 1
        return segment

    def _segment(self, stream: Stream) -> _Segment:
        """Return the segment that takes the next record of a stream."""
        active = self._active.get(stream)
        if active is not None and not active.failed and active.end < self._segment_bytes:
            return active
        if active is not None:
            del self._active[stream]
            self._released.add(active.number)
            self._close_if_done(active.number)
        new = self._create(self._next)
        self._active[stream] = self._open[new.number] = new
        return new

    def _create(self, number: int) -> _Segment:
        path = segment_path(self._database, self._identity, number)
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700)
            sync_directory(path.parent.parent)
        self._next = number + 1
        segment = _Segment(number, path)
        try:
            sync_directory(path.parent)
        except OSError:
            os.close(segment.handle)
            path.unlink(missing_ok=True)
            raise
        return segment

    def settle(self, location: Location) -> bool:
        """Let go of a content that was appended or held. See `PayloadLog.settle`."""
        return self._settle(location.segment)

    def hold(self, location: Location) -> bool:
        """Keep a content where it is. See `PayloadLog.hold`."""
        with self._lock:
            if location.segment in self._dropped:
                return False
            self._unsettled[location.segment] += 1
            return True

    def file(self, location: Location) -> FilePart:
        """Return the part of the segment that holds a content. See `PayloadLog.file`."""
        path = segment_path(self._database, self._identity, location.segment)
        return FilePart(path, location.offset + HEADER_BYTES)

    def _settle(self, number: int) -> bool:
        with self._lock:
            self._unsettled[number] -= 1
            if self._unsettled[number]:
                return False
            del self._unsettled[number]
            self._close_if_done(number)
            return number in self._released

    def _close_if_done(self, number: int) -> None:
        """Close a segment that takes no more records, once none of it is being synced."""
        taking = any(each.number == number for each in self._active.values())
        if not taking and number not in self._unsettled and number in self._open:
            os.close(self._open.pop(number).handle)

    def read(self, location: Location) -> bytes:
        """Return a content, verified. See `PayloadLog.read`."""
        with self._reading(location) as path, path.open("rb", buffering=0) as file:
            head = os.pread(file.fileno(), HEADER_BYTES, location.offset)
            content = os.pread(file.fileno(), location.size, location.offset + HEADER_BYTES)
            check_record(head, len(content), content_digest(content), location)
        return content

    def size(self, segment: int) -> int:
        """Return the bytes that a segment takes. See `PayloadLog.size`."""
        try:
            return segment_path(self._database, self._identity, segment).stat().st_size
        except FileNotFoundError:
            return 0

    def verify(self, location: Location) -> None:
        """Check a content in small parts. See `PayloadLog.verify`."""
        with self._reading(location):
            parts = self._parts(location)
            head, size, hashed = next(parts), 0, blake3()
            for part in parts:
                size += len(part)
                hashed.update(part)
            check_record(head, size, hashed.digest(), location)

    def _parts(self, location: Location) -> Iterator[bytes]:
        """Read the header of a record, then its content in small parts, as far as it is there."""
        path = segment_path(self._database, self._identity, location.segment)
        at, end = location.offset, location.offset + HEADER_BYTES + location.size
        with path.open("rb", buffering=0) as file:
            yield os.pread(file.fileno(), HEADER_BYTES, at)
            at += HEADER_BYTES
            while at < end and (part := os.pread(file.fileno(), min(end - at, _PART_BYTES), at)):
                yield part
                at += len(part)

    @contextlib.contextmanager
    def _reading(self, location: Location) -> Iterator[Path]:
        """Yield the path of a location's segment. What goes wrong there is `PayloadUnreadable`."""
        path = segment_path(self._database, self._identity, location.segment)
        try:
            yield path
        except FileNotFoundError as error:
            raise PayloadUnreadable(f"{path.name} is missing") from error
        except OSError as error:
            raise PayloadUnreadable(f"{path.name} can't be read: {error}") from error
        except PayloadUnreadable as error:
            text = f"{path.name}, offset {location.offset}: {error}"
            raise PayloadUnreadable(text) from error

    def released(self, segments: Iterable[int]) -> None:
        """Note that rows no longer name contents of these segments."""
        with self._lock:
            self._released.update(segments)

    def droppable(self) -> list[int]:
        """Return the segments that may be dropped if no row names them, each once."""
        with self._lock:
            active = {each.number for each in self._active.values()}
            found = self._released - active - self._unsettled.keys()
            self._released -= found
        return sorted(found)

    def drop(self, segments: Iterable[int]) -> None:
        """Remove segments that no row names and nobody holds. See `PayloadLog.drop`."""
        with self._lock:
            held = set(segments) & self._unsettled.keys()
            self._released |= held
            gone = set(segments) - held
            self._dropped |= gone
        for number in gone:
            segment_path(self._database, self._identity, number).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for segment in self._open.values():
                os.close(segment.handle)
            self._open.clear()
            self._active.clear()
