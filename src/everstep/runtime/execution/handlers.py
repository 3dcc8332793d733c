"""Operation handlers: execute an operation of a run and record its result.

`HANDLERS` has one for each kind. A handler returns when the run may execute its next operation.
For a save and for what trains that is before its result is recorded: see `saves`, `recorder`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

from everstep.failpoints import Failpoint
from everstep.ledger import Checkpoint, Event, Failure, NewOperation, Operation, Sampler
from everstep.ledger import Run as RunRecord
from everstep.logs import get_logger
from everstep.runtime import ids
from everstep.runtime.adapted_modules import adapted_modules, peft_note, totals
from everstep.runtime.authorization import event
from everstep.runtime.checkpoints.catalog import expiry
from everstep.runtime.errors import OperationFailed
from everstep.runtime.execution import lookahead, saves, snapshots, training
from everstep.runtime.execution.run import Run
from everstep.runtime.execution.saves import Save
from everstep.spool import freed
from everstep.vault import CheckpointId
from everstep.wire.errors import ErrorCategory
from everstep.wire.paths import CheckpointKind

_log = get_logger("everstep.run")
_LOADED = Failpoint("runtime.load.loaded", "a checkpoint is in memory, there is no snapshot of it")


async def execute(run: Run, operation: Operation) -> bool:
    """Execute an operation for the first time.

    Returns:
        False when the operation was to create the run, and failed.

    Raises:
        WorkerLost: the worker ended. Nothing was recorded.
        NotWritten: its result, or the one before it, could not be recorded.
    """
    if operation.kind not in lookahead.KINDS:
        await run.recorder.confirm()
    try:
        await HANDLERS[operation.kind](run, operation)
    except OperationFailed as failure:
        await run.recorder.confirm()
        await run.fail(operation, failure)
        return operation.seq_id != 0
    return True


async def create_model(run: Run, operation: Operation) -> None:
    """Create the run from its seed."""
    await run.attach()
    record = await run.record()
    await run.create(record)
    result = {
        "model_id": run.run_id,
        "lora_seed": record.lora.get("seed"),
        "adapted_modules": _log_adapted(run, record),
        "type": "create_model",
    }
    await run.succeed(operation, result, environment=run.environment(record))


async def create_from_state(run: Run, operation: Operation) -> None:
    """Create the run from a checkpoint."""
    payload = json.loads(operation.payload)
    path = payload["path"]
    await run.attach()
    record = await run.record()
    await run.restore_path(record, path, optimizer=payload["optimizer"])
    _log_adapted(run, record)
    await _snapshot_load(run, operation)  # the run no longer needs that checkpoint
    result = {"path": path, "model_id": run.run_id, "type": "load_weights"}
    environment = run.environment(record)
    await run.succeed(operation, result, environment=environment, event=_read_event(path))


def _log_adapted(run: Run, record: RunRecord) -> dict[str, Any] | None:
    """Log which modules a new run adapts, and return them for its creation's reply."""
    info = run.model(record)
    found = adapted_modules(info, record.lora)
    if found is None:
        return None
    _log.info("run created", run=run.run_id, model=info.name, **totals(found))
    note = peft_note(info, record.lora)
    if note is not None:
        _log.warning("PEFT can't load all of the run's adapter", run=run.run_id, reason=note)
    return found.model_dump()


async def load_weights(run: Run, operation: Operation) -> None:
    """Load a checkpoint into the run."""
    payload = json.loads(operation.payload)
    path = payload["path"]
    await run.wait_for_writes()
    await run.load(path, optimizer=payload["optimizer"])
    await _snapshot_load(run, operation)
    result = {"path": path, "model_id": run.run_id, "type": "load_weights"}
    await run.succeed(operation, result, event=_read_event(path))


async def training_pass(run: Run, operation: Operation) -> None:
    """Run forward (and backward), accumulating gradients into the run's state."""
    output, seconds = await training.training_pass(run, operation)
    if operation.kind in ids.CHANGES_STATE:
        run.add_replay_cost(seconds)
    try:
        await run.recorder.begin(partial(run.succeed, operation, output, seconds=seconds))
    except BaseException:
        await freed(output)
        raise


async def optim_step(run: Run, operation: Operation) -> None:
    """Take one step of the optimizer."""
    result, seconds = await training.optim_step(run, operation)
    run.add_replay_cost(seconds)
    await run.recorder.begin(partial(run.succeed, operation, result, seconds=seconds))


async def save_weights(run: Run, operation: Operation) -> None:
    """Save the training state."""
    payload = json.loads(operation.payload)
    checkpoint = await _new_checkpoint(run, operation, payload, CheckpointKind.TRAINING)
    result = {"path": checkpoint.path, "type": "save_weights"}
    overwrite = payload.get("overwrite", False)
    await saves.begin(run, Save(operation, checkpoint, result, overwrite=overwrite))


