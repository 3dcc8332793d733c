"""Stopping: the event that ends long polls when the service begins to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

Result = TypeVar("Result")


class Stopping(asyncio.Event):
    """An event that ends polls. Each poll stays in its own task, and starts none."""

    def __init__(self) -> None:
        super().__init__()
        self._polls: set[asyncio.Timeout] = set()

    def set(self) -> None:
        """Begin to stop: end all polls."""
        if self.is_set():
            return
        super().set()
        for poll in self._polls:
            poll.reschedule(0)

    async def unless_set(self, poll: Awaitable[Result]) -> Result | None:
        """Return the result of a poll, or None when the service stops before.

        Args:
            poll: is cancelled then.
        """
        scope: Any = asyncio.timeout(0 if self.is_set() else None)
        try:
            async with scope:
                self._polls.add(scope)
                return await poll
        except TimeoutError:
            if not scope.expired():
                raise
            return None
        finally:
            self._polls.discard(scope)
