"""Collection: mark what checkpoints name, sweep the rest, while others save."""

from __future__ import annotations

import threading
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from everstep.failpoints import Failpoint
from everstep.vault.keys import BLOBS, MANIFESTS, MARKS, CheckpointId, digest_of
from everstep.vault.locks import Locks
from everstep.vault.manifest import FileRef

if TYPE_CHECKING:
    from everstep.vault.vault import Vault

_MARKED = Failpoint("vault.collect.marked", "a collection knows what to keep, and removed nothing")


class Collection:
    """What may be collected from a vault, and doing it.

    Args:
        vault: the vault.
        locks: keep other processes' backups and collections apart.
    """

    def __init__(self, vault: Vault, locks: Locks) -> None:
        self._vault = vault
        self._locks = locks
        self._lock = threading.Lock()
        self._pinned = 0
        self._collecting = threading.Lock()
        self._fresh: set[str] = set()  # what was put or committed while a collection goes on

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Have no file collected meanwhile."""
        with self._lock:
            self._pinned += 1
        try:
            yield
        finally:
            with self._lock:
                self._pinned -= 1

    def keep(self, *digests: str) -> None:
        """Note files that a collection which goes on must not take."""
        with self._lock:
            if self._collecting.locked():
                self._fresh.update(digests)

    @property
    def held(self) -> bool:
        """Whether another process keeps everything from being collected."""
        with self._locks.collecting() as free:
            return not free

    def collect(
        self, grace_seconds: float, *, dry_run: bool, without: Container[CheckpointId]
    ) -> list[FileRef]:
        """Remove files that no checkpoint names; see `Vault.collect`."""
        with self._collecting, self._locks.collecting() as free:
            with self._lock:
                if (self._pinned or not free) and not dry_run:
                    return []
                self._fresh.clear()
            reachable = self._mark(without if dry_run else ())
            _MARKED()
            storage = self._vault.storage
            if not dry_run:
                storage.sync(MANIFESTS)  # a manifest that is gone must not come back
            removed = []
            for key in list(storage.keys(BLOBS)):
                if digest_of(key) not in reachable:
                    removed += self._remove(key, grace_seconds, dry_run)
            if not dry_run:
                self._vault.quarantine.prune(reachable, grace_seconds)
                self._forget_marks()
            return removed

    def _forget_marks(self) -> None:
        """Remove the marks of checkpoints that are gone."""
        storage = self._vault.storage
        for key in list(storage.keys(MARKS)):
            manifest = MANIFESTS + key.removeprefix(MARKS)
            if storage.size(manifest) is None and self._vault.quarantine.of(manifest) is None:
                storage.delete(key)

    def _mark(self, without: Container[CheckpointId]) -> set[str]:
        """Hashes of all files that are needed."""
        needed = (each for each in self._vault.all_recorded() if each.id not in without)
        reachable = {ref.blake3 for each in needed for ref in each.files.values()}
        for note in self._vault.quarantine.standing():
            reachable.update(note.files)
        return reachable

    def _remove(self, key: str, grace_seconds: float, dry_run: bool) -> list[FileRef]:
        """Remove a file, unless it was put or committed since the collection began."""
        storage = self._vault.storage
        digest = digest_of(key)
        with self._lock:  # so that neither can happen between the look and the removal
            size = storage.size(key)
            if self._pinned or digest in self._fresh or size is None:
                return []
            if time.time() - storage.modified(key) < grace_seconds:
                return []
            gone = dry_run or storage.delete(key)
            return [FileRef(blake3=digest, size=size)] if gone else []
