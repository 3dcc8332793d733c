"""Background maintenance: scrubbing and garbage collection of a running service, at intervals.

The scrubber moves damaged files to quarantine. The collector removes expired checkpoints, the files
that no checkpoint names, and recorded samples that were not used for a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from everstep.ledger import LedgerError
from everstep.logs import get_logger
from everstep.runtime.checkpoints.metadata import CheckpointMetadata
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import OperationFailed, WorkerLost
from everstep.runtime.maintenance.gc import GarbageCollector
from everstep.runtime.maintenance.scrub import Scrubber
from everstep.vault import QuarantineRecord, VaultError

_log = get_logger("everstep.maintenance")


class BackgroundMaintenance:
    """Scrubs and collects garbage at the intervals that the settings give.

    Args:
        context: the service's ledger, vault, catalog and settings.
        metadata: writes metadata to the vault that an earlier process could not write.
    """

    def __init__(self, context: RuntimeContext, metadata: CheckpointMetadata) -> None:
        self._metadata = metadata
        self._ledger = context.ledger
        self._catalog = context.catalog
        self._settings = context.settings
        self._collector = GarbageCollector(context, self._settings.collect_grace_seconds)
        self._scrubber = Scrubber(
            context.vault,
            bytes_per_second=self._settings.scrub_bytes_per_second,
            interval_seconds=self._settings.scrub_interval_seconds,
            on_quarantined=self._follow_quarantine,
        )
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start both jobs. The first scrub and the first collection begin after an interval."""
        self._tasks = [
            asyncio.create_task(
                run_every(self._settings.scrub_interval_seconds, self._scrub), name="scrubber"
            ),
            asyncio.create_task(
                run_every(self._settings.collect_interval_seconds, self.collect), name="collector"
            ),
        ]

    async def close(self) -> None:
        """Stop both jobs. A collection ends before the next file."""
        self._collector.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def collect(self) -> None:
        """Remove ended, expired and orphaned checkpoints, unnamed files and unused records."""
        await self._metadata.write_unwritten()
        await self._catalog.finish_deletions()
        found = await self._collector.find()
        await self._collector.remove(found)
        files = await self._collector.collect_files()
        kept = timedelta(seconds=self._settings.recorded_sample_seconds)
        samples = await self._ledger.samples.recorded.remove_unused(datetime.now(UTC) - kept)
        _log.info(
            "garbage collected",
            ended=len(found.ended),
            expired=len(found.expired),
            orphaned=len(found.orphaned),
            files=len(files),
            bytes=sum(ref.size for ref in files),
            recorded_samples=samples,
        )

    async def _scrub(self) -> None:
        await self._scrubber.scrub()
        for damage in await self._ledger.find_damaged_rows():
            _log.error("the ledger is damaged", reason=damage)

    async def _follow_quarantine(self, record: QuarantineRecord) -> None:
        await self._catalog.follow_quarantine()


async def run_every(seconds: float, job: Callable[[], Awaitable[None]]) -> None:
    """Run a job at intervals until cancelled. A job that fails is logged, and runs again.

    Args:
        seconds: from the end of one run to the start of the next, and before the first.
        job: the job.
    """
    while True:
        await asyncio.sleep(seconds)
        try:
            await job()
        except (OSError, VaultError, LedgerError, OperationFailed, WorkerLost) as error:
            _log.error("maintenance failed; it runs again later", reason=str(error))
