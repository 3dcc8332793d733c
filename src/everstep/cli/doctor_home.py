"""The doctor's look at a home: its disk, its ledger, its vault."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from everstep.cli.errors import Refused
from everstep.cli.finding import Finding, ok, problem, warning
from everstep.cli.output import counted

_LITTLE_BYTES = 5 << 30


def findings(home: Path) -> Iterator[Finding]:
    """Look at a home. Changes nothing; works beside a service."""
    yield _place(home)
    yield _room(home)
    if (home / "vault").is_dir():
        yield _ledger(home)
        yield _vault(home)


def _place(home: Path) -> Finding:
    there = next(each for each in (home, *home.parents) if each.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return problem(
            "home",
            f"{home}: {there} can't be written to",
            "Choose another by --home or EVERSTEP_HOME, or change its owner.",
        )
    if not (home / "vault").is_dir():
        return ok("home", f"{home} is not there yet; the first service makes it")
    return ok("home", str(home))


def _room(home: Path) -> Finding:
    from everstep.runtime import Settings
    from everstep.vault.room import readable

    there = next(each for each in (home, *home.parents) if each.exists())
    free = shutil.disk_usage(there).free
    found = f"{readable(free)} free"
    advice = "Free some: 'everstep checkpoint gc', 'everstep vault prune'; or move the home."
    if free < Settings().disk_reserve_bytes:
        return problem("disk", f"{found}: saves are refused", advice)
    if free < _LITTLE_BYTES:
        return warning("disk", found, advice)
    return ok("disk", found)


def _ledger(home: Path) -> Finding:
    from everstep.cli.vault_work import opened
    from everstep.ledger import LedgerError

    async def look() -> tuple[int, int, int]:
        async with opened(home, read_only=True) as ledger:
            _, runs = await ledger.directory.runs(1, 0)
            _, checkpoints = await ledger.directory.checkpoints(1, 0)
            return runs, checkpoints, len(await ledger.damaged())

    try:
        runs, checkpoints, damaged = asyncio.run(look())
    except (LedgerError, Refused, OSError) as error:
        return problem("ledger", str(error), "'everstep ledger verify' says more.")
    found = f"{counted(runs, 'run')}, {counted(checkpoints, 'checkpoint')}"
    if damaged:
        return problem(
            "ledger",
            f"{found}; damaged: {counted(damaged, 'row')}",
            "'everstep ledger verify' names them and says what to do.",
        )
    return ok("ledger", found)


def _vault(home: Path) -> Finding:
    from everstep.vault import VaultError, open_vault

    try:
        vault = open_vault(home, writer=False)
        notes = len(list(vault.quarantine.standing()))
        manifests = sum(1 for _ in vault.all_recorded())
    except (VaultError, OSError) as error:
        return problem(
            "vault", str(error), "'everstep vault verify --quarantine' puts it out of the way."
        )
    found = f"checkpoints and snapshots that can be read: {manifests:,}"
    if notes:
        return warning(
            "vault",
            f"{found}; in quarantine: {counted(notes, 'damaged file')}",
            "'everstep vault quarantined' names them; 'everstep restore' may have them.",
        )
    return ok("vault", f"{found}; 'everstep vault verify' hashes them")
