"""One run's operations, in order: waits for the next, executes it, brings the run back when lost.

The ledger is the queue. An actor holds the next few of what has not been executed, and is woken
when an operation is accepted. When the worker that held the run is gone, or the run was evicted,
the actor starts over from the newest state that stands before its first unfinished operation, and
applies the ledger's operations from there: finished ones again, unfinished ones for the first
time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from everstep.ledger import Failure, Ledger, LedgerDamaged, NewOperation, Operation
from everstep.runtime import names
from everstep.runtime.errors import (
    OperationFailed,
    RunCorrupted,
    RunUnavailable,
    VaultUnreachable,
    WorkerLost,
)
from everstep.runtime.execution import Execution
from everstep.runtime.recovery import Recovery
from everstep.runtime.run_commands import RunCommands
from everstep.runtime.settings import Settings
from everstep.vault import StoreFailed
from everstep.wire.errors import ErrorCategory

_log = structlog.get_logger("everstep.run")
_PAGE = 64
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 30.0


class _NotInMemory(Exception):
    """The run has to be brought back before it can go on."""


class RunActor:
    """Executes the operations of one run in ``seq_id`` order.

    Args:
        commands: to the worker that holds the run.
        ledger: where its operations are.
        recovery: brings it back.
        make_execution: makes what does as an operation says; takes what it calls when a write
            in the background was lost.
        settings: the gap's bound and the attempts of an operation.
        announce: called with each operation that failed with its run.
        ended: called when the run does not come to exist, or can't go on.

    Attributes:
        waits_for: why the run does not go on at the moment; None while it does.
    """

    def __init__(
        self,
        commands: RunCommands,
        ledger: Ledger,
        recovery: Recovery,
        make_execution: Callable[[Callable[[], None]], Execution],
        settings: Settings,
        announce: Callable[[Operation], None],
        ended: Callable[[str], None],
    ) -> None:
        self.run_id = commands.run_id
        self.waits_for: str | None = None
        self._commands = commands
        self._ledger = ledger
        self._recovery = recovery
        self._execution = make_execution(self._on_lost)
        self._settings = settings
        self._announce = announce
        self._ended = ended
        self._lost = False
        self._stopping = asyncio.Event()
        self._waiting: dict[int, Operation] = {}
        self._more = False
        self._wake = asyncio.Event()
        self._next = 0
        self._at_rest = False
        self._setbacks = 0
        self._attempts: dict[str, int] = {}
        self._last_end = ""
        self._turn = asyncio.Lock()
        self._task = asyncio.create_task(self._live(), name=f"run {self.run_id}")

    @property
    def position(self) -> int:
        """The sequence id of the last operation that was executed; -1 when there is none."""
        return self._next - 1

    @property
    def idle(self) -> bool:
        """Whether the run waits for its next operation, and none has come."""
        return self._at_rest and not self._wake.is_set()

    def push(self, operation: Operation) -> None:
        """Take an accepted operation; one that was taken before changes nothing."""
        if operation.seq_id < self._next:
            return
        if len(self._waiting) < _PAGE:
            self._waiting.setdefault(operation.seq_id, operation)
        else:
            self._more = True  # it is in the ledger
        self._wake.set()

    async def unload(self) -> bool:
        """Let the run leave the worker's memory; it comes back with its next operation.

        Returns:
            Whether it left.
        """
        async with self._turn:
            try:
                await self._execution.park(self.position)
            except WorkerLost:
                _log.debug("the worker is gone, and the run with it", run=self.run_id)
            return not self._commands.resident

    async def close(self) -> None:
        """Finish what executes, snapshot, stop. What was not executed stays in the ledger."""
        self._stopping.set()
        self._wake.set()
        await asyncio.wait([self._task])
        try:
            await self._execution.park(self.position)
        except WorkerLost:
            _log.warning("no snapshot at the stop: the worker is gone", run=self.run_id)

    def abandon(self) -> None:
        """Stop at once, wherever it is."""
        self._task.cancel()

    def _on_lost(self) -> None:
        self._lost = True
        self._wake.set()

    async def _live(self) -> None:
        while not self._stopping.is_set():
            try:
                await self._recover()
                while (operation := await self._take()) is not None:
                    async with self._turn:
                        if not await self._step(operation):
                            self._ended(self.run_id)
                            return
            except _NotInMemory:
                continue  # it was evicted, or its worker ended while nothing was asked of it
            except WorkerLost as lost:
                _log.info("bringing the run back", run=self.run_id, because=lost.reason)
            except RunUnavailable as reason:
                self.waits_for = f"the run waits: {reason}"
                _log.error("the run waits", run=self.run_id, because=str(reason))
                return
            except (VaultUnreachable, StoreFailed) as fault:
                self.waits_for = f"the run waits for its vault: {fault}"
                _log.error("the run waits for its vault", run=self.run_id, because=str(fault))
                self._commands.forget()
            except (RunCorrupted, LedgerDamaged) as fault:
                await self._corrupt(str(fault))
                return
            except Exception:  # noqa: BLE001  the outcome could not be recorded: memory is ahead
                _log.exception("the run is brought back from the ledger", run=self.run_id)
                self._commands.forget()
            await self._back_off()

    async def _back_off(self) -> None:
        """Wait longer after each setback without an operation in between; a stop ends it."""
        delay = min(_FIRST_DELAY * 2**self._setbacks, _LONGEST_DELAY) if self._setbacks else 0.0
        self._setbacks = min(self._setbacks + 1, 20)
        try:
            async with asyncio.timeout(delay):
                await self._stopping.wait()
        except TimeoutError:
            pass

    async def _recover(self) -> None:
        """Bring the run to a state before its first unfinished operation; `_take` goes on."""
        self._lost = False
        pending = await self._ledger.operations(self.run_id, status="pending", limit=1)
        first = pending[0].seq_id if pending else None
        self._waiting.clear()
        self._more = True
        if first == 0:
            self._next = 0
            return
        self.waits_for = "the run is being brought back from its newest state"
        position = await self._recovery.restore(before=first)
        self._execution.stands_at(position)
        self._next = position + 1

    async def _take(self) -> Operation | None:
        """Wait for the operation that is next; a gap that outlasts its bound is failed.

        Returns:
            None when the actor stops.

        Raises:
            WorkerLost: a save that was being written is unfinished again.
        """
        while not self._stopping.is_set():
            if self._lost:
                self._lost = False
                raise WorkerLost("a save was lost before it was recorded")
            if self._next not in self._waiting and self._more:
                await self._turn_page()
            if self._next in self._waiting:
                return self._waiting.pop(self._next)
            self.waits_for = None
            self._wake.clear()
            try:
                self._at_rest = True
                async with asyncio.timeout(self._settings.gap_seconds if self._waiting else None):
                    await self._wake.wait()
            except TimeoutError:
                self._at_rest = False
                await self._give_up_gap()
            finally:
                self._at_rest = False
        return None

    async def _turn_page(self) -> None:
        """Read the next operations from the ledger."""
        self._more = False
        page = await self._ledger.operations(self.run_id, after=self.position, limit=_PAGE)
        for operation in page:
            self._waiting.setdefault(operation.seq_id, operation)
        if len(page) == _PAGE and self._next in self._waiting:
            self._more = True

    async def _give_up_gap(self) -> None:
        """Fail what did not come and what waits for it, so that nothing hangs for ever.

        The missing operations get failed rows of their own, so that they can't be executed late.
        """
        last = max(self._waiting)
        text = (
            f"An operation of {self.run_id} with a lower sequence id (from {self._next}) did not "
            f"arrive within {self._settings.gap_seconds:g} s. This one was not executed; send it "
            "again with a new sequence id."
        )
        for seq_id in range(self._next, last + 1):
            operation = self._waiting.pop(seq_id, None)
            if operation is None:
                failure = Failure(text, ErrorCategory.USER)
                await self._ledger.accept(
                    NewOperation(self.run_id, seq_id, names.MISSING, b"", failure)
                )
            elif operation.status == "pending":
                await self._execution.fail(operation, OperationFailed(text))
        self._next = last + 1

    async def _step(self, operation: Operation) -> bool:
        """Execute one operation, or apply a finished one again, and move on.

        Returns:
            False when the run does not come to exist.
        """
        if operation.seq_id > 0 and not self._commands.resident:
            raise _NotInMemory
        alive = True
        try:
            if operation.status != "pending":
                self.waits_for = f"the run is being brought back: replaying {operation.seq_id}"
                self._execution.spend(await self._recovery.apply_again(operation))
            else:
                self.waits_for = None
                alive = await self._execute(operation)
        except WorkerLost as lost:
            if lost.blamed:
                self._blame(operation, lost)
            raise
        self._attempts.pop(operation.request_id, None)
        self._next = operation.seq_id + 1
        self._setbacks = 0
        return alive

    async def _execute(self, operation: Operation) -> bool:
        if self._recovery.foreign and await self._execution.snapshot(self.position):
            self._recovery.foreign = False  # what follows belongs to this environment
        attempts = self._attempts.get(operation.request_id, 0)
        if attempts < self._settings.worker_attempts:
            return await self._execution.execute(operation)
        text = (
            f"The worker ended {attempts} times while it executed this operation "
            f"({operation.kind}, {self._last_end}); it is given up. Gradients, weights and "
            "optimizer are as before it."
        )
        await self._execution.fail(operation, OperationFailed(text, ErrorCategory.SERVER))
        return operation.seq_id != 0

    def _blame(self, operation: Operation, lost: WorkerLost) -> None:
        """Count how often an operation ended its worker; its neighbours are not counted."""
        attempts = self._attempts.get(operation.request_id, 0) + 1
        self._attempts[operation.request_id] = attempts
        self._last_end = lost.reason
        if operation.status != "pending" and attempts >= self._settings.worker_attempts:
            raise RunUnavailable(
                f"replaying operation {operation.seq_id} ended the worker {attempts} times "
                f"({lost.reason})"
            ) from lost

    async def _corrupt(self, fault: str) -> None:
        _log.error("the run is corrupted", run=self.run_id, because=fault)
        self.waits_for = fault
        for operation in await self._ledger.corrupt(self.run_id, fault):
            self._announce(operation)
        if self._commands.resident:
            try:
                await self._commands.drop()
            except WorkerLost:
                _log.debug("the worker is gone, and the run with it", run=self.run_id)
        self._ended(self.run_id)
