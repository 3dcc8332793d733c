"""Checks of a home: its disk, its ledger, its vault."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from everstep.cli.common.errors import Refused
from everstep.cli.common.output import counted, size_text
from everstep.cli.doctor.finding import Finding, ok, problem, warning

_LOW_BYTES = 5 << 30


def check_home(home: Path) -> Iterator[Finding]:
    """Check a home, without changes to it, also beside a service."""
    yield _directory(home)
    yield _disk_space(home)
    if (home / "vault").is_dir():
        yield _ledger(home)
        yield _vault(home)


def _directory(home: Path) -> Finding:
    existing = next(each for each in (home, *home.parents) if each.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return problem(
            "home",
            f"{home}: {existing} is not writable",
            "Choose another by --home or EVERSTEP_HOME, or change its owner.",
        )
    if not (home / "vault").is_dir():
        return ok("home", f"{home} does not exist yet; the first service creates it")
    return ok("home", str(home))


def _disk_space(home: Path) -> Finding:
    from everstep.runtime import Settings

    existing = next(each for each in (home, *home.parents) if each.exists())
    free = shutil.disk_usage(existing).free
    found = f"{size_text(free)} free"
    advice = "Free some space: 'everstep checkpoint gc', 'everstep vault prune'; or move the home."
    if free < Settings().disk_reserve_bytes:
        return problem("disk", f"{found}: saves are refused", advice)
    if free < _LOW_BYTES:
        return warning("disk", found, advice)
    return ok("disk", found)


def _ledger(home: Path) -> Finding:
    from everstep.cli.common.ledger import open_ledger
    from everstep.ledger import LedgerError

    async def read() -> tuple[int, int, int]:
        async with open_ledger(home, read_only=True) as ledger:
            _, runs = await ledger.search.list_runs(1, 0)
            _, checkpoints = await ledger.search.list_checkpoints(1, 0)
            return runs, checkpoints, len(await ledger.find_damaged_rows())

    try:
        runs, checkpoints, damaged = asyncio.run(read())
    except (LedgerError, Refused, OSError) as error:
        return problem("ledger", str(error), "'everstep ledger verify' finds out more.")
    found = f"{counted(runs, 'run')}, {counted(checkpoints, 'checkpoint')}"
    if damaged:
        return problem(
            "ledger",
            f"{found}; damaged: {counted(damaged, 'row')}",
            "'everstep ledger verify' lists them, with advice.",
        )
    return ok("ledger", found)


def _vault(home: Path) -> Finding:
    from everstep.vault import VaultError, open_vault

    try:
        vault = open_vault(home, writer=False)
        notes = len(list(vault.quarantine.records()))
        manifests = sum(1 for _ in vault.read_manifests())
    except (VaultError, OSError) as error:
        return problem(
            "vault", str(error), "'everstep vault verify --quarantine' moves it into quarantine."
        )
    found = f"readable checkpoints and snapshots: {manifests:,}"
    if notes:
        return warning(
            "vault",
            f"{found}; in quarantine: {counted(notes, 'damaged file')}",
            "'everstep vault quarantined' lists them; a backup may hold them ('everstep restore').",
        )
    return ok("vault", f"{found}; 'everstep vault verify' checks their hashes")
