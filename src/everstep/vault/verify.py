"""Verification: every manifest, and every file that one names, read through once and hashed.

Nothing is changed, so that it can go on beside a running service. What is saved, overwritten,
deleted or collected meanwhile is no damage: whatever looks wrong is looked at again at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from everstep.vault import inspection
from everstep.vault.errors import CheckpointDamaged, CheckpointNotFound, CheckpointQuarantined
from everstep.vault.keys import (
    BLOBS,
    MANIFESTS,
    MARKS,
    CheckpointId,
    blob_key,
    checkpoint_of,
    digest_of,
)
from everstep.vault.quarantine import Note
from everstep.vault.vault import Vault

Progress = Callable[[int, int], None]
"""Called with the bytes that were read and those that will be."""


@dataclass(frozen=True)
class Damage:
    """A damaged file.

    Attributes:
        key: where it lies in the vault.
        reason: what is wrong with it.
        checkpoints: those that it touches.
    """

    key: str
    reason: str
    checkpoints: tuple[CheckpointId, ...]

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs that it touches."""
        return tuple(sorted({each.run_id for each in self.checkpoints}))


@dataclass
class Report:
    """What a verification found.

    Attributes:
        checkpoints: manifests that were read.
        files: files that were read through.
        size: bytes of those.
        damaged: what is wrong.
        quarantined: what was found before, and is out of the way.
    """

    checkpoints: int = 0
    files: int = 0
    size: int = 0
    damaged: list[Damage] = field(default_factory=list)
    quarantined: list[Note] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged


@dataclass
class Survey:
    """What lies in a vault, by its manifests.

    Attributes:
        checkpoints: manifests that can be read.
        unreadable: keys of the others, with what is wrong.
        owners: by the hash of a file, the checkpoints that name it.
        sizes: by the hash of a file, its bytes as the manifests have it.
    """

    checkpoints: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    owners: dict[str, list[CheckpointId]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[str, int] = field(default_factory=dict)


def survey(vault: Vault) -> Survey:
    """Read all manifests."""
    found = Survey()
    for key in vault.storage.keys(MANIFESTS):
        checkpoint = checkpoint_of(key)
        if checkpoint is None:
            found.unreadable[key] = "no manifest is called that"
            continue
        try:
            manifest = vault.recorded(*checkpoint)
        except (CheckpointNotFound, CheckpointQuarantined):
            continue  # gone since it was listed
        except CheckpointDamaged as error:
            found.unreadable[key] = str(error)
            continue
        found.checkpoints += 1
        for ref in set(manifest.files.values()):
            found.owners[ref.blake3].append(checkpoint)
            found.sizes[ref.blake3] = ref.size
    for key in vault.storage.keys(MARKS):
        reason = inspection.marks_damage(vault, key)
        if reason is not None:
            found.unreadable[key] = reason
    return found


def verify(vault: Vault, *, everything: bool = False, progress: Progress | None = None) -> Report:
    """Verify a vault.

    Args:
        vault: the vault.
        everything: read files that no manifest names as well.
        progress: told how far it is.
    """
    found = survey(vault)
    report = Report(checkpoints=found.checkpoints, quarantined=list(vault.quarantine.standing()))
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
        if inspection.blob_damage(vault.storage, key, on_read=advance) is not None:
            report.damaged += _confirmed(vault, key, found)
    return report


def _unreadable(vault: Vault, found: Survey) -> Iterator[Damage]:
    for key, reason in sorted(found.unreadable.items()):
        checkpoint = checkpoint_of(key)
        if vault.storage.size(key) is not None:
            yield Damage(key, reason, (checkpoint,) if checkpoint else ())


def _files(vault: Vault, found: Survey, everything: bool) -> Iterator[tuple[str, int]]:
    """Keys and sizes of the files to read."""
    for digest in sorted(found.owners):
        yield blob_key(digest), found.sizes[digest]
    if everything:
        for key in vault.storage.keys(BLOBS):
            if digest_of(key) not in found.owners:
                yield key, vault.storage.size(key) or 0


def _confirmed(vault: Vault, key: str, found: Survey) -> Iterator[Damage]:
    """The damage, unless the file was healed or is needed no more."""
    still = tuple(each for each in found.owners.get(digest_of(key), ()) if _names(vault, each, key))
    if still or vault.storage.size(key) is not None:
        again = inspection.blob_damage(vault.storage, key)
        if again is not None:
            yield Damage(key, again, still)


def _names(vault: Vault, checkpoint: CheckpointId, key: str) -> bool:
    try:
        manifest = vault.recorded(*checkpoint)
    except (CheckpointNotFound, CheckpointDamaged):
        return False
    return any(ref.blake3 == digest_of(key) for ref in manifest.files.values())
