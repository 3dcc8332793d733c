"""Quarantine: damaged files, moved out of the way, with a note that says what and why.

    <root>/quarantine/notes/<key>.json     what was found, when, and whom it touches
    <root>/quarantine/content/<key>        the damaged bytes, as they were found

A file is quarantined while it has a note and does not lie under its key: whoever puts the same
bytes again heals it, and the note is then history.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from everstep.vault.errors import CheckpointQuarantined, StoreFailed
from everstep.vault.keys import CheckpointId, checkpoint_of, digest_of
from everstep.vault.storage import Storage

_NOTES = "quarantine/notes/"
_CONTENT = "quarantine/content/"
_DIGEST = re.compile(rb"\b[0-9a-f]{64}\b")


class Note(BaseModel):
    """What is known of a quarantined file.

    Attributes:
        key: where it lay in the vault.
        found_at: when the damage was found.
        reason: what is wrong with it.
        checkpoints: whose manifests name it, or whose manifest it is: kind, run and name.
        runs: the runs of those.
        files: hashes of the files that a damaged manifest seems to name; they are kept.
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

    def put_away(self, key: str, reason: str, checkpoints: Iterable[CheckpointId]) -> Note:
        """Move a file here, durably; one that is missing only gets its note.

        Args:
            key: the file.
            reason: what is wrong with it.
            checkpoints: whom that touches.
        """
        touched = sorted(set(checkpoints))
        note = Note(
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

    def of(self, key: str) -> Note | None:
        """The note of a file that is quarantined now."""
        try:
            data = bytes(self._storage.read(f"{_NOTES}{key}.json"))
        except FileNotFoundError:
            return None
        return _read(key, data) if self._storage.size(key) is None else None

    def standing(self) -> Iterator[Note]:
        """The notes of all files that are quarantined now."""
        for note_key in self._storage.keys(_NOTES):
            note = self.of(note_key.removeprefix(_NOTES).removesuffix(".json"))
            if note is not None:
                yield note

    def forget(self, key: str) -> bool:
        """Remove a file and its note from here; returns whether it was quarantined."""
        stood = self.of(key) is not None
        self._storage.delete(_CONTENT + key)
        self._storage.delete(f"{_NOTES}{key}.json")
        return stood

    def prune(self, reachable: set[str], grace_seconds: float) -> None:
        """Forget files that no checkpoint names any more, and such as were healed.

        Args:
            reachable: hashes of the files that checkpoints name.
            grace_seconds: how old a note has to be.
        """
        for note_key in list(self._storage.keys(_NOTES)):
            key = note_key.removeprefix(_NOTES).removesuffix(".json")
            healed = self._storage.size(key) is not None
            wanted = checkpoint_of(key) is not None or digest_of(key) in reachable
            old = time.time() - self._storage.modified(note_key) >= grace_seconds
            if old and (healed or not wanted):
                self.forget(key)

    def _named_in(self, key: str) -> list[str]:
        """What looks like a hash in a damaged manifest."""
        if not key.endswith(".json") or not self._storage.size(key):
            return []
        try:
            content = b"".join(bytes(chunk) for chunk in self._storage.chunks(key))
        except StoreFailed:
            raise
        except OSError:
            return []
        return sorted({found.decode() for found in _DIGEST.findall(content)})


def refusal(label: str, file: str, note: Note) -> CheckpointQuarantined:
    """What is raised for a checkpoint that needs a quarantined file.

    Args:
        label: what the checkpoint is called.
        file: which of its files.
        note: of that file.
    """
    return CheckpointQuarantined(
        f"{label} is quarantined: {file} ({note.key}) was found damaged at "
        f"{note.found_at:%Y-%m-%d %H:%M:%S} UTC: {note.reason}. Load another checkpoint; saving "
        "the same bytes again heals it.",
        note.key,
    )


def _read(key: str, data: bytes) -> Note:
    """A note; one that is damaged itself still says that the file is quarantined."""
    try:
        return Note.model_validate_json(data)
    except ValidationError:
        return Note(
            key=key,
            found_at=datetime.fromtimestamp(0, UTC),
            reason="its note can't be read",
            checkpoints=[],
            runs=[],
            files=[],
        )
