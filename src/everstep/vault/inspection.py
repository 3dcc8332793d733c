"""Looking at files: what is wrong with one, whom that touches, and moving it out of the way."""

from __future__ import annotations

from blake3 import blake3

from everstep.vault.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointQuarantined,
    FormatTooNew,
)
from everstep.vault.keys import MANIFESTS, CheckpointId, checkpoint_of, digest_of
from everstep.vault.quarantine import Note
from everstep.vault.storage import Storage
from everstep.vault.vault import Vault


def damage(vault: Vault, key: str) -> str | None:
    """What is wrong with a blob or a manifest, read once more; None when nothing is."""
    checkpoint = checkpoint_of(key)
    return blob_damage(vault.storage, key) if checkpoint is None else _unreadable(vault, checkpoint)


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
        return vault.quarantine.put_away(key, reason, touched(vault, key))


def touched(vault: Vault, key: str) -> set[CheckpointId]:
    """The checkpoints that need a file; manifests that can't be read are passed over."""
    own = checkpoint_of(key)
    if own is not None:
        return {own}
    found = set()
    for each in vault.storage.keys(MANIFESTS):
        checkpoint = checkpoint_of(each)
        if checkpoint is None:
            continue
        try:
            manifest = vault.recorded(*checkpoint)
        except (CheckpointNotFound, CheckpointDamaged):
            continue
        if any(ref.blake3 == digest_of(key) for ref in manifest.files.values()):
            found.add(checkpoint)
    return found


def blob_damage(storage: Storage, key: str) -> str | None:
    """What is wrong with a file that lies under its hash; None: nothing."""
    hasher = blake3()
    size = 0
    try:
        for chunk in storage.chunks(key):
            hasher.update(chunk)
            size += len(chunk)
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it can't be read: {error}"
    found = hasher.hexdigest()
    if found == digest_of(key):
        return None
    return f"its {size} bytes hash to {found[:16]}…, not to its name"


def _unreadable(vault: Vault, checkpoint: CheckpointId) -> str | None:
    try:
        vault.recorded(*checkpoint)
    except (CheckpointNotFound, CheckpointQuarantined, FormatTooNew):
        return None
    except CheckpointDamaged as error:
        return str(error)
    return None
