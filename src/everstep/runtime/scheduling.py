"""What has an accepted operation executed, and tells whoever waits for it that it has ended."""

from __future__ import annotations

import structlog

from everstep.ledger import Ledger, LedgerDamaged, Operation
from everstep.runtime import names
from everstep.runtime.actors import Actors
from everstep.runtime.checkpoints import Checkpoints
from everstep.runtime.completions import Completions
from everstep.runtime.custom_losses import CustomLosses
from everstep.runtime.futures import Futures
from everstep.runtime.sampling import Sampling
from everstep.runtime.settings import Settings
from everstep.runtime.worker_process import WorkerProcess
from everstep.vault import Vault

_log = structlog.get_logger("everstep.runtime")


class Scheduling:
    """Runs' operations in their order, samples and custom losses beside them.

    Args:
        ledger: has the operations.
        vault: has the runs' snapshots.
        worker: executes.
        checkpoints: what runs save and load, and samplers sample from.
        settings: limits and intervals.

    Attributes:
        actors: run the operations of runs.
        sampling: samples that are under way.
        custom_losses: losses of users' own that are being kept.
        completions: samples that have ended.
        futures: who waits for which operation.
    """

    def __init__(
        self,
        ledger: Ledger,
        vault: Vault,
        worker: WorkerProcess,
        checkpoints: Checkpoints,
        settings: Settings,
    ) -> None:
        self._ledger = ledger
        self.completions = Completions(ledger, settings)
        self.futures = Futures(ledger)
        self.sampling = Sampling(ledger, worker, checkpoints, settings, self._announce)
        self.custom_losses = CustomLosses(ledger, self._announce)
        self.actors = Actors(ledger, vault, worker, checkpoints, settings, self._announce)

    def schedule(self, operation: Operation) -> None:
        """Have an operation executed; a finished one only takes its place in the order."""
        if operation.kind == names.SAMPLE:
            if operation.status == "pending":
                self.sampling.start(operation)
            else:
                self._announce(operation)
            return
        if operation.seq_id == 0 and operation.status == "failed":
            return
        if operation.kind == names.UNLOAD_MODEL:
            return
        self.actors.of(operation.scope).push(operation)

    async def go_on(self) -> None:
        """Schedule what was accepted and not finished, the busiest runs first."""
        for waiting in await self._ledger.backlog():
            if waiting.kind == names.SAMPLE:
                await self._go_on_sampling(waiting.scope)
            elif waiting.kind == names.CREATE_CUSTOM_LOSS:
                await self.custom_losses.go_on(waiting.scope)
            elif waiting.kind != names.UNLOAD_MODEL:
                self.actors.of(waiting.scope)

    async def _go_on_sampling(self, scope: str) -> None:
        try:
            operations = await self._ledger.operations(scope, status="pending")
        except LedgerDamaged as damage:
            _log.error("samples can't be gone on with", sampler=scope, because=str(damage))
            operations = []
            await self._ledger.corrupt(scope, str(damage))
        for operation in operations:
            self.sampling.start(operation)

    def _announce(self, operation: Operation) -> None:
        """Wake whoever waits for an operation."""
        self.completions.note(operation)
        self.futures.announce(operation)
