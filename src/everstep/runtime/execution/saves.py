"""Saves: write a run's checkpoint behind the run, and record it when it is durable."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from everstep.failpoints import Failpoint
from everstep.ledger import Checkpoint, NotWritten, Operation, Sampler
from everstep.logs import get_logger
from everstep.runtime.authorization import event
from everstep.runtime.checkpoints.catalog import draft, id_of, taken
from everstep.runtime.errors import OperationFailed, WorkerLost
from everstep.runtime.execution.run import SNAPSHOT_KEY, Run
from everstep.runtime.workers.base import Call
from everstep.wire.paths import CheckpointKind
from everstep.worker.protocol.messages import RunSaved

_log = get_logger("everstep.run")
_SAVED = Failpoint("runtime.save.written", "a checkpoint is durable, its operation not recorded")


@dataclass(frozen=True)
class Save:
    """A checkpoint that an operation saves.

    Attributes:
        operation: the operation.
        checkpoint: its row in the index, with a size of 0 until it is written.
        result: the operation's result.
        overwrite: whether it replaces a checkpoint of the same path.
        sampler: the sampler that is created with it, if any.
        recipients: whom its files are encrypted for.
    """

    operation: Operation
    checkpoint: Checkpoint
    result: Mapping[str, Any]
    overwrite: bool = False
    sampler: Sampler | None = None
    recipients: Sequence[str] = ()


async def begin(run: Run, save: Save) -> None:
    """Capture the run's state. Return when the run may go on. It is written behind the run.

    The lock of the checkpoint's path is held until the save is recorded or failed.

    Raises:
        OperationFailed: the path is taken, or the state could not be captured.
        WorkerLost: the worker ended. Nothing was recorded.
    """
    path = save.checkpoint.path
    lock = run.context.catalog.lock(path)
    await lock.acquire()
    try:
        call = await _capture(run, save)
    except BaseException:
        lock.release()
        raise
    earlier = [task for key, task in run.writes.items() if key != SNAPSHOT_KEY]
    run.write_in_background(path, _finish(run, save, call, lock, earlier))


async def _capture(run: Run, save: Save) -> Call[RunSaved]:
    operation, checkpoint = save.operation, save.checkpoint
    if not save.overwrite and await run.context.ledger.checkpoint(checkpoint.path) is not None:
        raise taken(id_of(checkpoint))
    record = await run.record()
    manifest = draft(
        checkpoint,
        base_fingerprint=run.model(record).fingerprint,
        run_metadata=record.user_metadata,
        position=operation.seq_id,
        request_id=operation.request_id,
    )
    call = await run.save(manifest, run.lineage.line(checkpoint.path), save.recipients)
    await call.captured
    if checkpoint.kind == CheckpointKind.TRAINING:
        run.lineage.saving(operation.request_id, checkpoint.path)
    return call


async def _finish(
    run: Run,
    save: Save,
    call: Call[RunSaved],
    lock: asyncio.Lock,
    earlier: list[asyncio.Task[None]],
) -> None:
    try:
        reply = await call.done
        if earlier:
            await asyncio.wait(earlier)  # a checkpoint's parent is recorded before it
    except OperationFailed as failure:
        await run.fail(save.operation, failure)
        run.lineage.failed(save.operation.request_id)
    except WorkerLost as lost:
        run.blame(save.operation, lost)
        run.lose_save()
    else:
        _SAVED()
        try:
            await _record(run, save, reply.size_bytes)
        except NotWritten as error:
            _log.error("a save could not be recorded", run=run.run_id, reason=str(error))
            run.lose_save()
    finally:
        lock.release()


async def _record(run: Run, save: Save, size_bytes: int) -> None:
    saved = replace(save.checkpoint, size_bytes=size_bytes)
    created = event("create", saved.path, size_bytes=size_bytes, listed=saved.listed)
    external = saved.kind == CheckpointKind.EXTERNAL
    result = {**save.result, "size_bytes": size_bytes} if external else save.result
    await run.succeed(save.operation, result, checkpoint=saved, sampler=save.sampler, event=created)
    run.lineage.saved(save.operation.request_id, saved.path)
