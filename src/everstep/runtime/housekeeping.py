"""Housekeeping: what a service does by itself, now and then, while nobody waits for it.

Damaged files are looked for and put into quarantine; what nobody needs any more is removed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from everstep.ledger import Ledger, LedgerError
from everstep.runtime.checkpoints import Checkpoints
from everstep.runtime.errors import OperationFailed, WorkerLost
from everstep.runtime.lifetimes import Lifetimes
from everstep.runtime.scrubber import Scrubber
from everstep.runtime.settings import Settings
from everstep.runtime.upkeep import Upkeep
from everstep.runtime.worker_process import WorkerProcess
from everstep.vault import Note, Vault, VaultError

_log = structlog.get_logger("everstep.housekeeping")


class Housekeeping:
    """Scrubs and collects, as often as the settings say.

    Args:
        ledger: the index.
        vault: the files.
        worker: removes files, as the one that writes them.
        checkpoints: keeps the index in line with the vault.
        lifetimes: tells the vault what it has yet to be told.
        settings: rates and intervals.
    """

    def __init__(
        self,
        ledger: Ledger,
        vault: Vault,
        worker: WorkerProcess,
        checkpoints: Checkpoints,
        lifetimes: Lifetimes,
        settings: Settings,
    ) -> None:
        self._lifetimes = lifetimes
        self._ledger = ledger
        self._worker = worker
        self._checkpoints = checkpoints
        self._settings = settings
        self._upkeep = Upkeep(ledger, vault, checkpoints, settings.collect_grace_seconds)
        self._scrubber = Scrubber(
            vault,
            bytes_per_second=settings.scrub_bytes_per_second,
            interval_seconds=settings.scrub_interval_seconds,
            on_quarantined=self._follow,
        )
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin: with the first scrub and the first collection an interval from now."""
        self._tasks = [
            asyncio.create_task(
                _every(self._settings.scrub_interval_seconds, self._scrub), name="scrubber"
            ),
            asyncio.create_task(
                _every(self._settings.collect_interval_seconds, self.collect), name="collector"
            ),
        ]

    async def close(self) -> None:
        """Stop, wherever it is."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def collect(self) -> None:
        """Remove what ended, expired or is orphaned, then the files that no checkpoint names."""
        await self._lifetimes.settle()
        found = await self._upkeep.leftovers()
        await self._upkeep.remove(found)
        command = {"command": "collect", "grace_seconds": self._settings.collect_grace_seconds}
        call = await self._worker.call(command, b"", await self._worker.wait_ready())
        reply = await call.done
        _log.info(
            "collected",
            ended=len(found.ended),
            expired=len(found.expired),
            orphaned=len(found.orphaned),
            files=len(reply.header["files"]),
            bytes=sum(size for _, size in reply.header["files"]),
        )

    async def _scrub(self) -> None:
        await self._scrubber.scrub()
        for damage in await self._ledger.damaged():
            _log.error("the ledger is damaged", reason=damage)

    async def _follow(self, note: Note) -> None:
        await self._checkpoints.follow_quarantine()


async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    """Do something again and again; what fails is told, and tried again in its turn."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except (OSError, VaultError, LedgerError, OperationFailed, WorkerLost) as error:
            _log.error("housekeeping failed; it is tried again later", reason=str(error))
