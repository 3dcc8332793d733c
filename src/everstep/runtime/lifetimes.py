"""Lifetimes, publication, tags: how long a checkpoint stays, who may read it, what it is called.

The ledger says what is so; the vault is told, so that its manifests and marks alone bring it back.
A change is recorded first, with a note that the vault has to be told, and answered when it was.
A process that dies in between tells it when it is started again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import structlog

from everstep.failpoints import Failpoint
from everstep.ledger import Checkpoint, Ledger
from everstep.runtime.access import event
from everstep.runtime.checkpoints import Checkpoints, expiry, path_of, requested_path
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.vault import Vault, VaultError
from everstep.vault.keys import MARKS
from everstep.wire.inspection import TagCheckpointRequest
from everstep.wire.paths import TinkerPath, parse_path

_log = structlog.get_logger("everstep.lifetimes")
_RESERVED = "everstep_"
_RECORDED = Failpoint("runtime.mark.recorded", "a change is in the ledger, the vault knows nothing")
_TOLD = Failpoint("runtime.mark.told", "the vault knows of a change, the ledger not that it does")


class Lifetimes:
    """Changes what lies beside a checkpoint's manifest.

    Args:
        ledger: where it is recorded.
        vault: which is told.
        checkpoints: has the bounds, and keeps saves, deletions and changes of a path apart.
    """

    def __init__(self, ledger: Ledger, vault: Vault, checkpoints: Checkpoints) -> None:
        self._ledger = ledger
        self._vault = vault
        self._checkpoints = checkpoints

    async def set_ttl(self, run_id: str, checkpoint_id: str, ttl_seconds: int | None) -> None:
        """Have a checkpoint expire so long from now.

        Args:
            run_id: its run.
            checkpoint_id: ``<segment>/<name>``.
            ttl_seconds: None: it never expires.

        Raises:
            Rejected: the id or the time is malformed (400), there is no such checkpoint (404).
        """
        path = requested_path(run_id, checkpoint_id)
        try:
            self._checkpoints.check_ttl(ttl_seconds)
        except OperationFailed as failure:
            raise Rejected(400, failure.message) from failure

        async def change(_: Checkpoint) -> Checkpoint | None:
            what = event("ttl_set", str(path), ttl_seconds=ttl_seconds)
            until = expiry(datetime.now(UTC), ttl_seconds)
            return await self._ledger.publication.change(str(path), what, expires_at=until)

        await self._change(path, change)

    async def set_public(self, run_id: str, checkpoint_id: str, public: bool) -> None:
        """Let everyone read a checkpoint, or its owner only; raises as `set_ttl`."""
        path = requested_path(run_id, checkpoint_id)

        async def change(known: Checkpoint) -> Checkpoint | None:
            if known.public == public and not known.unmarked:
                return known
            what = event("publish" if public else "unpublish", str(path))
            return await self._ledger.publication.change(str(path), what, public=public)

        await self._change(path, change)

    async def tag(self, request: TagCheckpointRequest) -> dict[str, str]:
        """Change a checkpoint's ``user_metadata``; returns what it is now.

        Raises:
            Rejected: the path is malformed or a key is not the user's (400), there is no such
                checkpoint (404).
        """
        path = parse_path(request.tinker_path)
        ours = [key for key in (*request.tags, *request.remove) if key.startswith(_RESERVED)]
        if ours:
            raise Rejected(
                400,
                f"{', '.join(ours)}: keys that begin with {_RESERVED!r} hold a training loop's "
                "state, and can't be changed.",
            )
        now: dict[str, str] = {}

        async def change(known: Checkpoint) -> Checkpoint | None:
            before = known.user_metadata or {}
            now.update({key: before[key] for key in before if key not in request.remove})
            now.update(request.tags)
            if now == before and not known.unmarked:
                return known
            what = event("tag", str(path), tags=dict(request.tags), removed=request.remove)
            return await self._ledger.publication.change(str(path), what, user_metadata=now)

        await self._change(path, change)
        return now

    async def settle(self) -> None:
        """Tell the vault what a process that died did not, and what it lost."""
        await self._ledger.publication.unmark(await asyncio.to_thread(self._lost))
        for row in await self._ledger.publication.unmarked():
            async with self._checkpoints.lock(row.path):
                now = await self._ledger.publication.unmarked()
                for current in (each for each in now if each.path == row.path):
                    await self._settle(current)

    def _lost(self) -> list[str]:
        """The paths of checkpoints whose marks were found damaged."""
        notes = [n for n in self._vault.quarantine.standing() if n.key.startswith(MARKS)]
        paths = [path_of(each) for note in notes for each in note.checkpoints]
        return [path for path in paths if path is not None]

    async def _settle(self, row: Checkpoint) -> None:
        try:
            await self._tell(row)
        except (VaultError, OSError) as error:
            _log.error("the vault could not be told", checkpoint=row.path, reason=str(error))

    async def _change(
        self, path: TinkerPath, change: Callable[[Checkpoint], Awaitable[Checkpoint | None]]
    ) -> None:
        async with self._checkpoints.lock(str(path)):  # no save, deletion or collection meanwhile
            known = await self._ledger.checkpoint(str(path))
            row = await change(known) if known is not None and known.listed else None
            if row is None:
                raise Rejected(404, f"Checkpoint {path} does not exist, or has expired.")
            if not row.unmarked:
                return
            _RECORDED()
            try:
                await self._tell(row)
            except (VaultError, OSError) as error:
                _log.error("the vault could not be told", checkpoint=str(path), reason=str(error))
                raise Rejected(
                    503, f"The change of {path} could not be written to the vault; try again."
                ) from error

    async def _tell(self, row: Checkpoint) -> None:
        """Write a checkpoint's marks, and record that they are there."""

        def mark() -> None:
            manifest = self._vault.recorded(row.kind, row.run_id, row.name)
            self._vault.mark(
                manifest,
                expires_at=row.expires_at,
                public=row.public,
                user_metadata=row.user_metadata,
            )

        await asyncio.to_thread(mark)
        _TOLD()
        await self._ledger.publication.marked(row.path)