async def save_weights_for_sampler(run: Run, operation: Operation) -> None:
    """Save the weights to sample from. Without a name, create a sampler on them."""
    payload = json.loads(operation.payload)
    checkpoint = await _new_checkpoint(run, operation, payload, CheckpointKind.SAMPLER)
    sampler_id = payload.get("sampler_id")
    kind = "save_weights_for_sampler"
    if sampler_id is None:
        await saves.begin(run, Save(operation, checkpoint, {"path": checkpoint.path, "type": kind}))
        return
    record = await run.record()
    sampler = Sampler(
        sampler_id=sampler_id,
        session_id=record.session_id,
        base_model=record.base_model,
        model_path=checkpoint.path,
        created_at=datetime.now(UTC),
        inflight_run=run.run_id if payload.get("inflight") else None,
        weights_position=operation.seq_id,
    )
    result = {"sampling_session_id": sampler_id, "type": kind}
    await saves.begin(run, Save(operation, checkpoint, result, overwrite=True, sampler=sampler))


async def save_weights_external(run: Run, operation: Operation) -> None:
    """Save the weights as files to download, encrypted if there are recipients."""
    payload = json.loads(operation.payload)
    checkpoint = await _new_checkpoint(run, operation, payload, CheckpointKind.EXTERNAL)
    result = {"path": checkpoint.path, "type": "save_weights_external"}
    recipients = payload["age_encryption_recipients"]
    await saves.begin(run, Save(operation, checkpoint, result, recipients=recipients))


Handler = Callable[[Run, Operation], Awaitable[None]]
HANDLERS: Mapping[str, Handler] = {
    ids.CREATE_MODEL: create_model,
    ids.CREATE_FROM_STATE: create_from_state,
    ids.FORWARD: training_pass,
    ids.FORWARD_BACKWARD: training_pass,
    ids.OPTIM_STEP: optim_step,
    ids.LOAD_WEIGHTS: load_weights,
    ids.SAVE_WEIGHTS: save_weights,
    ids.SAVE_WEIGHTS_FOR_SAMPLER: save_weights_for_sampler,
    ids.SAVE_WEIGHTS_EXTERNAL: save_weights_external,
}


async def _snapshot_load(run: Run, operation: Operation) -> None:
    """Snapshot the loaded state. Undo the load if that fails.

    Without a snapshot, recovery would need the checkpoint, which may be deleted.
    """
    _LOADED()
    if not await snapshots.take(run, operation.seq_id):
        run.detach()  # the run is brought back as it was before
        raise OperationFailed(
            "What was loaded could not be made durable; the run is as it was. Free space on "
            "the service's disk, or have its bucket answer, then load again.",
            ErrorCategory.SERVER,
        )


async def _new_checkpoint(
    run: Run, operation: Operation, payload: Mapping[str, Any], kind: CheckpointKind
) -> Checkpoint:
    """Build the index row of a checkpoint that an operation saves."""
    record = await run.record()
    target = CheckpointId(str(kind), run.run_id, payload["name"])
    return Checkpoint(
        path=target.path,
        run_id=target.run_id,
        kind=target.kind,
        name=target.name,
        created_at=datetime.now(UTC),
        size_bytes=0,
        base_model=record.base_model,
        lora=record.lora,
        optimizer=record.optimizer if kind is CheckpointKind.TRAINING else None,
        user_metadata=payload["user_metadata"],
        expires_at=expiry(operation.accepted_at, payload["ttl_seconds"]),
        public=False,
        listed="sampler_id" not in payload,
    )


def _read_event(path: str) -> Event:
    """The audit event of a checkpoint that is read to train on."""
    return event("read", path, purpose="training")


async def fail_gap(run: Run) -> None:
    """Fail the missing operations and those that wait for them, so that no future hangs.

    A missing operation gets a failed row of its own, so that it can't be executed late.
    """
    first, last = run.position + 1, run.queue.last
    text = (
        f"An operation of {run.run_id} with a lower sequence id (from {first}) did not arrive "
        f"within {run.context.settings.gap_seconds:g} s. This one was not executed; send it again "
        "with a new sequence id."
    )
    for seq_id in range(first, last + 1):
        operation = run.queue.pop(seq_id)
        if operation is None:
            failure = Failure(text, ErrorCategory.USER)
            await run.context.ledger.accept(
                NewOperation(run.run_id, seq_id, ids.MISSING, b"", failure)
            )
        elif operation.status == "pending":
            await run.fail(operation, OperationFailed(text))
    run.position = last
