"""Mutable metadata: expiry, publication and tags that changed after a checkpoint was saved.

    <root>/marks/<kind>/<run>/<name>.json

The file is self-hashed JSON and is replaced as a whole. ``saved_at`` binds it to one manifest: the
metadata of a checkpoint that was overwritten does not apply to the new one. A checkpoint whose
metadata is damaged counts as private and never expires, which is the safe side.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from everstep.vault import self_hashed_json
from everstep.vault.errors import CheckpointDamaged, FormatTooNew
from everstep.vault.manifest import Manifest
from everstep.vault.quarantine import Quarantine
from everstep.vault.storage.base import Storage
from everstep.vault.storage.keys import metadata_key

FORMAT_VERSION = 1


class MutableMetadata(BaseModel):
    """The current values of a checkpoint, which override those of its manifest.

    Attributes:
        format_version: version of this layout.
        kind: the checkpoint's kind.
        run_id: the checkpoint's run.
        name: the checkpoint's name.
        saved_at: ``created_at`` of the manifest that the values belong to.
        expires_at: when it expires, None for never.
        public: whether others may read it.
        user_metadata: the user's tags, None for those of the manifest.
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
        """Encode the metadata with its hash."""
        return self_hashed_json.encode(self.model_dump(mode="json"))

    @classmethod
    def decode(cls, data: bytes, where: str) -> MutableMetadata:
        """Decode metadata and verify its hash.

        Raises:
            CheckpointDamaged: the bytes are not those that were written.
            FormatTooNew: a newer release wrote them.
        """
        content = self_hashed_json.decode(data, where)
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
    """Replace a checkpoint's metadata durably."""
    key = metadata_key(*manifest.id)
    metadata = MutableMetadata(
        kind=manifest.kind,
        run_id=manifest.run_id,
        name=manifest.name,
        saved_at=manifest.created_at,
        expires_at=expires_at,
        public=public,
        user_metadata=user_metadata,
    )
    storage.write([metadata.encode()], lambda: key, replace=True)


def read(storage: Storage, key: str) -> MutableMetadata | None:
    """Read the metadata of a key, if any. Raises as `MutableMetadata.decode`."""
    try:
        data = bytes(storage.read(key))
    except FileNotFoundError:
        return None
    try:
        metadata = MutableMetadata.decode(data, key)
    except FormatTooNew:
        raise
    except CheckpointDamaged as error:
        raise CheckpointDamaged(str(error), key) from error
    if metadata_key(metadata.kind, metadata.run_id, metadata.name) != key:
        raise CheckpointDamaged(f"{key}: the metadata there is that of another checkpoint", key)
    return metadata


def applied(storage: Storage, quarantine: Quarantine, manifest: Manifest) -> Manifest:
    """Return a manifest with the metadata in place of the values at its save."""
    key = metadata_key(*manifest.id)
    try:
        metadata = read(storage, key)
        lost = metadata is None and quarantine.get(key) is not None
    except CheckpointDamaged:
        metadata, lost = None, True
    if lost:
        return manifest.model_copy(update={"expires_at": None, "public": False})
    if metadata is None or metadata.saved_at != manifest.created_at:
        return manifest
    tags = manifest.user_metadata if metadata.user_metadata is None else metadata.user_metadata
    return manifest.model_copy(
        update={
            "expires_at": metadata.expires_at,
            "public": metadata.public,
            "user_metadata": tags,
        }
    )
