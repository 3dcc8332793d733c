"""Verification of a home's vault, without a service."""

from __future__ import annotations

import asyncio
from pathlib import Path

from everstep.cli.common import output
from everstep.cli.common.ledger import open_ledger
from everstep.cli.common.progress_bars import progress_bar
from everstep.cli.vault import tables
from everstep.runtime import Settings
from everstep.runtime.checkpoints.catalog import CheckpointCatalog
from everstep.vault import QuarantineRecord, open_vault
from everstep.vault.integrity import quarantine_damaged
from everstep.vault.verify import Report
from everstep.vault.verify import verify as verify_vault


def verify_home(home: Path, everything: bool, quarantine: bool, as_json: bool) -> bool:
    """Verify a home's vault and print the damaged files.

    Args:
        home: the home.
        everything: verify unreferenced files as well.
        quarantine: move damaged files into quarantine. No service may run on the home.
        as_json: print JSON.

    Returns:
        Whether no file is damaged.

    Raises:
        LedgerLocked: ``quarantine`` is set, and a service runs on the home.
    """
    vault = open_vault(home, writer=False)

    def read() -> Report:
        with progress_bar("verifying", quiet=as_json) as progress:
            return verify_vault(vault, everything=everything, progress=progress)

    async def read_and_quarantine() -> tuple[Report, list[QuarantineRecord]]:
        async with open_ledger(home) as ledger:
            report = read()
            notes = [quarantine_damaged(vault, each.key) for each in report.damaged]
            await CheckpointCatalog(ledger, vault, Settings()).follow_quarantine()
            return report, [note for note in notes if note is not None]

    report, notes = asyncio.run(read_and_quarantine()) if quarantine else (read(), [])
    if as_json:
        output.print_json(tables.report_json(report, notes))
    else:
        _print_report(report, notes)
    return report.ok


def _print_report(report: Report, notes: list[QuarantineRecord]) -> None:
    out = output.console()
    if report.quarantined:
        tables.print_quarantined(map(tables.quarantine_note, report.quarantined))
    if report.damaged:
        tables.print_damaged(report.damaged)
    out.print(
        f"{output.counted(report.checkpoints, 'checkpoint')}, "
        f"{output.counted(report.files, 'file')}, {output.size_text(report.size)}: "
        + ("all intact." if report.ok else f"{len(report.damaged)} damaged.")
    )
    if notes:
        out.print(f"{len(notes)} moved to quarantine; saving the same bytes again repairs them.")
    elif report.damaged:
        out.print("Move them into quarantine with 'everstep vault verify --quarantine'.")
