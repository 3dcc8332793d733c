"""Quarantine: damaged files that were moved away, each with a record of the damage.

    <root>/quarantine/notes/<key>.json     the record
    <root>/quarantine/content/<key>        the damaged bytes, as they were found

A file is quarantined while it has a record and its key does not exist. Putting the same bytes again
heals it. The record is then obsolete.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from everstep.vault.errors import HOW_TO_HEAL, CheckpointQuarantined, StoreFailed
from everstep.vault.storage.base import Storage
from everstep.vault.storage.keys import CheckpointId, checkpoint_of, digest_of

_NOTES = "quarantine/notes/"
_CONTENT = "quarantine/content/"
_DIGEST = re.compile(rb"\b[0-9a-f]{64}\b")


class QuarantineRecord(BaseModel):
    """The record of a quarantined file.

    Attributes:
        key: its storage key in the vault.
        found_at: when the damage was found.
        reason: the damage.
        checkpoints: the checkpoints whose manifests name it, or whose manifest it is.
        runs: the runs of those.
        files: hashes that a damaged manifest seems to contain. Garbage collection keeps the files.
    """

    model_config = ConfigDict(frozen=True)
    key: str
    found_at: datetime
    reason: str
    checkpoints: list[CheckpointId]
    runs: list[str]
    files: list[str]


class Quarantine:
    """The quarantined files of one vault.

    Args:
        storage: the vault's.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def add(self, key: str, reason: str, checkpoints: Iterable[CheckpointId]) -> QuarantineRecord:
        """Move a file here, durably. A missing file only gets a record.

        Args:
            key: the file.
            reason: the damage.
            checkpoints: the affected checkpoints.
        """
        touched = sorted(set(checkpoints))
        note = QuarantineRecord(
            key=key,
            found_at=datetime.now(UTC),
            reason=reason,
            checkpoints=touched,
            runs=sorted({each.run_id for each in touched}),
            files=self._named_in(key),
        )
        content = note.model_dump_json(indent=1).encode()
        self._storage.write([content], lambda: f"{_NOTES}{key}.json", replace=True)
        self._storage.move(key, _CONTENT + key)
        return note

    def get(self, key: str) -> QuarantineRecord | None:
        """Return the record of a file, or None if it isn't quarantined now."""
        try:
            data = bytes(self._storage.read(f"{_NOTES}{key}.json"))
        except FileNotFoundError:
            return None
        return _read(key, data) if self._storage.size(key) is None else None

    def records(self) -> Iterator[QuarantineRecord]:
        """Yield the records of all files that are quarantined now."""
        for note_key in self._storage.keys(_NOTES):
            note = self.get(note_key.removeprefix(_NOTES).removesuffix(".json"))
            if note is not None:
                yield note

    def discard(self, key: str) -> bool:
        """Remove a file and its record. Return whether it was quarantined."""
        stood = self.get(key) is not None
        self._storage.delete(_CONTENT + key)
        self._storage.delete(f"{_NOTES}{key}.json")
        return stood

    def prune(self, reachable: set[str], grace_seconds: float) -> None:
        """Remove healed files, and files that no checkpoint names any more.

        Args:
            reachable: hashes of the files that checkpoints name.
            grace_seconds: the minimum age of a record.
        """
        for note_key in list(self._storage.keys(_NOTES)):
            key = note_key.removeprefix(_NOTES).removesuffix(".json")
            healed = self._storage.size(key) is not None
            wanted = checkpoint_of(key) is not None or digest_of(key) in reachable
            old = time.time() - self._storage.modified(note_key) >= grace_seconds
            if old and (healed or not wanted):
                self.discard(key)

    def _named_in(self, key: str) -> list[str]:
        """Return everything in a damaged manifest that looks like a hash."""
        if not key.endswith(".json") or not self._storage.size(key):
            return []
        try:
            content = b"".join(bytes(chunk) for chunk in self._storage.chunks(key))
        except StoreFailed:
            raise
        except OSError:
            return []
        return sorted({found.decode() for found in _DIGEST.findall(content)})


def refusal(label: str, file: str, note: QuarantineRecord) -> CheckpointQuarantined:
    """Return the error for a checkpoint that needs a quarantined file.

    Args:
        label: the checkpoint's name in the message.
        file: which of its files.
        note: the file's record.
    """
    return CheckpointQuarantined(
        f"{label} is quarantined: {file} ({note.key}) was found damaged at "
        f"{note.found_at:%Y-%m-%d %H:%M:%S} UTC: {note.reason}. {HOW_TO_HEAL}",
        note.key,
    )


def _read(key: str, data: bytes) -> QuarantineRecord:
    """Decode a record. A damaged one still shows that the file is quarantined."""
    try:
        return QuarantineRecord.model_validate_json(data)
    except ValidationError:
        return QuarantineRecord(
            key=key,
            found_at=datetime.fromtimestamp(0, UTC),
            reason="its record can't be read",
            checkpoints=[],
            runs=[],
            files=[],
        )
