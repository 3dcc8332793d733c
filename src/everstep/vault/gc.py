"""Garbage collection: removes the files that no checkpoint names, while others are saved.

A collection marks the files that manifests name, and sweeps the others. It may run beside writers
in any process, which keep nothing in memory for it:

* A file that is put, or named by a new manifest, while the collection runs is in the journal
  (`everstep.vault.gc_journal`), and stays.
* A file that was put earlier, for a manifest that is not committed yet, belongs to a command that
  is pinned (`everstep.vault.pins`). The collection begins its journal, then reads the pins, and
  marks only when all of these have ended. Their manifests exist by then, or never will. The
  caller waits for them (``pins_ended``).
* A backup pauses collections while it copies (`Vault.gc_paused`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Container, Iterator

from everstep.failpoints import Failpoint
from everstep.vault.errors import CheckpointDamaged, CheckpointNotFound, CheckpointQuarantined
from everstep.vault.gc_journal import JournalReader
from everstep.vault.manifest import FileRef
from everstep.vault.storage.keys import (
    BLOBS,
    KINDS,
    MANIFESTS,
    METADATA,
    CheckpointId,
    blob_key,
    checkpoint_of,
    digest_of,
)
from everstep.vault.vault import Vault

GRACE_SECONDS = 3600.0
_MARKED = Failpoint("vault.collect.marked", "a collection knows what to keep, and removed nothing")


def collect(
    vault: Vault,
    grace_seconds: float = GRACE_SECONDS,
    *,
    pins_ended: Callable[[], bool] = lambda: True,
    stopping: Callable[[], bool] = lambda: False,
) -> list[FileRef]:
    """Remove the files that no checkpoint names.

    Files stay that are younger than the grace period, and those that a quarantined manifest seems
    to name, since it may be repaired.

    Args:
        vault: the vault.
        grace_seconds: the minimum age of a file that is removed.
        pins_ended: called once, after the journal began. Waits until all commands that are pinned
            at that moment have ended. Returns False to give up.
        stopping: called before each file. Returns True to stop.

    Returns:
        The removed files. None are removed during a backup or another collection.
    """
    with vault.locks.collecting() as free:
        if not free:
            return []
        with vault.journal.begin() as journal:
            if not pins_ended():
                return []
            reachable = _reachable(vault)
            _MARKED()
            vault.storage.sync(MANIFESTS)  # a manifest that is gone must not come back
            removed: list[FileRef] = []
            for key in list(vault.storage.keys(BLOBS)):
                if stopping():
                    return removed
                if digest_of(key) not in reachable:
                    removed += _remove(vault, journal, key, grace_seconds)
            vault.quarantine.prune(reachable, grace_seconds)
            _remove_metadata(vault, journal)
            return removed


def unreferenced(
    vault: Vault,
    grace_seconds: float = GRACE_SECONDS,
    *,
    without: Container[CheckpointId] = (),
) -> list[FileRef]:
    """Return the files that `collect` would remove. Changes nothing.

    Args:
        vault: the vault.
        grace_seconds: the minimum age of a file.
        without: checkpoints that would be deleted before.
    """
    reachable = _reachable(vault, without)
    keys = [key for key in vault.storage.keys(BLOBS) if digest_of(key) not in reachable]
    return [ref for key in keys for ref in _old(vault, key, grace_seconds)]


def checkpoints_of(vault: Vault, run_id: str) -> list[CheckpointId]:
    """Return a run's checkpoints and snapshots, without reading their manifests."""
    return [CheckpointId(kind, *each) for kind in KINDS for each in vault.names(kind, run_id)]


def exclusive_to(vault: Vault, checkpoints: Collection[CheckpointId]) -> list[FileRef]:
    """Return the files that these checkpoints name and no others.

    Raises:
        CheckpointDamaged: the manifest of another checkpoint can't be read.
    """
    found: dict[str, FileRef] = {}
    for each in checkpoints:
        with contextlib.suppress(CheckpointNotFound, CheckpointQuarantined, CheckpointDamaged):
            files = vault.read_manifest(*each).files.values()
            found |= {ref.blake3: ref for ref in files}
    needed = _reachable(vault, checkpoints) if found else set()
    alone = [ref for digest, ref in found.items() if digest not in needed]
    return [ref for ref in alone if vault.storage.size(blob_key(ref.blake3)) is not None]


def remove_runs(vault: Vault, run_ids: Collection[str]) -> None:
    """Remove all checkpoints and snapshots of runs, durably. Their files stay until a collection.

    What is left of an interrupted call is removed by the next one.
    """
    for run_id in run_ids:
        for each in checkpoints_of(vault, run_id):
            vault.delete(*each)
        for kind in KINDS:
            for key in list(vault.storage.keys(f"{METADATA}{kind}/{run_id}/")):
                vault.storage.delete(key)
    for record in list(vault.quarantine.records()):
        checkpoint = checkpoint_of(record.key)
        if checkpoint is not None and checkpoint.run_id in run_ids:
            vault.quarantine.discard(record.key)
    vault.storage.sync(MANIFESTS)  # a manifest that is gone must not come back


def _reachable(vault: Vault, without: Container[CheckpointId] = ()) -> set[str]:
    """Return the hashes of all files that are needed."""
    needed = vault.read_manifests(without)
    reachable = {ref.blake3 for each in needed for ref in each.files.values()}
    for record in vault.quarantine.records():
        reachable.update(record.files)
    return reachable


def _old(vault: Vault, key: str, grace_seconds: float) -> Iterator[FileRef]:
    """Yield a file unless it is gone or too young."""
    size = vault.storage.size(key)
    if size is not None and time.time() - vault.storage.modified(key) >= grace_seconds:
        yield FileRef(blake3=digest_of(key), size=size)


def _remove(
    vault: Vault, journal: JournalReader, key: str, grace_seconds: float
) -> Iterator[FileRef]:
    """Remove a file unless its key is in the journal."""
    with journal.deciding(key) as noted:
        if not noted:
            for ref in _old(vault, key, grace_seconds):
                if vault.storage.delete(key):
                    yield ref


def _remove_metadata(vault: Vault, journal: JournalReader) -> None:
    """Remove the metadata of checkpoints that no longer exist."""
    for key in list(vault.storage.keys(METADATA)):
        manifest = MANIFESTS + key.removeprefix(METADATA)
        with journal.deciding(key) as noted:
            gone = vault.storage.size(manifest) is None
            if gone and not noted and vault.quarantine.get(manifest) is None:
                vault.storage.delete(key)
