"""Scheduler: dispatches accepted operations and resolves their futures."""

from __future__ import annotations

from everstep.ledger import LedgerDamaged, Operation
from everstep.logs import get_logger
from everstep.runtime import ids
from everstep.runtime.admission.custom_losses import CustomLosses
from everstep.runtime.context import RuntimeContext
from everstep.runtime.execution.futures import Futures
from everstep.runtime.execution.run_registry import RunRegistry
from everstep.runtime.sampling.batch_poll import BatchPoll
from everstep.runtime.sampling.requests import Sampling

_log = get_logger("everstep.runtime")


class Scheduler:
    """Dispatches a run's operations in order, samples and custom losses on their own.

    Args:
        context: of the service.

    Attributes:
        runs: execute the operations of runs.
        sampling: executes samples.
        custom_losses: creates custom losses.
        batch_poll: answers polls for all samples of a client.
        futures: resolved when an operation has finished.
    """

    def __init__(self, context: RuntimeContext) -> None:
        self._ledger = context.ledger
        self.batch_poll = BatchPoll(context)
        self.futures = Futures(context.ledger, self._want)
        self.sampling = Sampling(context, self._resolve)
        self.custom_losses = CustomLosses(context.ledger, self._resolve)
        self.runs = RunRegistry(context, self._resolve, self.futures.forget)

    def dispatch(self, operation: Operation) -> None:
        """Have an operation executed. A finished one only takes its turn in its run's order."""
        if operation.kind == ids.SAMPLE:
            if operation.status == "pending":
                self.sampling.start(operation)
            else:
                self._resolve(operation)
            return
        if operation.seq_id == 0 and operation.status == "failed":
            return
        if operation.kind == ids.UNLOAD_MODEL:
            return
        self.runs.get_or_create(operation.scope).push(operation)

    async def resume(self) -> None:
        """Dispatch the operations that an earlier process accepted and did not finish."""
        for backlog in await self._ledger.backlog():
            if backlog.kind == ids.SAMPLE:
                await self._resume_sampling(backlog.scope)
            elif backlog.kind == ids.CREATE_CUSTOM_LOSS:
                await self.custom_losses.resume(backlog.scope)
            elif backlog.kind != ids.UNLOAD_MODEL:
                self.runs.get_or_create(backlog.scope)
        self.runs.start_accounting()

    async def _resume_sampling(self, scope: str) -> None:
        try:
            operations = await self._ledger.operations(scope, status="pending", contents=False)
        except LedgerDamaged as damage:
            _log.error("samples can't be resumed", sampler=scope, reason=str(damage))
            operations = []
            await self._ledger.mark_corrupted(scope, str(damage))
        for operation in operations:
            self.sampling.start(operation)

    def _resolve(self, operation: Operation) -> None:
        """Wake everything that waits for an operation to finish."""
        self.batch_poll.notify(operation)
        self.futures.resolve(operation)

    def _want(self, scope: str) -> None:
        """Record that a client waits for a run."""
        actor = self.runs.find(scope)
        if actor is not None:
            actor.want()
