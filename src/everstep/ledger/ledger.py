"""The ledger: operations, futures, runs, sessions, samplers, checkpoints, in one database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, delete, select

from everstep.ledger import audit, index, seals
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.audit import AuditLog
from everstep.ledger.database import HomeLock, open_engine, open_read_only
from everstep.ledger.directory import Directory
from everstep.ledger.position import Position, refuse_if_gone
from everstep.ledger.publication import Publication
from everstep.ledger.records import (
    Backlog,
    Checkpoint,
    Event,
    NewOperation,
    Operation,
    Place,
    Run,
    Sampler,
    Session,
)
from everstep.ledger.samples import Samples, put_sampler
from everstep.ledger.writer import Writer


class Ledger:
    """The queue and the write-ahead log. Every method returns when its writes are durable.

    Attributes:
        publication: lifetimes, publication, copies and tokens of checkpoints.
        directory: lists of sessions, runs and checkpoints.
        audit: what was done, by whom.
        samples: clients of samplers, and what has ended of their samples.
    """

    def __init__(
        self, engine: Engine, lock: HomeLock | None = None, position: Position | None = None
    ) -> None:
        self._lock = lock
        self._engine = engine
        self._position = position
        self._writer = Writer(engine, position)
        self.publication = Publication(self._writer)
        self.directory = Directory(self._writer)
        self.audit = AuditLog(self._writer)
        self.samples = Samples(self._writer)

    @classmethod
    async def open(cls, path: Path, *, anew: bool = False) -> Ledger:
        """Open the database at a path, creating or migrating it.

        Args:
            path: the database.
            anew: when one was here and is gone, begin with an empty one.

        Raises:
            LedgerLocked: another process has it open.
            LedgerTooNew: a newer release wrote it.
            LedgerDamaged: it can't be read, or lacks what was acknowledged.
        """
        lock = HomeLock(path.with_name(path.name + ".lock"))
        try:
            return cls(*await asyncio.to_thread(_open, path, lock, anew))
        except BaseException:
            lock.release()
            raise

    @classmethod
    async def open_read_only(cls, path: Path) -> Ledger:
        """Open the database beside a service that has it: reads only, a write is `NotWritten`.

        Raises:
            LedgerError: it isn't there, or has another schema than this release's.
        """
        return cls(await asyncio.to_thread(open_read_only, path))

    async def close(self) -> None:
        """Write what was queued, then close."""
        await asyncio.to_thread(self._writer.close)
        self._engine.dispose()
        if self._position is not None:
            self._position.close()
        if self._lock is not None:
            self._lock.release()

    @property
    def commits(self) -> int:
        """How many transactions were committed."""
        return self._writer.commits

    # Operations

    async def accept(
        self,
        new: NewOperation,
        *,
        run: Run | None = None,
        replace_failed: bool = False,
        match_payload: bool = True,
    ) -> tuple[Operation, bool]:
        """Append an operation, once: a retry finds the first one.

        Args:
            new: the operation; unique by its scope and sequence id.
            run: the run that it creates, written with it.
            replace_failed: a failed operation gives up its place (its future still resolves).
            match_payload: a retry has to have the same payload.

        Returns:
            The operation, and whether it is new.

        Raises:
            SequenceConflict: its place is taken by another request.
        """
        return await self._writer.run(
            lambda c: q.accept(c, new, run, replace_failed, match_payload)
        )

    async def succeed(
        self,
        request_id: str,
        result: bytes,
        media: str,
        *,
        checkpoint: Checkpoint | None = None,
        sampler: Sampler | None = None,
        seconds: float = 0.0,
        environment: dict[str, Any] | None = None,
        prune: bool = False,
        event: Event | None = None,
    ) -> Operation:
        """Record that an operation succeeded, with what it made, in one transaction.

        Args:
            request_id: the operation; one that has ended already stays as it is, and what it
                made is not written again.
            result: what its future resolves to.
            media: the form of the result, ``json`` or ``protobuf``.
            checkpoint: a checkpoint that now exists, replacing one with its path.
            sampler: a sampler that now exists.
            seconds: how long it was executed.
            environment: the numeric environment that its run goes on in from now on.
            prune: drop its payload: it will not be replayed.
            event: what that is, for the audit log.
        """

        def work(connection: Any) -> Operation:
            finished, ended = q.finish(
                connection,
                request_id,
                status="succeeded",
                result=result,
                media=media,
                seconds=seconds,
                **(q.NO_PAYLOAD if prune else {}),
            )
            if ended and checkpoint is not None:
                q.put(connection, t.checkpoints, checkpoint)
            if ended and sampler is not None:
                put_sampler(connection, sampler)
            if ended and environment is not None:
                q.update_run(connection, finished.scope, environment=environment)
            if ended:
                audit.note(connection, event)
            return finished

        return await self._writer.run(work)

    async def fail(self, request_id: str, message: str, category: str) -> Operation:
        """Record that an operation failed. A run whose creation fails does not come to exist."""

        def work(connection: Any) -> Operation:
            failed, ended = q.finish(
                connection, request_id, status="failed", error=message, category=category
            )
            if ended and failed.seq_id == 0:
                connection.execute(delete(t.runs).where(t.runs.c.run_id == failed.scope))
            return failed

        return await self._writer.run(work)

    async def operation(self, request_id: str) -> Operation | None:
        """The operation of a future; raises `LedgerDamaged` where its result is damaged."""
        mine = t.operations.c.request_id == request_id
        return await self._writer.run(lambda c: q.operation_where(c, mine, payload=False))

    async def operation_at(self, scope: str, seq_id: int) -> Operation | None:
        """The operation that has a place."""
        here = (t.operations.c.scope == scope, t.operations.c.seq_id == seq_id)
        return await self._writer.run(lambda c: q.operation_where(c, *here))

    async def place_before(self, scope: str, seq_id: int) -> Place | None:
        """The last place below a sequence id that is taken, if any."""
        columns = t.operations.c
        query = (
            select(columns.seq_id, columns.kind)
            .where(columns.scope == scope, columns.seq_id < seq_id)
            .order_by(columns.seq_id.desc())
            .limit(1)
        )
        row = await self._writer.run(lambda c: c.execute(query).one_or_none())
        return Place(row.seq_id, row.kind) if row is not None else None

    async def operations(
        self, scope: str, *, after: int = -1, status: str | None = None, limit: int | None = None
    ) -> list[Operation]:
        """The first operations of a scope above ``after``, by sequence id; all without a limit.

        Raises:
            LedgerDamaged: one of them is not what was written.
        """
        where = [t.operations.c.scope == scope, t.operations.c.seq_id > after]
        if status is not None:
            where.append(t.operations.c.status == status)
        return await self._writer.run(lambda c: q.operations_where(c, *where, limit=limit))

    async def prune(self, scope: str, *, after: int, upto: int, kinds: Iterable[str]) -> int:
        """Drop the payloads of operations that have ended and that no replay will need.

        What they asked is still known by its digest, so that a retry finds them.

        Args:
            scope: whose operations.
            after: those up to this sequence id were pruned before.
            upto: the last sequence id to prune.
            kinds: of which kinds.

        Returns:
            How many were pruned.
        """
        total = 0
        while True:  # in small transactions: others wait for the thread
            done = await self._writer.run(lambda c: q.prune(c, scope, after, upto, set(kinds)))
            total += done
            if done < q.PRUNED_AT_ONCE:
                return total

    async def damaged(self) -> list[str]:
        """Read every row; what is not what was written, by table and key."""
        found: list[str] = []
        for table in t.SEALED:
            last: Any = None
            while True:
                page, last = await self._writer.run(partial(q.damaged, table=table, after=last))
                found += page
                if last is None:
                    break
        return found

    async def backlog(self) -> list[Backlog]:
        """Every scope whose operations wait, the one with the most first."""
        return await self._writer.run(q.backlog)

    # Runs

    async def run(self, run_id: str) -> Run | None:
        """A run."""
        return await self._writer.run(lambda c: q.one(c, Run, t.runs, run_id))

    async def note_environment(self, run_id: str, environment: dict[str, Any]) -> None:
        """Record the numeric environment that a run goes on in."""
        await self._writer.run(lambda c: q.update_run(c, run_id, environment=environment))

    async def corrupt(self, run_id: str, fault: str) -> list[Operation]:
        """Record that a run can't be brought back, and fail whatever waits on it.

        Args:
            run_id: the run.
            fault: what is wrong, with which operation, and what to do.

        Returns:
            The operations that failed.
        """
        return await self._writer.run(lambda c: q.corrupt(c, run_id, fault))

    # Sessions and samplers

    async def create_session(self, session: Session, idempotency_key: str | None) -> Session:
        """Open a session; the same key finds the same one."""

        def work(connection: Any) -> Session:
            if idempotency_key is not None:
                mine = t.sessions.c.idempotency_key == idempotency_key
                row = connection.execute(select(t.sessions).where(mine)).one_or_none()
                if row is not None:
                    seals.check(t.sessions, row)
                    return q.record(Session, row)
            values = {**vars(session), "idempotency_key": idempotency_key}
            seals.add(connection, t.sessions, values)
            return session

        return await self._writer.run(work)

    async def session(self, session_id: str) -> Session | None:
        """A session."""
        return await self._writer.run(lambda c: q.one(c, Session, t.sessions, session_id))

    async def touch_session(self, session_id: str) -> None:
        """Note that a session's client is alive."""
        mine = t.sessions.c.session_id == session_id
        await self._writer.run(lambda c: seals.change(c, t.sessions, mine, last_seen_at=q.now()))

    async def finish_session(self, session_id: str, reason: str, detail: str | None) -> None:
        """End a session; its first end counts."""
        mine = (t.sessions.c.session_id == session_id, t.sessions.c.finished.is_(None))
        values = {"finished": reason, "detail": detail, "finished_at": q.now()}
        await self._writer.run(lambda c: seals.change(c, t.sessions, *mine, **values))

    async def create_sampler(self, sampler: Sampler, event: Event | None = None) -> Sampler:
        """Create a sampler; one that exists stays as it is, and ``event`` is not noted again."""

        def work(connection: Any) -> Sampler:
            known = q.one(connection, Sampler, t.samplers, sampler.sampler_id)
            if known is None:
                q.put(connection, t.samplers, sampler)
                audit.note(connection, event)
            return known or sampler

        return await self._writer.run(work)

    async def sampler(self, sampler_id: str) -> Sampler | None:
        """A sampler."""
        return await self._writer.run(lambda c: q.one(c, Sampler, t.samplers, sampler_id))

    # Checkpoints

    async def checkpoint(self, path: str) -> Checkpoint | None:
        """A checkpoint that has not expired."""
        mine = t.checkpoints.c.path == path
        found = await self._writer.run(lambda c: q.checkpoints_where(c, mine))
        return found[0] if found else None

    async def checkpoints(self, run_id: str) -> list[Checkpoint]:
        """A run's checkpoints that are listed and have not expired, oldest first."""
        where = (t.checkpoints.c.run_id == run_id, t.checkpoints.c.listed)
        return await self._writer.run(lambda c: q.checkpoints_where(c, *where))

    async def delete_checkpoint(self, path: str, event: Event | None = None) -> bool:
        """Remove a checkpoint from the index; returns whether it was there."""

        def work(connection: Any) -> bool:
            deleted = q.delete_checkpoint(connection, path)
            audit.note(connection, event if deleted else None)
            return deleted

        return await self._writer.run(work)

    async def was_deleted(self, path: str) -> bool:
        """Whether a checkpoint was deleted: so that a second deletion is no error."""
        query = select(t.deleted_checkpoints).where(t.deleted_checkpoints.c.path == path)
        return await self._writer.run(lambda c: c.execute(query).one_or_none() is not None)

    # Upkeep of the index

    async def every_checkpoint(self) -> list[Checkpoint]:
        """All rows of the index, also expired, quarantined and unlisted ones."""
        return await self._writer.run(index.every_checkpoint)

    async def is_indexed(self, path: str) -> bool:
        """Whether a checkpoint has a row, be it expired, quarantined or unlisted."""
        return await self._writer.run(lambda c: index.is_indexed(c, path))

    async def expired_checkpoints(self, before: datetime) -> list[Checkpoint]:
        """Checkpoints that had expired at a time."""
        return await self._writer.run(lambda c: index.expired(c, before))

    async def pending_operations(self, kinds: Iterable[str]) -> list[Operation]:
        """Operations of some kinds that have not ended, of all scopes."""
        return await self._writer.run(lambda c: index.pending(c, kinds))

    async def set_quarantined(self, paths: Iterable[str]) -> int:
        """Make exactly these checkpoints the quarantined ones; returns how many rows changed."""
        return await self._writer.run(lambda c: index.set_quarantined(c, paths))

    async def recreate(
        self, runs: Iterable[Run], checkpoints: Iterable[Checkpoint]
    ) -> tuple[int, int]:
        """Insert the runs and checkpoints that are neither there nor were deleted.

        Returns:
            How many runs and how many checkpoints were inserted.
        """
        return await self._writer.run(lambda c: index.recreate(c, runs, checkpoints))


def _open(path: Path, lock: HomeLock, anew: bool) -> tuple[Engine, HomeLock, Position]:
    refuse_if_gone(path, anew=anew)
    engine = open_engine(path)
    try:
        return engine, lock, Position(path, engine)
    except BaseException:
        engine.dispose()
        raise
