"""Sampling: executes accepted samples, limits their number, and streams their tokens.

Each sample is an operation of its own, and none waits for another.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from everstep.failpoints import Failpoint
from everstep.ledger import LedgerDamaged, NewOperation, Operation, RecordedSample, Sampler
from everstep.logs import get_logger
from everstep.runtime import ids
from everstep.runtime.checkpoints.catalog import id_of
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import (
    OperationFailed,
    Rejected,
    RequestUnreadable,
    UnknownFuture,
    WorkerLost,
)
from everstep.runtime.sampling.recorded import to_record
from everstep.runtime.sampling.stream import SampleEvent, StreamReader
from everstep.runtime.workers.base import Call, Lease
from everstep.runtime.workers.ends import WorkerEnds
from everstep.runtime.workers.stored_requests import request_of
from everstep.spool import taken
from everstep.wire.errors import ErrorCategory
from everstep.wire.messages.streams import DrawnTokens
from everstep.worker.protocol.messages import Sample, SampleDone
from everstep.worker.protocol.stored_request import StoredRequest

_log = get_logger("everstep.sampling")
_RETRY_AFTER_SECONDS = 1.0
_CANCELLED = "This sample was cancelled by its client."
_CANCELLED_DURABLY = Failpoint(
    "runtime.sample.cancelled", "a sample is cancelled for good, and still being drawn"
)


class Sampling:
    """Sends accepted samples to workers and records their results.

    Args:
        context: of the service.
        on_finished: called with each operation that succeeded or failed.
    """

    def __init__(self, context: RuntimeContext, on_finished: Callable[[Operation], None]) -> None:
        self._home = context.home
        self._ledger = context.ledger
        self._workers = context.workers
        self._catalog = context.catalog
        self._settings = context.settings
        self._on_finished = on_finished
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._entering = 0
        self._freed = asyncio.Event()
        self._calls: dict[str, tuple[Lease, Call[SampleDone]]] = {}
        self._readers: defaultdict[str, list[StreamReader]] = defaultdict(list)

    def start(self, operation: Operation) -> None:
        """Begin an accepted sample. A sample that was begun before is left alone.

        A request that the payload log holds stays there.
        """
        request_id = operation.request_id
        if request_id in self._tasks:
            return
        sample = self._sample(operation.without_contents())
        task = asyncio.create_task(sample, name=f"sample {request_id}")
        self._tasks[request_id] = task
        task.add_done_callback(lambda _: self._ended(request_id))

    async def close(self) -> None:
        """Stop. Unfinished samples stay in the ledger."""
        for readers in self._readers.values():
            for reader in readers:
                reader.end(None)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @asynccontextmanager
    async def admission(self, new: NewOperation, *, patient: bool) -> AsyncIterator[None]:
        """Hold a slot for a sample while it is accepted. A retry needs no slot.

        Args:
            new: the sample.
            patient: wait for a free slot, as long as a poll is held.

        Raises:
            Rejected: no slot is free (429).
        """
        full = self._full and new.failure is None
        if full and await self._ledger.operation_by_seq_id(new.scope, new.seq_id) is None:
            await self._wait_for_slot(self._settings.poll_seconds if patient else 0.0)
        self._entering += 1
        try:
            yield
        finally:
            self._entering -= 1
            self._freed.set()

    @property
    def _full(self) -> bool:
        return len(self._tasks) + self._entering >= self._settings.max_inflight_samples

    async def _wait_for_slot(self, seconds: float) -> None:
        """Wait for a free slot. Raises `Rejected` (429) after a time."""
        try:
            async with asyncio.timeout(seconds):
                while self._full:
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            raise Rejected(
                429,
                f"{self._settings.max_inflight_samples} samples are queued or executing, the most "
                "that this service accepts; send this one again later.",
                retry_after=_RETRY_AFTER_SECONDS,
            ) from None

    def _ended(self, request_id: str) -> None:
        self._tasks.pop(request_id, None)
        self._freed.set()

    async def cancel(self, request_id: str) -> None:
        """Cancel a sample. Its future fails with that reason. A finished sample stays as it is.

        Raises:
            UnknownFuture: no operation has this request id.
            Rejected: the operation is not a sample.
        """
        operation = await self._sample_of(request_id)
        if operation.status == "pending":
            finished = await self._ledger.fail(request_id, _CANCELLED, str(ErrorCategory.USER))
            _CANCELLED_DURABLY()
            self._end(finished)
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()

    async def abandon(self, request_ids: Sequence[str]) -> None:
        """Stop samples that were deleted, and end their streams. Nothing is recorded."""
        tasks = [self._tasks[each] for each in request_ids if each in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in request_ids:
            for reader in self._readers.get(each, ()):
                reader.end(None)

    async def _sample_of(self, request_id: str) -> Operation:
        """Return the operation of a sample. Raises as `cancel` does."""
        operation = await self._ledger.operation(request_id)
        if operation is None:
            raise UnknownFuture(request_id)
        if operation.kind != ids.SAMPLE:
            raise Rejected(
                400,
                f"Future {request_id} is not a sample. Only samples are streamed and cancelled.",
            )
        return operation

    async def follow(self, request_id: str, position: int) -> AsyncIterator[SampleEvent]:
        """Stream a sample's tokens as they are drawn. See `Runtime.follow`."""
        operation = await self._sample_of(request_id)
        if operation.retrieved:
            raise result_dropped(operation)
        return self._followed(request_id, StreamReader(position))

    async def _followed(self, request_id: str, reader: StreamReader) -> AsyncIterator[SampleEvent]:
        readers = self._readers[request_id]
        readers.append(reader)
        try:
            operation = await self._ledger.operation(request_id)
            if operation is not None and operation.status != "pending":
                reader.end(operation)
            self._watch(request_id)
            async for event in reader.events():
                yield event
        finally:
            readers.remove(reader)
            if not readers:
                self._readers.pop(request_id, None)

    def _watch(self, request_id: str) -> None:
        """Have the worker send the tokens that the readers of a sample have not read."""
        held, readers = self._calls.get(request_id), self._readers.get(request_id)
        if held is not None and readers:
            lease, call = held
            lease.worker.watch(call, min(reader.position for reader in readers))

    def _drawn(self, request_id: str, drawn: Sequence[DrawnTokens]) -> None:
        for reader in self._readers.get(request_id, ()):
            reader.add(drawn)

    def _end(self, operation: Operation) -> None:
        """Resolve a finished sample's future and end its streams."""
        self._on_finished(operation)
        for reader in self._readers.get(operation.request_id, ()):
            reader.end(operation)

    async def _sample(self, operation: Operation) -> None:
        try:
            reply, session_id = await self._attempt(operation)
            result = await taken(reply.body)
            recorded = await self._record(operation, session_id, result)
        except OperationFailed as failure:
            finished = await self._ledger.fail(
                operation.request_id, failure.message, str(failure.category)
            )
        except LedgerDamaged as damage:
            finished = await self._ledger.fail(
                operation.request_id, str(damage), str(ErrorCategory.SERVER)
            )
        else:
            finished = await self._ledger.samples.recorded.succeed(
                operation.request_id,
                result,
                seconds=reply.seconds,
                recorded=recorded,
            )
        self._end(finished)

    async def _record(
        self, operation: Operation, session_id: str, result: bytes
    ) -> RecordedSample | None:
        """Build the record of a finished sample for training, if its client asked for one."""
        if self._settings.stable_reinforce == "refuse":
            return None
        whole = await self._ledger.contents.fill(operation)
        return to_record(whole, session_id, result)

    async def _attempt(self, operation: Operation) -> tuple[SampleDone, str]:
        """Return the worker's reply, and the session of the sampler."""
        ends, sends_request = WorkerEnds(), False
        while not ends.reach(self._settings.worker_attempts):
            sampler = await self._ledger.sampler(operation.scope)
            if sampler is None:
                raise OperationFailed(f"Sampling session {operation.scope} was deleted.")
            lease = await self._workers.for_model(sampler.base_model)
            stored = request_of(self._ledger, self._home, operation, as_bytes=sends_request)
            try:
                async with stored as request:
                    command = await self._command(operation, sampler, *request)
                    reply = await self._call(operation.request_id, command, lease)
            except OperationFailed as failure:
                if failure.category == ErrorCategory.SERVER:
                    await self._catalog.follow_quarantine()
                raise
            except RequestUnreadable as error:
                sends_request = True
                _log.error("a sample's request is sent", reason=str(error))
            except WorkerLost as lost:
                ends.count(lost)
                _log.warning("sample lost with its worker; retrying", id=operation.request_id)
            else:
                return reply, sampler.session_id
        raise OperationFailed(
            f"The worker ended {ends.total} times while it executed this sample.",
            ErrorCategory.SERVER,
        )

    async def _call(self, request_id: str, command: Sample, lease: Lease) -> SampleDone:
        """Send a sample and wait for its reply. It can be streamed until then."""
        call = await lease.call(command)
        call.on_drawn = partial(self._drawn, request_id)
        self._calls[request_id] = lease, call
        self._watch(request_id)
        try:
            return await call.done
        except asyncio.CancelledError:
            lease.worker.cancel(call)
            raise
        finally:
            del self._calls[request_id]

    async def _command(
        self, operation: Operation, sampler: Sampler, body: bytes, stored: StoredRequest | None
    ) -> Sample:
        source, weights = None, operation.weights or sampler.model_path
        if weights is not None:
            source = id_of(await self._catalog.find(weights))
        return Sample(
            model=sampler.base_model,
            source=source,
            sampler=operation.scope,
            default_seed=ids.seed_for(operation.scope, operation.seq_id),
            body=body,
            stored=stored,
        )


def result_dropped(operation: Operation) -> Rejected:
    """Build the error of a result that was dropped after its client acknowledged it."""
    return Rejected(
        410,
        f"The result of future {operation.request_id} was dropped because its client "
        "acknowledged it (retrieve_futures).",
    )
