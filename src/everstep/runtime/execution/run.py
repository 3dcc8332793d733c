"""Run: the state of one run in the service, and its commands to the worker that holds it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from everstep.engine.models.info import ModelInfo
from everstep.engine.numerics import Numerics
from everstep.failpoints import Failpoint
from everstep.ledger import Operation
from everstep.ledger import Run as RunRecord
from everstep.logs import get_logger
from everstep.runtime import ids
from everstep.runtime.checkpoints.catalog import check_compatible, id_of
from everstep.runtime.errors import (
    OperationFailed,
    RuntimeFault,
    RunUnavailable,
    VaultUnreachable,
    WorkerLost,
)
from everstep.runtime.execution.lookahead import Lookahead
from everstep.runtime.execution.operation_queue import OperationQueue
from everstep.runtime.execution.recorder import Recorder, encoded_result
from everstep.runtime.execution.run_context import RunContext
from everstep.runtime.maintenance.pins import send_pinned
from everstep.runtime.workers.base import Call, Lease, not_served
from everstep.runtime.workers.ends import WorkerEnds
from everstep.spool import Data, freed
from everstep.vault import CheckpointId
from everstep.wire.errors import ErrorCategory
from everstep.worker.protocol import messages
from everstep.worker.protocol.lineage import Line, Lineage

R = TypeVar("R", bound=messages.Reply)
_log = get_logger("everstep.run")
SNAPSHOT_KEY = "snapshot"
"""The key of a run's snapshot among its writes."""
NOT_DETERMINISTIC = 0
"""``deterministic`` of an environment in which equal passes may give other bits each time."""
_EXECUTED = Failpoint("runtime.execute.executed", "the worker answered, nothing is recorded")
_RECORDED = Failpoint("runtime.execute.recorded", "a result is durable, and not yet acknowledged")


