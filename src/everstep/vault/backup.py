"""Backups: copies of a home at several moments, which share their files.

    <directory>/blobs/ab/<blake3>                       shared by all backups in it: files of
                                                        checkpoints, segments of the payload log
    <directory>/backups/<id>/ledger.sqlite              the database as of one moment
    <directory>/backups/<id>/manifests/<kind>/<run>/<name>.json
    <directory>/backups/<id>/backup.json                its description
    <directory>/tmp/                                    files while they are written

A backup is whole or absent: it is written under ``tmp`` and appears by one rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field

from everstep.durable_files import sync_directory, write_new
from everstep.vault.errors import CheckpointDamaged, VaultBusy, VaultError
from everstep.vault.integrity import blob_damage
from everstep.vault.manifest import FileRef, Manifest
from everstep.vault.storage.base import Storage
from everstep.vault.storage.keys import (
    BLOBS,
    MANIFESTS,
    blob_key,
    checkpoint_of,
    digest_of,
    manifest_key,
)
from everstep.vault.storage.local import LocalStorage
from everstep.vault.storage.locks import Locks

DATABASE = "ledger.sqlite"
_ID = "%Y%m%dT%H%M%S.%fZ"
_NOTE = "backup.json"
_CHUNK = 8 << 20


class BackupNote(BaseModel):
    """The description of a backup.

    Attributes:
        id: its name, derived from the time at which its ledger was copied.
        made_at: that time.
        checkpoints: number of checkpoints and snapshots.
        files: number of files that those name.
        size: bytes of the files.
        ledger: hash and size of its copy of the ledger.
        segments: hash and size of each segment of the ledger's payload log, by name.
        left_out: checkpoints that could not be copied, with the reason.
    """

    model_config = ConfigDict(frozen=True)
    id: str
    made_at: datetime
    checkpoints: int
    files: int
    size: int
    ledger: FileRef
    left_out: dict[str, str]
    segments: dict[str, FileRef] = Field(default_factory=dict)

    def encode(self) -> bytes:
        """Encode the description with its hash. Earlier releases had no segments."""
        content = self.model_dump_json(exclude=None if self.segments else {"segments"})
        sealed = {"note": content, "blake3": blake3(content.encode()).hexdigest()}
        return json.dumps(sealed, indent=1).encode()

    @classmethod
    def decode(cls, data: bytes, where: str) -> BackupNote:
        """Decode a description, or raise `CheckpointDamaged` if it is not as written."""
        try:
            sealed = json.loads(data)
            note = cls.model_validate_json(sealed["note"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointDamaged(f"{where} can't be read: {error!r}") from error
        if note.encode() != data:
            raise CheckpointDamaged(f"{where}: its bytes don't hash to what it says")
        return note


class BackupDirectory:
    """A directory of backups, for one process at a time.

    Args:
        path: the directory. It is created, or holds earlier backups.

    Raises:
        VaultError: the directory holds something else.
        VaultBusy: another process uses it.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and any(path.iterdir()) and not (path / "backups").is_dir():
            raise VaultError(f"{path} is not empty and holds no backup; choose another directory.")
        self.path = path
        self.storage = LocalStorage(path)
        (path / "backups").mkdir(exist_ok=True)
        sync_directory(path)
        self._open = contextlib.ExitStack()
        if not self._open.enter_context(Locks(path).collecting()):
            self.close()
            raise VaultBusy(f"Another backup or restore is at {path}; wait for it.")

    def close(self) -> None:
        """Release the directory for other processes."""
        self._open.close()

    def ids(self) -> list[str]:
        """List the backups, oldest first."""
        return sorted(path.name for path in (self.path / "backups").iterdir())

    def next_id(self, now: datetime) -> str:
        """Return an id for a new backup. It sorts after all others, even if the clock went back."""
        earlier = self.ids()
        if earlier:
            last = datetime.strptime(earlier[-1], _ID).replace(tzinfo=UTC)
            now = max(now, last + timedelta(microseconds=1))
        return now.strftime(_ID)

    def of(self, backup_id: str) -> Path:
        """Return the directory of a backup."""
        return self.path / "backups" / backup_id

    def note(self, backup_id: str) -> BackupNote:
        """Read a backup's description, or raise `CheckpointDamaged`."""
        path = self.of(backup_id) / _NOTE
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointDamaged(f"{path} can't be read: {error}") from error
        return BackupNote.decode(data, str(path))

    def ledger(self, backup_id: str) -> Iterator[bytes]:
        """Read a backup's copy of the ledger in chunks.

        Args:
            backup_id: the backup.

        Raises:
            CheckpointDamaged: after the last chunk, if the copy is damaged.
        """
        path = self.of(backup_id) / DATABASE
        with path.open("rb") as file:
            found = yield from _hashed(file)
        if found != self.note(backup_id).ledger:
            raise CheckpointDamaged(f"{path} is damaged: its bytes are not those that were written")

    def manifests(self, backup_id: str) -> Iterator[Manifest]:
        """Read a backup's manifests, raising `CheckpointDamaged` on one that is not as written."""
        root = self.of(backup_id)
        for path in sorted((root / MANIFESTS).rglob("*.json")):
            manifest = Manifest.decode(path.read_bytes(), str(path))
            if checkpoint_of(path.relative_to(root).as_posix()) != manifest.id:
                raise CheckpointDamaged(f"{path}: the manifest there is that of {manifest.id}")
            yield manifest

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        """Yield an empty directory for a new backup. It is removed if writing fails."""
        for leftover in (self.path / "tmp").iterdir():  # of a process that died
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        stage = self.path / "tmp" / "stage"
        stage.mkdir()
        try:
            yield stage
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise

    def take(
        self, source: Storage, ref: FileRef, *, link: bool, on_read: Callable[[int], None]
    ) -> str | None:
        """Copy a file here unless it exists, and verify the copy.

        Args:
            source: the storage of the vault.
            ref: the file.
            link: create a hard link instead of a copy where possible.
            on_read: called with the size of each verified chunk.

        Returns:
            The damage of the source, or None.
        """
        key = blob_key(ref.blake3)
        for _ in range(2):  # what an earlier backup has here may be damaged: then once more
            if self.storage.size(key) != ref.size:
                try:
                    self._bring(source, key, link)
                except FileNotFoundError:
                    return "it is missing"
            reason = blob_damage(self.storage, key, on_read=on_read)
            if reason is None:
                return None
            self.storage.delete(key)
        return reason

    def _bring(self, source: Storage, key: str, link: bool) -> None:
        if link and isinstance(source, LocalStorage):
            try:
                self.storage.link(source.path(key), key)
            except FileNotFoundError:
                raise
            except OSError:
                pass  # another file system, or one without links: a copy then
            else:
                return
        self.storage.write(source.chunks(key), lambda: key, replace=True)

    def take_file(self, path: Path) -> FileRef:
        """Copy a file that lies in no vault here, as it is now, unless an earlier backup has it.

        Args:
            path: the file. It may be appended to meanwhile.

        Raises:
            FileNotFoundError: it is gone.
        """
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = _digest_of(file, size)
            key = blob_key(digest)
            if self.storage.size(key) != size or blob_damage(self.storage, key) is not None:
                file.seek(0)
                self.storage.write(_parts(file, size), lambda: key, replace=True)
        return FileRef(blake3=digest, size=size)

    def restore_file(self, ref: FileRef, path: Path) -> None:
        """Write a file that `take_file` has copied.

        Raises:
            CheckpointDamaged: the copy is damaged.
        """
        key = blob_key(ref.blake3)
        if self.storage.size(key) != ref.size or blob_damage(self.storage, key) is not None:
            raise CheckpointDamaged(
                f"{path.name} ({key}) is damaged in the backup; restore another one with --at"
            )
        write_new(path, self.storage.chunks(key), mode=0o600)

    def finish(self, stage: Path, note: BackupNote, manifests: list[Manifest]) -> None:
        """Make a staged backup appear: whole, durable, at once."""
        for manifest in manifests:
            path = stage / manifest_key(*manifest.id)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_new(path, [manifest.encode()])
        write_new(stage / _NOTE, [note.encode()])
        for directory, _, _ in os.walk(stage, topdown=False):
            sync_directory(Path(directory))
        stage.rename(self.of(note.id))
        sync_directory(self.path / "backups")
        sync_directory(self.path / "tmp")

    def check(self, backup_id: str) -> None:
        """Raise `CheckpointDamaged` unless a backup's ledger, manifests and files all exist."""
        for _ in self.ledger(backup_id):
            pass
        for name, ref in self.note(backup_id).segments.items():
            if self.storage.size(blob_key(ref.blake3)) != ref.size:
                raise CheckpointDamaged(f"backup {backup_id}: no whole {name}")
        for manifest in self.manifests(backup_id):
            for name, ref in manifest.files.items():
                if self.storage.size(blob_key(ref.blake3)) != ref.size:
                    raise CheckpointDamaged(f"backup {backup_id}: {manifest.id}: no whole {name}")

    def prune(self, keep: int) -> None:
        """Remove all but the newest backups, and the files that none of these needs."""
        for old in self.ids()[:-keep]:
            doomed = self.path / "tmp" / old
            self.of(old).rename(doomed)
            sync_directory(self.path / "backups")
            shutil.rmtree(doomed)
        needed = {
            ref.blake3
            for backup_id in self.ids()
            for manifest in self.manifests(backup_id)
            for ref in manifest.files.values()
        }
        for backup_id in self.ids():
            needed |= {ref.blake3 for ref in self.note(backup_id).segments.values()}
        for key in list(self.storage.keys(BLOBS)):
            if digest_of(key) not in needed:
                self.storage.delete(key)


def file_ref(path: Path) -> FileRef:
    """Return hash and size of a file."""
    with path.open("rb") as file:
        hashed = _hashed(file)
        while True:
            try:
                next(hashed)
            except StopIteration as end:
                ref: FileRef = end.value
                return ref


def _digest_of(file: BinaryIO, size: int) -> str:
    hasher = blake3()
    for part in _parts(file, size):
        hasher.update(part)
    return hasher.hexdigest()


def _parts(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the first bytes of a file."""
    while size and (part := file.read(min(size, _CHUNK))):
        size -= len(part)
        yield part


def _hashed(file: BinaryIO) -> Generator[bytes, None, FileRef]:
    """Yield a file's chunks, and return its hash and size."""
    hasher, size = blake3(), 0
    while chunk := file.read(_CHUNK):
        hasher.update(chunk)
        size += len(chunk)
        yield chunk
    return FileRef(blake3=hasher.hexdigest(), size=size)
