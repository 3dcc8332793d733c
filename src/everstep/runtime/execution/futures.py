"""Futures: wait for operations to finish, and build the futures of accepted ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from everstep.ledger import Ledger, Operation
from everstep.runtime import ids
from everstep.runtime.errors import UnknownFuture
from everstep.wire import types

MAX_PENDING = 100_000
"""Unfinished operations that are known without a look at the ledger. Others are looked up."""


class Futures:
    """Wakes the polls that wait for an operation when it has finished.

    Args:
        ledger: holds the operations.
        on_wait: called with the scope of each unfinished operation that a poll begins to wait for.
    """

    def __init__(self, ledger: Ledger, on_wait: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._on_wait = on_wait
        self._waiting: dict[str, asyncio.Future[Operation]] = {}
        self._pending: dict[str, str] = {}  # request id → scope

    def begin(self, operation: Operation) -> None:
        """Note that an operation was accepted, so that polls for it read nothing."""
        if operation.status == "pending" and len(self._pending) < MAX_PENDING:
            self._pending[operation.request_id] = operation.scope

    def forget(self, scope: str) -> None:
        """Look the operations of a scope up again: their run has ended, and they with it."""
        for request_id in [each for each, mine in self._pending.items() if mine == scope]:
            del self._pending[request_id]

    async def scope(self, request_id: str) -> str | None:
        """Return the scope of an operation, or None if there is no such operation."""
        if request_id in self._pending:
            return self._pending[request_id]
        operation = await self._ledger.operation(request_id, contents=False)
        return operation.scope if operation is not None else None

    async def wait(self, request_id: str, seconds: float) -> Operation | None:
        """Wait for an operation to finish. See `Runtime.wait`."""
        future = self._waiting.get(request_id)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            future = self._waiting.setdefault(request_id, future)
            if request_id in self._pending:
                self._on_wait(self._pending[request_id])
            else:
                await self._look_up(request_id)
        done, _ = await asyncio.wait([future], timeout=seconds)
        return future.result() if done else None

    async def _look_up(self, request_id: str) -> None:
        """Read an operation, and resolve its future if it has finished."""
        try:
            operation = await self._ledger.operation(request_id, contents=False)
            if operation is None:
                raise UnknownFuture(request_id)
            if operation.kind not in ids.PASSES:
                operation = await self._ledger.contents.fill(operation, payload=False)
        except BaseException:  # the next poll looks it up itself
            self._waiting.pop(request_id, None)
            raise
        if operation.status == "pending":
            self.begin(operation)
            self._on_wait(operation.scope)
        else:
            self.resolve(operation)

    def resolve(self, operation: Operation) -> None:
        """Wake the polls of an operation that has finished."""
        self._pending.pop(operation.request_id, None)
        future = self._waiting.pop(operation.request_id, None)
        if future is not None and not future.done():
            future.set_result(operation)

    def drop(self, request_id: str, error: Exception) -> None:
        """Raise an error in the polls of an operation that was deleted."""
        self._pending.pop(request_id, None)
        future = self._waiting.pop(request_id, None)
        if future is not None and not future.done():
            future.set_exception(error)
            future.exception()  # there may be no poll any more


def future_of(operation: Operation) -> types.UntypedAPIFuture:
    """Build the future that a client gets for an accepted operation.

    It has the sequences' names and the seed of a sample, unless the sample failed.
    """
    sample_ids = seed = None
    if operation.kind == ids.SAMPLE and operation.payload and operation.failure is None:
        payload = json.loads(operation.payload)
        count = payload.get("num_samples", 1)
        sample_ids = [f"{operation.request_id}:{index}" for index in range(count)]
        seed = (payload.get("sampling_params") or {}).get("seed")
        if seed is None:
            seed = ids.seed_for(operation.scope, operation.seq_id)
    of_no_run = operation.kind in (ids.SAMPLE, ids.CREATE_CUSTOM_LOSS)
    model_id = None if of_no_run else operation.scope
    return types.UntypedAPIFuture(
        request_id=operation.request_id,
        model_id=model_id,
        sample_sequence_ids=sample_ids,
        sample_seed=seed,
    )
