"""Which runs are in the worker's memory, and which of them have to leave it.

A run that nobody used for a while leaves; so do the least recently used ones when all together
take more than the budget. They come back from the vault with their next operation.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

import structlog

from everstep.runtime.memory import total_bytes
from everstep.runtime.settings import Settings

_log = structlog.get_logger("everstep.residency")
_SHARE = 4
_LOOKS_PER_IDLE = 10


@dataclass
class _Resident:
    size: int
    used_at: float


class Residency:
    """Accounts for the runs in memory, and evicts.

    Args:
        settings: the budget and the idle time.
        evict: lets a run leave if it is idle; returns whether it left.
    """

    def __init__(self, settings: Settings, evict: Callable[[str], Awaitable[bool]]) -> None:
        budget = settings.memory_bytes
        self._budget = total_bytes() // _SHARE if budget is None else budget
        self._idle_seconds = settings.idle_seconds
        self._evict = evict
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._live(), name="residency")

    @property
    def count(self) -> int:
        """How many runs are in memory."""
        return len(self._residents)

    @property
    def size(self) -> int:
        """What they take together, in bytes."""
        return sum(resident.size for resident in self._residents.values())

    def came(self, run_id: str, size: int) -> None:
        """Note that a run is in memory now."""
        self._residents[run_id] = _Resident(size, monotonic())
        self._residents.move_to_end(run_id)
        if self.size > self._budget:
            self._wake.set()

    def used(self, run_id: str) -> None:
        """Note that a run is used."""
        resident = self._residents.get(run_id)
        if resident is not None:
            resident.used_at = monotonic()
            self._residents.move_to_end(run_id)
            if self.size > self._budget:
                self._wake.set()

    def left(self, run_id: str) -> None:
        """Note that a run is no longer in memory."""
        self._residents.pop(run_id, None)

    async def close(self) -> None:
        """Evict no more."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _live(self) -> None:
        while True:
            self._wake.clear()
            try:
                async with asyncio.timeout(self._idle_seconds / _LOOKS_PER_IDLE):
                    await self._wake.wait()
            except TimeoutError:
                pass  # time to look for idle runs
            try:
                await self._make_room()
            except Exception:  # noqa: BLE001  the next look tries again; runs stay in memory
                _log.exception("a run could not be evicted")

    async def _make_room(self) -> None:
        for run_id, resident in list(self._residents.items()):
            idle = monotonic() - resident.used_at > self._idle_seconds
            if not idle and self.size <= self._budget:
                return  # the others were used later
            if await self._evict(run_id):
                _log.info("run evicted", run=run_id, idle=idle, resident=self.count)
