"""Contents: moves large requests and results of operations into the payload log and out of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection

from everstep.ledger import operation_rows as rows
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.errors import LedgerDamaged, LedgerError, NotWritten, QueueFull
from everstep.ledger.payload_log import compaction
from everstep.ledger.payload_log.content import Column, Content, digest_of
from everstep.ledger.payload_log.log import FilePart, Location, PayloadUnreadable, Stream
from everstep.ledger.records import NewOperation, Operation
from everstep.ledger.store import Store
from everstep.spool import Data, viewed

Result = TypeVar("Result")
LOGGED_BYTES = 32 << 10
"""Contents from this size on go to the payload log. Below it, the second fsync costs more than the
copies that the database's own log writes."""
_THREADS = 4


class _Unreadable(Exception):
    """The ``request`` or the ``result`` of an operation can't be read."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(reason)
        self.part = part


class Contents:
    """Large requests and results of operations.

    Args:
        store: the database, and the payload log beside it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._log = store.payloads
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="payloads")
        self._dropping: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Wait for what is under way. The store closes the log."""
        if self._dropping is not None:
            await asyncio.wait([self._dropping])
        await asyncio.to_thread(self._threads.shutdown)

    # In

    async def request(self, new: NewOperation, max_queued: int | None) -> Content:
        """Write the payload of a new operation to the log, unless it is small or a retry.

        Args:
            new: the operation.
            max_queued: bytes of logged payloads that may wait in its scope. None: any number.

        Raises:
            QueueFull: as many wait. One that the scope's next operations may wait for is taken.
            NotWritten: the log can't be written.
        """
        if new.inline or len(new.payload) < LOGGED_BYTES:
            return Content(new.payload)
        queue = await self._store.read(lambda c: rows.queue(c, new.scope, new.seq_id))
        if queue.known:
            return Content(new.payload, digest=await self._run(partial(digest_of, new.payload)))
        behind = queue.bytes and new.seq_id > queue.last
        if max_queued is not None and behind and queue.bytes + len(new.payload) > max_queued:
            raise QueueFull(new.scope, queue.bytes, max_queued)
        return await self._append(new.payload, "requests")

    async def result(self, data: Data) -> Content:
        """Write a result to the log, unless it is small. Raises `NotWritten`."""
        return Content(data) if len(data) < LOGGED_BYTES else await self._append(data, "results")

    async def finish(
        self,
        result: Content,
        work: Callable[[Connection], Operation],
        then: Callable[[Operation], None],
    ) -> Operation:
        """Run the function that records how an operation ended, and return the operation.

        Args:
            result: what it records. It is settled then.
            work: as of `Store.run`.
            then: as of `Store.run`.
        """
        try:
            finished = await self._store.run(work, then)
        finally:
            self.settle(result)
        if finished.pruned and finished.payload_at is not None:
            self.release([finished.payload_at.segment])
        if result.at is not None and finished.result_at == result.at:
            return finished  # what it lacks is in a spool, not wanted as an object
        return await self.fill(finished, payload=False)

    async def _append(self, data: Data, stream: Stream) -> Content:
        def append() -> Content:
            digest = digest_of(data)
            try:
                with viewed(data) as view:
                    return Content(data, self._log.append(view, digest, stream))
            except OSError as error:
                raise NotWritten(f"the payload log could not be written: {error}") from error

        def settle(appended: Future[Content]) -> None:
            if appended.exception() is None:
                self.settle(appended.result())

        appended = self._threads.submit(append)
        try:
            return await asyncio.shield(asyncio.wrap_future(appended))
        except asyncio.CancelledError:
            appended.add_done_callback(settle)
            raise

    def settle(self, content: Content) -> None:
        """Let go of a content whose row is queued in the store, or will not be."""
        if content.at is not None and self._log.settle(content.at):
            self._begin_dropping()

    # Out

    async def fill(self, operation: Operation, *, payload: bool = True) -> Operation:
        """Return an operation with its result, and its payload, read from the log.

        One that was dropped since the row was read is not there: then the operation says so.

        Raises:
            LedgerDamaged: one of them is missing or damaged.
        """
        missing = _missing(operation, payload)
        if not missing:
            return operation
        try:
            return await self._run(lambda: self._filled(operation, payload))
        except _Unreadable as error:
            now = await self._now(operation, payload=True)
            if now is None:
                raise LedgerError(f"operation {operation.request_id} was deleted") from error
            if _missing(now, payload) == missing:
                name = operation.seq_id, operation.kind, operation.scope
                raise q.damage(error.part, *name, str(error)) from error
        return await self.fill(now, payload=payload)

    @asynccontextmanager
    async def held(
        self, operation: Operation, part: Column = "payload"
    ) -> AsyncIterator[tuple[FilePart, Location] | None]:
        """Keep the payload or the result of an operation where the payload log has it.

        That is for the duration of the block.

        Yields:
            The part of a file that holds it, and its location. None: no file does. It is in the
            row, or elsewhere.

        Raises:
            LedgerError: the operation was deleted.
        """
        at = _location(operation, part)
        while at is not None and not self._log.hold(at):
            now = await self._now(operation, payload=False)
            if now is None:
                raise LedgerError(f"operation {operation.request_id} was deleted")
            at = found if (found := _location(now, part)) != at else None
        if at is None:
            yield None
            return
        try:
            file = self._log.file(at)
            yield (file, at) if file is not None else None
        finally:
            if self._log.settle(at):
                self._begin_dropping()

    async def verify_result(self, operation: Operation, location: Location) -> None:
        """Check a result, holding little of it in memory.

        Args:
            operation: whose it is.
            location: where it is held.

        Raises:
            LedgerDamaged: it is missing or damaged.
        """
        try:
            await self._run(partial(self._log.verify, location))
        except PayloadUnreadable as error:
            name = operation.seq_id, operation.kind, operation.scope
            raise q.damage("result", *name, str(error)) from error

    async def _now(self, operation: Operation, *, payload: bool) -> Operation | None:
        """Read the row of an operation again: what it names was dropped, or moved."""
        mine = t.operations.c.request_id == operation.request_id
        return await self._store.read(lambda c: q.operation_where(c, mine, payload=payload))

    async def fill_all(self, operations: Iterable[Operation]) -> list[Operation]:
        """Return operations with payloads and results. Raises as `fill` does."""
        return [await self.fill(each) for each in operations]

    async def damaged(self, operations: Iterable[Operation]) -> list[str]:
        """Read the contents of operations and return a message for each that is damaged."""
        found = []
        for each in operations:
            try:
                await self.fill(each)
            except LedgerDamaged as damage:
                found.append(str(damage))
        return found

    def _filled(self, operation: Operation, payload: bool) -> Operation:
        if payload and _lacks_payload(operation):
            assert operation.payload_at is not None
            operation = replace(operation, payload=self._read("request", operation.payload_at))
        if operation.result is None and operation.result_at is not None:
            operation = replace(operation, result=self._read("result", operation.result_at))
        return operation

    def _read(self, part: str, location: Location) -> bytes:
        try:
            return self._log.read(location)
        except PayloadUnreadable as error:
            raise _Unreadable(part, str(error)) from error

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(self._threads.submit(work))

    # Away

    def release(self, segments: Collection[int]) -> None:
        """Drop the segments, of those that rows named, that no row names any more.

        That happens in the background.
        """
        if segments:
            self._log.released(segments)
            self._begin_dropping()

    def _begin_dropping(self) -> None:
        if self._dropping is None or self._dropping.done():
            self._dropping = asyncio.create_task(self._drop(), name="drop payload segments")

    async def _drop(self) -> None:
        """Drop what was released.

        A row that names a content is queued before the content is settled. So the read here, which
        is queued after that, sees it.
        """
        while candidates := self._log.droppable():
            named = await self._store.read(partial(rows.named_segments, among=candidates))
            await self._run(partial(self._log.drop, set(candidates) - named))
            for segment in sorted(named):
                await self._compact(segment)

    async def _compact(self, segment: int) -> None:
        """Move what is left in a segment where that is a small part of it."""
        copied = await compaction.compact(self._store, self._log, segment, self._run)
        if copied:
            self._log.released([segment])


def _location(operation: Operation, part: Column) -> Location | None:
    return operation.payload_at if part == "payload" else operation.result_at


def _lacks_payload(operation: Operation) -> bool:
    return operation.payload_at is not None and not operation.payload and not operation.pruned


def _missing(operation: Operation, payload: bool) -> list[Location]:
    """Return the locations of the contents that an operation lacks."""
    found = [operation.payload_at] if payload and _lacks_payload(operation) else []
    found += [operation.result_at] if operation.result is None else []
    return [each for each in found if each is not None]
