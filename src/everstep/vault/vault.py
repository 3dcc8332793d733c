"""The vault: content-addressed files and the manifests that make checkpoints of them."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from everstep.failpoints import Failpoint
from everstep.vault.errors import (
    CheckpointDamaged,
    CheckpointExists,
    CheckpointNotFound,
    UnsafeName,
)
from everstep.vault.manifest import FileRef, Manifest
from everstep.vault.storage import (
    Buffer,
    LocalStorage,
    Storage,
    as_bytes,
    sync_directory,
    write_synced,
)

KINDS = ("training", "sampler", "snapshot")
_PART = re.compile(r"[A-Za-z0-9_+=-][A-Za-z0-9._+=:-]{0,127}", re.ASCII)
_PARALLEL_FROM = 1 << 20
_MARKED = Failpoint("vault.collect.marked", "a collection knows what to keep, and removed nothing")


class Vault:
    """Checkpoints in a directory; safe to use from several threads.

        <root>/blobs/ab/<blake3>                        files, once each
        <root>/manifests/<kind>/<run>/<name>.json       checkpoints
        <root>/tmp/                                     what is being written

    Args:
        root: the directory.
        writer: whether this process writes: it removes what a crash left in ``tmp``.
    """

    def __init__(self, root: Path, *, writer: bool = True) -> None:
        storage = LocalStorage(root)
        self._storage: Storage = storage
        self._lock = threading.Lock()
        self._pinned = 0
        self._collecting = threading.Lock()
        self._fresh: set[str] = set()  # what was put or committed while a collection goes on
        if writer:
            storage.clean()

    def put(self, chunks: Iterable[Buffer]) -> FileRef:
        """Store a file by its content; durable on return.

        What is there already under that hash is replaced by the same bytes, so that a damaged
        copy is healed and never trusted. Until `commit` names the file, keep it with `pinned`.

        Args:
            chunks: the content.
        """
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
            self._keep(hasher.hexdigest())
            return _blob_key(hasher.hexdigest())

        self._storage.write(hashed(), key, replace=True)
        return FileRef(blake3=hasher.hexdigest(), size=size)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Keep every file that is put inside from being collected before it is committed."""
        with self._lock:
            self._pinned += 1
        try:
            yield
        finally:
            with self._lock:
                self._pinned -= 1

    def commit(self, manifest: Manifest, *, overwrite: bool = False) -> None:
        """Make a checkpoint appear: whole, durable, at once.

        Args:
            manifest: names files that were put.
            overwrite: replace one with the same name; until then that one stays as it is.

        Raises:
            CheckpointExists: the name is taken.
            CheckpointDamaged: a file that it names is not there in its size.
        """
        key = _manifest_key(manifest.kind, manifest.run_id, manifest.name)
        with self.pinned():
            self._keep(*(ref.blake3 for ref in manifest.files.values()))
            for name, ref in manifest.files.items():
                if self._storage.size(_blob_key(ref.blake3)) != ref.size:
                    raise CheckpointDamaged(f"{_label(manifest)}: {name} was not stored")
            try:
                self._storage.write([manifest.encode()], lambda: key, replace=overwrite)
            except FileExistsError as error:
                raise CheckpointExists(f"{_label(manifest)} exists already") from error

    def manifest(self, kind: str, run_id: str, name: str) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointNotFound: there is none.
            CheckpointDamaged: it is not what was written.
        """
        key = _manifest_key(kind, run_id, name)
        label = f"checkpoint {run_id}/{kind}/{name}"
        try:
            data = bytes(self._storage.read(key))
        except FileNotFoundError as error:
            raise CheckpointNotFound(f"{label} does not exist") from error
        manifest = Manifest.decode(data, label)
        if (manifest.kind, manifest.run_id, manifest.name) != (kind, run_id, name):
            raise CheckpointDamaged(f"{label}: the manifest there is that of {_label(manifest)}")
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
        try:
            data = self._storage.read(_blob_key(ref.blake3))
        except FileNotFoundError as error:
            raise CheckpointDamaged(f"{_label(manifest)}: {filename} is missing") from error
        if len(data) != ref.size:
            raise CheckpointDamaged(
                f"{_label(manifest)}: {filename} has {len(data)} bytes instead of {ref.size}"
            )
        threads = blake3.AUTO if len(data) >= _PARALLEL_FROM else 1
        found = blake3(data, max_threads=threads).hexdigest()
        if found != ref.blake3:
            raise CheckpointDamaged(
                f"{_label(manifest)}: {filename} hashes to {found[:16]}… instead of "
                f"{ref.blake3[:16]}…"
            )
        return data

    def manifests(self, run_id: str | None = None, kind: str | None = None) -> Iterator[Manifest]:
        """All checkpoints, or those of a run or kind. Raises `CheckpointDamaged` on a bad one."""
        for each in KINDS if kind is None else (kind,):
            for run, name in self.names(each, run_id):
                try:
                    yield self.manifest(each, run, name)
                except CheckpointNotFound:
                    continue  # deleted since it was listed

    def names(self, kind: str, run_id: str | None = None) -> Iterator[tuple[str, str]]:
        """Run and name of all checkpoints of a kind, or of a run's, unread."""
        prefix = f"manifests/{_part(kind)}/" + ("" if run_id is None else f"{_part(run_id)}/")
        for key in self._storage.keys(prefix):
            *_, run, name = key.split("/")
            yield run, name.removesuffix(".json")

    def delete(self, kind: str, run_id: str, name: str) -> bool:
        """Remove a checkpoint; returns whether it was there. Its files stay until `collect`."""
        return self._storage.delete(_manifest_key(kind, run_id, name))

    def collect(self, grace_seconds: float = 3600.0) -> list[FileRef]:
        """Remove files that no checkpoint names.

        A file that is younger than the grace period stays, and so does every file while one is
        pinned: its checkpoint may be about to be committed.

        Returns:
            What was removed.
        """
        with self._collecting:
            with self._lock:
                if self._pinned:
                    return []
                self._fresh.clear()
            reachable = {ref.blake3 for m in self.manifests() for ref in m.files.values()}
            _MARKED()
            self._storage.sync("manifests/")  # a manifest that is gone must not come back
            removed = []
            for key in list(self._storage.keys("blobs/")):
                if key.rsplit("/", 1)[-1] not in reachable:
                    removed += self._remove(key, grace_seconds)
            return removed

    def _remove(self, key: str, grace_seconds: float) -> list[FileRef]:
        """Remove a file, unless it was put or committed since the collection began."""
        digest = key.rsplit("/", 1)[-1]
        with self._lock:  # so that neither can happen between the look and the removal
            size = self._storage.size(key)
            if self._pinned or digest in self._fresh or size is None:
                return []
            if time.time() - self._storage.modified(key) < grace_seconds:
                return []
            return [FileRef(blake3=digest, size=size)] if self._storage.delete(key) else []

    def export(self, manifest: Manifest, directory: Path) -> list[Path]:
        """Copy a checkpoint's files, durably, under their own names; none unless all verify.

        Args:
            manifest: the checkpoint.
            directory: created when it isn't there; files of the same names are replaced.
        """
        files = {directory / _part(name): self.read(manifest, name) for name in manifest.files}
        directory.mkdir(parents=True, exist_ok=True)
        for target, content in files.items():
            temporary = directory / f".{uuid.uuid4().hex}"
            try:
                write_synced(temporary, [content])
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_directory(directory)
        return list(files)

    def _keep(self, *digests: str) -> None:
        """Note files that a collection which goes on must not take."""
        with self._lock:
            if self._collecting.locked():
                self._fresh.update(digests)


def _part(text: str) -> str:
    """A part of a key, checked: nothing else becomes a file name."""
    if not _PART.fullmatch(text):
        raise UnsafeName(f"{text[:200]!r} can't be part of a checkpoint's name")
    return text


def _manifest_key(kind: str, run_id: str, name: str) -> str:
    if kind not in KINDS:
        raise UnsafeName(f"{kind!r} is not a kind of checkpoint; it is one of {', '.join(KINDS)}")
    return f"manifests/{kind}/{_part(run_id)}/{_part(name)}.json"


def _blob_key(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


def _label(manifest: Manifest) -> str:
    return f"checkpoint {manifest.run_id}/{manifest.kind}/{manifest.name}"
