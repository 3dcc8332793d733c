"""Snapshots: the states that recovery starts from. A run's own training checkpoint is one too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from everstep.background_io import lower_priority
from everstep.failpoints import Failpoint
from everstep.ledger import LedgerError
from everstep.ledger import Run as RunRecord
from everstep.logs import get_logger
from everstep.runtime import ids
from everstep.runtime.errors import OperationFailed, WorkerLost
from everstep.runtime.execution.environment_changes import add_change
from everstep.runtime.execution.run import SNAPSHOT_KEY, Run
from everstep.runtime.workers.base import Call
from everstep.runtime.workers.ends import WorkerEnds
from everstep.vault import CheckpointNotFound, Manifest, Vault, VaultError
from everstep.vault.integrity import is_sound
from everstep.worker.protocol.messages import RunSaved

_log = get_logger("everstep.run")
KIND = "snapshot"
_KEPT = 2
_PRUNING_SECONDS = 1.0
_pruner = ThreadPoolExecutor(1, "snapshot pruner", initializer=lower_priority)
_WRITTEN = Failpoint("runtime.snapshot.written", "a snapshot is durable, older ones are there")


class _Stopping(Exception):
    """Snapshots are not verified any further: the service stops."""


async def newest_first(vault: Vault, run_id: str) -> list[Manifest]:
    """List a run's states that lie in the vault with their optimizer, newest first.

    A damaged manifest is skipped and logged.
    """
    found = await asyncio.to_thread(lambda: list(_manifests(vault, run_id)))
    return sorted(found, key=lambda m: (m.position, m.kind == KIND), reverse=True)


def _manifests(vault: Vault, run_id: str) -> Iterator[Manifest]:
    for kind in (KIND, "training"):
        for run, name in vault.names(kind, run_id):
            try:
                yield vault.manifest(kind, run, name)
            except CheckpointNotFound:
                continue  # deleted since it was listed
            except VaultError as error:
                _log.error("unusable state skipped", run=run_id, reason=str(error))


async def take(run: Run, position: int) -> bool:
    """Snapshot a run as it is now. The snapshot is durable on return.

    A failure is logged. It costs replay time, no data. There is none of a state that is ahead of
    the ledger: the run's actor brings it back first.

    Args:
        run: the run. None of its operations may execute at the same time.
        position: sequence id of the last operation that its state includes.

    Returns:
        Whether there is a snapshot.
    """
    await run.wait_for_writes()
    if run.recorder.failed:
        return False
    record = await run.record()
    try:
        await (await _begin(run, record, position)).done
    except OperationFailed as failure:
        _log.error("snapshot failed", run=run.run_id, reason=failure.message)
        return False
    except WorkerLost as lost:
        run.blame_snapshot(lost)
        raise
    run.snapshot_ends = WorkerEnds()
    environment = run.environment(record)
    if record.environment != environment:
        changes = add_change(record, environment, position)
        await run.context.ledger.set_environment(
            run.run_id, environment=environment, environment_changes=changes
        )
    run.mark_durable(position)
    _WRITTEN()
    _prune_in_background(run, position)
    return True


async def take_in_background(run: Run, position: int, *, replaying: bool = False) -> None:
    """Capture a snapshot. Return when the run may go on. It is written behind the run.

    Args:
        run: the run. None of its operations may execute at the same time.
        position: sequence id of the last operation that its state includes.
        replaying: whether operations after it have been executed before, and cost their replay.
    """
    await run.recorder.wait()
    if run.recorder.failed:
        return
    try:
        call = await _begin(run, await run.record(), position)
        await call.captured
    except OperationFailed as failure:
        _log.error("snapshot failed", run=run.run_id, reason=failure.message)
        run.context.budget.reset(run.run_id, 0.0)  # the next one is due after as much again
        return
    except WorkerLost as lost:
        run.blame_snapshot(lost)
        raise
    earlier = list(run.writes.values())
    rest = await run.replay_seconds_after(position) if replaying else 0.0
    run.context.budget.begin_write(run.run_id, rest)
    run.write_in_background(SNAPSHOT_KEY, _finish(run, call, position, earlier))


async def _finish(
    run: Run, call: Call[RunSaved], position: int, earlier: list[asyncio.Task[None]]
) -> None:
    try:
        await call.done
        if earlier:
            await asyncio.wait(earlier)  # a save that isn't recorded may need an older snapshot
        run.snapshot_ends = WorkerEnds()
        run.snapshot_position = max(run.snapshot_position, position)
        _WRITTEN()
        _prune_in_background(run, position)
    except OperationFailed as failure:
        _log.error("snapshot failed", run=run.run_id, reason=failure.message)
    except WorkerLost as lost:
        run.blame_snapshot(lost)  # the actor finds out by itself, once it has something to do
        await run.count_replay_cost()
    finally:
        run.context.budget.end_write(run.run_id)


async def evict(run: Run) -> None:
    """Snapshot a run if it changed since the last snapshot, and drop it from memory.

    A run that could not be snapshotted stays in memory, and one whose snapshots end the worker.
    """
    await run.recorder.wait()
    if not run.resident:
        return
    await run.wait_for_writes()
    changed = run.position > run.snapshot_position
    if changed and (run.snapshots_given_up or not await take(run, run.position)):
        return
    await run.drop()


async def _begin(run: Run, record: RunRecord, position: int) -> Call[RunSaved]:
    manifest = _draft(record, position, run.model(record).fingerprint)
    return await run.save(manifest, run.lineage.line(), may_diverge=True)


def _draft(record: RunRecord, position: int, base_fingerprint: str) -> dict[str, Any]:
    """The part of a snapshot's manifest that the service knows."""
    return {
        "kind": KIND,
        "run_id": record.run_id,
        "name": f"{position:020d}",
        "base_model": record.base_model,
        "base_fingerprint": base_fingerprint,
        "lora": record.lora,
        "optimizer": record.optimizer,
        "user_metadata": None,
        "run_metadata": record.user_metadata,
        "expires_at": None,
        "position": position,
        "request_id": None,
    }


