"""Deletion: removes runs and sessions with all that they own, once nobody uses them.

A deletion is refused while the client of an open session is alive that uses the run, or while such
a session has unfinished operations of it. Of a finished session, whose operations are no longer
wanted, those that wait are deleted, and what executes is finished first.

Other runs that began from its checkpoints, or loaded one, have a snapshot of their own since. Where
that is damaged, the run is brought back and snapshotted before anything is deleted. Files that are
shared stay until nothing names them.

Killed at any point, the service deletes at its next start what has a tombstone, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from everstep.failpoints import Failpoint
from everstep.ledger import Deleted, Event, InUse, Owned, Tombstone
from everstep.ledger.deletion import describe
from everstep.ledger.records import RUN, SESSION, Reader
from everstep.runtime import ids
from everstep.runtime.absence import absent
from everstep.runtime.authorization import OWNER
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import Rejected
from everstep.runtime.execution import snapshots
from everstep.runtime.execution.scheduler import Scheduler
from everstep.runtime.queries.traces import Traces
from everstep.vault import CheckpointDamaged, FormatTooNew, Vault, gc
from everstep.vault.integrity import is_sound
from everstep.wire.messages.deletion import DeletionResponse

CLIENT_SECONDS = 60.0
"""A client is alive that was heard of within this time. It sends a heartbeat every ten seconds."""
_LOADS = (ids.CREATE_FROM_STATE, ids.LOAD_WEIGHTS)
_STOPPED = Failpoint("runtime.deletion.stopped", "a run does nothing any more, and is whole")
_RECORDED = Failpoint("runtime.deletion.recorded", "a run is deleted, its rows and files are there")
_FINISHED = Failpoint("runtime.deletion.finished", "a run is deleted, and not yet acknowledged")


@dataclass(frozen=True)
class _Target:
    """A run or session to delete."""

    kind: str
    id: str

    @property
    def name(self) -> str:
        return f"{self.kind.capitalize()} {self.id}"


class Deletion:
    """Deletes runs and sessions.

    Args:
        context: the service's ledger, vault and catalog.
        scheduler: executes what has to end before a run is deleted.
        traces: keeps timelines, which mention runs.
    """

    def __init__(self, context: RuntimeContext, scheduler: Scheduler, traces: Traces) -> None:
        self._ledger = context.ledger
        self._vault = context.vault
        self._catalog = context.catalog
        self._scheduler = scheduler
        self._traces = traces

    async def delete_run(self, run_id: str, *, dry_run: bool = False) -> DeletionResponse:
        """Delete a run: its checkpoints, snapshots, operations and samplers. Durable on return.

        A deletion that is repeated is no error.

        Args:
            run_id: the run.
            dry_run: only say what would be deleted.

        Raises:
            Rejected: there is no such run, or it was deleted with its session (404), or it is in
                use (409).
        """
        return await self._delete(_Target(RUN, run_id), dry_run)

    async def delete_session(self, session_id: str, *, dry_run: bool = False) -> DeletionResponse:
        """Delete a session with its runs, samplers and custom losses. As `delete_run`."""
        return await self._delete(_Target(SESSION, session_id), dry_run)

    async def _delete(self, target: _Target, dry_run: bool) -> DeletionResponse:
        async with AsyncExitStack() as locks:
            await locks.enter_async_context(self._catalog.lock(target.id))
            known = await self._ledger.deletions.find(target.id)
            if known is not None:
                return await self._repeated(known, target)
            what = await self._ledger.deletions.owned(target.kind, target.id)
            if what is None:
                raise await absent(self._ledger, target.id, f"{target.name} does not exist.")
            for run_id in sorted(set(what.runs) - {target.id}):
                await locks.enter_async_context(self._catalog.lock(run_id))  # an import holds it
            await self._check_unused(what)
            readers = await self._readers(target, what)
            details = await self._describe(what)
            if dry_run:
                return _answer(target, None, details)
            await self._make_durable(target, readers)
            tombstone, pending = await self._bury(target, what, details)
            await self._catalog.finish_deletions()
            self._drop(tombstone, pending)  # a poll may have found an operation in the meantime
        _FINISHED()
        return _answer(target, tombstone.deleted_at, details)

    async def _repeated(self, known: Tombstone, target: _Target) -> DeletionResponse:
        if (known.kind, known.id, known.deleted_with) != (target.kind, target.id, None):
            raise Rejected(404, describe(known, target.id))
        await self._catalog.finish_deletions()
        return _answer(target, known.deleted_at, known.details)

    # What forbids it

    async def _check_unused(self, what: Owned) -> None:
        try:
            await self._ledger.deletions.check_unused(what, _since())
        except InUse as error:
            raise Rejected(409, str(error)) from error

    async def _readers(self, target: _Target, what: Owned) -> list[Reader]:
        """Return the runs that have loaded a checkpoint of these runs, and may be brought back.

        Raises:
            Rejected: runs are about to load one (409).
        """
        readers = await self._ledger.deletions.readers(set(what.runs), _LOADS)
        waiting = [each.run_id for each in readers if each.pending]
        if waiting:
            raise Rejected(
                409,
                f"{target.name} can't be deleted now: its checkpoints are about to be loaded by "
                f"{_listed(waiting)}. Delete again when that is done, or delete those before.",
            )
        return readers

    async def _is_durable(self, reader: Reader) -> bool:
        """Return whether a run has a sound snapshot that is not older than its last load."""
        found = await snapshots.newest_first(self._vault, reader.run_id)
        for manifest in found:
            newer = manifest.kind == snapshots.KIND and manifest.position >= reader.seq_id
            if newer and await asyncio.to_thread(is_sound, self._vault, manifest):
                return True
        return False

    async def _make_durable(self, target: _Target, readers: Iterable[Reader]) -> None:
        """Snapshot the runs that could need a checkpoint which is deleted.

        Raises:
            Rejected: one of them can't be snapshotted now (409).
        """
        runs = [each.run_id for each in readers if not await self._is_durable(each)]
        done = await asyncio.gather(*map(self._scheduler.runs.make_durable, runs))
        left = [run_id for run_id, durable in zip(runs, done, strict=True) if not durable]
        if left:
            raise Rejected(
                409,
                f"{target.name} can't be deleted: {_listed(left)} could not be brought back "
                "without its checkpoints, and could not be snapshotted now. The log says why. "
                "Delete again later, or delete those before.",
            )

    # The deletion

    async def _bury(
        self, target: _Target, what: Owned, details: dict[str, Any]
    ) -> tuple[Tombstone, list[str]]:
        """Stop everything that belongs to a run or session, and record the deletion.

        Returns:
            The tombstone, and the request ids of the operations that had not ended.
        """
        await self._stop(what)
        _STOPPED()
        run_id = target.id if target.kind == RUN else None
        listed = [each.path for each in what.checkpoints if each.listed]
        named = {} if run_id is not None else {"session_id": target.id}
        event = Event(
            f"{target.kind}_delete",
            OWNER,
            run_id=run_id,
            details={**named, **details, "tinker_paths": listed},
        )
        try:
            tombstone, pending = await self._ledger.deletions.bury(
                target.kind, target.id, event, _since(), details
            )
        except InUse as error:  # a client came back
            await self._resume(what)
            raise Rejected(409, str(error)) from error
        except Exception:
            await self._resume(what)
            raise
        _RECORDED()
        await self._stop(what)  # a retry of an earlier request may have woken a run
        await self._scheduler.sampling.abandon(pending)
        self._drop(tombstone, pending)
        await self._traces.remove([target.id, *what.runs, *what.samplers])
        return tombstone, pending

    def _drop(self, tombstone: Tombstone, pending: list[str]) -> None:
        """Fail the polls of operations that were deleted."""
        for request_id in pending:
            gone = Deleted(describe(tombstone, tombstone.id))
            self._scheduler.futures.drop(request_id, gone)

    async def _stop(self, what: Owned) -> None:
        await asyncio.gather(*map(self._scheduler.runs.end, what.runs))

    async def _resume(self, what: Owned) -> None:
        """Have runs go on that were stopped and are not deleted after all."""
        for run_id in what.runs:
            if await self._ledger.operations(run_id, status="pending", limit=1, contents=False):
                self._scheduler.runs.get_or_create(run_id)

    async def _describe(self, what: Owned) -> dict[str, Any]:
        """Return the fields of the answer that say what is deleted."""
        count, freed = await asyncio.to_thread(_files, self._vault, what)
        return {
            "training_run_ids": what.runs,
            "sampler_ids": what.samplers,
            "checkpoints": len(what.checkpoints),
            "size_bytes": sum(each.size_bytes for each in what.checkpoints),
            "snapshots": count,
            "freed_bytes": freed,
            "operations": what.operations,
            "unfinished_operations": what.pending,
        }


def _since() -> datetime:
    return datetime.now(UTC) - timedelta(seconds=CLIENT_SECONDS)


def _files(vault: Vault, what: Owned) -> tuple[int, int | None]:
    """Return the number of snapshots of runs, and the size of the files that only they name."""
    found = [each for run_id in what.runs for each in gc.checkpoints_of(vault, run_id)]
    try:
        freed = sum(ref.size for ref in gc.exclusive_to(vault, set(found)))
    except (CheckpointDamaged, FormatTooNew):
        freed = None
    return sum(each.kind == snapshots.KIND for each in found), freed


def _answer(
    target: _Target, deleted_at: datetime | None, details: dict[str, Any]
) -> DeletionResponse:
    return DeletionResponse.model_validate(
        {"id": target.id, "dry_run": deleted_at is None, "deleted_at": deleted_at, **details}
    )


def _listed(runs: list[str]) -> str:
    shown = ", ".join(runs[:5]) + (", …" if len(runs) > 5 else "")
    return f"{'run' if len(runs) == 1 else 'runs'} {shown}"
