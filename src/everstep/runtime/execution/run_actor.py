"""RunActor: executes one run's operations in order, and brings the run back when it is lost.

The actor is woken when an operation is accepted. When the worker that held the run is gone, or the
run was evicted, the actor starts over from the newest state before its first unfinished operation,
and applies the ledger's operations from there: finished ones again, unfinished ones for the first
time.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from everstep.backoff import Backoff
from everstep.ledger import LedgerDamaged, Operation
from everstep.logs import get_logger
from everstep.runtime.errors import (
    OperationFailed,
    OutOfMemory,
    RunCorrupted,
    RunUnavailable,
    VaultUnreachable,
    WorkerLost,
)
from everstep.runtime.execution import handlers, recovery, snapshots
from everstep.runtime.execution.replay_snapshots import ReplaySnapshots
from everstep.runtime.execution.run import Run
from everstep.runtime.execution.run_context import RunContext
from everstep.vault import StoreFailed
from everstep.wire.errors import ErrorCategory

_log = get_logger("everstep.run")
_BACKOFF = Backoff(initial=0.2, max=30.0)  # from the second failure on
_RETRY = Backoff(initial=60.0, max=3600.0)  # a replay that ends the worker holds up other runs too


class _NotResident(Exception):
    """The run has to be brought back before it can go on."""


class _FatalReplay(Exception):
    """An operation that succeeded before ends the worker each time that it is replayed."""


class RunActor:
    """Executes the operations of one run in ``seq_id`` order.

    Args:
        run_id: the run.
        context: the parts that all runs share.

    Attributes:
        waits_for: why the run does not go on at the moment, or None while it does.
    """

    def __init__(self, run_id: str, context: RunContext) -> None:
        self.run_id = run_id
        self.waits_for: str | None = None
        self._context = context
        self._run = Run(run_id, context, self._may_look_ahead)
        self._stopping = asyncio.Event()
        self._at_rest = False
        self._failures = 0  # since an operation was executed
        self._fatal_replays = 0
        self._replay_snapshots = ReplaySnapshots(self._run)
        self._executing = asyncio.Lock()
        self._wanted: asyncio.Future[bool] | None = None  # a snapshot that a deletion waits for
        self._task = asyncio.create_task(self._live(), name=f"run {run_id}")

    @property
    def position(self) -> int:
        """The sequence id of the last operation that was executed, or -1."""
        return self._run.position

    @property
    def pruning(self) -> asyncio.Task[None] | None:
        """See `Run.pruning`."""
        return self._run.pruning

    @property
    def idle(self) -> bool:
        """Whether the run waits for its next operation, and none has arrived."""
        return self._at_rest and not self._run.wake.is_set()

    def push(self, operation: Operation) -> None:
        """Add an accepted operation. One that was added or executed before changes nothing."""
        if operation.seq_id <= self._run.position:
            return
        self._run.queue.push(operation)
        if operation.status == "pending":
            self.want()
        self._run.wake.set()
        self._run.lookahead.look()

    def want(self) -> None:
        """Record that a client waits for the run, so that it is brought back before others."""
        self._context.recovery.want(self.run_id)

    def wake(self) -> None:
        """Have the actor look for a snapshot that is due."""
        self._run.wake.set()

    async def unload(self) -> bool:
        """Snapshot the run and drop it from the worker's memory.

        It comes back with its next operation. One whose next operation is there stays.

        Returns:
            Whether it was dropped.
        """
        async with self._executing:
            if self._run.lookahead.busy:
                return False
            try:
                await snapshots.evict(self._run)
            except WorkerLost:
                _log.debug("the worker is gone, and the run with it", run=self.run_id)
            return not self._run.resident

    def release(self) -> bool:
        """Stop, unless something is left to do. Returns whether it stops.

        The task ends before that of the run's next actor begins.
        """
        due = self._wanted is not None or self._context.budget.is_due(self.run_id)
        busy = due or self._executing.locked() or not self._run.forgettable
        return self.idle and not busy and self._task.cancel()

    async def close(self) -> None:
        """Finish what executes, snapshot, stop. Other operations stay in the ledger."""
        self._stopping.set()
        self._run.wake.set()
        await asyncio.wait([self._task])
        await self._forget_ahead()
        try:
            await snapshots.evict(self._run)
        except WorkerLost:
            _log.warning("no snapshot at the stop: the worker is gone", run=self.run_id)
        await snapshots.end_pruning(self._run)

    async def end(self) -> None:
        """Finish what executes and what is written, drop the run, stop. Nothing is snapshotted."""
        self._stopping.set()
        self._run.wake.set()
        async with self._executing:
            self._task.cancel()
        await asyncio.wait([self._task])
        await self._run.lookahead.abandon()
        await self._run.wait_for_writes()
        if self._run.resident:
            with contextlib.suppress(WorkerLost, OperationFailed):
                await self._run.drop()

    async def snapshot(self, seconds: float) -> bool:
        """Bring the run back, and snapshot it before it rests. Returns whether there is one now."""
        wanted = self._wanted = self._wanted or asyncio.get_running_loop().create_future()
        self.want()
        self._run.wake.set()
        ends: list[asyncio.Future[Any]] = [wanted, self._task]
        await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return wanted.done() and wanted.result()

    def abandon(self) -> None:
        """Stop at once, wherever it is."""
        self._task.cancel()

    # The loop

    async def _live(self) -> None:
        while not self._stopping.is_set():
            retry_after = 0.0
            try:
                if not await self._work():
                    return
            except _NotResident:
                continue  # it was evicted, or its worker ended while nothing was asked of it
            except WorkerLost as lost:
                _log.info("bringing the run back", run=self.run_id, reason=lost.reason)
            except _FatalReplay as fault:
                retry_after = _RETRY.delay(self._fatal_replays)
                self._fatal_replays += 1
                self.waits_for = f"the run waits {retry_after:g} s: {fault}"
                _log.error("the run waits", run=self.run_id, reason=str(fault), seconds=retry_after)
            except RunUnavailable as reason:
                self.waits_for = f"the run waits: {reason}"
                _log.error("the run waits", run=self.run_id, reason=str(reason))
                self._context.budget.clear(self.run_id)
                return
            except (OutOfMemory, VaultUnreachable, StoreFailed) as fault:
                what = "memory" if isinstance(fault, OutOfMemory) else "its vault"
                self.waits_for = f"the run waits for {what}: {fault}"
                _log.error(f"the run waits for {what}", run=self.run_id, reason=str(fault))
                self._run.detach()
            except (RunCorrupted, LedgerDamaged) as fault:
                self.waits_for = str(fault)
                await recovery.end_corrupted(self._run, str(fault))
                return
            except Exception:  # noqa: BLE001  the result was not recorded: memory is ahead
                _log.exception("the run is brought back from the ledger", run=self.run_id)
                self._run.detach()
            finally:
                self._context.recovery.leave(self.run_id)
            await self._back_off(retry_after)

    async def _work(self) -> bool:
        """Bring the run back if needed, then execute its operations.

        Returns:
            False when the run was not created, or the service stops.
        """
        if not await self._recover():
            return False
        recovering = self._context.recovery
        while (operation := await self._next_operation()) is not None:
            if self.run_id in recovering and not await recovering.turn(self.run_id):
                return False
            async with self._executing:
                if not await self._step(operation):
                    self._context.on_ended(self.run_id)
                    return False
        return False

    async def _back_off(self, at_least: float) -> None:
        """Wait longer after each failure without an operation in between. A stop ends it."""
        failures = max(self._failures, self._run.recorder.failures - 1)
        delay = max(at_least, _BACKOFF.delay(failures - 1) if failures else 0.0)
        self._failures += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._stopping.wait()

    async def _recover(self) -> bool:
        """Restore a state before the first unfinished operation. `_step` replays from there.

        Returns:
            False when the service stops.
        """
        run = self._run
        run.save_lost = False
        await self._forget_ahead()
        await run.recorder.confirm()
        first = await run.queue.reset()
        if first == 0:
            run.position = -1
            return True
        self.waits_for = "the run waits to be brought back: others come first"
        if not await self._context.recovery.turn(self.run_id):
            return False
        self.waits_for = "the run is being brought back from its newest state"
        await run.begin_replay(await recovery.restore(run, before=first))
        self._replay_snapshots.begin()
        return True

    async def _forget_ahead(self) -> None:
        """Forget the command that is ahead. Its effect on the run in memory is not known."""
        if await self._run.lookahead.abandon():
            self._run.detach()

    def _may_look_ahead(self, operation: Operation) -> bool:
        """Whether nothing has to be done with the run before an operation, nor alone with it."""
        run = self._run
        snapshot = self._wanted is not None or self._context.budget.is_due(self.run_id)
        waits = snapshot or run.foreign or run.save_lost or self._stopping.is_set()
        return not waits and operation.request_id not in run.ends

    async def _next_operation(self) -> Operation | None:
        """Wait for the next operation. A gap that outlasts its bound is failed.

        Returns:
            None when the service stops.

        Raises:
            WorkerLost: a save that was being written is unfinished again.
            NotWritten: the last result could not be recorded.
        """
        run = self._run
        while not self._stopping.is_set() or run.lookahead.busy:
            await run.recorder.check()
            if run.save_lost:
                run.save_lost = False
                raise WorkerLost("a save was lost before it was recorded")
            operation = await run.lookahead.operation()
            operation = operation or await run.queue.next(run.position + 1)
            if operation is not None:
                return operation
            self._context.recovery.leave(self.run_id)
            self.waits_for = None
            run.wake.clear()
            async with self._executing:
                await self._snapshot_if_due()
            await self._rest()
        return None

    async def _rest(self) -> None:
        """Wait until there is something to do, or a gap has outlasted its bound."""
        if not self._run.queue and not self._run.saving:
            self._context.recovery.unwant(self.run_id)
        self._at_rest = True
        try:
            async with asyncio.timeout(
                self._context.settings.gap_seconds if self._run.queue else None
            ):
                await self._run.wake.wait()
        except TimeoutError:
            self._at_rest = False
            await handlers.fail_gap(self._run)
        finally:
            self._at_rest = False

    # One operation

    async def _step(self, operation: Operation) -> bool:
        """Execute an operation, or replay a finished one, and move on.

        Returns:
            False when the run was not created.
        """
        run = self._run
        if operation.seq_id > 0 and not run.resident and not run.lookahead.busy:
            raise _NotResident
        alive, replayed = True, 0.0
        try:
            if operation.status == "pending":
                self.waits_for = None
                alive = await self._execute(operation)
            else:
                self.waits_for = f"the run is being brought back: replaying {operation.seq_id}"
                replayed = await recovery.replay(run, operation)
        except WorkerLost as lost:
            self._blame(operation, lost)
            raise
        run.position = operation.seq_id
        self._failures = 0
        if operation.status != "pending":
            run.ends.pop(operation.request_id, None)
            await self._replay_snapshots.after(operation, replayed)
        elif alive:
            self._context.recovery.renew(self.run_id)
            await self._snapshot_if_due()
        return alive

    async def _execute(self, operation: Operation) -> bool:
        run = self._run
        if run.foreign:
            await self._leave_foreign()
        # Brought back: the next run's turn. Behind a long operation it would wait for nothing, and
        # behind one that ends the worker again and again it would never come.
        self._context.recovery.leave(self.run_id)
        if not run.given_up(operation):
            return await handlers.execute(run, operation)
        times = run.ends[operation.request_id].total
        text = (
            f"The worker ended {times} times while it executed this operation "
            f"({operation.kind}, {run.last_end}); it is given up. Gradients, weights and "
            "optimizer are as before it."
        )
        await run.fail(operation, OperationFailed(text, ErrorCategory.SERVER))
        return operation.seq_id != 0

    async def _leave_foreign(self) -> bool:
        """Snapshot the run, so that later results belong to this numeric environment."""
        taken = await snapshots.take(self._run, self._run.position)
        self._run.foreign = self._run.foreign and not taken
        return taken

    async def _snapshot_if_due(self) -> None:
        """Snapshot the run if the budget of replay says so.

        Raises:
            _NotResident: it has to be brought back for that.
        """
        run = self._run
        if run.lookahead.busy:
            return  # the state in memory may be that of the next position
        if self._wanted is None and not self._context.budget.is_due(self.run_id):
            return
        if run.snapshots_given_up:
            self._context.budget.clear(self.run_id)
            return
        if not run.resident:
            raise _NotResident
        if self._wanted is not None:
            self._wanted.set_result(await self._leave_foreign())
            self._wanted = None
        elif run.foreign:
            await self._leave_foreign()
        else:
            await snapshots.take_in_background(run, run.position)

    def _blame(self, operation: Operation, lost: WorkerLost) -> None:
        """Count how often an operation ended its worker. Its neighbours are not counted."""
        self._run.blame(operation, lost)
        if operation.status != "pending" and self._run.given_up(operation):
            ends = self._run.ends.pop(operation.request_id)
            raise _FatalReplay(
                f"replaying operation {operation.seq_id} ended the worker {ends.total} times "
                f"({lost.reason})"
            ) from lost
