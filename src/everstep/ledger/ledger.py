"""Ledger: stores operations, futures, runs, sessions, samplers and checkpoints durably."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from everstep.ledger import (
    checkpoint_index,
    integrity,
    operation_rows,
    outcomes,
    session_rows,
)
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.audit import AuditLog
from everstep.ledger.checkpoint_metadata import CheckpointMetadata
from everstep.ledger.deletion import Deletions
from everstep.ledger.memory import Memory
from everstep.ledger.payload_log.contents import Contents
from everstep.ledger.records import (
    Backlog,
    Checkpoint,
    Event,
    NewOperation,
    Operation,
    OperationRef,
    Run,
    Sampler,
    Session,
)
from everstep.ledger.samples import Samples
from everstep.ledger.search import LedgerSearch
from everstep.ledger.sqlite.store import SqliteStore
from everstep.ledger.store import Store
from everstep.spool import Data


class Ledger:
    """The operation queue and write-ahead log. Every method returns when its writes are durable.

    Args:
        store: the database. The ledger closes it.
        exclusive: False where another process writes the database. Nothing is held in memory.

    Attributes:
        checkpoint_metadata: expiry, publication, copies and access tokens of checkpoints.
        search: lists of sessions, runs and checkpoints, and searches over them.
        audit: the audit log.
        samples: clients of samplers, and the samples that have ended.
        contents: large requests and results.
        deletions: deletes runs and sessions, and knows what was deleted.
    """

    def __init__(self, store: Store, *, exclusive: bool = True) -> None:
        self._store = store
        self._memory = Memory(enabled=exclusive)
        store.listen(self._memory.forget)
        self.contents = Contents(store)
        self.deletions = Deletions(store, self.contents)
        self.checkpoint_metadata = CheckpointMetadata(store, self.deletions)
        self.search = LedgerSearch(store, self._memory)
        self.audit = AuditLog(store)
        self.samples = Samples(store, self._memory, self.contents)

    @classmethod
    async def open(cls, path: Path, *, allow_missing: bool = False) -> Ledger:
        """Open the database at a path, creating or migrating it.

        Args:
            path: the database file.
            allow_missing: create an empty database even where one was here and is gone.

        Raises:
            LedgerLocked: another process has it open.
            LedgerTooNew: a newer release wrote it.
            LedgerDamaged: it can't be read, or lacks acknowledged transactions.
        """
        return cls(await SqliteStore.open(path, allow_missing=allow_missing))

    @classmethod
    async def open_read_only(cls, path: Path) -> Ledger:
        """Open the database beside the service that has it. A write raises `NotWritten`.

        Raises:
            LedgerError: it doesn't exist, or has another schema than this release's.
            LedgerDamaged: it can't be read, or lacks acknowledged transactions.
        """
        return cls(await SqliteStore.open_read_only(path), exclusive=False)

    async def close(self) -> None:
        """Commit the writes that are queued, then close the database."""
        await self.contents.close()
        await self._memory.flush(self._store)
        await self._store.close()

    @property
    def commits(self) -> int:
        """The number of transactions that were committed since the ledger was opened."""
        return self._store.commits

    # Operations

    async def accept(
        self,
        new: NewOperation,
        *,
        run: Run | None = None,
        replace_failed: bool = False,
        match_payload: bool = True,
        open_session: bool = False,
        max_queued: int | None = None,
    ) -> tuple[Operation, bool]:
        """Append an operation, once: a retry gets the one that was accepted first.

        What it is checked against is read in the transaction that appends it. An operation of a
        corrupted run is recorded as failed.

        Args:
            new: the operation, unique by its scope and sequence id. A spool is not returned.
            run: the run that it creates, written with it.
            replace_failed: let a failed operation give up its sequence id to this one. The future
                of the failed one still resolves.
            match_payload: require a retry to have the same payload.
            open_session: refuse a new operation whose session has ended.
            max_queued: bytes of large requests that may wait in its scope. None: any number.

        Returns:
            The operation, and whether it is new.

        Raises:
            SequenceConflict: another request has used its sequence id.
            SessionFinished: it is new, and its session has ended.
            Deleted: its run, session or sampler was deleted.
            QueueFull: as many bytes wait.
        """
        payload = await self.contents.request(new, max_queued)

        def work(connection: Any) -> tuple[Operation, bool]:
            self.deletions.check(new.scope, new.session_id)
            return operation_rows.accept(
                connection,
                new,
                payload,
                run,
                replace_failed=replace_failed,
                match_payload=match_payload,
                open_session=open_session,
            )

        try:
            operation, is_new = await self._store.run(work, self._memory.accepted)
        finally:
            self.contents.settle(payload)
        if is_new:
            return operation, True
        in_memory = isinstance(new.payload, bytes)
        return await self.contents.fill(operation, payload=in_memory), False

    async def succeed(
        self,
        request_id: str,
        result: Data,
        media: str,
        *,
        checkpoint: Checkpoint | None = None,
        sampler: Sampler | None = None,
        seconds: float = 0.0,
        environment: dict[str, Any] | None = None,
        prune: bool = False,
        event: Event | None = None,
    ) -> Operation:
        """Record that an operation succeeded, with everything it created, in one transaction.

        Args:
            request_id: the operation. One that has ended already stays as it is, and none of the
                other arguments is written.
            result: the value that its future resolves to. A large one in a spool is not returned.
            media: the form of the result, ``json`` or ``protobuf``.
            checkpoint: the checkpoint that it created, replacing one with the same path.
            sampler: the sampler that it created.
            seconds: how long its execution took.
            environment: the numeric environment of the run from now on.
            prune: drop its payload, because it will not be replayed.
            event: the entry for the audit log.
        """
        content = await self.contents.result(result)
        work = partial(
            outcomes.succeed,
            request_id=request_id,
            result=content,
            media=media,
            checkpoint=checkpoint,
            sampler=sampler,
            seconds=seconds,
            environment=environment,
            prune=prune,
            event=event,
        )
        return await self.contents.finish(content, work, self._memory.finished)

    async def fail(self, request_id: str, message: str, category: str) -> Operation:
        """Record that an operation failed. A run whose creation failed is removed."""
        work = partial(outcomes.fail, request_id=request_id, message=message, category=category)
        return await self._store.run(work, self._memory.finished)

    async def operation(self, request_id: str, *, contents: bool = True) -> Operation | None:
        """Return the operation of a future, raising `LedgerDamaged` if its result is damaged.

        It lacks a payload that the payload log holds, and without ``contents`` such a result.
        """
        known = self._memory.ended.get(request_id)
        if known is not None:
            return known
        mine = t.operations.c.request_id == request_id
        found = await self._store.read(
            lambda c: q.operation_where(c, mine, payload=False), self._memory.finished
        )
        if found is None or not contents:
            return found
        return await self.contents.fill(found, payload=False)

    async def operation_by_seq_id(self, scope: str, seq_id: int) -> Operation | None:
        """Return the operation that has a sequence id, or None if there is none."""
        here = (t.operations.c.scope == scope, t.operations.c.seq_id == seq_id)
        found = await self._store.read(lambda c: q.operation_where(c, *here))
        return await self.contents.fill(found) if found is not None else None

    async def previous_operation(self, scope: str, seq_id: int) -> OperationRef | None:
        """Return the operation with the greatest sequence id below another, or None if none is."""
        return await self._store.read(lambda c: q.operation_before(c, scope, seq_id))

    async def operations(
        self,
        scope: str,
        *,
        after: int = -1,
        status: str | None = None,
        limit: int | None = None,
        contents: bool = True,
    ) -> list[Operation]:
        """Return the operations of a scope above ``after`` by sequence id, up to a limit.

        Without ``contents``, those lack what the payload log holds. `Contents.fill` reads it later.

        Raises:
            LedgerDamaged: the checksum of one of them does not match.
        """
        where = [t.operations.c.scope == scope, t.operations.c.seq_id > after]
        if status is not None:
            where.append(t.PENDING if status == "pending" else t.operations.c.status == status)
        found = await self._store.read(lambda c: q.operations_where(c, *where, limit=limit))
        return await self.contents.fill_all(found) if contents else found

    async def prune(self, scope: str, *, after: int, upto: int, kinds: Iterable[str]) -> int:
        """Drop the payloads of operations that have ended and that no replay will need.

        The digest of a dropped payload stays, so a retry still finds its operation.

        Args:
            scope: the operations' scope.
            after: the sequence id up to which payloads were dropped before.
            upto: the last sequence id to prune.
            kinds: the kinds of operations to prune.

        Returns:
            The number of payloads that were dropped.
        """
        total = 0
        while True:  # in small transactions, because other calls wait for the thread
            done, segments = await self._store.run(
                lambda c: operation_rows.prune(c, scope, after, upto, set(kinds))
            )
            self.contents.release(segments)
            total += done
            if done < operation_rows.PRUNED_AT_ONCE:
                return total

    async def find_damaged_rows(self) -> list[str]:
        """Read every row and its contents, and return a message for each that is damaged."""
        return await integrity.find_damaged_rows(self._store, self.contents)

    async def backlog(self) -> list[Backlog]:
        """Return every scope that has pending operations, the one with the most first."""
        return await self._store.read(q.backlog)

    # Runs

    async def run(self, run_id: str) -> Run | None:
        """Return a run, or None if there is none."""
        keep = partial(self._memory.runs.put, run_id)
        return self._memory.runs.get(run_id) or await self._store.read(
            lambda c: self._memory.used(q.one(c, Run, t.runs, run_id)), keep
        )

    async def set_environment(self, run_id: str, **columns: Any) -> None:
        """Record a run's ``environment`` from now on, and the ``environment_changes`` so far."""
        await self._store.run(lambda c: q.update_run(c, run_id, **columns))

    async def mark_corrupted(self, run_id: str, fault: str) -> list[Operation]:
        """Record that a run can't be restored, and fail its pending operations.

        Args:
            run_id: the run.
            fault: the error message: the problem, the operation, and the remedy.

        Returns:
            The operations that failed.
        """
        return await self._store.run(lambda c: operation_rows.mark_corrupted(c, run_id, fault))

    # Sessions and samplers

    async def create_session(self, session: Session, idempotency_key: str | None) -> Session:
        """Create a session. A retry with the same key gets the same one."""
        return await self._store.run(lambda c: session_rows.create(c, session, idempotency_key))

    async def session(self, session_id: str) -> Session | None:
        """Return a session, or None if there is none."""
        return await self._store.read(lambda c: q.one(c, Session, t.sessions, session_id))

    async def touch_session(self, session_id: str) -> None:
        """Record that a session's client is alive."""
        await self._store.run(lambda c: session_rows.touch(c, session_id))

    async def finish_session(self, session_id: str, reason: str, detail: str | None) -> None:
        """End a session. One that has ended keeps its first reason."""
        await self._store.run(lambda c: session_rows.finish(c, session_id, reason, detail))

    async def create_sampler(self, sampler: Sampler, event: Event | None = None) -> Sampler:
        """Create a sampler. One that exists stays as it is and ``event`` is not recorded again."""

        def work(connection: Any) -> Sampler:
            self.deletions.check(sampler.sampler_id, sampler.session_id, sampler.model_path)
            return session_rows.create_sampler(connection, sampler, event)

        return await self._store.run(work)

    async def sampler(self, sampler_id: str) -> Sampler | None:
        """Return a sampler, or None if there is none."""
        keep = partial(self._memory.samplers.put, sampler_id)
        return self._memory.samplers.get(sampler_id) or await self._store.read(
            lambda c: q.one(c, Sampler, t.samplers, sampler_id), keep
        )

    # Checkpoints

    async def checkpoint(self, path: str) -> Checkpoint | None:
        """Return a checkpoint, or None if there is none, or it is expired or quarantined."""
        mine = t.checkpoints.c.path == path
        found = await self._store.read(lambda c: q.checkpoints_where(c, mine))
        return found[0] if found else None

    async def checkpoints(self, run_id: str) -> list[Checkpoint]:
        """Return a run's listed, unexpired checkpoints, oldest first."""
        where = (t.checkpoints.c.run_id == run_id, t.checkpoints.c.listed)
        return await self._store.read(lambda c: q.checkpoints_where(c, *where))

    async def delete_checkpoint(self, path: str, event: Event | None = None) -> bool:
        """Replace a checkpoint of the index by a tombstone, and return whether it existed."""
        return await self._store.run(lambda c: checkpoint_index.remove(c, path, event))

    # Maintenance of the index

    async def all_checkpoints(self) -> list[Checkpoint]:
        """Return all rows of the index, including expired, quarantined and unlisted ones."""
        return await self._store.read(checkpoint_index.all_checkpoints)

    async def is_indexed(self, path: str) -> bool:
        """Return whether a checkpoint has a row, even an expired, quarantined or unlisted one."""
        return await self._store.read(lambda c: checkpoint_index.is_indexed(c, path))

    async def expired_checkpoints(self, before: datetime) -> list[Checkpoint]:
        """Return the checkpoints that had expired at a time."""
        return await self._store.read(lambda c: checkpoint_index.expired(c, before))

    async def pending_operations(self, kinds: Iterable[str]) -> list[Operation]:
        """Return the pending operations of some kinds, over all scopes."""
        found = await self._store.read(lambda c: checkpoint_index.pending(c, kinds))
        return await self.contents.fill_all(found)

    async def set_quarantined(self, paths: Iterable[str]) -> int:
        """Quarantine these checkpoints and release all others, and return how many rows changed."""
        return await self._store.run(lambda c: checkpoint_index.set_quarantined(c, paths))

    async def insert_missing(
        self, runs: Iterable[Run], checkpoints: Iterable[Checkpoint]
    ) -> tuple[int, int]:
        """Insert the runs and checkpoints that have no row and were not deleted.

        Returns:
            The numbers of runs and of checkpoints that were inserted.
        """
        return await self._store.run(
            lambda c: checkpoint_index.insert_missing(c, runs, checkpoints)
        )
