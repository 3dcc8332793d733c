"""Marks: what was changed of a checkpoint after it was saved. Its manifest never changes.

    <root>/marks/<kind>/<run>/<name>.json

A file of marks is sealed as a manifest is, and replaced as a whole. It belongs to the one manifest
that it names by its time: marks of a checkpoint that was overwritten say nothing of the new one.
Where marks are damaged, the checkpoint counts as private and never expires, which harms no one.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from everstep.vault import sealed
from everstep.vault.errors import CheckpointDamaged, FormatTooNew
from everstep.vault.keys import marks_key
from everstep.vault.manifest import Manifest
from everstep.vault.quarantine import Quarantine
from everstep.vault.storage import Storage

FORMAT_VERSION = 1


class Marks(BaseModel):
    """What is true of a checkpoint now, in place of what its manifest says.

    Attributes:
        format_version: of this layout.
        kind: of the checkpoint, as its manifest has it.
        run_id: likewise.
        name: likewise.
        saved_at: ``created_at`` of the manifest that they belong to.
        expires_at: when it may be collected; None: never.
        public: whether others may read it.
        user_metadata: the user's; None: what it was saved with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: int = FORMAT_VERSION
    kind: str
    run_id: str
    name: str
    saved_at: datetime
    expires_at: datetime | None
    public: bool
    user_metadata: dict[str, str] | None = None

    def encode(self) -> bytes:
        """The marks as they are written."""
        return sealed.encode(self.model_dump(mode="json"))

    @classmethod
    def decode(cls, data: bytes, where: str) -> Marks:
        """Read marks.

        Raises:
            CheckpointDamaged: they are not what was written.
            FormatTooNew: a newer release wrote them.
        """
        content = sealed.decode(data, where)
        if content.get("format_version") != FORMAT_VERSION:
            raise FormatTooNew(
                f"{where}: format {content.get('format_version')}. Upgrade everstep."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise CheckpointDamaged(f"{where} is not valid: {error}") from error


def write(
    storage: Storage,
    manifest: Manifest,
    expires_at: datetime | None,
    public: bool,
    user_metadata: dict[str, str] | None,
) -> None:
    """Mark a checkpoint durably, in place of the marks that it had."""
    key = marks_key(*manifest.id)
    marks = Marks(
        kind=manifest.kind,
        run_id=manifest.run_id,
        name=manifest.name,
        saved_at=manifest.created_at,
        expires_at=expires_at,
        public=public,
        user_metadata=user_metadata,
    )
    storage.write([marks.encode()], lambda: key, replace=True)


def read(storage: Storage, key: str) -> Marks | None:
    """The marks that lie under a key, if any; raises as `Marks.decode`."""
    try:
        data = bytes(storage.read(key))
    except FileNotFoundError:
        return None
    try:
        marks = Marks.decode(data, key)
    except FormatTooNew:
        raise
    except CheckpointDamaged as error:
        raise CheckpointDamaged(str(error), key) from error
    if marks_key(marks.kind, marks.run_id, marks.name) != key:
        raise CheckpointDamaged(f"{key}: the marks there are those of another checkpoint", key)
    return marks


def applied(storage: Storage, quarantine: Quarantine, manifest: Manifest) -> Manifest:
    """A manifest with what its marks say in place of what it was saved with."""
    key = marks_key(*manifest.id)
    try:
        marks = read(storage, key)
        lost = marks is None and quarantine.of(key) is not None
    except CheckpointDamaged:
        marks, lost = None, True
    if lost:
        return manifest.model_copy(update={"expires_at": None, "public": False})
    if marks is None or marks.saved_at != manifest.created_at:
        return manifest
    metadata = manifest.user_metadata if marks.user_metadata is None else marks.user_metadata
    return manifest.model_copy(
        update={
            "expires_at": marks.expires_at,
            "public": marks.public,
            "user_metadata": metadata,
        }
    )
