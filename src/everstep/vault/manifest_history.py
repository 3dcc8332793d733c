"""Manifest history: the versions of manifests that several scans of a changing vault found."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from everstep.vault.errors import CheckpointDamaged, VaultError
from everstep.vault.manifest import Manifest
from everstep.vault.storage.keys import CheckpointId, checkpoint_of


class ManifestHistory:
    """The manifests that scans found, by checkpoint.

    Attributes:
        damaged: checkpoints whose manifests can't be read, and why.
    """

    def __init__(self) -> None:
        self._seen: dict[CheckpointId, list[tuple[int, Manifest]]] = {}
        self.damaged: dict[CheckpointId, str] = {}
        self._scans = 0

    def scan(self, keys: Iterator[str], read: Callable[[CheckpointId], Manifest]) -> None:
        """Record the manifests that exist now.

        Args:
            keys: keys of manifests.
            read: reads a manifest.
        """
        self._scans += 1
        for key in keys:
            checkpoint = checkpoint_of(key)
            if checkpoint is None:
                continue
            try:
                manifest = read(checkpoint)
            except CheckpointDamaged as error:
                self.damaged[checkpoint] = str(error)
                continue
            except VaultError:
                continue  # deleted since it was listed
            seen = self._seen.setdefault(checkpoint, [])
            if manifest not in [each for _, each in seen]:
                seen.append((self._scans, manifest))

    def __iter__(self) -> Iterator[CheckpointId]:
        return iter(list(self._seen))

    def newest(self, checkpoint: CheckpointId, fits: Callable[[Manifest], bool]) -> Manifest | None:
        """Return a checkpoint's newest manifest that is older than the last scan, or fits."""
        for scan, manifest in reversed(self._seen.get(checkpoint, [])):
            if scan < self._scans or fits(manifest):
                return manifest
        return None
