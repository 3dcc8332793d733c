"""Quarantine queries: the damaged files of a vault."""

from __future__ import annotations

from everstep.vault import CheckpointId, QuarantineRecord, Vault
from everstep.wire.messages.maintenance import QuarantineNote, QuarantineResponse


def name_of(checkpoint: CheckpointId) -> str:
    """Return a checkpoint's path, or run, kind and name of a snapshot, which has no path."""
    return checkpoint.path if checkpoint.has_path else str(checkpoint)


def quarantine_response(vault: Vault) -> QuarantineResponse:
    """List the damaged files that were moved away."""
    return QuarantineResponse(notes=[_note(each) for each in vault.quarantine.records()])


def _note(record: QuarantineRecord) -> QuarantineNote:
    return QuarantineNote(
        file=record.key,
        found_at=record.found_at,
        reason=record.reason,
        checkpoints=[name_of(each) for each in record.checkpoints],
        runs=record.runs,
    )
