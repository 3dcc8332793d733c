"""Recorder: makes a run's results durable, one after the other, while the run goes on.

The next operation executes while a result is committed. Nobody is told of a result before it is
durable. After a crash in between, both operations are unfinished, and are executed again in order.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from everstep.spool import Data


class Recorder:
    """Holds the last result of one run until it is recorded.

    Args:
        on_failure: called when a result could not be recorded.

    Attributes:
        failures: how many results in a row could not be recorded.
    """

    def __init__(self, on_failure: Callable[[], None]) -> None:
        self._on_failure = on_failure
        self.failures = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether the last result could not be recorded: memory is ahead of the ledger."""
        task = self._task
        return task is not None and task.done() and (task.cancelled() or bool(task.exception()))

    async def begin(self, record: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin to record a result, once the one before it is durable.

        Args:
            record: records it.

        Raises:
            NotWritten: the one before it could not be recorded. This one was not begun.
        """
        await self.confirm()
        self._task = asyncio.create_task(record(), name="record a result")
        self._task.add_done_callback(self._end)

    async def confirm(self) -> None:
        """Wait until the last result is durable. Only the run's actor may call this.

        Raises:
            NotWritten: it could not be recorded. This is raised once.
        """
        await self.wait()
        task, self._task = self._task, None
        if task is not None:
            task.result()

    async def check(self) -> None:
        """Raise the error of a result that could not be recorded, as `confirm` does."""
        if self.failed:
            await self.confirm()

    async def wait(self) -> None:
        """Wait until nothing is being recorded, whether that succeeds or not."""
        if self._task is not None and not self._task.done():
            await asyncio.wait([self._task])

    def _end(self, _: object) -> None:
        if self.failed:
            self.failures += 1
            self._on_failure()
        else:
            self.failures = 0


def encoded_result(result: Mapping[str, Any] | Data) -> tuple[Data, str]:
    """Return a result as the ledger keeps it, and its form there: ``json`` or ``protobuf``."""
    if isinstance(result, Mapping):
        return json.dumps(result).encode(), "json"
    return result, "protobuf"
