"""Vault: content-addressed files, and the manifests that make checkpoints of them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from blake3 import blake3

from everstep.durable_files import Buffer
from everstep.vault import mutable_metadata
from everstep.vault.disk_guard import DiskGuard
from everstep.vault.errors import (
    HOW_TO_HEAL,
    CheckpointDamaged,
    CheckpointExists,
    CheckpointNotFound,
    CheckpointQuarantined,
    FormatTooNew,
    damaged,
)
from everstep.vault.gc_journal import GcJournal
from everstep.vault.manifest import FileRef, Manifest
from everstep.vault.quarantine import Quarantine, refusal
from everstep.vault.storage.base import NewContent, Storage
from everstep.vault.storage.hashed import HashedContent
from everstep.vault.storage.keys import (
    KINDS,
    MANIFESTS,
    CheckpointId,
    blob_key,
    manifest_key,
    metadata_key,
    part,
)
from everstep.vault.storage.local import LocalStorage
from everstep.vault.storage.locks import Locks

_PARALLEL_FROM = 1 << 20


class Vault:
    """Checkpoints in a directory or a bucket. Safe to use from several threads and processes.

        <root>/blobs/ab/<blake3>                        files, once each
        <root>/manifests/<kind>/<run>/<name>.json       checkpoints
        <root>/marks/<kind>/<run>/<name>.json           their mutable metadata
        <root>/quarantine/                              damaged files, with records of them
        <root>/tmp/                                     files that are being written
        <root>/gc.journal                               see `everstep.vault.gc_journal`

    Args:
        root: the directory. For a bucket, the directory of the locks and the journal.
        writer: whether this process writes checkpoints: it removes temporary files of a crash.
        reserve_bytes: bytes that a save has to leave free on the disk.
        storage: the storage. None for the directory itself. `open_vault` chooses it.

    Attributes:
        storage: where the files lie, for functions that work on files rather than checkpoints.
        quarantine: the damaged files that were moved away.
        locks: the locks between processes.
        journal: the journal that `everstep.vault.gc` reads.
    """

    def __init__(
        self,
        root: Path,
        *,
        writer: bool = True,
        reserve_bytes: int = 0,
        storage: Storage | None = None,
    ) -> None:
        self.storage: Storage = LocalStorage(root) if storage is None else storage
        self.locks = Locks(root)
        self.journal = GcJournal(root)
        self.quarantine = Quarantine(self.storage)
        self._disk_guard = DiskGuard(self.storage, root, reserve_bytes)
        if writer:
            with self.locks.exclusive() as exclusive:  # another process may be writing
                if exclusive:
                    self.storage.clean()

    # Writing

    def put(self, chunks: Iterable[Buffer]) -> FileRef:
        """Store a file under the hash of its content. Durable on return.

        A file that is there already under the same hash is replaced by the same bytes, so that a
        damaged copy is healed and never trusted. Until `commit` names the file, its command has
        to be pinned (`everstep.vault.pins`), or the caller inside `gc_paused`.

        Args:
            chunks: the content.

        Raises:
            DiskFull: there is not enough space. Nothing of the file stays.
        """
        hashed = HashedContent(chunks, self.journal)
        self.check_free_space(hashed.expected or 0)
        with self.locks.writing(), self._disk_guard.translating(hashed.expected):
            self.storage.write_all([hashed.content])
        return hashed.ref

    def save(
        self,
        contents: Mapping[str, Iterable[Buffer]],
        manifest_of: Callable[[dict[str, FileRef]], Manifest],
        *,
        stored: Mapping[str, FileRef] | None = None,
        overwrite: bool = False,
        cold: bool = False,
    ) -> Manifest:
        """Store a checkpoint's files and make it appear: `put` of each and `commit`, in one go.

        Args:
            contents: the files by name.
            manifest_of: returns the checkpoint, given the files' hashes and sizes.
            stored: further files of it, which are in the vault.
            overwrite: replace a checkpoint of the same name, which stays as it is until then.
            cold: nobody is likely to read the files soon: no file cache for them.

        Returns:
            The checkpoint.

        Raises:
            CheckpointExists: the name is taken.
            CheckpointDamaged: a stored file does not exist, or has another size.
            DiskFull: there is not enough space. Nothing of the checkpoint stays.
        """
        hashed = {name: HashedContent(each, self.journal, cold) for name, each in contents.items()}
        total = sum(each.expected or 0 for each in hashed.values())
        self.check_free_space(total)
        made: list[Manifest] = []

        def encoded() -> Iterator[bytes]:
            manifest = manifest_of(
                {**(stored or {}), **{k: each.ref for k, each in hashed.items()}}
            )
            self._keep(manifest, stored or {})
            made.append(manifest)
            yield manifest.encode()

        last = NewContent(encoded(), lambda: manifest_key(*made[0].id))
        with self.locks.writing(), self._disk_guard.translating(total):
            try:
                files = [each.content for each in hashed.values()]
                self.storage.write_all(files, last, replace=overwrite)
            except FileExistsError as error:
                raise CheckpointExists(f"{_label(made[0])} exists already") from error
        return made[0]

    def check_free_space(self, size: int) -> None:
        """Raise `DiskFull` unless so many bytes fit on the disk and the reserve stays free."""
        self._disk_guard.check(size)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep every process from moving files to quarantine, from the first `put` to `commit`."""
        with self.locks.writing():
            yield

    @contextmanager
    def gc_paused(self) -> Iterator[None]:
        """Keep every process from collecting garbage. Waits for a running collection.

        For backups, and for writers that are not among the service's pins.
        """
        with self.locks.pausing_gc():
            yield

    @property
    def is_gc_paused(self) -> bool:
        """Whether a backup, or another collection, keeps garbage from being collected."""
        with self.locks.collecting() as free:
            return not free

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Lock the vault against writers, without waiting. Yields whether it is locked."""
        with self.locks.exclusive() as exclusive:
            yield exclusive

    def commit(self, manifest: Manifest, *, overwrite: bool = False) -> None:
        """Make a checkpoint appear: whole, durable, at once.

        Args:
            manifest: the checkpoint. Its files were put.
            overwrite: replace a checkpoint of the same name, which stays as it is until then.

        Raises:
            CheckpointExists: the name is taken.
            CheckpointDamaged: a file that it names does not exist, or has another size.
            DiskFull: there is not enough space for the manifest.
        """
        key = manifest_key(*manifest.id)
        with self.locks.writing():
            try:
                with self._disk_guard.translating():
                    self._keep(manifest, manifest.files)
                    self.storage.write([manifest.encode()], lambda: key, replace=overwrite)
            except FileExistsError as error:
                raise CheckpointExists(f"{_label(manifest)} exists already") from error

    def _keep(self, manifest: Manifest, files: Mapping[str, FileRef]) -> None:
        """Have garbage collection keep files that a manifest will name, and check their sizes."""
        if not files:
            return
        self.journal.note(*(blob_key(ref.blake3) for ref in files.values()))
        for name, ref in files.items():
            if self.storage.size(blob_key(ref.blake3)) != ref.size:
                raise CheckpointDamaged(f"{_label(manifest)}: {name} was not stored")

    def set_metadata(
        self,
        manifest: Manifest,
        *,
        expires_at: datetime | None,
        public: bool,
        user_metadata: dict[str, str] | None = None,
    ) -> None:
        """Replace a checkpoint's mutable metadata. Durable on return.

        Args:
            manifest: the checkpoint.
            expires_at: when it expires, None for never.
            public: whether others may read it.
            user_metadata: the user's tags, None for those of the manifest.
        """
        with self.locks.writing(), self._disk_guard.translating():
            self.journal.note(metadata_key(*manifest.id))
            mutable_metadata.write(self.storage, manifest, expires_at, public, user_metadata)

    def delete(self, kind: str, run_id: str, name: str) -> bool:
        """Remove a checkpoint. Return whether it existed. Its files stay until a collection."""
        key = manifest_key(kind, run_id, name)
        deleted = self.storage.delete(key)
        if kind != "snapshot":
            self.storage.delete(metadata_key(kind, run_id, name))
        return self.quarantine.discard(key) or deleted

    # Reading

    def manifest(self, kind: str, run_id: str, name: str) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointNotFound: it does not exist.
            CheckpointDamaged: its bytes are not those that were written.
            CheckpointQuarantined: it, or a file that it names, is in quarantine.
        """
        manifest = self.read_manifest(kind, run_id, name)
        for file, ref in manifest.files.items():
            note = self.quarantine.get(blob_key(ref.blake3))
            if note is not None:
                raise refusal(_label(manifest), file, note)
        return manifest

    def read_manifest(self, kind: str, run_id: str, name: str) -> Manifest:
        """Read a manifest, even if its files are missing or quarantined. Raises as `manifest`."""
        key = manifest_key(kind, run_id, name)
        label = CheckpointId(kind, run_id, name).label
        try:
            data = bytes(self.storage.read(key))
        except FileNotFoundError as error:
            note = self.quarantine.get(key)
            if note is not None:
                raise refusal(label, "its manifest", note) from error
            raise CheckpointNotFound(f"{label} does not exist") from error
        try:
            manifest = Manifest.decode(data, label)
        except FormatTooNew:
            raise
        except CheckpointDamaged as error:
            raise CheckpointDamaged(f"{error}. {HOW_TO_HEAL}", key) from error
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
            data = self.storage.read(key)
        except FileNotFoundError as error:
            raise self.missing(manifest, filename) from error
        if len(data) != ref.size:
            found = f"has {len(data)} bytes instead of {ref.size}"
            raise damaged(manifest.id.label, filename, found, key)
        threads = blake3.AUTO if len(data) >= _PARALLEL_FROM else 1
        found = blake3(data, max_threads=threads).hexdigest()
        if found != ref.blake3:
            found = f"hashes to {found[:16]}… instead of {ref.blake3[:16]}…"
            raise damaged(manifest.id.label, filename, found, key)
        return data

    def missing(self, manifest: Manifest, filename: str) -> CheckpointDamaged:
        """Return the error for a checkpoint's file that is not where it should be."""
        key = blob_key(manifest.files[filename].blake3)
        note = self.quarantine.get(key)
        if note is not None:
            return refusal(_label(manifest), filename, note)
        return damaged(manifest.id.label, filename, "is missing", key)

    def manifests(self, run_id: str | None = None, kind: str | None = None) -> Iterator[Manifest]:
        """Read all checkpoints, or those of a run or kind, without quarantined ones.

        Raises:
            CheckpointDamaged: a manifest is damaged.
        """
        for each in KINDS if kind is None else (kind,):
            for run, name in self.names(each, run_id):
                try:
                    yield self.manifest(each, run, name)
                except (CheckpointNotFound, CheckpointQuarantined):
                    continue  # deleted since it was listed, or not to be loaded

    def names(self, kind: str, run_id: str | None = None) -> Iterator[tuple[str, str]]:
        """List run and name of all checkpoints of a kind, or of a run's, without reading them."""
        prefix = f"{MANIFESTS}{part(kind)}/" + ("" if run_id is None else f"{part(run_id)}/")
        for key in self.storage.keys(prefix):
            *_, run, name = key.split("/")
            yield run, name.removesuffix(".json")

    def read_manifests(self, without: Container[CheckpointId] = ()) -> Iterator[Manifest]:
        """Read the manifests of all checkpoints but some, whatever the state of their files.

        Raises:
            CheckpointDamaged: a manifest can't be read.
        """
        for each in (CheckpointId(kind, *names) for kind in KINDS for names in self.names(kind)):
            if each in without:
                continue
            try:
                yield self.read_manifest(*each)
            except (CheckpointNotFound, CheckpointQuarantined):
                continue

    def with_metadata(self, manifest: Manifest) -> Manifest:
        """Return a manifest with the mutable metadata in place of the values at its save."""
        return mutable_metadata.applied(self.storage, self.quarantine, manifest)


def _label(manifest: Manifest) -> str:
    return manifest.id.label
