"""Sightings: the manifests of a vault that goes on changing, as they were seen, look after look."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from everstep.vault.errors import CheckpointDamaged, VaultError
from everstep.vault.keys import CheckpointId, checkpoint_of
from everstep.vault.manifest import Manifest


class Sightings:
    """Manifests as they were seen in a vault that goes on changing."""

    def __init__(self) -> None:
        self._seen: dict[CheckpointId, list[tuple[int, Manifest]]] = {}
        self.damaged: dict[CheckpointId, str] = {}
        self._looks = 0

    def look(self, keys: Iterator[str], read: Callable[[CheckpointId], Manifest]) -> None:
        """Note what is there now.

        Args:
            keys: of manifests.
            read: reads one.
        """
        self._looks += 1
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
                seen.append((self._looks, manifest))

    def __iter__(self) -> Iterator[CheckpointId]:
        return iter(list(self._seen))

    def newest(self, checkpoint: CheckpointId, fits: Callable[[Manifest], bool]) -> Manifest | None:
        """The newest manifest of a checkpoint that was there before the last look, or fits."""
        for look, manifest in reversed(self._seen.get(checkpoint, [])):
            if look < self._looks or fits(manifest):
                return manifest
        return None
