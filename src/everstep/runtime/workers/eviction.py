"""Eviction: tracks the runs in the worker's memory and evicts some of them to the vault.

An idle run is evicted, and so are the least recently used runs while all runs together exceed the
memory budget. An evicted run is restored from the vault with its next operation.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

from everstep.logs import get_logger
from everstep.runtime.settings import Settings
from everstep.runtime.workers.memory import total_bytes

_log = get_logger("everstep.eviction")
MEMORY_SHARE = 4
CHECKS_PER_IDLE = 10


@dataclass
class _Resident:
    size: int
    used_at: float


class Eviction:
    """Accounts for the runs in memory, and evicts.

    Args:
        settings: the budget and the idle time.
        evict: evicts a run if it is idle, and returns whether it did.
    """

    def __init__(self, settings: Settings, evict: Callable[[str], Awaitable[bool]]) -> None:
        budget = settings.memory_bytes
        self._budget = total_bytes() // MEMORY_SHARE if budget is None else budget
        self._idle_seconds = settings.idle_seconds
        self._evict = evict
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="eviction")

    @property
    def count(self) -> int:
        """How many runs are in memory."""
        return len(self._residents)

    @property
    def size(self) -> int:
        """Memory of all runs together, in bytes."""
        return sum(resident.size for resident in self._residents.values())

    def add(self, run_id: str, size: int) -> None:
        """Add a run that is in memory now."""
        self._residents[run_id] = _Resident(size, monotonic())
        self._residents.move_to_end(run_id)
        if self.size > self._budget:
            self._wake.set()

    def touch(self, run_id: str) -> None:
        """Mark a run as used now."""
        resident = self._residents.get(run_id)
        if resident is not None:
            resident.used_at = monotonic()
            self._residents.move_to_end(run_id)
            if self.size > self._budget:
                self._wake.set()

    def remove(self, run_id: str) -> None:
        """Remove a run that is no longer in memory."""
        self._residents.pop(run_id, None)

    async def close(self) -> None:
        """Stop evicting."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                async with asyncio.timeout(self._idle_seconds / CHECKS_PER_IDLE):
                    await self._wake.wait()
            except TimeoutError:
                pass  # time to check for idle runs
            try:
                await self._evict_some()
            except Exception:  # noqa: BLE001  the next check tries again; runs stay in memory
                _log.exception("a run could not be evicted")

    async def _evict_some(self) -> None:
        for run_id, resident in list(self._residents.items()):
            idle = monotonic() - resident.used_at > self._idle_seconds
            if not idle and self.size <= self._budget:
                return  # the others were used later
            if await self._evict(run_id):
                _log.info("run evicted", run=run_id, idle=idle, resident=self.count)
