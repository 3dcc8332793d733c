"""Recovery: restores a run's newest state that verifies, and replays its operations after it.

A replayed operation is compared with its recorded result. A difference marks the run corrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from everstep.failpoints import Failpoint
from everstep.ledger import Operation
from everstep.ledger import Run as RunRecord
from everstep.logs import get_logger
from everstep.runtime import ids
from everstep.runtime.errors import (
    OperationFailed,
    OutOfMemory,
    RunCorrupted,
    RunUnavailable,
    VaultUnreachable,
    WorkerLost,
)
from everstep.runtime.execution import snapshots, training
from everstep.runtime.execution.environment_changes import describe_changes
from everstep.runtime.execution.replay_check import difference
from everstep.runtime.execution.run import Run
from everstep.spool import taken
from everstep.vault import CheckpointId
from everstep.wire.errors import ErrorCategory

_log = get_logger("everstep.run")
_RESTORED = Failpoint("runtime.recover.restored", "a state is in memory, nothing is replayed")
_REPLAYED = Failpoint("runtime.recover.replayed", "an operation is applied again")


async def restore(run: Run, before: int | None) -> int:
    """Bring a run into the worker's memory.

    Sets `Run.foreign`.

    Args:
        run: the run.
        before: the state must come before this operation, or None for the newest.

    Returns:
        The sequence id of the last operation that the state includes.

    Raises:
        RunUnavailable: the service can't restore it now, but may later.
        OutOfMemory: the worker has not enough memory for it at the moment.
        VaultUnreachable, StoreFailed: the vault's store does not answer.
        RunCorrupted: none of its states can be read.
    """
    await run.attach()
    record = await run.record()
    _compare_environments(run, record)
    damaged: list[str] = []
    for manifest in await snapshots.newest_first(run.context.vault, run.run_id):
        if before is not None and manifest.position >= before:
            continue
        _check_base(run, record, manifest.base_fingerprint, manifest.environment)
        try:
            await run.restore(record, manifest.id, optimizer=True)
        except (OutOfMemory, VaultUnreachable):
            raise
        except OperationFailed as failure:
            _log.error("unusable state skipped", run=run.run_id, reason=failure.message)
            damaged.append(failure.message)
            continue
        _RESTORED()
        return manifest.position
    await _restore_origin(run, record, damaged)
    _RESTORED()
    return 0


async def replay(run: Run, operation: Operation) -> float:
    """Apply a finished operation again.

    Returns:
        Seconds of computation.

    Raises:
        OutOfMemory, VaultUnreachable: it could not be applied now.
        RunCorrupted: its result is not the recorded one.
        RunUnavailable: in another numeric environment, its result is not near the recorded one.
    """
    if operation.status == "succeeded" and operation.kind == ids.SAVE_WEIGHTS:
        name = json.loads(operation.payload)["name"]
        run.lineage.stand_on(CheckpointId("training", operation.scope, name).path)
    if operation.status != "succeeded" or operation.kind not in ids.CHANGES_STATE:
        return 0.0
    try:
        result, seconds = await _apply(run, operation)
    except (OutOfMemory, VaultUnreachable):
        raise
    except OperationFailed as failure:
        raise _corrupted(operation, failure.message) from failure
    if result is not None:
        recorded = operation.result or b""
        found = difference(recorded, operation.media, result, exact=run.replays_exactly)
        if found is not None and run.foreign:
            raise RunUnavailable(
                f"in this numeric environment operation {operation.seq_id} ({operation.kind}) "
                f"is not near what it gave before: {found}; start the service in the former one"
            )
        if found is not None:
            raise _corrupted(operation, found)
    _REPLAYED()
    return seconds


async def _apply(run: Run, operation: Operation) -> tuple[bytes | dict[str, Any] | None, float]:
    """Apply an operation. Returns its result, None where it has no numbers, and its seconds."""
    if operation.pruned:
        raise RunCorrupted(
            f"Run {operation.scope} is corrupted: its newest two snapshots are damaged, and "
            f"what operation {operation.seq_id} asked is kept no longer than they need it. "
            "Create a new run from its last checkpoint."
        )
    if operation.kind == ids.FORWARD_BACKWARD:
        output, seconds = await training.training_pass(run, operation, again=True)
        return await taken(output), seconds
    if operation.kind == ids.OPTIM_STEP:
        return await training.optim_step(run, operation, again=True)
    payload = json.loads(operation.payload)
    await run.load(payload["path"], optimizer=payload["optimizer"])
    return None, 0.0


async def _restore_origin(run: Run, record: RunRecord, damaged: list[str]) -> None:
    """Restore a run from its creation."""
    origin = await run.context.ledger.operation_by_seq_id(run.run_id, 0)
    if origin is None:
        raise RunCorrupted(
            f"Run {run.run_id} is corrupted: none of its states can be read, and nothing says "
            f"how it began. {' '.join(damaged)}"
        )
    if origin.kind == ids.CREATE_MODEL:
        await run.create(record)
        return
    payload = json.loads(origin.payload)
    try:
        await run.restore_path(record, payload["path"], optimizer=payload["optimizer"])
    except (OutOfMemory, VaultUnreachable):
        raise
    except OperationFailed as failure:
        if failure.category == ErrorCategory.SERVER and not damaged:
            raise
        raise RunCorrupted(
            f"Run {run.run_id} is corrupted: none of its states can be read, nor the "
            f"checkpoint it came from. {' '.join([*damaged, failure.message])}"
        ) from failure


def _compare_environments(run: Run, record: RunRecord) -> None:
    """Set `Run.foreign`, and log the changes of the numeric environment."""
    current = run.environment(record)
    run.foreign = record.environment is not None and record.environment != current
    if not run.foreign or record.environment is None:
        return
    fingerprint = str(record.environment.get("base_fingerprint", ""))
    _check_base(run, record, fingerprint, record.environment)
    _log.warning(
        "the numeric environment has changed; replayed results are compared to a tolerance",
        run=run.run_id,
        **describe_changes(record.environment, current),
    )


def _check_base(
    run: Run, record: RunRecord, fingerprint: str, environment: Mapping[str, Any]
) -> None:
    """Raise `RunUnavailable` for a base model with other weights.

    In another dtype the same weights have another fingerprint. Then they are not compared.
    """
    served = run.model(record)
    if environment.get("dtype", served.dtype) != served.dtype:
        return
    if fingerprint and fingerprint != served.fingerprint:
        raise RunUnavailable(
            f"its base model {record.base_model} has other weights than when it was trained; "
            "serve the former ones under that name"
        )


def _corrupted(operation: Operation, found: str) -> RunCorrupted:
    return RunCorrupted(
        f"Run {operation.scope} is corrupted: replayed operation {operation.seq_id} "
        f"({operation.kind}) does not give what it gave before: {found}. Create a new run "
        "from its last checkpoint."
    )


async def end_corrupted(run: Run, fault: str) -> None:
    """Fail all operations of a run that can't be brought back, and drop what is in memory."""
    _log.error("the run is corrupted", run=run.run_id, reason=fault)
    run.context.budget.clear(run.run_id)
    for operation in await run.context.ledger.mark_corrupted(run.run_id, fault):
        run.context.on_finished(operation)
    if run.resident:
        try:
            await run.drop()
        except WorkerLost:
            _log.debug("the worker is gone, and the run with it", run=run.run_id)
    run.context.on_ended(run.run_id)
