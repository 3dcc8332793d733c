"""Owed replay: what each run would cost to recompute, from the ledger and the vault."""

from __future__ import annotations

import asyncio

from everstep.ledger import Ledger
from everstep.runtime import ids
from everstep.runtime.execution import snapshots
from everstep.vault import Vault


async def owed_by_run(ledger: Ledger, vault: Vault) -> dict[str, float]:
    """Return the seconds of computation after each run's newest durable state.

    Runs that owe nothing are left out, as are corrupted ones and those of finished sessions, which
    are never brought back.

    Raises:
        StoreFailed: the vault's storage does not answer.
    """
    positions = await asyncio.to_thread(_newest_snapshots, vault)
    runs = await ledger.search.replayable_runs()
    counted = {run_id: positions.get(run_id, 0) for run_id in runs}
    owed = await ledger.search.executed_seconds(counted, ids.CHANGES_STATE)
    behind: dict[str, int] = {}
    for run_id in owed:
        for manifest in (await snapshots.newest_first(vault, run_id))[:1]:
            behind[run_id] = manifest.position  # a training checkpoint may be newer
    exact = await ledger.search.executed_seconds(behind, ids.CHANGES_STATE)
    return {run_id: exact.get(run_id, 0.0) if run_id in behind else owed[run_id] for run_id in owed}


def _newest_snapshots(vault: Vault) -> dict[str, int]:
    """Return the position of each run's newest snapshot. Manifests are not read."""
    positions: dict[str, int] = {}
    for run_id, name in vault.names(snapshots.KIND):
        if name.isdecimal():
            positions[run_id] = max(positions.get(run_id, 0), int(name))
    return positions
