"""Pruning: deletes a run's checkpoints that a policy does not keep."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from everstep.runtime.absence import absent
from everstep.runtime.checkpoints.catalog import CheckpointCatalog, id_of
from everstep.runtime.context import RuntimeContext
from everstep.vault import Manifest, VaultError
from everstep.vault.integrity import is_sound
from everstep.vault.retention import Policy, to_delete


@dataclass(frozen=True)
class PrunePlan:
    """The result of a policy for a run's checkpoints, each list oldest first.

    Attributes:
        doomed: checkpoints to delete.
        kept: checkpoints to keep.
        passed_over: the reasons why some checkpoints can't be read. They are kept.
    """

    doomed: list[Manifest]
    kept: list[Manifest]
    passed_over: list[str]


async def plan(context: RuntimeContext, run_id: str, policy: Policy) -> PrunePlan:
    """Apply a policy to a run's checkpoints, or raise `Rejected` (404) if there is no such run."""
    if await context.ledger.run(run_id) is None:
        raise await absent(context.ledger, run_id, f"There is no run {run_id}.")
    vault = context.vault
    rows = await context.ledger.checkpoints(run_id)

    def read() -> PrunePlan:
        found: list[Manifest] = []
        bad: list[str] = []
        for row in rows:
            try:
                manifest = vault.manifest(*id_of(row))
            except VaultError as error:
                bad.append(str(error))
                continue
            current = {
                "expires_at": row.expires_at,
                "public": row.public,
                "user_metadata": row.user_metadata,
            }
            found.append(manifest.model_copy(update=current))
        now = datetime.now(UTC)
        doomed = to_delete(found, policy, now=now, good=lambda m: is_sound(vault, m))
        gone = {each.id for each in doomed}
        return PrunePlan(doomed, [each for each in found if each.id not in gone], bad)

    return await asyncio.to_thread(read)


async def delete(catalog: CheckpointCatalog, doomed: Sequence[Manifest]) -> None:
    """Delete the checkpoints that a plan names."""
    for each in doomed:
        await catalog.delete(each.id)
