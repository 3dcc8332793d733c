"""Verification: reads every manifest and every file that one names, and checks the hashes.

It changes nothing, so it can run beside a service. Files that are saved, overwritten, deleted or
collected during the run are not damage: each finding is checked again before it is reported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from everstep.vault import integrity
from everstep.vault.errors import CheckpointDamaged, CheckpointNotFound, CheckpointQuarantined
from everstep.vault.quarantine import QuarantineRecord
from everstep.vault.storage.keys import (
    BLOBS,
    MANIFESTS,
    METADATA,
    CheckpointId,
    blob_key,
    checkpoint_of,
    digest_of,
)
from everstep.vault.vault import Vault

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the total."""


@dataclass(frozen=True)
class Damage:
    """A damaged file.

    Attributes:
        key: its storage key.
        reason: the damage.
        checkpoints: the affected checkpoints.
    """

    key: str
    reason: str
    checkpoints: tuple[CheckpointId, ...]

    @property
    def runs(self) -> tuple[str, ...]:
        """The affected runs."""
        return tuple(sorted({each.run_id for each in self.checkpoints}))


@dataclass
class Report:
    """The result of a verification.

    Attributes:
        checkpoints: number of manifests read.
        files: number of files read through.
        size: bytes of those.
        damaged: the damage found.
        quarantined: damage that was found before, and moved away.
    """

    checkpoints: int = 0
    files: int = 0
    size: int = 0
    damaged: list[Damage] = field(default_factory=list)
    quarantined: list[QuarantineRecord] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no damage was found."""
        return not self.damaged


@dataclass
class VaultContents:
    """The contents of a vault according to its manifests.

    Attributes:
        checkpoints: number of manifests that can be read.
        unreadable: keys of the others, and of damaged metadata, with the reason.
        owners: the checkpoints that name a file, by its hash.
        sizes: the size of a file according to the manifests, by its hash.
    """

    checkpoints: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    owners: dict[str, list[CheckpointId]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[str, int] = field(default_factory=dict)


def scan(vault: Vault) -> VaultContents:
    """Read all manifests."""
    found = VaultContents()
    for key in vault.storage.keys(MANIFESTS):
        checkpoint = checkpoint_of(key)
        if checkpoint is None:
            found.unreadable[key] = "no manifest is called that"
            continue
        try:
            manifest = vault.read_manifest(*checkpoint)
        except (CheckpointNotFound, CheckpointQuarantined):
            continue  # gone since it was listed
        except CheckpointDamaged as error:
            found.unreadable[key] = str(error)
            continue
        found.checkpoints += 1
        for ref in set(manifest.files.values()):
            found.owners[ref.blake3].append(checkpoint)
            found.sizes[ref.blake3] = ref.size
    for key in vault.storage.keys(METADATA):
        reason = integrity.metadata_damage(vault, key)
        if reason is not None:
            found.unreadable[key] = reason
    return found


def verify(vault: Vault, *, everything: bool = False, progress: Progress | None = None) -> Report:
    """Verify a vault.

    Args:
        vault: the vault.
        everything: also read files that no manifest names.
        progress: called after each chunk.
    """
    found = scan(vault)
    report = Report(checkpoints=found.checkpoints, quarantined=list(vault.quarantine.records()))
    report.damaged += _unreadable(vault, found)
    away = {note.key for note in report.quarantined}
    files = {key: size for key, size in _files(vault, found, everything) if key not in away}
    total = sum(files.values())

    def advance(count: int) -> None:
        report.size += count
        if progress is not None:
            progress(report.size, total)

    for key in files:
        report.files += 1
        if integrity.blob_damage(vault.storage, key, on_read=advance) is not None:
            report.damaged += _confirmed(vault, key, found)
    return report


def _unreadable(vault: Vault, found: VaultContents) -> Iterator[Damage]:
    for key, reason in sorted(found.unreadable.items()):
        checkpoint = checkpoint_of(key)
        if vault.storage.size(key) is not None:
            yield Damage(key, reason, (checkpoint,) if checkpoint else ())


def _files(vault: Vault, found: VaultContents, everything: bool) -> Iterator[tuple[str, int]]:
    """Yield keys and sizes of the files to read."""
    for digest in sorted(found.owners):
        yield blob_key(digest), found.sizes[digest]
    if everything:
        for key in vault.storage.keys(BLOBS):
            if digest_of(key) not in found.owners:
                yield key, vault.storage.size(key) or 0


def _confirmed(vault: Vault, key: str, found: VaultContents) -> Iterator[Damage]:
    """Yield the damage, unless the file was healed or is no longer needed."""
    still = tuple(each for each in found.owners.get(digest_of(key), ()) if _names(vault, each, key))
    if still or vault.storage.size(key) is not None:
        again = integrity.blob_damage(vault.storage, key)
        if again is not None:
            yield Damage(key, again, still)


def _names(vault: Vault, checkpoint: CheckpointId, key: str) -> bool:
    try:
        manifest = vault.read_manifest(*checkpoint)
    except (CheckpointNotFound, CheckpointDamaged):
        return False
    return any(ref.blake3 == digest_of(key) for ref in manifest.files.values())
