"""Checkpoint metadata: expiry, publication, copies, imports and access tokens of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, select

from everstep.ledger import audit
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.deletion import Deletions
from everstep.ledger.errors import SequenceConflict
from everstep.ledger.records import Checkpoint, Event, Run, Session, WeightsToken
from everstep.ledger.sqlite import row_checksums
from everstep.ledger.store import Store


class CheckpointMetadata:
    """Changes of checkpoints after they were saved. Every method returns when they are durable.

    Args:
        store: the database.
        deletions: knows the runs that were deleted, to which nothing is added.
    """

    def __init__(self, store: Store, deletions: Deletions) -> None:
        self._store = store
        self._deletions = deletions

    async def change(self, path: str, event: Event, **values: Any) -> Checkpoint | None:
        """Change a checkpoint's metadata and mark it as not yet written to the vault.

        Args:
            path: the checkpoint's path.
            event: the entry for the audit log.
            values: new ``expires_at``, ``public`` or ``user_metadata``.

        Returns:
            The changed checkpoint, or None if there is none or it is expired.
        """

        def work(connection: Connection) -> Checkpoint | None:
            here = (t.checkpoints.c.path == path, q.unexpired())
            if not row_checksums.update(connection, t.checkpoints, *here, unmarked=True, **values):
                return None
            audit.record(connection, event)
            return q.one(connection, Checkpoint, t.checkpoints, path)

        return await self._store.run(work)

    async def mark_written(self, path: str) -> None:
        """Record that the vault's metadata of a checkpoint is up to date."""
        mine = t.checkpoints.c.path == path
        await self._store.run(
            lambda c: row_checksums.update(c, t.checkpoints, mine, unmarked=False)
        )

    async def unwritten(self) -> list[Checkpoint]:
        """Return the checkpoints whose changed metadata is not written to the vault yet."""
        query = select(t.checkpoints).where(t.checkpoints.c.unmarked)

        def work(connection: Connection) -> list[Checkpoint]:
            rows = row_checksums.intact(t.checkpoints, connection.execute(query))
            return [q.record(Checkpoint, row) for row in rows]

        return await self._store.read(work)

    async def mark_unwritten(self, paths: Iterable[str]) -> None:
        """Mark the metadata of these checkpoints as not written to the vault."""
        mine = t.checkpoints.c.path.in_(list(paths))
        await self._store.run(lambda c: row_checksums.update(c, t.checkpoints, mine, unmarked=True))

    # Copies

    async def find_copy(self, idempotency_key: str, request: str) -> str | None:
        """Return the path of the copy that a request with this key made before, if any.

        Args:
            idempotency_key: the request's key.
            request: the request in a canonical form.

        Raises:
            SequenceConflict: the key was used for another request.
        """

        def work(connection: Connection) -> str | None:
            query = select(t.copies).where(t.copies.c.idempotency_key == idempotency_key)
            row = connection.execute(query).one_or_none()
            if row is None:
                return None
            row_checksums.check(t.copies, row)
            if row.request != request:
                raise SequenceConflict(
                    "This X-Idempotency-Key was used before, for another copy. A new request "
                    "needs a key of its own."
                )
            return str(row.path)

        return await self._store.read(work)

    async def record_copy(
        self,
        checkpoint: Checkpoint,
        run: Run,
        session: Session | None,
        event: Event,
        key: tuple[str, str] | None,
    ) -> None:
        """Record a copy, with the run and session that were created for it.

        Args:
            checkpoint: the copy.
            run: the run that holds it. One that exists stays as it is.
            session: the session that holds the run, or None if it exists.
            event: the entry for the audit log.
            key: the idempotency key and request, for `find_copy`.
        """

        def work(connection: Connection) -> None:
            self._deletions.check(run.run_id)
            if session is not None and q.one(connection, Session, t.sessions, session.session_id):
                return  # another request with the same key was recorded first
            if session is not None:
                row_checksums.insert(connection, t.sessions, vars(session))
            if q.one(connection, Run, t.runs, run.run_id) is None:
                row_checksums.insert(connection, t.runs, vars(run))
            q.put(connection, t.checkpoints, checkpoint)
            if key is not None:
                row = {"idempotency_key": key[0], "request": key[1], "path": checkpoint.path}
                row_checksums.insert(connection, t.copies, row)
            audit.record(connection, event)

        await self._store.run(work)

    # Imports

    async def record_import(
        self, checkpoint: Checkpoint, run: Run, session: Session, event: Event
    ) -> None:
        """Record an imported checkpoint, with the run and session that hold it.

        Args:
            checkpoint: the imported checkpoint. It replaces one with the same path.
            run: the run that holds it. One that exists stays as it is.
            session: the session that holds the run. One that exists stays as it is.
            event: the entry for the audit log.
        """

        def work(connection: Connection) -> None:
            if q.one(connection, Session, t.sessions, session.session_id) is None:
                row_checksums.insert(connection, t.sessions, vars(session))
            if q.one(connection, Run, t.runs, run.run_id) is None:
                row_checksums.insert(connection, t.runs, vars(run))
            q.put(connection, t.checkpoints, checkpoint)
            audit.record(connection, event)

        await self._store.run(work)

    # Tokens

    async def add_token(self, token: WeightsToken, event: Event) -> None:
        """Store an access token."""

        def work(connection: Connection) -> None:
            self._deletions.check(token.path)
            row_checksums.insert(connection, t.weights_tokens, vars(token))
            audit.record(connection, event)

        await self._store.run(work)

    async def find_token(self, digest: str) -> WeightsToken | None:
        """Return the token with a digest, or None if there is none or it is expired."""
        query = select(t.weights_tokens).where(t.weights_tokens.c.digest == digest)

        def work(connection: Connection) -> WeightsToken | None:
            row = connection.execute(query).one_or_none()
            if row is None:
                return None
            row_checksums.check(t.weights_tokens, row)
            token = WeightsToken(row.token_id, row.digest, row.path, row.created_at, row.expires_at)
            return token if _is_valid(token, q.now()) else None

        return await self._store.read(work)

    async def revoke_token(self, token_id: str, event: Event) -> bool:
        """Delete a token, and return whether it existed."""
        mine = t.weights_tokens.c.token_id == token_id

        def work(connection: Connection) -> bool:
            gone = connection.execute(delete(t.weights_tokens).where(mine)).rowcount > 0
            audit.record(connection, event if gone else None)
            return gone

        return await self._store.run(work)


def _is_valid(token: WeightsToken, now: datetime) -> bool:
    return token.expires_at is None or token.expires_at > now
