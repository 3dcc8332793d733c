"""The vault: content-addressed files and the manifests that make checkpoints of them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from blake3 import blake3

from everstep.vault import marks
from everstep.vault.collection import Collection
from everstep.vault.errors import (
    CheckpointDamaged,
    CheckpointExists,
    CheckpointNotFound,
    CheckpointQuarantined,
    FormatTooNew,
)
from everstep.vault.export import export
from everstep.vault.keys import (
    KINDS,
    MANIFESTS,
    CheckpointId,
    blob_key,
    manifest_key,
    marks_key,
    part,
)
from everstep.vault.local import LocalStorage
from everstep.vault.locks import Locks
from everstep.vault.manifest import FileRef, Manifest
from everstep.vault.quarantine import Quarantine, refusal
from everstep.vault.room import Room, size_of
from everstep.vault.storage import Buffer, Storage, as_bytes

_PARALLEL_FROM = 1 << 20


class Vault:
    """Checkpoints in a directory, or another storage; safe to use from several threads.

        <root>/blobs/ab/<blake3>                        files, once each
        <root>/manifests/<kind>/<run>/<name>.json       checkpoints
        <root>/marks/<kind>/<run>/<name>.json           what was changed of them since
        <root>/quarantine/                              damaged files and notes of them
        <root>/tmp/                                     what is being written

    Args:
        root: the directory; of another storage, where processes lock each other out.
        writer: whether this process writes: it removes what a crash left in ``tmp``.
        reserve_bytes: what a save has to leave free on the disk.
        storage: where files lie instead (`location.open_vault`).

    Attributes:
        quarantine: the damaged files that were moved away.
    """

    def __init__(
        self,
        root: Path,
        *,
        writer: bool = True,
        reserve_bytes: int = 0,
        storage: Storage | None = None,
    ) -> None:
        storage = LocalStorage(root) if storage is None else storage
        self._storage: Storage = storage
        self._locks = Locks(root)
        self._room = Room(storage, root, reserve_bytes)
        self.quarantine = Quarantine(storage)
        self._collection = Collection(self, self._locks)
        if writer:
            with self._locks.alone() as alone:  # another process may just be marking a checkpoint
                if alone:
                    storage.clean()

    def put(self, chunks: Iterable[Buffer]) -> FileRef:
        """Store a file by its content; durable on return.

        What is there already under that hash is replaced by the same bytes, so that a damaged
        copy is healed and never trusted. Until `commit` names the file, keep it with `pinned`.

        Args:
            chunks: the content.

        Raises:
            DiskFull: there is no room; nothing of it stays.
        """
        expected = size_of(chunks)
        self.check_room(expected or 0)
        hasher = blake3()
        size = 0

        def hashed() -> Iterator[Buffer]:
            nonlocal size
            for chunk in chunks:
                view = as_bytes(chunk)
                hasher.update(view)
                size += len(view)
                yield view

        def key() -> str:
            self._collection.keep(hasher.hexdigest())
            return blob_key(hasher.hexdigest())

        with self._locks.writing(), self._room.told(expected):
            self._storage.write(hashed(), key, replace=True)
        return FileRef(blake3=hasher.hexdigest(), size=size)

    def check_room(self, size: int) -> None:
        """Raise `DiskFull` unless so many bytes fit on the disk and the reserve stays free."""
        self._room.check(size)

    @property
    def storage(self) -> Storage:
        """Where everything lies, for what looks at files rather than checkpoints."""
        return self._storage

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every process from collecting anything, as a backup does while it copies."""
        with self._locks.holding():
            yield

    @property
    def is_held(self) -> bool:
        """Whether a backup, or a collection, of some process goes on: then nothing is collected."""
        return self._collection.held

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Move a damaged file away while no process writes; gives whether that is so."""
        with self._locks.alone() as alone:
            yield alone

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Keep every file that is put inside from being collected before it is committed."""
        with self._collection.pinned(), self._locks.writing():
            yield

    def commit(self, manifest: Manifest, *, overwrite: bool = False) -> None:
        """Make a checkpoint appear: whole, durable, at once.

        Args:
            manifest: names files that were put.
            overwrite: replace one with the same name; until then that one stays as it is.

        Raises:
            CheckpointExists: the name is taken.
            CheckpointDamaged: a file that it names is not there in its size.
            DiskFull: there is no room for the manifest.
        """
        key = manifest_key(*manifest.id)
        with self.pinned():
            self._collection.keep(*(ref.blake3 for ref in manifest.files.values()))
            for name, ref in manifest.files.items():
                if self._storage.size(blob_key(ref.blake3)) != ref.size:
                    raise CheckpointDamaged(f"{_label(manifest)}: {name} was not stored")
            try:
                with self._room.told():
                    self._storage.write([manifest.encode()], lambda: key, replace=overwrite)
            except FileExistsError as error:
                raise CheckpointExists(f"{_label(manifest)} exists already") from error

    def manifest(self, kind: str, run_id: str, name: str) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointNotFound: there is none.
            CheckpointDamaged: it is not what was written.
            CheckpointQuarantined: it, or a file that it names, was found damaged before.
        """
        manifest = self.recorded(kind, run_id, name)
        for file, ref in manifest.files.items():
            note = self.quarantine.of(blob_key(ref.blake3))
            if note is not None:
                raise refusal(_label(manifest), file, note)
        return manifest

    def recorded(self, kind: str, run_id: str, name: str) -> Manifest:
        """Read a manifest, whatever became of the files that it names; raises as `manifest`."""
        key = manifest_key(kind, run_id, name)
        label = f"checkpoint {run_id}/{kind}/{name}"
        try:
            data = bytes(self._storage.read(key))
        except FileNotFoundError as error:
            note = self.quarantine.of(key)
            if note is not None:
                raise refusal(label, "its manifest", note) from error
            raise CheckpointNotFound(f"{label} does not exist") from error
        try:
            manifest = Manifest.decode(data, label)
        except FormatTooNew:
            raise
        except CheckpointDamaged as error:
            raise CheckpointDamaged(str(error), key) from error
        if manifest.id != (kind, run_id, name):
            raise CheckpointDamaged(
                f"{label}: the manifest there is that of {_label(manifest)}", key
            )
        return manifest

    def read(self, manifest: Manifest, filename: str) -> memoryview:
        """Map one of a checkpoint's files, verified.

        Raises:
            CheckpointNotFound: the checkpoint has no file of that name.
            CheckpointDamaged: its bytes are not those that were written.
        """
        ref = manifest.files.get(filename)
        if ref is None:
            raise CheckpointNotFound(f"{_label(manifest)} has no file {filename}")
        key = blob_key(ref.blake3)
        try:
            data = self._storage.read(key)
        except FileNotFoundError as error:
            raise self.missing(manifest, filename) from error
        if len(data) != ref.size:
            raise CheckpointDamaged(
                f"{_label(manifest)}: {filename} has {len(data)} bytes instead of {ref.size}", key
            )
        threads = blake3.AUTO if len(data) >= _PARALLEL_FROM else 1
        found = blake3(data, max_threads=threads).hexdigest()
        if found != ref.blake3:
            raise CheckpointDamaged(
                f"{_label(manifest)}: {filename} hashes to {found[:16]}… instead of "
                f"{ref.blake3[:16]}…",
                key,
            )
        return data

    def missing(self, manifest: Manifest, filename: str) -> CheckpointDamaged:
        """What to raise for a file of a checkpoint that is not where it should be."""
        key = blob_key(manifest.files[filename].blake3)
        note = self.quarantine.of(key)
        if note is not None:
            return refusal(_label(manifest), filename, note)
        return CheckpointDamaged(f"{_label(manifest)}: {filename} is missing", key)

    def manifests(self, run_id: str | None = None, kind: str | None = None) -> Iterator[Manifest]:
        """All checkpoints, or those of a run or kind, without quarantined ones.

        Raises `CheckpointDamaged` on a bad one.
        """
        for each in KINDS if kind is None else (kind,):
            for run, name in self.names(each, run_id):
                try:
                    yield self.manifest(each, run, name)
                except (CheckpointNotFound, CheckpointQuarantined):
                    continue  # deleted since it was listed, or not to be loaded

    def names(self, kind: str, run_id: str | None = None) -> Iterator[tuple[str, str]]:
        """Run and name of all checkpoints of a kind, or of a run's, unread."""
        prefix = f"{MANIFESTS}{part(kind)}/" + ("" if run_id is None else f"{part(run_id)}/")
        for key in self._storage.keys(prefix):
            *_, run, name = key.split("/")
            yield run, name.removesuffix(".json")

    def all_recorded(self) -> Iterator[Manifest]:
        """All manifests, also those of which a file is missing or quarantined.

        Raises `CheckpointDamaged` on a manifest that can't be read.
        """
        for kind in KINDS:
            for run, name in self.names(kind):
                try:
                    yield self.recorded(kind, run, name)
                except (CheckpointNotFound, CheckpointQuarantined):
                    continue

    def delete(self, kind: str, run_id: str, name: str) -> bool:
        """Remove a checkpoint; returns whether it was there. Its files stay until `collect`."""
        key = manifest_key(kind, run_id, name)
        deleted = self._storage.delete(key)
        if kind != "snapshot":
            self._storage.delete(marks_key(kind, run_id, name))
        return self.quarantine.forget(key) or deleted

    def mark(
        self,
        manifest: Manifest,
        *,
        expires_at: datetime | None,
        public: bool,
        user_metadata: dict[str, str] | None = None,
    ) -> None:
        """Change what is told of a checkpoint, and how long it stays; durable on return.

        Args:
            manifest: the checkpoint's.
            expires_at: when it may be collected; None: never.
            public: whether others may read it.
            user_metadata: the user's; None: what it was saved with.
        """
        with self._locks.writing(), self._room.told():
            marks.write(self._storage, manifest, expires_at, public, user_metadata)

    def marked(self, manifest: Manifest) -> Manifest:
        """A manifest with what `mark` changed since the checkpoint was saved."""
        return marks.applied(self._storage, self.quarantine, manifest)

    def collect(
        self,
        grace_seconds: float = 3600.0,
        *,
        dry_run: bool = False,
        without: Container[CheckpointId] = (),
    ) -> list[FileRef]:
        """Remove files that no checkpoint names.

        A file that is younger than the grace period stays, and so does every file while one is
        pinned or `held`: its checkpoint may be about to be committed. What a quarantined manifest
        seems to name stays as well: someone may repair it.

        Args:
            grace_seconds: how old a file has to be.
            dry_run: only say what would be removed.
            without: for a dry run, checkpoints that would be deleted before.

        Returns:
            What was removed.
        """
        return self._collection.collect(grace_seconds, dry_run=dry_run, without=without)

    def export(
        self, manifest: Manifest, directory: Path, *, only: Container[str] | None = None
    ) -> list[Path]:
        """Copy a checkpoint's files, durably, under their own names; none unless all verify.

        Args:
            manifest: the checkpoint.
            directory: created when it isn't there; files of the same names are replaced.
            only: names of the files that are wanted; None: all.
        """
        return export(self, manifest, directory, only)


def _label(manifest: Manifest) -> str:
    return f"checkpoint {manifest.run_id}/{manifest.kind}/{manifest.name}"
