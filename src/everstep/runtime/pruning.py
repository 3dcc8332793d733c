"""Pruning: deleting a run's checkpoints but those that a policy keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from everstep.ledger import Ledger
from everstep.runtime.checkpoints import Checkpoints, path_of
from everstep.runtime.errors import Rejected
from everstep.vault import Manifest, Vault, VaultError
from everstep.vault.inspection import is_sound
from everstep.vault.retention import Policy, to_delete
from everstep.wire.paths import parse_path


@dataclass(frozen=True)
class Pruning:
    """What a policy says of a run's checkpoints, each oldest first.

    Attributes:
        doomed: those that go.
        kept: those that stay.
        passed_over: those that can't be read, and stay: what is wrong with each.
    """

    doomed: list[Manifest]
    kept: list[Manifest]
    passed_over: list[str]


async def plan(ledger: Ledger, vault: Vault, run_id: str, policy: Policy) -> Pruning:
    """Say what a policy lets go; raises `Rejected` (404) where there is no such run."""
    if await ledger.run(run_id) is None:
        raise Rejected(404, f"There is no run {run_id}.")
    rows = await ledger.checkpoints(run_id)

    def look() -> Pruning:
        found: list[Manifest] = []
        bad: list[str] = []
        for row in rows:
            try:
                manifest = vault.manifest(row.kind, row.run_id, row.name)
            except VaultError as error:
                bad.append(str(error))
                continue
            now_so = {
                "expires_at": row.expires_at,
                "public": row.public,
                "user_metadata": row.user_metadata,
            }
            found.append(manifest.model_copy(update=now_so))
        now = datetime.now(UTC)
        doomed = to_delete(found, policy, now=now, good=lambda m: is_sound(vault, m))
        gone = {each.id for each in doomed}
        return Pruning(doomed, [each for each in found if each.id not in gone], bad)

    return await asyncio.to_thread(look)


async def delete(checkpoints: Checkpoints, doomed: Sequence[Manifest]) -> None:
    """Delete checkpoints that a plan lets go."""
    for each in doomed:
        path = parse_path(str(path_of(each.id)))
        await checkpoints.delete(path.run_id, path.checkpoint_id)
