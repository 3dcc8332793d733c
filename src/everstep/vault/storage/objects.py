"""A vault's files in a bucket, through obstore: S3 and compatible stores, Google Cloud, Azure.

    <key>/<number>              a version of a key. The newest one counts
    <key>/<number>-<nonce>      a copy of a blob, or of a quarantined file
    tmp/<uuid>                  a large file until its hash is known

No object is ever written twice under one name. So a put or a deletion that takes effect long after
its client gave up can't affect a later save.

The commit is a put that creates and never replaces (``If-None-Match: *``). Odd numbers hold
content, even numbers are tombstones. A write creates the next odd number and then removes the older
objects. Readers see the old version or the new one, and of two writers one finds the number taken.
A retried put may find the object of its own first attempt, whose reply was lost. It recognises it
by a nonce in the object's metadata. ``If-Match``, which not every store has, isn't needed.

A file under its hash is the same for every writer, so its writers don't compete for a number.

Large files are hashed while they are uploaded in parts under ``tmp``, and then copied within the
store to the key of their hash. So a file is read once and never held in memory. obstore can't list
the parts of an upload that a killed process left. A lifecycle rule of the bucket has to remove them
(docs/guides/operations.md).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from everstep.durable_files import Buffer
from everstep.vault.errors import StoreFailed
from everstep.vault.storage.base import (
    DURABLE,
    NAMED,
    REMOVED,
    SYNCED,
    WRITTEN,
    NewContent,
    as_bytes,
    safe_key,
)
from everstep.vault.storage.bucket import library
from everstep.vault.storage.keys import BLOBS
from everstep.vault.storage.versions import (
    Version,
    newest_of,
    next_number,
    version_path,
    versions_by_key,
)

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ObjectStore

_CONTENT = (BLOBS, "quarantine/content/")
_TEMPORARY = "tmp/"
_PART = 8 << 20
_MAX_CONCURRENCY = 4
_MAX_COPY_BYTES = 5 << 30
_NONCE = "everstepnonce"
_TOMBSTONE_SECONDS = 3600.0
"""Lifetime of a tombstone. Stores refuse requests that were signed earlier than that."""


class ObjectStorage:
    """A bucket, or a prefix in one.

    Args:
        store: of obstore.
        name: its URL, for error messages.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self._name = name
        self._obstore = library()

    def clean(self) -> None:
        """Remove temporary objects, superseded versions and old deletions."""
        with self._translating("clean"):
            for each in self._list(_TEMPORARY):
                self._remove(each["path"])
            self._clean_prefix("")

    def write(self, chunks: Iterable[Buffer], key_of: Callable[[], str], *, replace: bool) -> str:
        """Put a small file under its key. Upload a large one to a temporary key and copy it.

        A large file that is no blob is held in memory as a whole.
        """
        parts = _parts(chunks)
        first = next(parts, b"")
        second = next(parts, None)
        with self._translating("write"):
            if second is None:
                WRITTEN()
                SYNCED()
                key = safe_key(key_of())
                self._name_content(key, first, replace)
            else:
                key = self._write_large(_joined(first, second, parts), key_of, replace)
        DURABLE()
        return key

    def write_all(
        self, files: Sequence[NewContent], last: NewContent | None = None, *, replace: bool = True
    ) -> None:
        """Put one file after the other."""
        for content in files:
            self.write(content.chunks, content.key_of, replace=True)
        if last is not None:
            self.write(last.chunks, last.key_of, replace=replace)

    def read(self, key: str) -> memoryview:
        """Read the newest version into memory."""
        with self._translating(key):
            return memoryview(self._get(key).bytes())

    def chunks(self, key: str, *, start: int = 0, cold: bool = False) -> Iterator[memoryview]:
        """Stream the newest version, always from the store."""
        with self._translating(key):
            if start and start >= self._there(key).size:
                return  # a range that begins there is an error to the store
            for chunk in self._get(key, start).stream(min_chunk_size=_PART):
                yield memoryview(chunk)

    def size(self, key: str) -> int | None:
        """Return the size of the newest version."""
        with self._translating(key):
            there = newest_of(self._versions(key))
        return None if there is None else there.size

    def modified(self, key: str) -> float:
        """Return when the newest version was put, by the store's clock."""
        with self._translating(key):
            return self._there(key).modified.timestamp()

    def keys(self, prefix: str) -> Iterator[str]:
        """List the keys of a prefix. The request is sent when the first is asked for."""
        with self._translating(prefix):
            found = versions_by_key(self._list(_checked(prefix)))
        yield from sorted(key for key, versions in found.items() if newest_of(versions))

    def delete(self, key: str) -> bool:
        """Create a tombstone and remove the older versions. Remove a blob without one."""
        with self._translating(key):
            while True:
                versions = self._versions(key)
                newest = newest_of(versions)
                if newest is None:
                    return False
                if _is_content(key):
                    for each in versions:
                        self._remove(each.path)
                    break
                if self._create(version_path(key, newest.number + 1), b""):
                    self._tidy(versions)
                    break
        REMOVED()
        return True

    def move(self, key: str, to: str) -> bool:
        """Copy a file to another key, then delete it."""
        safe_key(to)
        if self.size(key) is None:
            return False
        self.write(self.chunks(key), lambda: to, replace=True)
        self.delete(key)
        return True

    def sync(self, prefix: str) -> None:
        """Remove objects that a dead writer left. Everything that is visible is durable."""
        with self._translating(prefix):
            self._clean_prefix(_checked(prefix))

    def free(self) -> None:
        """A bucket has no bound."""
        return

    # Writing

    def _name_content(self, key: str, content: bytes, replace: bool) -> None:
        if _is_content(key):
            self._add_copy(key, replace, lambda path: self._put(path, content))
        else:
            self._add_version(key, content, replace)

    def _write_large(self, parts: Iterator[bytes], key_of: Callable[[], str], replace: bool) -> str:
        temporary = _TEMPORARY + uuid.uuid4().hex
        try:
            size = self._upload(temporary, parts)
            SYNCED()
            key = safe_key(key_of())
            if _is_content(key):
                self._add_copy(key, replace, lambda path: self._copy(temporary, path, size))
            else:
                content = bytes(self._obstore.get(self._store, temporary).bytes())
                self._add_version(key, content, replace)
        finally:
            with suppress(_error()):  # the next start removes it
                self._remove(temporary)
        return key

    def _add_copy(self, key: str, replace: bool, put: Callable[[str], None]) -> None:
        """Put a copy of a blob in place of the existing ones."""
        versions = self._versions(key)
        if versions and not replace:
            raise self._taken(key)
        put(f"{version_path(key, next_number(versions))}-{uuid.uuid4().hex}")
        NAMED()
        self._tidy(versions)

    def _add_version(self, key: str, content: bytes, replace: bool) -> None:
        """Create the next version, and remove the older ones."""
        while True:
            versions = self._versions(key)
            if newest_of(versions) and not replace:
                raise self._taken(key)
            number = next_number(versions)
            if not self._create(version_path(key, number), content):
                continue
            NAMED()
            self._tidy(versions)
            if replace or self._versions(key)[-1].number == number:
                return
            # Others created and deleted the key between our listing and our put.
            self._remove(version_path(key, number))

    def _create(self, path: str, content: bytes) -> bool:
        """Put an object if none exists. Return whether the object there is ours."""
        from obstore.exceptions import AlreadyExistsError

        nonce = uuid.uuid4().hex
        try:
            self._put(path, content, mode="create", attributes={_NONCE: nonce})
        except AlreadyExistsError:
            return self._is_ours(path, nonce)
        return True

    def _is_ours(self, path: str, nonce: str) -> bool:
        try:
            found = self._obstore.get(self._store, path, options={"head": True})
        except FileNotFoundError:
            return False  # removed since
        return bool(found.attributes.get(_NONCE) == nonce)

    def _put(self, path: str, content: bytes, **options: object) -> None:
        self._obstore.put(self._store, path, content, use_multipart=False, **options)

    def _upload(self, path: str, parts: Iterator[bytes]) -> int:
        """Upload in parts. An error of the iterator is raised unchanged."""
        size = 0
        raised: list[BaseException] = []

        def counted() -> Iterator[bytes]:
            nonlocal size
            try:
                for part in parts:
                    size += len(part)
                    yield part
                WRITTEN()
            except BaseException as error:
                raised.append(error)
                raise

        try:
            self._obstore.put(
                self._store,
                path,
                counted(),
                use_multipart=True,
                chunk_size=_PART,
                max_concurrency=_MAX_CONCURRENCY,
            )
        except BaseException:
            if raised:
                raise raised[0] from None
            raise
        return size

    def _copy(self, source: str, target: str, size: int) -> None:
        if size <= _MAX_COPY_BYTES:
            self._obstore.copy(self._store, source, target)
            return
        stream = self._obstore.get(self._store, source).stream(min_chunk_size=_PART)
        self._upload(target, (bytes(each) for each in stream))

    # Reading and removing

    def _get(self, key: str, start: int = 0) -> GetResult:
        options: GetOptions = {"range": {"offset": start}} if start else {}
        tried = None
        while True:
            newest = self._there(key)
            try:
                found: GetResult = self._obstore.get(self._store, newest.path, options=options)
            except FileNotFoundError:
                if newest.path == tried:
                    raise  # listed, and not there
                tried = newest.path
            else:
                return found

    def _there(self, key: str) -> Version:
        newest = newest_of(self._versions(key))
        if newest is None:
            raise FileNotFoundError(f"{self._name}: there is no {key}")
        return newest

    def _versions(self, key: str) -> list[Version]:
        return versions_by_key(self._list(safe_key(key))).get(key, [])

    def _clean_prefix(self, prefix: str) -> None:
        for versions in versions_by_key(self._list(prefix)).values():
            for each in versions[:-1]:
                self._remove(each.path)
            newest = versions[-1]
            if newest.deleted and time.time() - newest.modified.timestamp() > _TOMBSTONE_SECONDS:
                self._remove(newest.path)

    def _tidy(self, versions: Sequence[Version]) -> None:
        """Remove superseded versions. Those that remain have no effect: see `_clean_prefix`."""
        with suppress(_error()):
            for each in versions:
                self._remove(each.path)

    def _list(self, prefix: str) -> Sequence[ObjectMeta]:
        found: Sequence[ObjectMeta] = self._obstore.list(
            self._store, prefix.removesuffix("/") or None
        ).collect()
        return found

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):  # S3 doesn't say so, others do
            self._obstore.delete(self._store, path)

    def _taken(self, key: str) -> FileExistsError:
        return FileExistsError(f"{self._name}: {key} is there already")

    @contextmanager
    def _translating(self, what: str) -> Iterator[None]:
        """Translate errors of the library."""
        try:
            yield
        except _error() as error:
            raise StoreFailed.of(self._name, what, error) from None


def _error() -> type[Exception]:
    """Return the base of obstore's errors."""
    from obstore.exceptions import BaseError

    return BaseError


def _is_content(key: str) -> bool:
    """Return whether a key names its content, or is written once."""
    return key.startswith(_CONTENT)


def _checked(prefix: str) -> str:
    safe_key(prefix.removesuffix("/"))
    return prefix


def _parts(chunks: Iterable[Buffer]) -> Iterator[bytes]:
    """Split chunks into parts of one size that own their bytes. The last may be shorter."""
    part = bytearray()
    for chunk in chunks:
        view = as_bytes(chunk)
        while len(view):
            taken = view[: _PART - len(part)]
            part += taken
            view = view[len(taken) :]
            if len(part) == _PART:
                yield bytes(part)
                part.clear()
    if part:
        yield bytes(part)


def _joined(first: bytes, second: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield second
    yield from rest
