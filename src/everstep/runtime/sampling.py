"""Samples: each is its own operation and none waits for another."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial

import structlog

from everstep.failpoints import Failpoint
from everstep.ledger import Ledger, NewOperation, Operation
from everstep.runtime import names
from everstep.runtime.channel import Message
from everstep.runtime.checkpoints import Checkpoints
from everstep.runtime.errors import OperationFailed, Rejected, UnknownFuture, WorkerLost
from everstep.runtime.followers import Follower, SampleEvent
from everstep.runtime.settings import Settings
from everstep.runtime.worker_process import Call, WorkerProcess
from everstep.wire.errors import ErrorCategory
from everstep.wire.streams import DrawnTokens

_log = structlog.get_logger("everstep.sampling")
_BUSY_SECONDS = 1.0
_CANCELLED = "This sample was cancelled by its client."
_CANCELLED_DURABLY = Failpoint(
    "runtime.sample.cancelled", "a sample is cancelled for good, and still being drawn"
)


class Sampling:
    """Sends accepted samples to the worker and records what comes back.

    Args:
        ledger: where samplers are looked up and results recorded.
        worker: where models are.
        checkpoints: where the samplers' paths are resolved.
        settings: the attempts of an operation.
        announce: called with each operation that was finished.
    """

    def __init__(
        self,
        ledger: Ledger,
        worker: WorkerProcess,
        checkpoints: Checkpoints,
        settings: Settings,
        announce: Callable[[Operation], None],
    ) -> None:
        self._ledger = ledger
        self._worker = worker
        self._checkpoints = checkpoints
        self._settings = settings
        self._announce = announce
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._entering = 0
        self._freed = asyncio.Event()
        self._calls: dict[str, Call] = {}
        self._followers: defaultdict[str, list[Follower]] = defaultdict(list)

    def start(self, operation: Operation) -> None:
        """Begin an accepted sample; one that was begun before changes nothing."""
        request_id = operation.request_id
        if request_id in self._tasks:
            return
        task = asyncio.create_task(self._sample(operation), name=f"sample {request_id}")
        self._tasks[request_id] = task
        task.add_done_callback(lambda _: self._ended(request_id))

    async def close(self) -> None:
        """Stop. What was not finished stays in the ledger."""
        for followers in self._followers.values():
            for follower in followers:
                follower.end(None)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @asynccontextmanager
    async def admission(self, new: NewOperation, *, patient: bool) -> AsyncIterator[None]:
        """Hold a place for a sample while it is accepted. A retry has its place.

        Args:
            new: the sample.
            patient: wait for a place for as long as a poll is held; else there is one or none.

        Raises:
            Rejected: there is none (429).
        """
        full = self._full and new.failure is None
        if full and await self._ledger.operation_at(new.scope, new.seq_id) is None:
            await self._room(self._settings.poll_seconds if patient else 0.0)
        self._entering += 1
        try:
            yield
        finally:
            self._entering -= 1
            self._freed.set()

    @property
    def _full(self) -> bool:
        return len(self._tasks) + self._entering >= self._settings.most_samples

    async def _room(self, seconds: float) -> None:
        """Wait for a place; raises `Rejected` (429) when there is none in that time."""
        try:
            async with asyncio.timeout(seconds):
                while self._full:
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            raise Rejected(
                429,
                f"{self._settings.most_samples} samples are waiting or under way, as many as are "
                "taken at a time; send this one again.",
                retry_after=_BUSY_SECONDS,
            ) from None

    def _ended(self, request_id: str) -> None:
        self._tasks.pop(request_id, None)
        self._freed.set()

    async def cancel(self, request_id: str) -> None:
        """Stop a sample; its future fails and says so. One that has ended stays as it is.

        Raises:
            UnknownFuture: there is no such operation.
            Rejected: it is no sample.
        """
        operation = await self._sample_of(request_id)
        if operation.status == "pending":
            finished = await self._ledger.fail(request_id, _CANCELLED, str(ErrorCategory.USER))
            _CANCELLED_DURABLY()
            self._end(finished)
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()

    async def _sample_of(self, request_id: str) -> Operation:
        """The operation of a sample; raises as `cancel` does."""
        operation = await self._ledger.operation(request_id)
        if operation is None:
            raise UnknownFuture(request_id)
        if operation.kind != names.SAMPLE:
            raise Rejected(
                400, f"Future {request_id} is no sample: only samples are streamed and cancelled."
            )
        return operation

    async def follow(self, request_id: str, position: int) -> AsyncIterator[SampleEvent]:
        """A sample's tokens as they are drawn; see `Runtime.follow`."""
        operation = await self._sample_of(request_id)
        if operation.retrieved:
            raise dropped(operation)
        return self._followed(request_id, Follower(position))

    async def _followed(self, request_id: str, follower: Follower) -> AsyncIterator[SampleEvent]:
        followers = self._followers[request_id]
        followers.append(follower)
        try:
            operation = await self._ledger.operation(request_id)
            if operation is not None and operation.status != "pending":
                follower.end(operation)
            self._watch(request_id)
            async for event in follower.events():
                yield event
        finally:
            followers.remove(follower)
            if not followers:
                self._followers.pop(request_id, None)

    def _watch(self, request_id: str) -> None:
        """Have the worker tell what the followers of a sample have not read."""
        call, followers = self._calls.get(request_id), self._followers.get(request_id)
        if call is not None and followers:
            self._worker.watch(call, min(follower.position for follower in followers))

    def _drawn(self, request_id: str, drawn: list[DrawnTokens]) -> None:
        for follower in self._followers.get(request_id, ()):
            follower.drawn(drawn)

    def _end(self, operation: Operation) -> None:
        """Tell everyone who waits for a sample that it has ended."""
        self._announce(operation)
        for follower in self._followers.get(operation.request_id, ()):
            follower.end(operation)

    async def _sample(self, operation: Operation) -> None:
        try:
            reply, seconds = await self._attempt(operation)
        except OperationFailed as failure:
            finished = await self._ledger.fail(
                operation.request_id, failure.message, str(failure.category)
            )
        else:
            finished = await self._ledger.succeed(
                operation.request_id, reply, "protobuf", seconds=seconds, prune=True
            )
        self._end(finished)

    async def _attempt(self, operation: Operation) -> tuple[bytes, float]:
        for _ in range(self._settings.worker_attempts):
            generation = await self._worker.wait_ready()
            header = await self._header(operation)
            try:
                message = await self._call(operation, header, generation)
            except OperationFailed as failure:
                if failure.category == ErrorCategory.SERVER:
                    await self._checkpoints.follow_quarantine()
                raise
            except WorkerLost:
                _log.warning("sample lost with its worker; trying again", id=operation.request_id)
            else:
                return message.body, float(message.header.get("seconds", 0.0))
        raise OperationFailed(
            f"The worker ended {self._settings.worker_attempts} times while it sampled this.",
            ErrorCategory.SERVER,
        )

    async def _call(
        self, operation: Operation, header: Mapping[str, object], generation: int
    ) -> Message:
        """The worker's reply to a sample, which may be followed meanwhile."""
        request_id = operation.request_id
        call = await self._worker.call(header, operation.payload, generation)
        call.on_drawn = partial(self._drawn, request_id)
        self._calls[request_id] = call
        self._watch(request_id)
        try:
            return await call.done
        except asyncio.CancelledError:
            self._worker.cancel(call)
            raise
        finally:
            del self._calls[request_id]

    async def _header(self, operation: Operation) -> dict[str, object]:
        sampler = await self._ledger.sampler(operation.scope)
        if sampler is None:
            raise OperationFailed(f"Sampling session {operation.scope} does not exist any more.")
        source, weights = None, operation.weights or sampler.model_path
        if weights is not None:
            checkpoint = await self._checkpoints.find(weights)
            source = self._checkpoints.source(checkpoint)
        return {
            "command": "sample",
            "model": sampler.base_model,
            "source": source,
            "sampler": operation.scope,
            "default_seed": names.seed_for(operation.scope, operation.seq_id),
        }


def dropped(operation: Operation) -> Rejected:
    """The refusal of a result that its client has acknowledged."""
    return Rejected(
        410,
        f"The result of future {operation.request_id} was dropped when its client said that it "
        "has it (retrieve_futures).",
    )
