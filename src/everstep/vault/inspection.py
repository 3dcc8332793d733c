"""Looking at files: what is wrong with one, whom that touches, and moving it out of the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blake3 import blake3

from everstep.vault import marks
from everstep.vault.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointQuarantined,
    FormatTooNew,
    StoreFailed,
    VaultError,
)
from everstep.vault.keys import MANIFESTS, MARKS, CheckpointId, blob_key, checkpoint_of, digest_of
from everstep.vault.manifest import Manifest
from everstep.vault.quarantine import Note
from everstep.vault.storage import Storage
from everstep.vault.vault import Vault


def damage(vault: Vault, key: str) -> str | None:
    """What is wrong with a blob or a manifest, read once more; None when nothing is."""
    if key.startswith(MARKS):
        return marks_damage(vault, key)
    checkpoint = checkpoint_of(key)
    return blob_damage(vault.storage, key) if checkpoint is None else _unreadable(vault, checkpoint)


def marks_damage(vault: Vault, key: str) -> str | None:
    """What is wrong with a file of marks; None when nothing is."""
    try:
        marks.read(vault.storage, key)
    except FormatTooNew:
        return None
    except CheckpointDamaged as error:
        return str(error)
    return None


def put_away(vault: Vault, key: str) -> Note | None:
    """Look at a file again, and move it to quarantine if it is damaged.

    Args:
        vault: the vault.
        key: a blob's or a manifest's, as `CheckpointDamaged` names it.

    Returns:
        The note of it; None when the file is sound, or when something is being written: that may
        be this very file, and damage that stays is found again.
    """
    with vault.alone() as alone:
        reason = damage(vault, key) if alone else None
        if reason is None:
            return None
        owners = touched(vault, key)
        if not owners and vault.storage.size(key) is None:
            return None  # nobody misses it
        return vault.quarantine.put_away(key, reason, owners)


@contextmanager
def quarantining(vault: Vault) -> Iterator[None]:
    """Move a file to quarantine over which something inside fails; the error goes on its way."""
    try:
        yield
    except CheckpointQuarantined:
        raise
    except CheckpointDamaged as error:
        if error.key is not None:
            try:
                put_away(vault, error.key)
            except (OSError, VaultError) as failure:
                error.add_note(f"It could not be moved to quarantine: {failure}")
        raise


def touched(vault: Vault, key: str) -> set[CheckpointId]:
    """The checkpoints that need a file; manifests that can't be read are passed over."""
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
    """Keys of the files that checkpoints name, and that are neither there nor quarantined."""
    keys = {blob_key(ref.blake3) for each in _readable(vault) for ref in each.files.values()}
    absent = [key for key in sorted(keys) if vault.storage.size(key) is None]
    return [key for key in absent if vault.quarantine.of(key) is None]


def _readable(vault: Vault) -> Iterator[Manifest]:
    """All manifests that can be read."""
    for key in vault.storage.keys(MANIFESTS):
        checkpoint = checkpoint_of(key)
        if checkpoint is None:
            continue
        try:
            yield vault.recorded(*checkpoint)
        except (CheckpointNotFound, CheckpointDamaged):
            continue


def is_sound(vault: Vault, manifest: Manifest) -> bool:
    """Whether all of a checkpoint's files are what was written; they are read through."""
    keys = {blob_key(ref.blake3) for ref in manifest.files.values()}
    return all(blob_damage(vault.storage, key) is None for key in keys)


def blob_damage(
    storage: Storage, key: str, *, on_read: Callable[[int], None] | None = None
) -> str | None:
    """What is wrong with a file that lies under its hash, read through once; None: nothing.

    Args:
        storage: where it lies.
        key: the file.
        on_read: told of every so many bytes that were read.

    Raises:
        StoreFailed: the object store did not answer, which says nothing of the file.
    """
    hasher = blake3(max_threads=blake3.AUTO)
    try:
        for chunk in storage.chunks(key):
            hasher.update(chunk)
            if on_read is not None:
                on_read(len(chunk))
    except OSError as error:
        return unreadable(error)
    return mismatch(key, hasher.hexdigest())


def unreadable(error: OSError) -> str:
    """What is wrong with a file that can't be read; an object store's failure is raised again."""
    if isinstance(error, StoreFailed):
        raise error
    missing = isinstance(error, FileNotFoundError)
    return "it is missing" if missing else f"it can't be read: {error}"


def mismatch(key: str, found: str) -> str | None:
    """What is wrong with a file, by its hash; None: nothing."""
    return None if found == digest_of(key) else f"its bytes hash to {found[:16]}…, not to its name"


def _unreadable(vault: Vault, checkpoint: CheckpointId) -> str | None:
    try:
        vault.recorded(*checkpoint)
    except (CheckpointNotFound, CheckpointQuarantined, FormatTooNew):
        return None
    except CheckpointDamaged as error:
        return str(error)
    return None
