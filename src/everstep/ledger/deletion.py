"""Deletions: remove runs and sessions with what they own, and leave tombstones.

A deletion is one transaction. It removes the rows by which a run or session is found, and writes
a tombstone. Later requests are answered from the tombstone, and a rebuild of the index leaves out
what has one. The operations are removed afterwards in small transactions, because other calls wait
for the thread, then the files in the vault. The tombstone is marked unfinished until all are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Connection, delete, select

from everstep.ledger import audit
from everstep.ledger import deletion_rows as rows
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.errors import Deleted, InUse
from everstep.ledger.payload_log.contents import Contents
from everstep.ledger.records import (
    RUN,
    SAMPLER,
    SESSION,
    Event,
    Owned,
    Reader,
    Tombstone,
)
from everstep.ledger.sqlite import row_checksums
from everstep.ledger.store import Store
from everstep.wire.paths import SCHEME

_NOUNS = {RUN: "Run", SESSION: "Session", SAMPLER: "Sampling session"}


class Deletions:
    """Deletes runs and sessions, and knows what was deleted. Durable when a call returns.

    Args:
        store: the database.
        contents: keeps large requests and results.
    """

    def __init__(self, store: Store, contents: Contents) -> None:
        self._store = store
        self._contents = contents
        self._gone: dict[str, Tombstone] = {}

    # What was deleted

    async def find(self, key: str) -> Tombstone | None:
        """Return the tombstone of a run, session, sampler or path, or of what owned it, if any."""
        return await self._store.read(lambda c: rows.tombstone_of(c, key))

    async def require_absent(self, key: str) -> None:
        """Raise `Deleted` if a run, session or sampler was deleted."""
        tombstone = await self.find(key)
        if tombstone is not None:
            raise Deleted(describe(tombstone, key))

    async def is_checkpoint_deleted(self, path: str) -> bool:
        """Return whether a checkpoint was deleted, so that a second deletion is no error."""
        query = select(t.deleted_checkpoints).where(t.deleted_checkpoints.c.path == path)
        return await self._store.read(lambda c: c.execute(query).one_or_none() is not None)

    async def unfinished(self) -> list[Tombstone]:
        """Return the tombstones of deletions that are not finished."""
        return await self._store.read(rows.unfinished)

    def check(self, *keys: str | None) -> None:
        """Raise `Deleted` for what was deleted since the ledger was opened. Reads nothing.

        For transactions that add rows, of requests that found a run before it was deleted. Later
        requests don't find the run.

        Args:
            keys: the runs, sessions, samplers, scopes and paths that rows are added to.
        """
        if not self._gone:
            return
        for key in filter(None, keys):
            for name in rows.names(key):
                tombstone = self._gone.get(name)
                if tombstone is not None and rows.buries(tombstone, key):
                    raise Deleted(describe(tombstone, key))

    # What would be deleted

    async def owned(self, kind: str, key: str) -> Owned | None:
        """Return what a ``run`` or ``session`` owns, or None if there is none of that id."""
        return await self._store.read(lambda c: rows.owned(c, kind, key))

    async def check_unused(self, what: Owned, since: datetime) -> None:
        """Raise `InUse` if an open session uses a run or session.

        Args:
            what: the run or session.
            since: a session uses it if its client was heard of since then, or if it has
                unfinished operations.
        """
        await self._store.read(lambda c: _check_unused(c, what, since))

    async def readers(self, runs: Collection[str], kinds: Iterable[str]) -> list[Reader]:
        """Return the other runs that may have to load checkpoints of these runs again.

        Args:
            runs: the runs.
            kinds: the kinds of operations that load a checkpoint.
        """
        return await self._store.read(lambda c: rows.readers(c, runs, kinds))

    # Deletion

    async def bury(
        self, kind: str, key: str, event: Event, since: datetime, details: dict[str, Any]
    ) -> tuple[Tombstone, list[str]]:
        """Delete a run or session, and leave unfinished tombstones.

        Args:
            kind: ``run`` or ``session``.
            key: its id.
            event: the entry for the audit log.
            since: as for `check_unused`.
            details: for its tombstone.

        Returns:
            Its tombstone, and the request ids of its operations that had not ended.

        Raises:
            InUse: an open session uses it. Nothing is deleted.
            Deleted: it does not exist any more.
        """
        buried: dict[str, Tombstone] = {}

        def work(connection: Connection) -> tuple[Tombstone, list[str]]:
            what = rows.owned(connection, kind, key)
            if what is None:
                raise Deleted(f"{_NOUNS[kind]} {key} does not exist.")
            _check_unused(connection, what, since)
            pending = rows.pending_requests(connection, what)
            tombstone = Tombstone(key, kind, None, q.now(), True, details)
            buried.update((each.id, each) for each in _tombstones(tombstone, what))
            _insert(connection, buried.values())
            rows.remove_index(connection, kind, key, what)
            audit.record(connection, event)
            self._gone.update(buried)
            return tombstone, pending

        try:
            return await self._store.run(work)
        except BaseException:
            for each in buried:
                self._gone.pop(each, None)
            raise

    async def remove_rows(self, tombstone: Tombstone) -> None:
        """Remove the rows that an unfinished deletion has left."""
        kind, key = tombstone.kind, tombstone.id
        # A save that ended with the deletion may have recorded a checkpoint behind it.
        await self._store.run(lambda c: rows.remove_index(c, kind, key, None))
        more = True
        while more:
            more, segments = await self._store.run(lambda c: rows.remove_operations(c, kind, key))
            self._contents.release(segments)

    async def mark_finished(self, keys: Iterable[str]) -> None:
        """Mark deletions as finished: nothing is left of what was deleted."""
        mine = t.tombstones.c.id.in_(list(keys))
        await self._store.run(
            lambda c: row_checksums.update(c, t.tombstones, mine, unfinished=False)
        )

    async def forget(self, *keys: str) -> None:
        """Remove tombstones, so that an import can create runs of these ids again."""

        def work(connection: Connection) -> None:
            connection.execute(delete(t.tombstones).where(t.tombstones.c.id.in_(keys)))
            for key in keys:
                self._gone.pop(key, None)

        await self._store.run(work)


def describe(tombstone: Tombstone, key: str) -> str:
    """Say that a run, session, sampler, scope or path was deleted, with what, and when."""
    noun = _NOUNS[tombstone.kind] if tombstone.id == key else _noun_of(key)
    with_it = tombstone.deleted_with
    if with_it is None and tombstone.id != key:
        with_it = tombstone.id
    owner = f" with {_noun_of(with_it).lower()} {with_it}" if with_it is not None else ""
    at = f"{tombstone.deleted_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return f"{noun} {key} was deleted{owner} on {at}."


def buried_ids(connection: Connection) -> Callable[[str], bool]:
    """Return a function that returns whether the run of an id was deleted, alone or with others."""
    query = select(t.tombstones.c.id).where(t.tombstones.c.kind != SAMPLER)
    known = set(connection.scalars(query))
    return lambda run_id: not known.isdisjoint(rows.names(run_id))


def _noun_of(key: str) -> str:
    if key.startswith(SCHEME):
        return "Checkpoint"
    if ":sample:" in key:
        return _NOUNS[SAMPLER]
    return _NOUNS[RUN] if ":train:" in key else _NOUNS[SESSION]


def _tombstones(first: Tombstone, what: Owned) -> list[Tombstone]:
    """Return the tombstones of a deletion. A sampler whose id names its owner needs none."""
    also = partial(replace, first, deleted_with=first.id, details={})
    runs = [also(id=run, kind=RUN) for run in what.runs if run != first.id]
    known = {first.id, *what.runs}
    samplers = [
        also(id=sampler, kind=SAMPLER)
        for sampler in what.samplers
        if known.isdisjoint(rows.names(sampler))
    ]
    return [first, *runs, *samplers]


def _insert(connection: Connection, tombstones: Iterable[Tombstone]) -> None:
    for each in tombstones:
        connection.execute(delete(t.tombstones).where(t.tombstones.c.id == each.id))
        row_checksums.insert(connection, t.tombstones, asdict(each))


def _check_unused(connection: Connection, what: Owned, since: datetime) -> None:
    found = rows.users(connection, what, since)
    if not found:
        return
    user, noun = found[0], _NOUNS[what.kind]
    others = f" {len(found) - 1} more sessions use it." if len(found) > 1 else ""
    ends = f"end it (everstep session finish {user.session_id}), then delete again."
    if user.heard_at >= since:
        seconds = max((q.now() - user.heard_at).total_seconds(), 0.0)
        raise InUse(
            f"{noun} {what.id} is in use: session {user.session_id} is open, and its client was "
            f"heard of {seconds:.0f} s ago.{others} Stop that program, or {ends}"
        )
    count = f"{user.pending} operation" + ("" if user.pending == 1 else "s")
    raise InUse(
        f"{noun} {what.id} is in use: {count} of the open session {user.session_id} are not "
        f"finished.{others} Wait for them, or {ends}"
    )
