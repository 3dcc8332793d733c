"""Integrity: finds damage in files and the checkpoints it affects, and quarantines files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blake3 import blake3

from everstep.vault import mutable_metadata
from everstep.vault.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointQuarantined,
    FormatTooNew,
    StoreFailed,
    VaultError,
)
from everstep.vault.manifest import Manifest
from everstep.vault.quarantine import QuarantineRecord
from everstep.vault.storage.base import Storage
from everstep.vault.storage.keys import (
    MANIFESTS,
    METADATA,
    CheckpointId,
    blob_key,
    checkpoint_of,
    digest_of,
)
from everstep.vault.vault import Vault


def damage(vault: Vault, key: str) -> str | None:
    """Read a blob, manifest or metadata file again. Return its damage, or None."""
    if key.startswith(METADATA):
        return metadata_damage(vault, key)
    checkpoint = checkpoint_of(key)
    return blob_damage(vault.storage, key) if checkpoint is None else _unreadable(vault, checkpoint)


def metadata_damage(vault: Vault, key: str) -> str | None:
    """Return the damage of a metadata file, or None."""
    try:
        mutable_metadata.read(vault.storage, key)
    except FormatTooNew:
        return None
    except CheckpointDamaged as error:
        return str(error)
    return None


def quarantine_damaged(vault: Vault, key: str) -> QuarantineRecord | None:
    """Read a file again, and move it to quarantine if it is damaged.

    Args:
        vault: the vault.
        key: the file, as `CheckpointDamaged` names it.

    Returns:
        The record. None if the file is sound, or if another process writes: that may be this very
        file, and damage that remains is found again.
    """
    with vault.exclusive() as exclusive:
        reason = damage(vault, key) if exclusive else None
        if reason is None:
            return None
        owners = touched(vault, key)
        if not owners and vault.storage.size(key) is None:
            return None  # nobody misses it
        return vault.quarantine.add(key, reason, owners)


@contextmanager
def quarantining(vault: Vault) -> Iterator[None]:
    """Move the file to quarantine that a `CheckpointDamaged` from inside names; then re-raise."""
    try:
        yield
    except CheckpointQuarantined:
        raise
    except CheckpointDamaged as error:
        if error.key is not None:
            try:
                quarantine_damaged(vault, error.key)
            except (OSError, VaultError) as failure:
                error.add_note(f"It could not be moved to quarantine: {failure}")
        raise


def touched(vault: Vault, key: str) -> set[CheckpointId]:
    """Return the checkpoints that need a file. Skips manifests that can't be read."""
    own = checkpoint_of(key)
    if own is not None:
        return {own}
    digest = digest_of(key)
    return {
        manifest.id
        for manifest in _readable(vault)
        if any(ref.blake3 == digest for ref in manifest.files.values())
    }


def missing(vault: Vault) -> list[str]:
    """Return the keys of files that checkpoints name and that neither exist nor are quarantined."""
    keys = {blob_key(ref.blake3) for each in _readable(vault) for ref in each.files.values()}
    absent = [key for key in sorted(keys) if vault.storage.size(key) is None]
    return [key for key in absent if vault.quarantine.get(key) is None]


def _readable(vault: Vault) -> Iterator[Manifest]:
    """Yield all manifests that can be read."""
    for key in vault.storage.keys(MANIFESTS):
        checkpoint = checkpoint_of(key)
        if checkpoint is None:
            continue
        try:
            yield vault.read_manifest(*checkpoint)
        except (CheckpointNotFound, CheckpointDamaged):
            continue


def is_sound(
    vault: Vault,
    manifest: Manifest,
    *,
    on_read: Callable[[int], None] | None = None,
    max_threads: int = blake3.AUTO,
) -> bool:
    """Read a checkpoint's files through. Return whether all are as written.

    Args:
        vault: the vault.
        manifest: the checkpoint.
        on_read: as for `blob_damage`.
        max_threads: as for `blob_damage`.
    """
    keys = {blob_key(ref.blake3) for ref in manifest.files.values()}
    return all(
        blob_damage(vault.storage, key, on_read=on_read, max_threads=max_threads) is None
        for key in keys
    )


def blob_damage(
    storage: Storage,
    key: str,
    *,
    on_read: Callable[[int], None] | None = None,
    max_threads: int = blake3.AUTO,
) -> str | None:
    """Read a blob through and hash it. Return its damage, or None.

    Args:
        storage: the storage.
        key: the blob.
        on_read: called with the size of each chunk that was read. May raise, to stop.
        max_threads: how many threads hash.

    Raises:
        StoreFailed: the object store did not answer. The file may be sound.
    """
    hasher = blake3(max_threads=max_threads)
    try:
        for chunk in storage.chunks(key):
            hasher.update(chunk)
            if on_read is not None:
                on_read(len(chunk))
    except OSError as error:
        return unreadable(error)
    return mismatch(key, hasher.hexdigest())


def unreadable(error: OSError) -> str:
    """Describe a file that can't be read. Raises the failure of an object store again."""
    if isinstance(error, StoreFailed):
        raise error
    missing = isinstance(error, FileNotFoundError)
    return "it is missing" if missing else f"it can't be read: {error}"


def mismatch(key: str, found: str) -> str | None:
    """Return the damage of a blob whose hash was found, or None."""
    return None if found == digest_of(key) else f"its bytes hash to {found[:16]}…, not to its name"


def _unreadable(vault: Vault, checkpoint: CheckpointId) -> str | None:
    try:
        vault.read_manifest(*checkpoint)
    except (CheckpointNotFound, CheckpointQuarantined, FormatTooNew):
        return None
    except CheckpointDamaged as error:
        return str(error)
    return None
