"""Who waits for which operation, and what a client gets for one."""

from __future__ import annotations

import asyncio
import json

from everstep.ledger import Ledger, Operation
from everstep.runtime import names
from everstep.runtime.errors import UnknownFuture
from everstep.wire import types


class Futures:
    """Wakes whoever waits for an operation when it has ended.

    Args:
        ledger: has the operations.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: dict[str, asyncio.Future[Operation]] = {}

    async def wait(self, request_id: str, seconds: float) -> Operation | None:
        """Wait for an operation to finish; see `Runtime.wait`."""
        future = self._waiting.get(request_id)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            future = self._waiting.setdefault(request_id, future)
            try:
                operation = await self._ledger.operation(request_id)
                if operation is None:
                    raise UnknownFuture(request_id)
            except BaseException:  # the next one to wait looks for itself
                self._waiting.pop(request_id, None)
                raise
            if operation.status != "pending":
                self.announce(operation)
        done, _ = await asyncio.wait([future], timeout=seconds)
        return future.result() if done else None

    def announce(self, operation: Operation) -> None:
        """Wake whoever waits for an operation that has ended."""
        future = self._waiting.pop(operation.request_id, None)
        if future is not None and not future.done():
            future.set_result(operation)


def future_of(operation: Operation) -> types.UntypedAPIFuture:
    """What a client gets for an accepted operation; one that failed has no samples to name."""
    sample_ids = None
    if operation.kind == names.SAMPLE and operation.payload and operation.failure is None:
        count = json.loads(operation.payload).get("num_samples", 1)
        sample_ids = [f"{operation.request_id}:{index}" for index in range(count)]
    of_no_run = operation.kind in (names.SAMPLE, names.CREATE_CUSTOM_LOSS)
    model_id = None if of_no_run else operation.scope
    return types.UntypedAPIFuture(
        request_id=operation.request_id, model_id=model_id, sample_sequence_ids=sample_ids
    )
