"""One run's operations, in order: waits for the next, executes it, brings the run back when lost.

The ledger is the queue. An actor holds what of it has not been executed, and is woken when an
operation is accepted. When the worker that held the run is gone, the actor starts over from the
newest checkpoint of the run that stands before its first unfinished operation, and applies the
ledger's operations from there: finished ones again without recording them, unfinished ones for
the first time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from everstep.ledger import Failure, Ledger, NewOperation, Operation
from everstep.runtime.errors import OperationFailed, WorkerLost
from everstep.runtime.execution import Execution
from everstep.runtime.settings import Settings
from everstep.wire.errors import ErrorCategory

_log = structlog.get_logger("everstep.run")
_BACK_OFF = 1.0


class RunActor:
    """Executes the operations of one run in ``seq_id`` order.

    Args:
        run_id: the run.
        ledger: where its operations are.
        make_execution: makes what does as an operation says; takes what it calls when a write
            in the background was lost with its worker.
        settings: the gap's bound and the attempts of an operation.
        ended: called when the run does not come to exist (its creation failed).
    """

    def __init__(
        self,
        run_id: str,
        ledger: Ledger,
        make_execution: Callable[[Callable[[], None]], Execution],
        settings: Settings,
        ended: Callable[[str], None],
    ) -> None:
        self.run_id = run_id
        self._ledger = ledger
        self._execution = make_execution(self._on_lost)
        self._settings = settings
        self._ended = ended
        self._lost = False
        self._stopping = False
        self._waiting: dict[int, Operation] = {}
        self._wake = asyncio.Event()
        self._next = 0
        self._attempts: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self._task = asyncio.create_task(self._live(), name=f"run {run_id}")

    @property
    def position(self) -> int:
        """The sequence id of the last operation that was executed; -1 when there is none."""
        return self._next - 1

    def push(self, operation: Operation) -> None:
        """Take an accepted operation; one that was taken before changes nothing."""
        if operation.seq_id >= self._next:
            self._waiting.setdefault(operation.seq_id, operation)
            self._wake.set()

    async def unload(self) -> None:
        """Let the run leave the worker's memory; it comes back with its next operation."""
        async with self._turn:
            await self._execution.park(self.position)

    async def close(self) -> None:
        """Finish what executes, snapshot, stop. What was not executed stays in the ledger."""
        self._stopping = True
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
        while not self._stopping:
            try:
                await self._recover()
                while (operation := await self._take()) is not None:
                    async with self._turn:
                        if not await self._step(operation):
                            self._ended(self.run_id)
                            return
            except WorkerLost:
                _log.info("the run is not in memory; bringing it back", run=self.run_id)
            except Exception:  # noqa: BLE001  the outcome could not be recorded: what is in memory is ahead
                _log.exception("the run is brought back from the ledger", run=self.run_id)
                await asyncio.sleep(_BACK_OFF)  # spares a full disk; nothing waits on its length
                self._execution.forget()

    async def _recover(self) -> None:
        """Bring the run to where its ledger stands; what follows is left to `_take`."""
        self._lost = False
        pending = await self._ledger.operations(self.run_id, status="pending")
        first = pending[0].seq_id if pending else None
        self._next = 0 if first == 0 else await self._execution.restore(before=first) + 1
        for operation in await self._ledger.operations(self.run_id, after=self._next - 1):
            self._waiting[operation.seq_id] = operation

    async def _take(self) -> Operation | None:
        """Wait for the operation that is next; a gap that outlasts its bound is failed.

        Returns:
            None when the actor stops.

        Raises:
            WorkerLost: a save that was being written is unfinished again.
        """
        while True:
            if self._stopping:
                return None
            if self._lost:
                self._lost = False
                raise WorkerLost("a save was lost with its worker")
            if self._next in self._waiting:
                return self._waiting.pop(self._next)
            self._wake.clear()
            try:
                async with asyncio.timeout(self._settings.gap_seconds if self._waiting else None):
                    await self._wake.wait()
            except TimeoutError:
                await self._give_up_gap()

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
                    NewOperation(self.run_id, seq_id, "missing", b"", failure)
                )
            elif operation.status == "pending":
                await self._execution.fail(operation, OperationFailed(text))
        self._next = last + 1

    async def _step(self, operation: Operation) -> bool:
        """Execute one operation (or apply a finished one again) and move on.

        Returns:
            False when the run does not come to exist.
        """
        attempts = self._attempts.get(operation.request_id, 0) + 1
        alive = True
        if operation.seq_id > 0 and not self._execution.resident:
            raise WorkerLost("the run was unloaded, or its worker ended")
        if attempts > self._settings.worker_attempts and operation.status == "pending":
            await self._execution.fail(
                operation,
                OperationFailed(
                    f"The worker ended {attempts - 1} times while it executed this operation; it "
                    "is given up. Gradients, weights and optimizer are as before it.",
                    ErrorCategory.SERVER,
                ),
            )
        else:
            self._attempts[operation.request_id] = attempts
            alive = await self._execution.execute(operation)
        self._attempts.pop(operation.request_id, None)
        self._next = operation.seq_id + 1
        return alive
