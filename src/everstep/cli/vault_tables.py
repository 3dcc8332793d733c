"""What the vault's commands print: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

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


def damage_table(damaged: Iterable[Damage]) -> Table:
    """Damaged files and whom they touch."""
    table = _table("Damaged", "file", "what is wrong", "touches")
    for each in damaged:
        table.add_row(each.key, each.reason, _all(each.checkpoints))
    return table


def quarantine_table(notes: Iterable[Note]) -> Table:
    """Quarantined files and whom they touch."""
    table = _table("In quarantine", "file", "since", "why", "touches")
    for note in notes:
        since = f"{note.found_at:%Y-%m-%d %H:%M}"
        table.add_row(note.key, since, note.reason, _all(note.checkpoints))
    return table


def lines(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A table of checkpoints or files with one remark each."""
    table = _table(title, "", "")
    table.show_header = False
    for row in rows:
        table.add_row(*row)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _all(checkpoints: Iterable[CheckpointId]) -> str:
    return "\n".join(called(each) for each in checkpoints) or "no checkpoint"
