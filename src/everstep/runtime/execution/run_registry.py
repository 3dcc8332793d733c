"""RunRegistry: the actors of the runs that are in use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from everstep.backoff import Backoff
from everstep.ledger import Operation
from everstep.logs import get_logger
from everstep.runtime.context import RuntimeContext
from everstep.runtime.execution.owed_replay import owed_by_run
from everstep.runtime.execution.recovery_queue import RecoveryQueue
from everstep.runtime.execution.replay_budget import ReplayBudget
from everstep.runtime.execution.run_actor import RunActor
from everstep.runtime.execution.run_context import RunContext
from everstep.runtime.workers.eviction import Eviction
from everstep.vault import StoreFailed

_log = get_logger("everstep.runtime")
_BACKOFF = Backoff(initial=1.0, max=60.0)


class RunRegistry:
    """Creates an actor for a run when it is needed, and removes that of an ended or evicted run.

    Args:
        context: of the service.
        on_finished: called with each operation that succeeded or failed.
        on_removed: called with the id of each run that has ended.
    """

    def __init__(
        self,
        context: RuntimeContext,
        on_finished: Callable[[Operation], None],
        on_removed: Callable[[str], None],
    ) -> None:
        self._on_removed = on_removed
        settings = context.settings
        self._shutdown_seconds = settings.shutdown_seconds
        self._actors: dict[str, RunActor] = {}
        self._context = RunContext(
            home=context.home,
            ledger=context.ledger,
            vault=context.vault,
            workers=context.workers,
            pins=context.pins,
            catalog=context.catalog,
            settings=settings,
            eviction=Eviction(settings, context.workers, self._evict),
            recovery=RecoveryQueue(),
            budget=ReplayBudget(settings.replay_seconds, self._wake),
            on_finished=on_finished,
            on_ended=self._remove,
        )
        self._accounting: asyncio.Task[None] | None = None
        self._closing = False

    def find(self, run_id: str) -> RunActor | None:
        """Return the actor of a run, or None if the run is not in use."""
        return self._actors.get(run_id)

    def get_or_create(self, run_id: str) -> RunActor:
        """Return the actor of a run. A new one begins with the operations in the ledger."""
        actor = self._actors.get(run_id)
        if actor is None:
            actor = self._actors[run_id] = RunActor(run_id, self._context)
        return actor

    async def end(self, run_id: str) -> None:
        """End the actor of a run that is to be deleted, if it has one.

        What executes is finished, and what is being written. Other operations stay in the ledger.
        """
        actor = self._actors.get(run_id)
        if actor is not None:
            await actor.end()
            self._context.eviction.remove(run_id)
            if self._actors.get(run_id) is actor:
                self._remove(run_id)

    async def unload(self, run_id: str) -> bool:
        """Snapshot a run and drop it from the worker's memory, and its actor if it is idle.

        Both come back with its next operation. A run whose next operation is there stays.

        Returns:
            Whether it was dropped.
        """
        actor = self._actors.get(run_id)
        if actor is not None and not await actor.unload():
            return False
        self._context.eviction.remove(run_id)
        if actor is not None:
            self._release(actor)
        return True

    async def make_durable(self, run_id: str) -> bool:
        """Bring a run back, and snapshot it once its operations are executed.

        Returns:
            Whether it has a snapshot now. False also if that takes longer than a stop may.
        """
        return await self.get_or_create(run_id).snapshot(self._shutdown_seconds)

    def start_accounting(self) -> None:
        """Begin to count the replay that runs owe which nobody has used since the start."""
        self._accounting = asyncio.create_task(self._account(), name="replay accounting")

    async def _account(self) -> None:
        context, attempt = self._context, 0
        while True:
            try:
                owed = await owed_by_run(context.ledger, context.vault)
                break
            except (StoreFailed, OSError) as fault:
                _log.warning("the replay that runs owe is not counted yet", reason=str(fault))
                await asyncio.sleep(_BACKOFF.delay(attempt))
                attempt += 1
        context.budget.seed(owed)

    async def close(self) -> None:
        """Finish the executing operations and snapshot the runs, within the settings' bound."""
        self._closing = True
        if self._accounting is not None:
            self._accounting.cancel()
            await asyncio.wait([self._accounting])
        await self._context.eviction.close()
        actors = list(self._actors.values())
        stops = [asyncio.create_task(actor.close()) for actor in actors]
        self._context.recovery.close()
        if stops:
            _, late = await asyncio.wait(stops, timeout=self._shutdown_seconds)
            for task in late:
                task.cancel()
            if late:
                _log.warning("some runs have no snapshot; their next start replays", runs=len(late))
        for actor in actors:
            actor.abandon()

    async def _evict(self, run_id: str) -> bool:
        """Drop an idle run from the worker's memory. Returns whether it was dropped."""
        actor = self._actors.get(run_id)
        return (actor is None or actor.idle) and await self.unload(run_id)

    def _release(self, actor: RunActor, _: object = None) -> None:
        """Keep nothing of an evicted run in memory. Its next operation creates an actor again."""
        if self._actors.get(actor.run_id) is not actor:
            return
        if actor.pruning is not None and not actor.pruning.done():
            actor.pruning.add_done_callback(partial(self._release, actor))
        elif actor.release():
            del self._actors[actor.run_id]

    def _wake(self, run_id: str) -> None:
        """Have a run look for a snapshot that is due. One that is not in use is brought back."""
        actor = self._actors.get(run_id)
        if actor is None and not self._closing:
            actor = self.get_or_create(run_id)
        if actor is not None:
            actor.wake()

    def _remove(self, run_id: str) -> None:
        self._actors.pop(run_id, None)
        self._context.budget.clear(run_id)
        self._context.recovery.unwant(run_id)
        self._on_removed(run_id)
