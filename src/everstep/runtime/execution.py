"""Doing what an operation says, and recording what came of it.

A handler a kind. Saves are different from the rest: the run goes on as soon as its state is
captured, and the operation is recorded when the checkpoint is durable.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import structlog

from everstep.failpoints import Failpoint
from everstep.ledger import Checkpoint, Event, Ledger, NotWritten, Operation, Run, Sampler
from everstep.runtime import names
from everstep.runtime.access import event
from everstep.runtime.checkpoints import draft, expiry, taken
from everstep.runtime.errors import OperationFailed, WorkerLost
from everstep.runtime.recovery import optim_step_result
from everstep.runtime.run_commands import RunCommands
from everstep.runtime.snapshots import Snapshots
from everstep.runtime.worker_process import Call
from everstep.wire.errors import ErrorCategory
from everstep.wire.paths import CheckpointKind, TinkerPath

_log = structlog.get_logger("everstep.run")
_EXECUTED = Failpoint("runtime.execute.executed", "the worker answered, nothing is recorded")
_RECORDED = Failpoint("runtime.execute.recorded", "a result is durable, no one was told")
_SAVED = Failpoint("runtime.save.written", "a checkpoint is durable, its operation not recorded")
_LOADED = Failpoint("runtime.load.loaded", "a checkpoint is in memory, there is no snapshot of it")
_SNAPSHOT_KEY = "snapshot"
_SNAPSHOT = Failpoint("runtime.snapshot.written", "a snapshot is durable, older ones are there")


class Execution:
    """Executes one run's operations, one after another.

    Args:
        commands: to the worker that holds the run.
        ledger: where outcomes are recorded.
        snapshots: takes the run's snapshots.
        replay_seconds: the run is snapshotted when replaying it would cost more than this.
        announce: called with each operation that was finished.
        lost: called when a write in the background was lost with its worker.
        lock: what a save of a path holds until it is recorded.
    """

    def __init__(
        self,
        commands: RunCommands,
        ledger: Ledger,
        snapshots: Snapshots,
        replay_seconds: float,
        announce: Callable[[Operation], None],
        lost: Callable[[], None],
        lock: Callable[[str], asyncio.Lock],
    ) -> None:
        self.run_id = commands.run_id
        self._commands = commands
        self._ledger = ledger
        self._snapshots = snapshots
        self._replay_seconds = replay_seconds
        self._announce = announce
        self._lost = lost
        self._lock = lock
        self._writes: dict[str, asyncio.Task[None]] = {}
        self._snapshot_position = -1
        self._pruned = 0
        self._cost = 0.0
        self._handlers: dict[str, Callable[[Operation], Awaitable[None]]] = {
            names.CREATE_MODEL: self._create_model,
            names.CREATE_FROM_STATE: self._create_from_state,
            names.FORWARD: self._pass,
            names.FORWARD_BACKWARD: self._pass,
            names.OPTIM_STEP: self._optim_step,
            names.LOAD_WEIGHTS: self._load_weights,
            names.SAVE_WEIGHTS: self._save_weights,
            names.SAVE_WEIGHTS_FOR_SAMPLER: self._save_weights_for_sampler,
            names.SAVE_WEIGHTS_EXTERNAL: self._save_weights_external,
        }

    async def execute(self, operation: Operation) -> bool:
        """Execute an operation for the first time.

        Returns:
            False when the run does not come to exist because what creates it failed.

        Raises:
            WorkerLost: the worker ended; nothing was recorded.
        """
        try:
            await self._handlers[operation.kind](operation)
        except OperationFailed as failure:
            await self.fail(operation, failure)
            return operation.seq_id != 0
        if self._cost > self._replay_seconds and _SNAPSHOT_KEY not in self._writes:
            await self._snapshot_behind(operation.seq_id)
        return True

    async def fail(self, operation: Operation, failure: OperationFailed) -> None:
        """Record that an operation failed."""
        finished = await self._ledger.fail(
            operation.request_id, failure.message, str(failure.category)
        )
        _log.info(
            "operation failed",
            run=self.run_id,
            seq_id=operation.seq_id,
            kind=operation.kind,
            reason=failure.message,
        )
        self._announce(finished)

    def stands_at(self, position: int) -> None:
        """Take a state as the newest that is durable: replay would begin there."""
        self._snapshot_position = position
        self._cost = 0.0

    def spend(self, seconds: float) -> None:
        """Note what replaying an operation would cost."""
        self._cost += seconds

    async def settled(self) -> None:
        """Wait until no checkpoint of the run is being written."""
        while self._writes:
            await asyncio.wait(self._writes.values())

    async def park(self, position: int) -> None:
        """Snapshot the run if it moved since the last one, and drop it from memory.

        A run that could not be snapshotted stays in memory.
        """
        if not self._commands.resident:
            return
        await self.settled()
        if position > self._snapshot_position and not await self.snapshot(position):
            return
        await self._commands.drop()

    async def snapshot(self, position: int) -> bool:
        """Snapshot the run as it is now; durable on return. A failure costs replay, no data.

        Returns:
            Whether there is one.
        """
        await self.settled()
        run = await self._commands.run()
        try:
            await (await self._begin_snapshot(run, position)).done
        except OperationFailed as failure:
            _log.error("snapshot failed", run=self.run_id, reason=failure.message)
            return False
        environment = self._commands.environment(run)
        if run.environment != environment:
            await self._ledger.note_environment(self.run_id, environment)
        self.stands_at(position)
        _SNAPSHOT()
        await self._prune()
        return True

    async def _snapshot_behind(self, position: int) -> None:
        """Capture a snapshot; go on while it is written."""
        call = await self._begin_snapshot(await self._commands.run(), position)
        await call.captured
        earlier = list(self._writes.values())
        self._cost = 0.0  # if it fails, the next one comes after as much again
        self._write_behind(_SNAPSHOT_KEY, self._finish_snapshot(call, position, earlier))

    async def _finish_snapshot(
        self, call: Call, position: int, earlier: list[asyncio.Task[None]]
    ) -> None:
        try:
            await call.done
        except OperationFailed as failure:
            _log.error("snapshot failed", run=self.run_id, reason=failure.message)
            return
        except WorkerLost:
            return  # the actor finds out by itself
        if earlier:
            await asyncio.wait(earlier)  # a save that isn't recorded may need an older snapshot
        self._snapshot_position = max(self._snapshot_position, position)
        _SNAPSHOT()
        await self._prune()

    async def _prune(self) -> None:
        """Drop what recovery needs no more: older snapshots, and requests before them."""
        try:
            oldest = await self._snapshots.prune(self.run_id)
        except OSError as error:
            _log.error("older snapshots stay", run=self.run_id, reason=str(error))
            return  # until the next one
        if oldest is not None and oldest > self._pruned:
            await self._ledger.prune(
                self.run_id, after=self._pruned, upto=oldest, kinds=names.PASSES
            )
            self._pruned = oldest

    async def _begin_snapshot(self, run: Run, position: int) -> Call:
        manifest = self._snapshots.draft(run, position, self._commands.model(run).fingerprint)
        return await self._commands.save(manifest, self._commands.lineage.line())

    # Handlers

    async def _create_model(self, operation: Operation) -> None:
        await self._commands.attach()
        run = await self._commands.run()
        await self._commands.create(run)
        environment = self._commands.environment(run)
        result = {"model_id": self.run_id, "type": "create_model"}
        await self._succeed(operation, result, environment=environment)

    async def _create_from_state(self, operation: Operation) -> None:
        payload = json.loads(operation.payload)
        await self._commands.attach()
        run = await self._commands.run()
        await self._commands.restore_path(run, payload["path"], optimizer=payload["optimizer"])
        await self._snapshot_load(operation)  # the run no longer needs that checkpoint
        result = {"path": payload["path"], "model_id": self.run_id, "type": "load_weights"}
        environment = self._commands.environment(run)
        await self._succeed(
            operation, result, environment=environment, event=_read(payload["path"])
        )

    async def _load_weights(self, operation: Operation) -> None:
        payload = json.loads(operation.payload)
        await self.settled()
        await self._commands.load(payload["path"], optimizer=payload["optimizer"])
        await self._snapshot_load(operation)
        result = {"path": payload["path"], "model_id": self.run_id, "type": "load_weights"}
        await self._succeed(operation, result, event=_read(payload["path"]))

    async def _snapshot_load(self, operation: Operation) -> None:
        """Make what was loaded the run's own; else undo it, as the checkpoint may be deleted."""
        _LOADED()
        if not await self.snapshot(operation.seq_id):
            self._commands.forget()  # what is in memory; the run comes back as it was before
            raise OperationFailed(
                "What was loaded could not be made durable; the run is as it was. Free space on "
                "the service's disk, or have its bucket answer, then load again.",
                ErrorCategory.SERVER,
            )

    async def _pass(self, operation: Operation) -> None:
        reply = await self._commands.training_pass(operation.payload)
        _EXECUTED()
        seconds = float(reply.header["seconds"])
        finished = await self._ledger.succeed(
            operation.request_id, reply.body, "protobuf", seconds=seconds
        )
        _RECORDED()
        self.spend(seconds)
        self._announce(finished)

    async def _optim_step(self, operation: Operation) -> None:
        reply = await self._commands.optim_step(json.loads(operation.payload))
        self.spend(float(reply.header["seconds"]))
        await self._succeed(operation, optim_step_result(reply.header))

    async def _save_weights(self, operation: Operation) -> None:
        payload = json.loads(operation.payload)
        checkpoint = await self._new_checkpoint(operation, payload, CheckpointKind.TRAINING)
        result = {"path": checkpoint.path, "type": "save_weights"}
        await self._save(operation, checkpoint, payload.get("overwrite", False), result)

    async def _save_weights_for_sampler(self, operation: Operation) -> None:
        payload = json.loads(operation.payload)
        checkpoint = await self._new_checkpoint(operation, payload, CheckpointKind.SAMPLER)
        sampler_id = payload.get("sampler_id")
        result = {"path": checkpoint.path, "type": "save_weights_for_sampler"}
        sampler = None
        if sampler_id is not None:
            result = {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}
            run = await self._commands.run()
            sampler = Sampler(
                sampler_id=sampler_id,
                session_id=run.session_id,
                base_model=run.base_model,
                model_path=checkpoint.path,
                created_at=datetime.now(UTC),
                inflight_run=self.run_id if payload.get("inflight") else None,
                weights_position=operation.seq_id,
            )
        await self._save(operation, checkpoint, sampler is not None, result, sampler)

    async def _save_weights_external(self, operation: Operation) -> None:
        payload = json.loads(operation.payload)
        checkpoint = await self._new_checkpoint(operation, payload, CheckpointKind.EXTERNAL)
        result = {"path": checkpoint.path, "type": "save_weights_external"}
        recipients = payload["age_encryption_recipients"]
        await self._save(operation, checkpoint, False, result, recipients=recipients)

    # Saving

    async def _new_checkpoint(
        self, operation: Operation, payload: Mapping[str, Any], kind: CheckpointKind
    ) -> Checkpoint:
        run = await self._commands.run()
        return Checkpoint(
            path=str(TinkerPath(self.run_id, kind, payload["name"])),
            run_id=self.run_id,
            kind=str(kind),
            name=payload["name"],
            created_at=datetime.now(UTC),
            size_bytes=0,
            base_model=run.base_model,
            lora=run.lora,
            optimizer=run.optimizer if kind is CheckpointKind.TRAINING else None,
            user_metadata=payload["user_metadata"],
            expires_at=expiry(operation.accepted_at, payload["ttl_seconds"]),
            public=False,
            listed="sampler_id" not in payload,
        )

    async def _save(
        self,
        operation: Operation,
        checkpoint: Checkpoint,
        overwrite: bool,
        result: Mapping[str, Any],
        sampler: Sampler | None = None,
        recipients: Sequence[str] = (),
    ) -> None:
        """Capture the state; go on while it is written."""
        lock = self._lock(checkpoint.path)
        await lock.acquire()
        try:
            call = await self._begin_save(operation, checkpoint, overwrite, recipients)
        except BaseException:
            lock.release()
            raise

        async def record(size_bytes: int) -> None:
            saved = Checkpoint(**{**vars(checkpoint), "size_bytes": size_bytes})
            made = event("create", saved.path, size_bytes=size_bytes, listed=saved.listed)
            external = checkpoint.kind == CheckpointKind.EXTERNAL
            told = {**result, "size_bytes": size_bytes} if external else result
            await self._succeed(operation, told, checkpoint=saved, sampler=sampler, event=made)
            self._commands.lineage.saved(operation.request_id, saved.path)

        earlier = [task for key, task in self._writes.items() if key != _SNAPSHOT_KEY]
        writing = self._finish_save(operation, call, record, lock, earlier)
        self._write_behind(checkpoint.path, writing)

    async def _begin_save(
        self,
        operation: Operation,
        checkpoint: Checkpoint,
        overwrite: bool,
        recipients: Sequence[str],
    ) -> Call:
        if not overwrite and await self._ledger.checkpoint(checkpoint.path) is not None:
            raise taken(checkpoint.name, self.run_id, CheckpointKind(checkpoint.kind))
        run = await self._commands.run()
        manifest = draft(
            checkpoint,
            base_fingerprint=self._commands.model(run).fingerprint,
            run_metadata=run.user_metadata,
            position=operation.seq_id,
            request_id=operation.request_id,
        )
        lineage = self._commands.lineage
        call = await self._commands.save(manifest, lineage.line(checkpoint.path), recipients)
        await call.captured
        if checkpoint.kind == CheckpointKind.TRAINING:
            lineage.saving(operation.request_id, checkpoint.path)
        return call

    async def _finish_save(
        self,
        operation: Operation,
        call: Call,
        record: Callable[[int], Awaitable[None]],
        lock: asyncio.Lock,
        earlier: list[asyncio.Task[None]],
    ) -> None:
        try:
            reply = await call.done
            if earlier:
                await asyncio.wait(earlier)  # what it may name as its parent is recorded first
        except OperationFailed as failure:
            await self.fail(operation, failure)
            self._commands.lineage.failed(operation.request_id)
        except WorkerLost:
            self._lost()
        else:
            _SAVED()
            try:
                await record(reply.header["size_bytes"])
            except NotWritten as error:
                _log.error("a save could not be recorded", run=self.run_id, reason=str(error))
                self._lost()
        finally:
            lock.release()

    def _write_behind(self, key: str, work: Any) -> None:
        task = asyncio.create_task(work, name=f"write {key}")
        self._writes[key] = task
        task.add_done_callback(lambda _: self._writes.pop(key, None))

    async def _succeed(self, operation: Operation, result: Mapping[str, Any], **also: Any) -> None:
        _EXECUTED()
        finished = await self._ledger.succeed(
            operation.request_id, json.dumps(result).encode(), "json", **also
        )
        _RECORDED()
        self._announce(finished)


def _read(path: str) -> Event:
    """A checkpoint was read to train on, for the audit log."""
    return event("read", path, purpose="training")
