"""Tables and JSON of the vault's files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from everstep.cli.common import output
from everstep.vault import CheckpointId, QuarantineRecord
from everstep.vault.verify import Damage, Report
from everstep.wire.messages.maintenance import QuarantineNote


def display_name(checkpoint: CheckpointId) -> str:
    """Return a checkpoint's path, or a description of a snapshot, which has none."""
    if checkpoint.has_path:
        return checkpoint.path
    return f"{checkpoint.kind} {checkpoint.name} of run {checkpoint.run_id}"


def quarantine_note(note: QuarantineRecord) -> QuarantineNote:
    """Convert a note of the vault to that of the service's response."""
    return QuarantineNote(
        file=note.key,
        found_at=note.found_at,
        reason=note.reason,
        checkpoints=[display_name(each) for each in note.checkpoints],
        runs=note.runs,
    )


def report_json(report: Report, notes: Iterable[QuarantineRecord]) -> dict[str, Any]:
    """Build the JSON of a verification."""
    return {
        "ok": report.ok,
        "checkpoints": report.checkpoints,
        "files": report.files,
        "bytes": report.size,
        "damaged": [
            {
                "file": each.key,
                "reason": each.reason,
                "runs": list(each.runs),
                "checkpoints": [display_name(one) for one in each.checkpoints],
            }
            for each in report.damaged
        ],
        "quarantined": [note_json(quarantine_note(note)) for note in [*report.quarantined, *notes]],
    }


def note_json(note: QuarantineNote) -> dict[str, Any]:
    """Build the JSON of a quarantined file."""
    return {
        "file": note.file,
        "found_at": note.found_at.isoformat(),
        "reason": note.reason,
        "runs": note.runs,
        "checkpoints": note.checkpoints,
    }


def print_damaged(damaged: Iterable[Damage]) -> None:
    """Print damaged files and the checkpoints that they affect."""
    rows = (
        (each.key, each.reason, [display_name(one) for one in each.checkpoints]) for each in damaged
    )
    _print_files("Damaged", rows)


def print_quarantined(notes: Iterable[QuarantineNote]) -> None:
    """Print quarantined files and the checkpoints that they affect."""
    rows = (
        (note.file, f"since {output.time_text(note.found_at)}: {note.reason}", note.checkpoints)
        for note in notes
    )
    _print_files("In quarantine", rows)


def print_remarks(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print checkpoints or files, each after a remark."""
    output.print_columns((title, ""), [(remark, name) for name, remark in rows])


def _print_files(title: str, rows: Iterable[tuple[str, str, Sequence[str]]]) -> None:
    out = output.console()
    out.print(title, style="bold")
    for key, remark, checkpoints in rows:
        out.print(key)
        out.print(f"  {remark}")
        for name in checkpoints or ["no checkpoint"]:
            out.print(f"  affects {name}")