class Run:
    """One run: its state in the service, beyond the ledger.

    The run's actor executes its operations (`run_actor`). Handlers, recovery and snapshots are
    functions that take the run.

    Args:
        run_id: the run.
        context: the parts that all runs share.
        may_look_ahead: whether an operation's command may be sent before its turn.

    Attributes:
        queue: its operations that are not executed yet.
        lookahead: sends the next training command while one executes.
        position: sequence id of the last operation that its state includes, or -1.
        foreign: the results since its newest state were made in another numeric environment.
        lineage: the checkpoints that its state in the worker's memory descends from.
        writes: its checkpoints and snapshots that are being written, by path or `SNAPSHOT_KEY`.
        pruning: the task that deletes its older snapshots, or has deleted them.
        snapshot_position: position of its newest durable state that replay would begin from.
        pruned_position: requests up to it were pruned.
        save_lost: a save was lost with its worker before it was recorded.
        ends: how often each unfinished operation ended its worker, by request id.
        last_end: how the worker ended that an operation was blamed for.
        snapshot_ends: how often in a row a snapshot ended its worker.
        wake: set when the actor has something to do.
        recorder: holds its last result until that is recorded.
        sends_requests: whether its worker is sent requests, since it could not read a stored one.
    """

    def __init__(
        self, run_id: str, context: RunContext, may_look_ahead: Callable[[Operation], bool]
    ) -> None:
        self.run_id = run_id
        self.context = context
        self.queue = OperationQueue(context.ledger, run_id)
        self.lookahead = Lookahead(self.queue, may_look_ahead)
        self.position = -1
        self.foreign = False
        self.lineage = Lineage()
        self.writes: dict[str, asyncio.Task[None]] = {}
        self.snapshot_position = -1
        self.pruned_position = 0
        self.pruning: asyncio.Task[None] | None = None
        self.save_lost = False
        self.ends: defaultdict[str, WorkerEnds] = defaultdict(WorkerEnds)
        self.snapshot_ends = WorkerEnds()
        self.last_end = ""
        self.wake = asyncio.Event()
        self.recorder = Recorder(self.wake.set)
        self._lease: Lease | None = None
        self._environment: Mapping[str, Any] = {}
        self._numerics: Mapping[str, Any] | None = None
        self.sends_requests = False

    # What is known of it

    @property
    def resident(self) -> bool:
        """Whether the run is in the memory of a worker that is alive."""
        return self._lease is not None and self._lease.valid

    @property
    def forgettable(self) -> bool:
        """Whether nothing is known of the run that the ledger and the vault don't hold.

        The ends of workers that are counted bound how often something is tried again.
        """
        counted = self.ends or self.snapshot_ends.total
        ahead = self.queue or self.lookahead.busy
        return not (self.resident or self.writes or self.save_lost or counted or ahead)

    @property
    def replays_exactly(self) -> bool:
        """Whether a replay has to give the recorded results bit for bit."""
        return not self.foreign and self._environment.get("deterministic") != NOT_DETERMINISTIC

    async def record(self) -> RunRecord:
        """Return the run's row in the ledger."""
        record = await self.context.ledger.run(self.run_id)
        if record is None:
            raise RuntimeFault(f"run {self.run_id} has operations but no row in the ledger")
        return record

    def model(self, record: RunRecord) -> ModelInfo:
        """Return the run's base model.

        Raises:
            RunUnavailable: this service doesn't serve it.
        """
        info = self.context.workers.models.get(record.base_model)
        if info is None:
            raise RunUnavailable(not_served(self.context.workers, record.base_model))
        return info

    def environment(self, record: RunRecord) -> dict[str, Any]:
        """Return the numeric environment that the run would go on in. Raises as `model` does."""
        info = self.model(record)
        own = {**info.environment(), "base_fingerprint": info.fingerprint}
        return {**self._environment, **own, **self._own_numerics(record)}

    def _own_numerics(self, record: RunRecord) -> Mapping[str, Any]:
        """Return the choices of arithmetic that the run keeps, wherever it goes on."""
        if self._numerics is not None:
            return self._numerics
        known = Numerics.recorded(record.environment)
        return known.environment() if known is not None else {}

    def mark_durable(self, position: int) -> None:
        """Record that the state of now is durable: nothing would be replayed."""
        self.snapshot_position = position
        self.context.budget.reset(self.run_id, 0.0)

    async def begin_replay(self, position: int) -> None:
        """Record that a durable state is restored, and what the replay after it costs."""
        self.position = self.snapshot_position = position
        await self.count_replay_cost()

    async def count_replay_cost(self) -> None:
        """Have the budget count what a replay from the newest durable state costs."""
        seconds = await self.replay_seconds_after(self.snapshot_position)
        self.context.budget.reset(self.run_id, seconds)

    async def replay_seconds_after(self, position: int) -> float:
        """Return how long the operations took that a replay from a position would repeat."""
        costs = await self.context.ledger.search.executed_seconds(
            {self.run_id: position}, ids.CHANGES_STATE
        )
        return costs.get(self.run_id, 0.0)

    def add_replay_cost(self, seconds: float) -> None:
        """Add the cost of replaying an operation that was executed to the budget."""
        self.context.budget.add(self.run_id, seconds)

    # Results

    async def succeed(
        self, operation: Operation, result: Mapping[str, Any] | Data, **also: Any
    ) -> None:
        """Record an operation's result durably, then resolve its future.

        Args:
            operation: the operation.
            result: JSON, or a message in the protobuf form of the wire. A spool is closed.
            also: further columns and rows of the same transaction, as in `Ledger.succeed`.
        """
        _EXECUTED()
        data, media = encoded_result(result)
        try:
            finished = await self.context.ledger.succeed(operation.request_id, data, media, **also)
        finally:
            await freed(data)
        _RECORDED()
        self.ends.pop(operation.request_id, None)
        self.context.on_finished(finished)

    async def fail(self, operation: Operation, failure: OperationFailed) -> None:
        """Record that an operation failed, then resolve its future."""
        finished = await self.context.ledger.fail(
            operation.request_id, failure.message, str(failure.category)
        )
        self.ends.pop(operation.request_id, None)
        _log.info(
            "operation failed",
            run=self.run_id,
            seq_id=operation.seq_id,
            kind=operation.kind,
            reason=failure.message,
        )
        self.context.on_finished(finished)

    def blame(self, operation: Operation, lost: WorkerLost) -> None:
        """Count an end of the worker for the operation that it was executing, if for any."""
        self.ends[operation.request_id].count(lost)
        if lost.blamed:
            self.last_end = lost.reason

    def given_up(self, operation: Operation) -> bool:
        """Return whether an operation has ended the worker too often to be tried again."""
        attempts = self.context.settings.worker_attempts
        return operation.request_id in self.ends and self.ends[operation.request_id].reach(attempts)

    def blame_snapshot(self, lost: WorkerLost) -> None:
        """Count an end of the worker for a snapshot that it was capturing or writing, if it was."""
        self.snapshot_ends.count(lost)
        if lost.blamed and self.snapshots_given_up:
            _log.error("no more snapshots: they end the worker", run=self.run_id)

    @property
    def snapshots_given_up(self) -> bool:
        """Whether snapshots have ended the worker so often that no more are taken."""
        return self.snapshot_ends.reach(self.context.settings.worker_attempts)

    # Writes in the background

    def write_in_background(self, key: str, work: Coroutine[Any, Any, None]) -> None:
        """Run the task that waits for a checkpoint or snapshot and records it."""
        task = asyncio.create_task(work, name=f"write {key}")
        self.writes[key] = task

        def end(_: object) -> None:
            if self.writes.get(key) is task:
                del self.writes[key]
            self.wake.set()

        task.add_done_callback(end)

    @property
    def saving(self) -> bool:
        """Whether a checkpoint of the run is being written that its client waits for."""
        return any(key != SNAPSHOT_KEY for key in self.writes)

    async def wait_for_writes(self) -> None:
        """Wait until no checkpoint of the run is being written, and no result is being recorded."""
        await self.recorder.wait()
        while self.writes:
            await asyncio.wait(self.writes.values())

    def lose_save(self) -> None:
        """Record that a save's operation is unfinished although the run went on behind it."""
        self.save_lost = True
        self.wake.set()

    # Commands to the worker

    async def attach(self) -> None:
        """Wait for a ready worker and bind this run to it."""
        record = await self.record()
        self._lease = await self.context.workers.acquire(self.run_id, record.base_model)
        self._environment = self._lease.worker.environment

    def detach(self) -> None:
        """Treat the run as not resident, whatever the worker holds."""
        self._lease = None
        self.context.workers.release(self.run_id)
        self.context.eviction.remove(self.run_id)

    async def create(self, record: RunRecord) -> None:
        """Create the run's state from its seed."""
        environment = record.environment or {}
        command = messages.CreateRun(self.run_id, record.base_model, record.lora, environment)
        created = await self.call(command)
        self._numerics = created.numerics
        self.context.eviction.add(self.run_id, created.bytes)
        self.lineage.begin([])

    async def restore(self, record: RunRecord, source: CheckpointId, *, optimizer: bool) -> None:
        """Restore the run's state from a checkpoint or snapshot in the vault."""
        base_model, lora = record.base_model, record.lora
        environment = record.environment or {}
        command = messages.RestoreRun(self.run_id, base_model, lora, source, optimizer, environment)
        async with self._syncing_quarantine():
            restored = await self.call(command)
        self._numerics = restored.numerics
        self.context.eviction.add(self.run_id, restored.bytes)
        self._begin_lineage(source, restored.parents)

    async def restore_path(self, record: RunRecord, path: str, *, optimizer: bool) -> None:
        """Restore the run's state from the checkpoint of a path."""
        catalog = self.context.catalog
        checkpoint = await catalog.loadable(path, optimizer=optimizer)
        await self.restore(record, id_of(checkpoint), optimizer=optimizer)

    async def load(self, path: str, *, optimizer: bool) -> None:
        """Load the checkpoint of a path into the resident run."""
        checkpoint = await self.context.catalog.loadable(path, optimizer=optimizer)
        check_compatible(checkpoint, await self.record())
        source = id_of(checkpoint)
        async with self._syncing_quarantine():
            loaded = await self.call(messages.LoadCheckpoint(self.run_id, source, optimizer))
        self._numerics = loaded.numerics
        self._begin_lineage(source, loaded.parents)

    async def drop(self) -> None:
        """Drop the run from the worker's memory."""
        await self.call(messages.DropRun(self.run_id))
        self.detach()

    async def save(
        self,
        manifest: Mapping[str, Any],
        line: Line,
        recipients: Sequence[str] = (),
        *,
        may_diverge: bool = False,
    ) -> Call[messages.RunSaved]:
        """Begin to write the run's state.

        Args:
            manifest: the part of the manifest that the service knows.
            line: the lineage of the state.
            recipients: whom the files are encrypted for. If empty, they are not encrypted.
            may_diverge: save weights that are NaN or infinite, whatever the settings say.

        Returns:
            The call: `captured` when the run may go on, `done` when the files are durable.
        """
        allowed = may_diverge or self.context.settings.allow_diverged
        command = messages.SaveRun(self.run_id, manifest, line, recipients, allowed)
        return await send_pinned(self.context.pins, lambda: self.send(command))

    async def call(self, command: messages.Command[R]) -> R:
        """Send a command and wait for its reply. Raises `OperationFailed`, `WorkerLost`."""
        eviction = self.context.eviction
        return await eviction.making_room(self.run_id, lambda: self.send(command))

    async def send(self, command: messages.Command[R]) -> Call[R]:
        """Send a command. Raises `WorkerLost` if the run is not resident."""
        self.context.eviction.touch(self.run_id)
        if self._lease is None:
            raise WorkerLost("the run is not in a worker's memory")
        return await self._lease.call(command)

    def _begin_lineage(self, source: CheckpointId, parents: Sequence[str]) -> None:
        self.lineage.begin([source.path, *parents] if source.has_path else parents)

    @asynccontextmanager
    async def _syncing_quarantine(self) -> AsyncIterator[None]:
        """Update the index of checkpoints if reading one moved a damaged file to quarantine."""
        try:
            yield
        except OperationFailed as failure:
            unreachable = isinstance(failure, VaultUnreachable)
            if failure.category == ErrorCategory.SERVER and not unreachable:
                await self.context.catalog.follow_quarantine()
            raise