async def end_pruning(run: Run) -> None:
    """Let the deletion of older snapshots end. What takes long is left to the next service."""
    if run.pruning is not None:
        await asyncio.wait([run.pruning], timeout=_PRUNING_SECONDS)
        run.pruning.cancel()


def _prune_in_background(run: Run, written: int) -> None:
    """Run `_prune` in a task, behind an earlier one. Nobody waits for it."""
    earlier = run.pruning

    async def prune() -> None:
        if earlier is not None:
            await asyncio.wait([earlier])
        if run.pruning is task:  # else a later one deletes as much
            await _prune(run, written)

    run.pruning = task = asyncio.create_task(prune(), name=f"prune {run.run_id}")


async def _prune(run: Run, written: int) -> None:
    """Delete older snapshots, and the payloads of requests before them.

    Args:
        run: the run.
        written: position of a snapshot that was just written, or read and verified.
    """
    loop, stopping = asyncio.get_running_loop(), threading.Event()
    arguments = (run.context.vault, run.run_id, written, stopping)
    try:
        oldest = await loop.run_in_executor(_pruner, _delete_older, *arguments)
    except asyncio.CancelledError:
        stopping.set()
        raise
    except OSError as error:
        _log.error("older snapshots could not be deleted", run=run.run_id, reason=str(error))
        return  # until the next one
    if oldest is None or oldest <= run.pruned_position:
        return
    ledger, after = run.context.ledger, run.pruned_position
    try:
        await ledger.prune(run.run_id, after=after, upto=oldest, kinds=ids.PASSES)
    except LedgerError as error:  # the service stops
        _log.debug("requests before a snapshot are kept", run=run.run_id, reason=str(error))
    else:
        run.pruned_position = oldest


def _delete_older(vault: Vault, run_id: str, written: int, stopping: threading.Event) -> int | None:
    """Delete a run's snapshots that are older than the newest two that verify.

    Returns:
        The position of the older one: no replay begins before it. None when there is one only, or
        the service stops.
    """

    def check(_: int) -> None:
        if stopping.is_set():
            raise _Stopping

    sound: list[str] = []
    try:
        for name in sorted((name for _, name in vault.names(KIND, run_id)), reverse=True):
            if len(sound) == _KEPT:
                vault.delete(KIND, run_id, name)
            elif int(name) == written or _verifies(vault, run_id, name, check):
                sound.append(name)
    except _Stopping:
        return None
    return int(sound[-1]) if len(sound) == _KEPT else None


def _verifies(vault: Vault, run_id: str, name: str, check: Callable[[int], None]) -> bool:
    try:
        manifest = vault.manifest(KIND, run_id, name)
        sound = is_sound(vault, manifest, on_read=check, max_threads=1)
    except VaultError:
        sound = False
    if not sound:
        _log.error("damaged snapshot found; older ones are kept", run=run_id, snapshot=name)
    return sound
