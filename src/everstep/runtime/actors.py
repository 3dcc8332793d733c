"""The actors of the runs that something is done with: made when needed, gone when they are done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from everstep.ledger import Ledger, Operation
from everstep.runtime.checkpoints import Checkpoints
from everstep.runtime.execution import Execution
from everstep.runtime.recovery import Recovery
from everstep.runtime.residency import Residency
from everstep.runtime.run_actor import RunActor
from everstep.runtime.run_commands import RunCommands
from everstep.runtime.settings import Settings
from everstep.runtime.snapshots import Snapshots
from everstep.runtime.worker_process import WorkerProcess
from everstep.vault import Vault

_log = structlog.get_logger("everstep.runtime")


class Actors:
    """One actor a run.

    Args:
        ledger: has the runs' operations.
        vault: has their snapshots.
        worker: executes.
        checkpoints: what runs save and load.
        settings: limits and intervals.
        announce: called with each operation that ended.
    """

    def __init__(
        self,
        ledger: Ledger,
        vault: Vault,
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
        self._snapshots = Snapshots(vault)
        self._residency = Residency(settings, self._evict)
        self._actors: dict[str, RunActor] = {}

    def find(self, run_id: str) -> RunActor | None:
        """The actor of a run, if it has one now."""
        return self._actors.get(run_id)

    def of(self, run_id: str) -> RunActor:
        """The actor of a run; it begins with what the ledger has."""
        actor = self._actors.get(run_id)
        if actor is None:
            actor = self._actors[run_id] = self._new(run_id)
        return actor

    async def close(self) -> None:
        """Finish what executes and park the runs, bounded by the settings."""
        await self._residency.close()
        stops = [asyncio.create_task(actor.close()) for actor in self._actors.values()]
        actors = list(self._actors.values())
        if stops:
            _, late = await asyncio.wait(stops, timeout=self._settings.shutdown_seconds)
            for task in late:
                task.cancel()
            if late:
                _log.warning("some runs were not parked; their next start replays", runs=len(late))
        for actor in actors:
            actor.abandon()

    def _new(self, run_id: str) -> RunActor:
        commands = RunCommands(
            run_id, self._ledger, self._worker, self._checkpoints, self._residency
        )
        return RunActor(
            commands,
            self._ledger,
            Recovery(commands, self._ledger, self._snapshots),
            lambda lost: Execution(
                commands,
                self._ledger,
                self._snapshots,
                self._settings.replay_seconds,
                self._announce,
                lost,
                self._checkpoints.lock,
            ),
            self._settings,
            self._announce,
            self._forget,
        )

    async def _evict(self, run_id: str) -> bool:
        """Let an idle run leave the worker's memory."""
        actor = self._actors.get(run_id)
        if actor is not None and (not actor.idle or not await actor.unload()):
            return False
        self._residency.left(run_id)
        return True

    def _forget(self, run_id: str) -> None:
        self._actors.pop(run_id, None)
