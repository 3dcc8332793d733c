"""Doing what an operation says: one run's calls to the worker, and what the ledger records.

A handler a kind. Saves are different from the rest: the run goes on as soon as its state is
captured, and the operation is recorded when the checkpoint is durable.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import structlog

from everstep.ledger import Checkpoint, Ledger, Operation, Run, Sampler
from everstep.runtime import names
from everstep.runtime.checkpoints import Checkpoints, draft, expiry, taken
from everstep.runtime.errors import OperationFailed, RuntimeFault, WorkerLost
from everstep.runtime.settings import Settings
from everstep.runtime.snapshots import Snapshots
from everstep.runtime.worker_process import Call, WorkerProcess
from everstep.wire.errors import ErrorCategory
from everstep.wire.paths import CheckpointKind, TinkerPath

_log = structlog.get_logger("everstep.run")
_LORA_FIELDS = ("rank", "alpha", "train_attn", "train_mlp", "train_unembed")


class Execution:
    """Executes one run's operations, one after another.

    Args:
        run_id: the run.
        ledger: where outcomes are recorded.
        worker: where the run lives.
        checkpoints: where paths are resolved.
        snapshots: takes and finds the run's snapshots.
        settings: limits.
        announce: called with each operation that was finished.
        lost: called when a write in the background was lost with its worker.
    """

    def __init__(
        self,
        run_id: str,
        ledger: Ledger,
        worker: WorkerProcess,
        checkpoints: Checkpoints,
        snapshots: Snapshots,
        settings: Settings,
        announce: Callable[[Operation], None],
        lost: Callable[[], None],
    ) -> None:
        self.run_id = run_id
        self._ledger = ledger
        self._worker = worker
        self._checkpoints = checkpoints
        self._snapshots = snapshots
        self._settings = settings
        self._announce = announce
        self._lost = lost
        self._generation = -1
        self._writes: dict[str, asyncio.Task[None]] = {}
        self._snapshot_position = -1
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
        }

    @property
    def resident(self) -> bool:
        """Whether the run is in the memory of the worker that runs now."""
        return self._worker.ready and self._generation == self._worker.generation

    def forget(self) -> None:
        """Take the run as not resident, whatever the worker holds."""
        self._generation = -1

    async def execute(self, operation: Operation) -> bool:
        """Execute an operation, or apply a finished one again.

        Returns:
            False when the run does not come to exist because what creates it failed.

        Raises:
            WorkerLost: the worker ended; nothing was recorded.
        """
        if operation.status != "pending":
            await self._apply_again(operation)
            return True
        try:
            await self._handlers[operation.kind](operation)
        except OperationFailed as failure:
            await self.fail(operation, failure)
            return operation.seq_id != 0
        if self._cost > self._settings.replay_seconds:
            await self._snapshot(operation.seq_id)
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

    async def restore(self, before: int | None) -> int:
        """Bring the run into the worker's memory.

        Args:
            before: the state must stand before this operation; None: the newest will do.

        Returns:
            The sequence id of the last operation that the state includes.
        """
        await self._settle()
        self._generation = await self._worker.wait_ready()
        run = await self._run()
        for manifest in await self._snapshots.newest_first(self.run_id):
            if before is not None and manifest.position >= before:
                continue
            source = {"kind": manifest.kind, "run": self.run_id, "name": manifest.name}
            try:
                await self._done(self._restore_command(run, source, optimizer=True))
            except OperationFailed as failure:
                _log.error("a snapshot can't be used", run=self.run_id, reason=failure.message)
                continue
            self._note_snapshot(manifest.position)
            return manifest.position
        return await self._restore_origin(run)

    async def settled(self) -> None:
        """Wait until no checkpoint of the run is being written."""
        while self._writes:
            await asyncio.wait(self._writes.values())

    async def park(self, position: int) -> None:
        """Snapshot the run if it moved since the last one, and drop it from memory."""
        if not self.resident:
            return
        await self.settled()
        if position > self._snapshot_position:
            await self._snapshot(position)
        await self._done({"command": "drop"})
        self.forget()

    # Handlers

    async def _create_model(self, operation: Operation) -> None:
        self._generation = await self._worker.wait_ready()
        await self._done(self._create_command(await self._run()))
        await self._succeed(operation, {"model_id": self.run_id, "type": "create_model"})

    async def _create_from_state(self, operation: Operation) -> None:
        payload = json.loads(operation.payload)
        self._generation = await self._worker.wait_ready()
        checkpoint = await self._checkpoints.loadable(
            payload["path"], optimizer=payload["optimizer"]
        )
        source = self._checkpoints.source(checkpoint)
        command = self._restore_command(await self._run(), source, optimizer=payload["optimizer"])
        await self._done(command)
        await self._snapshot(operation.seq_id)  # the run no longer needs that checkpoint
        result = {"path": payload["path"], "model_id": self.run_id, "type": "load_weights"}
        await self._succeed(operation, result)

    async def _pass(self, operation: Operation) -> None:
        reply = await self._done({"command": "pass"}, operation.payload)
        finished = await self._ledger.succeed(
            operation.request_id, reply.body, "protobuf", seconds=reply.header["seconds"]
        )
        self._spend(reply.header)
        self._announce(finished)

    async def _optim_step(self, operation: Operation) -> None:
        reply = await self._done({"command": "optim_step", **json.loads(operation.payload)})
        self._spend(reply.header)
        await self._succeed(operation, {"metrics": reply.header["metrics"], "type": "optim_step"})

    async def _load_weights(self, operation: Operation) -> None:
        payload = json.loads(operation.payload)
        await self.settled()
        await self._done(await self._load_command(payload))
        await self._snapshot(operation.seq_id)
        result = {"path": payload["path"], "model_id": self.run_id, "type": "load_weights"}
        await self._succeed(operation, result)

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
            run = await self._run()
            sampler = Sampler(
                sampler_id=sampler_id,
                session_id=run.session_id,
                base_model=run.base_model,
                model_path=checkpoint.path,
                created_at=datetime.now(UTC),
            )
        await self._save(operation, checkpoint, sampler is not None, result, sampler)

    # Saving

    async def _new_checkpoint(
        self, operation: Operation, payload: Mapping[str, Any], kind: CheckpointKind
    ) -> Checkpoint:
        run = await self._run()
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
    ) -> None:
        """Capture the state; go on while it is written."""
        if checkpoint.path in self._writes:
            await asyncio.wait([self._writes[checkpoint.path]])
        if not overwrite and await self._ledger.checkpoint(checkpoint.path) is not None:
            kind = CheckpointKind(checkpoint.kind)
            raise taken(checkpoint.name, self.run_id, kind)
        manifest = draft(
            checkpoint,
            base_fingerprint=self._worker.models[checkpoint.base_model].fingerprint,
            position=operation.seq_id,
            request_id=operation.request_id,
            parents=[],
        )
        call = await self._call({"command": "save", "manifest": manifest})
        await call.captured

        async def record(size_bytes: int) -> None:
            saved = Checkpoint(**{**vars(checkpoint), "size_bytes": size_bytes})
            await self._succeed(operation, result, checkpoint=saved, sampler=sampler)

        self._write_behind(checkpoint.path, self._finish_save(operation, call, record))

    async def _finish_save(
        self, operation: Operation, call: Call, record: Callable[[int], Awaitable[None]]
    ) -> None:
        try:
            reply = await call.done
        except OperationFailed as failure:
            await self.fail(operation, failure)
        except WorkerLost:
            self._lost()
        else:
            await record(reply.header["size_bytes"])

    def _write_behind(self, key: str, work: Any) -> None:
        task = asyncio.create_task(work, name=f"write {key}")
        self._writes[key] = task
        task.add_done_callback(lambda _: self._writes.pop(key, None))

    async def _snapshot(self, position: int) -> None:
        """Snapshot the run as it is now; durable on return. A failure costs replay, no data."""
        await self.settled()
        run = await self._run()
        manifest = self._snapshots.draft(
            run, position, self._worker.models[run.base_model].fingerprint
        )
        try:
            call = await self._call({"command": "save", "manifest": manifest})
            await call.done
        except OperationFailed as failure:
            _log.error("snapshot failed", run=self.run_id, reason=failure.message)
            return
        self._note_snapshot(position)
        await self._snapshots.prune(self.run_id)

    def _note_snapshot(self, position: int) -> None:
        self._snapshot_position = position
        self._cost = 0.0

    def _spend(self, header: Mapping[str, Any]) -> None:
        self._cost += float(header["seconds"])

    # Recovery

    async def _apply_again(self, operation: Operation) -> None:
        if operation.status != "succeeded" or operation.kind not in names.CHANGES_STATE:
            return
        if operation.kind == names.FORWARD_BACKWARD:
            reply = await self._done({"command": "pass"}, operation.payload)
        elif operation.kind == names.OPTIM_STEP:
            reply = await self._done({"command": "optim_step", **json.loads(operation.payload)})
        else:
            reply = await self._done(await self._load_command(json.loads(operation.payload)))
        self._spend(reply.header)

    async def _restore_origin(self, run: Run) -> int:
        """Bring the run back from what created it."""
        origin = await self._ledger.operation_at(self.run_id, 0)
        if origin is None or origin.kind == names.CREATE_MODEL:
            await self._done(self._create_command(run))
        else:
            payload = json.loads(origin.payload)
            checkpoint = await self._checkpoints.loadable(
                payload["path"], optimizer=payload["optimizer"]
            )
            source = self._checkpoints.source(checkpoint)
            await self._done(self._restore_command(run, source, optimizer=payload["optimizer"]))
        return 0

    async def _settle(self) -> None:
        """Wait for what was written by a worker that is gone; each has its end by now."""
        if self._writes:
            await asyncio.gather(*self._writes.values(), return_exceptions=True)

    # Commands

    def _create_command(self, run: Run) -> dict[str, Any]:
        return {"command": "create", "model": run.base_model, "adapter": run.lora}

    def _restore_command(
        self, run: Run, source: Mapping[str, str], *, optimizer: bool
    ) -> dict[str, Any]:
        command = {"command": "restore", "model": run.base_model, "adapter": run.lora}
        return {**command, "source": source, "optimizer": optimizer}

    async def _load_command(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        checkpoint = await self._checkpoints.loadable(
            payload["path"], optimizer=payload["optimizer"]
        )
        check_compatible(checkpoint, await self._run())
        source = self._checkpoints.source(checkpoint)
        return {"command": "load", "source": source, "optimizer": payload["optimizer"]}

    async def _call(self, header: Mapping[str, Any], body: bytes = b"") -> Call:
        return await self._worker.call({**header, "run": self.run_id}, body, self._generation)

    async def _done(self, header: Mapping[str, Any], body: bytes = b"") -> Any:
        return await (await self._call(header, body)).done

    async def _succeed(self, operation: Operation, result: Mapping[str, Any], **also: Any) -> None:
        finished = await self._ledger.succeed(
            operation.request_id, json.dumps(result).encode(), "json", **also
        )
        self._announce(finished)

    async def _run(self) -> Run:
        run = await self._ledger.run(self.run_id)
        if run is None:
            raise RuntimeFault(f"run {self.run_id} has operations but no row in the ledger")
        return run


def check_compatible(checkpoint: Checkpoint, run: Run) -> None:
    """Raise `OperationFailed` naming each field in which a checkpoint doesn't fit a run."""
    pairs = [("base_model", checkpoint.base_model, run.base_model)]
    pairs += [(field, checkpoint.lora[field], run.lora[field]) for field in _LORA_FIELDS]
    wrong = [
        f"checkpoint {field} is {theirs} but target model {field} is {ours}"
        for field, theirs, ours in pairs
        if theirs != ours
    ]
    if wrong:
        raise OperationFailed(
            "Checkpoint model configuration is incompatible with target model: "
            f"{'; '.join(wrong)}. Create a training client from the checkpoint instead.",
            ErrorCategory.USER,
        )
