"""The quarantine of a home's vault."""

from __future__ import annotations

from everstep.cli.common import output
from everstep.cli.common.target import Target
from everstep.cli.vault import tables
from everstep.wire.messages.maintenance import QuarantineResponse


def print_quarantine(target: Target) -> None:
    """Print the damaged files in quarantine. Raises `NotOffered`."""
    with target.reader() as service:
        service.require_everstep("the quarantine")
        notes = service.get("/everstep/vault/quarantine", QuarantineResponse).notes
    for note in notes:
        note.checkpoints = [_display_name(each) for each in note.checkpoints]
    if target.as_json:
        output.print_json([tables.note_json(note) for note in notes])
    elif notes:
        tables.print_quarantined(notes)
    else:
        output.console().print("The quarantine is empty.")


def _display_name(name: str) -> str:
    """Describe a snapshot, which the service names ``<run>/snapshot/<name>``."""
    run, infix, snapshot = name.partition("/snapshot/")
    return f"snapshot {snapshot} of run {run}" if infix else name
