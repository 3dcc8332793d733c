"""What the vault's commands print: lines for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from everstep.cli import output
from everstep.runtime.checkpoints import path_of
from everstep.vault import CheckpointId, Note
from everstep.vault.verify import Damage, Report


def called(checkpoint: CheckpointId) -> str:
    """What people call a checkpoint: its path; a snapshot has none."""
    kind, run, name = checkpoint
    return path_of(checkpoint) or f"{kind} {name} of run {run}"


def report_json(report: Report, notes: Iterable[Note]) -> dict[str, Any]:
    """A verification's report."""
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
                "checkpoints": [called(one) for one in each.checkpoints],
            }
            for each in report.damaged
        ],
        "quarantined": [note_json(note) for note in [*report.quarantined, *notes]],
    }


def note_json(note: Note) -> dict[str, Any]:
    """A quarantined file."""
    return {
        "file": note.key,
        "found_at": note.found_at.isoformat(),
        "reason": note.reason,
        "runs": note.runs,
        "checkpoints": [called(each) for each in note.checkpoints],
    }


def print_damaged(damaged: Iterable[Damage]) -> None:
    """Print damaged files and whom they touch."""
    _print_files("Damaged", ((each.key, each.reason, each.checkpoints) for each in damaged))


def print_quarantined(notes: Iterable[Note]) -> None:
    """Print quarantined files and whom they touch."""
    rows = (
        (note.key, f"since {output.time_text(note.found_at)}: {note.reason}", note.checkpoints)
        for note in notes
    )
    _print_files("In quarantine", rows)


def print_remarks(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print checkpoints or files, each behind a remark."""
    output.print_columns((title, ""), [(remark, name) for name, remark in rows])


def _print_files(title: str, rows: Iterable[tuple[str, str, Iterable[CheckpointId]]]) -> None:
    out = output.console()
    out.print(title, style="bold")
    for key, remark, checkpoints in rows:
        out.print(key)
        out.print(f"  {remark}")
        for text in [called(each) for each in checkpoints] or ["no checkpoint"]:
            out.print(f"  touches {text}")
