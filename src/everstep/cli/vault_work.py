"""``everstep vault verify``, ``quarantined`` and ``gc``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from everstep.cli import output, running
from everstep.cli import vault_tables as tables
from everstep.cli.errors import Refused
from everstep.ledger import Ledger, LedgerLocked
from everstep.runtime import Settings
from everstep.runtime.care import told_of
from everstep.runtime.checkpoints import Checkpoints
from everstep.runtime.upkeep import Upkeep, without
from everstep.vault import Note, VaultBusy, open_vault
from everstep.vault.inspection import put_away
from everstep.vault.room import readable
from everstep.vault.verify import Report
from everstep.vault.verify import verify as verify_vault
from everstep.wire.upkeep import CollectResponse


@asynccontextmanager
async def opened(home: Path, *, read_only: bool = False) -> AsyncIterator[Ledger]:
    """The ledger of a home, to oneself; or only to read it, beside a service.

    Raises:
        Refused: there is none.
        LedgerLocked: a service has it.
    """
    path = home / "ledger.sqlite"
    if not path.exists():
        raise Refused(
            f"{home} has a vault, but no {path.name}: if it was lost, bring it back from a backup "
            "(everstep restore), or make it anew with 'everstep vault rebuild'."
        )
    ledger = await (Ledger.open_read_only(path) if read_only else Ledger.open(path))
    try:
        yield ledger
    finally:
        await ledger.close()


def verify(home: Path, everything: bool, quarantine: bool, as_json: bool) -> bool:
    """Verify a home's vault and print what was found.

    Args:
        home: the home.
        everything: also files that no checkpoint names.
        quarantine: move what is damaged away; no service may have the home.
        as_json: print JSON.

    Returns:
        Whether nothing is damaged.
    """
    vault = open_vault(home, writer=False)

    def look() -> Report:
        with output.progress_bar("verifying", quiet=as_json) as progress:
            return verify_vault(vault, everything=everything, progress=progress)

    async def look_and_move() -> tuple[Report, list[Note]]:
        async with opened(home) as ledger:
            report = look()
            notes = [put_away(vault, each.key) for each in report.damaged]
            await Checkpoints(ledger, vault, Settings()).follow_quarantine()
            return report, [note for note in notes if note is not None]

    report, notes = asyncio.run(look_and_move()) if quarantine else (look(), [])
    if as_json:
        output.print_json(tables.report_json(report, notes))
    else:
        _print_report(report, notes)
    return report.ok


def _print_report(report: Report, notes: list[Note]) -> None:
    out = output.console()
    if report.quarantined:
        tables.print_quarantined(report.quarantined)
    if report.damaged:
        tables.print_damaged(report.damaged)
    out.print(
        f"{output.counted(report.checkpoints, 'checkpoint')}, "
        f"{output.counted(report.files, 'file')}, {readable(report.size)}: "
        + ("all as they were written." if report.ok else f"{len(report.damaged)} damaged.")
    )
    if notes:
        out.print(f"{len(notes)} moved to quarantine; saving the same bytes again heals them.")
    elif report.damaged:
        out.print("Move them out of the way with 'everstep vault verify --quarantine'.")


def quarantined(home: Path, as_json: bool) -> None:
    """Print what is in a home's quarantine."""
    notes = list(open_vault(home, writer=False).quarantine.standing())
    if as_json:
        output.print_json([tables.note_json(note) for note in notes])
    elif notes:
        tables.print_quarantined(notes)
    else:
        output.console().print("Nothing is in quarantine.")


def collect(home: Path, grace: float, dry_run: bool, as_json: bool) -> None:
    """Collect what nobody needs any more, and print what that is.

    Args:
        home: the home; a service that has it does it itself.
        grace: what is younger than so many seconds stays.
        dry_run: only print.
        as_json: print JSON.

    Raises:
        VaultBusy: a backup is being made.
    """
    try:
        done = asyncio.run(_collect(home, grace, dry_run))
    except LedgerLocked:
        asked = {"grace_seconds": grace, "dry_run": dry_run}
        answer = running.ask(home, "everstep/vault/collect", asked)
        done = CollectResponse.model_validate(answer)
    print_collected(done, as_json)


def print_collected(done: CollectResponse, as_json: bool) -> None:
    """Print what a collection removed, or would."""
    if as_json:
        output.print_json(done.model_dump())
        return
    out = output.console()
    rows = [(path, "of a session that ended") for path in done.ended]
    rows += [(path, "expired") for path in done.expired]
    rows += [(path, "not in the index") for path in done.orphaned]
    rows += [(digest, "no checkpoint names it") for digest in done.files] if done.dry_run else []
    if rows:
        tables.print_remarks("To be removed" if done.dry_run else "Removed", rows)
    checkpoints = len(done.ended) + len(done.expired) + len(done.orphaned)
    verb = "would be removed" if done.dry_run else "removed"
    out.print(
        f"{output.counted(checkpoints, 'checkpoint')} and {output.counted(len(done.files), 'file')}"
        f" {verb}: {readable(done.bytes)}."
    )


async def _collect(home: Path, grace: float, dry_run: bool) -> CollectResponse:
    async with opened(home, read_only=dry_run) as ledger:
        vault = open_vault(home, writer=not dry_run)
        upkeep = Upkeep(ledger, vault, Checkpoints(ledger, vault, Settings()), grace)
        found = await upkeep.leftovers()
        if dry_run:
            return told_of(
                found, vault.collect(grace, dry_run=True, without=without(found)), dry_run
            )
        if vault.is_held:
            raise VaultBusy(f"A backup of {home} is being made; collect when it is done.")
        await upkeep.remove(found)
        return told_of(found, vault.collect(grace), dry_run)
