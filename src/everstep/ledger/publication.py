"""Lifetimes, publication, copies and tokens of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, select

from everstep.ledger import audit, seals
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.errors import SequenceConflict
from everstep.ledger.records import Checkpoint, Event, Run, Session, WeightsToken
from everstep.ledger.writer import Writer


class Publication:
    """What is changed of checkpoints after they were saved. Durable when a call returns."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def change(self, path: str, event: Event, **values: Any) -> Checkpoint | None:
        """Change a checkpoint's lifetime, publication or tags; the vault has to be told then.

        Args:
            path: of the checkpoint.
            event: what that is, for the audit log.
            values: new ``expires_at``, ``public`` or ``user_metadata``.

        Returns:
            The checkpoint as it is now; None when there is none, or none any more.
        """

        def work(connection: Connection) -> Checkpoint | None:
            here = (t.checkpoints.c.path == path, q.unexpired())
            if not seals.change(connection, t.checkpoints, *here, unmarked=True, **values):
                return None
            audit.note(connection, event)
            return q.one(connection, Checkpoint, t.checkpoints, path)

        return await self._writer.run(work)

    async def marked(self, path: str) -> None:
        """Record that the vault knows what was changed of a checkpoint."""
        mine = t.checkpoints.c.path == path
        await self._writer.run(lambda c: seals.change(c, t.checkpoints, mine, unmarked=False))

    async def unmarked(self) -> list[Checkpoint]:
        """The checkpoints of which the vault has to be told."""
        query = select(t.checkpoints).where(t.checkpoints.c.unmarked)

        def work(connection: Connection) -> list[Checkpoint]:
            rows = seals.intact(t.checkpoints, connection.execute(query))
            return [q.record(Checkpoint, row) for row in rows]

        return await self._writer.run(work)

    async def unmark(self, paths: Iterable[str]) -> None:
        """Have the vault told once more of these checkpoints."""
        mine = t.checkpoints.c.path.in_(list(paths))
        await self._writer.run(lambda c: seals.change(c, t.checkpoints, mine, unmarked=True))

    # Copies

    async def copied(self, idempotency_key: str, request: str) -> str | None:
        """The path that a request with this key was given before, if any.

        Args:
            idempotency_key: of the request.
            request: what it asks, in a canonical form.

        Raises:
            SequenceConflict: the key was used for another request.
        """

        def work(connection: Connection) -> str | None:
            query = select(t.copies).where(t.copies.c.idempotency_key == idempotency_key)
            row = connection.execute(query).one_or_none()
            if row is None:
                return None
            seals.check(t.copies, row)
            if row.request != request:
                raise SequenceConflict(
                    "This X-Idempotency-Key was used before, for another copy; a new request "
                    "needs a key of its own."
                )
            return str(row.path)

        return await self._writer.run(work)

    async def copy(
        self,
        checkpoint: Checkpoint,
        run: Run,
        session: Session | None,
        event: Event,
        key: tuple[str, str] | None,
    ) -> None:
        """Record a copy with the run, and perhaps the session, that were made for it.

        Args:
            checkpoint: the copy.
            run: holds it; one that is there stays as it is.
            session: holds the run; None: it exists.
            event: for the audit log.
            key: idempotency key and request, for `copied`.
        """

        def work(connection: Connection) -> None:
            if session is not None and q.one(connection, Session, t.sessions, session.session_id):
                return  # a request with the same key was quicker
            if session is not None:
                seals.add(connection, t.sessions, vars(session))
            if q.one(connection, Run, t.runs, run.run_id) is None:
                seals.add(connection, t.runs, vars(run))
            q.put(connection, t.checkpoints, checkpoint)
            if key is not None:
                row = {"idempotency_key": key[0], "request": key[1], "path": checkpoint.path}
                seals.add(connection, t.copies, row)
            audit.note(connection, event)

        await self._writer.run(work)

    # Imports

    async def imported(
        self, checkpoint: Checkpoint, run: Run, session: Session, event: Event
    ) -> None:
        """Record an imported checkpoint, with the run and session that hold it.

        Args:
            checkpoint: what was imported; one with its path is replaced.
            run: holds it; one that is there stays as it is.
            session: holds the run; likewise.
            event: for the audit log.
        """

        def work(connection: Connection) -> None:
            if q.one(connection, Session, t.sessions, session.session_id) is None:
                seals.add(connection, t.sessions, vars(session))
            if q.one(connection, Run, t.runs, run.run_id) is None:
                seals.add(connection, t.runs, vars(run))
            q.put(connection, t.checkpoints, checkpoint)
            audit.note(connection, event)

        await self._writer.run(work)

    # Tokens

    async def add_token(self, token: WeightsToken, event: Event) -> None:
        """Record a token."""

        def work(connection: Connection) -> None:
            seals.add(connection, t.weights_tokens, vars(token))
            audit.note(connection, event)

        await self._writer.run(work)

    async def token(self, digest: str) -> WeightsToken | None:
        """The token with this digest, if there is one and it has not expired."""
        query = select(t.weights_tokens).where(t.weights_tokens.c.digest == digest)

        def work(connection: Connection) -> WeightsToken | None:
            row = connection.execute(query).one_or_none()
            if row is None:
                return None
            seals.check(t.weights_tokens, row)
            token = WeightsToken(row.token_id, row.digest, row.path, row.created_at, row.expires_at)
            return token if _lives(token, q.now()) else None

        return await self._writer.run(work)

    async def revoke_token(self, token_id: str, event: Event) -> bool:
        """Forget a token; returns whether it was there."""
        mine = t.weights_tokens.c.token_id == token_id

        def work(connection: Connection) -> bool:
            gone = connection.execute(delete(t.weights_tokens).where(mine)).rowcount > 0
            audit.note(connection, event if gone else None)
            return gone

        return await self._writer.run(work)


def _lives(token: WeightsToken, now: datetime) -> bool:
    return token.expires_at is None or token.expires_at > now
