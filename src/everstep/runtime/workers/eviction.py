"""Eviction: tracks the runs in the worker's memory and evicts some of them to the vault.

An idle run is evicted, and so are the least recently used runs while all runs together exceed the
memory budget, or while a command of another run finds not enough memory. An evicted run is restored
from the vault with its next operation.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

from everstep.logs import get_logger
from everstep.runtime.errors import OutOfMemory
from everstep.runtime.settings import Settings
from everstep.runtime.workers.base import Call, WorkerPool
from everstep.runtime.workers.memory import total_bytes
from everstep.worker.protocol.messages import Reply

R = TypeVar("R", bound=Reply)

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
        workers: where the runs are.
        evict: evicts a run if it is idle, and returns whether it did.
    """

    def __init__(
        self, settings: Settings, workers: WorkerPool, evict: Callable[[str], Awaitable[bool]]
    ) -> None:
        self._given = settings.memory_bytes
        self._host_share = total_bytes() // MEMORY_SHARE
        self._workers = workers
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
    def budget(self) -> int:
        """How much memory all runs may take: as set, or a share of the memory that they lie in."""
        if self._given is not None:
            return self._given
        on_device = self._workers.state_bytes
        return self._host_share if on_device is None else on_device

    @property
    def size(self) -> int:
        """Memory of all runs together, in bytes."""
        return sum(resident.size for resident in self._residents.values())

    def add(self, run_id: str, size: int) -> None:
        """Add a run that is in memory now."""
        self._residents[run_id] = _Resident(size, monotonic())
        self._residents.move_to_end(run_id)
        if self.size > self.budget:
            self._wake.set()

    def touch(self, run_id: str) -> None:
        """Mark a run as used now."""
        resident = self._residents.get(run_id)
        if resident is not None:
            resident.used_at = monotonic()
            self._residents.move_to_end(run_id)
            if self.size > self.budget:
                self._wake.set()

    def remove(self, run_id: str) -> None:
        """Remove a run that is no longer in memory."""
        self._residents.pop(run_id, None)

    async def making_room(self, run_id: str, send: Callable[[], Awaitable[Call[R]]]) -> R:
        """Send a command of a run, again for each run that is evicted where memory is not enough.

        No other command of the run may have been sent behind it: that one would come first.

        Returns:
            The reply.

        Raises:
            OutOfMemory: memory is not enough, and no other run is idle.
        """
        while True:
            try:
                return await (await send()).done
            except OutOfMemory:
                if not await self._evict_another(run_id):
                    raise

    async def _evict_another(self, run_id: str) -> bool:
        """Evict the least recently used run that is idle, but not this one. False: none is."""
        for other in list(self._residents):
            if other != run_id and await self._evict(other):
                _log.info("run evicted", run=other, needed_by=run_id, resident=self.count)
                return True
        return False

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
            if not idle and self.size <= self.budget:
                return  # the others were used later
            if await self._evict(run_id):
                _log.info("run evicted", run=run_id, idle=idle, resident=self.count)
