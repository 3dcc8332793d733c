"""A vault's files in a bucket, through obstore: S3 and what speaks it, Google Cloud, Azure.

    <key>/<number>              a version of a key; the newest counts
    <key>/<number>-<nonce>      of a blob, and of what is in quarantine: a copy of its bytes
    tmp/<uuid>                  large files until their hash is known

No object is ever written twice under one name, so that a request that takes effect long after its
client gave it up, a put or a deletion, can't touch what was saved meanwhile.

The commit is a put that creates and never replaces (``If-None-Match: *``). Odd numbers hold
content, even ones say that the key is deleted. A write creates the next odd number and then
removes the older objects: readers see the old or the new, and of two writers one finds the number
taken. A put whose reply was lost may meet its own object when it is sent again; it knows it by a
nonce in the object's metadata. ``If-Match``, which not every store has, isn't needed.

What lies under its hash is the same whoever writes it, and no number has to be fought for.

Large files are hashed while they are uploaded, in parts, so that a file is read once and never
held: under ``tmp``, then copied within the store to the name that the hash gives. Parts of an
upload that a killed process left can't be listed through obstore; a lifecycle rule of the bucket
has to remove them (docs/guides/operations.md).
"""

from __future__ import annotations

import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from everstep.vault.bucket import library
from everstep.vault.errors import StoreFailed
from everstep.vault.keys import BLOBS
from everstep.vault.storage import (
    DURABLE,
    NAMED,
    REMOVED,
    SYNCED,
    WRITTEN,
    Buffer,
    as_bytes,
    safe_key,
)

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ObjectStore

_CONTENT = (BLOBS, "quarantine/content/")
_TEMPORARY = "tmp/"
_OBJECT = re.compile(r"(.+)/(\d{20})(?:-[0-9a-f]{32})?", re.ASCII | re.DOTALL)
_PART = 8 << 20
_AT_ONCE = 4
_LARGEST_COPY = 5 << 30
_NONCE = "everstepnonce"
_DELETED_SECONDS = 3600.0
"""For how long a key is said to be deleted; stores refuse a request that was signed before that."""


class _Version(NamedTuple):
    number: int
    path: str
    size: int
    modified: datetime

    @property
    def deleted(self) -> bool:
        return self.number % 2 == 0


class ObjectStorage:
    """A bucket, or a prefix in one.

    Args:
        store: of obstore.
        name: what to call it in an error: its URL.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self._name = name
        self._obstore = library()

    def clean(self) -> None:
        """Remove temporary objects, superseded versions and old deletions."""
        with self._told("clean"):
            for each in self._list(_TEMPORARY):
                self._remove(each["path"])
            self._settle("")

    def write(self, chunks: Iterable[Buffer], key_of: Callable[[], str], *, replace: bool) -> str:
        """Put a small object under its key; a large one under a temporary one, and copy it.

        A large one that is no blob is held in memory as a whole.
        """
        parts = _parts(chunks)
        first = next(parts, b"")
        second = next(parts, None)
        with self._told("write"):
            if second is None:
                WRITTEN()
                SYNCED()
                key = safe_key(key_of())
                self._name_content(key, first, replace)
            else:
                key = self._write_large(_joined(first, second, parts), key_of, replace)
        DURABLE()
        return key

    def read(self, key: str) -> memoryview:
        """The newest version, in memory."""
        with self._told(key):
            return memoryview(self._get(key).bytes())

    def chunks(self, key: str, *, start: int = 0, cold: bool = False) -> Iterator[memoryview]:
        """The newest version as it arrives; always from the store."""
        with self._told(key):
            if start and start >= self._there(key).size:
                return  # a range that begins there is an error to the store
            for chunk in self._get(key, start).stream(min_chunk_size=_PART):
                yield memoryview(chunk)

    def size(self, key: str) -> int | None:
        """The size of the newest version."""
        with self._told(key):
            there = _newest(self._versions(key))
        return None if there is None else there.size

    def modified(self, key: str) -> float:
        """When the newest version was put, by the store's clock."""
        with self._told(key):
            return self._there(key).modified.timestamp()

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of a prefix, listed when the first is asked for."""
        with self._told(prefix):
            found = _by_key(self._list(_checked(prefix)))
        yield from sorted(key for key, versions in found.items() if _newest(versions))

    def delete(self, key: str) -> bool:
        """Create the version that says so, and remove the older ones; of a blob, remove it."""
        with self._told(key):
            while True:
                versions = self._versions(key)
                newest = _newest(versions)
                if newest is None:
                    return False
                if _is_content(key):
                    for each in versions:
                        self._remove(each.path)
                    break
                if self._create(_path(key, newest.number + 1), b""):
                    self._tidy(versions)
                    break
        REMOVED()
        return True

    def move(self, key: str, to: str) -> bool:
        """Write what lies under a key under another one, then delete it."""
        safe_key(to)
        if self.size(key) is None:
            return False
        self.write(self.chunks(key), lambda: to, replace=True)
        self.delete(key)
        return True

    def sync(self, prefix: str) -> None:
        """Remove what writers left that died before they could; all that is read is durable."""
        with self._told(prefix):
            self._settle(_checked(prefix))

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
        """Put a copy of what lies under its hash in place of those that are there."""
        versions = self._versions(key)
        if versions and not replace:
            raise self._taken(key)
        put(f"{_path(key, _next(versions))}-{uuid.uuid4().hex}")
        NAMED()
        self._tidy(versions)

    def _add_version(self, key: str, content: bytes, replace: bool) -> None:
        """Create the next version, and remove the older ones."""
        while True:
            versions = self._versions(key)
            if _newest(versions) and not replace:
                raise self._taken(key)
            number = _next(versions)
            if not self._create(_path(key, number), content):
                continue
            NAMED()
            self._tidy(versions)
            if replace or self._versions(key)[-1].number == number:
                return
            # Others created and deleted the key between our look and our put.
            self._remove(_path(key, number))

    def _create(self, path: str, content: bytes) -> bool:
        """Put an object where none is; whether it is ours that is there now."""
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
        """Upload in parts; an error of whoever makes them comes out as it went in."""
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
                max_concurrency=_AT_ONCE,
            )
        except BaseException:
            if raised:
                raise raised[0] from None
            raise
        return size

    def _copy(self, source: str, target: str, size: int) -> None:
        if size <= _LARGEST_COPY:
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

    def _there(self, key: str) -> _Version:
        newest = _newest(self._versions(key))
        if newest is None:
            raise FileNotFoundError(f"{self._name}: there is no {key}")
        return newest

    def _versions(self, key: str) -> list[_Version]:
        return _by_key(self._list(safe_key(key))).get(key, [])

    def _settle(self, prefix: str) -> None:
        for versions in _by_key(self._list(prefix)).values():
            for each in versions[:-1]:
                self._remove(each.path)
            newest = versions[-1]
            if newest.deleted and time.time() - newest.modified.timestamp() > _DELETED_SECONDS:
                self._remove(newest.path)

    def _tidy(self, versions: Sequence[_Version]) -> None:
        """Remove what a newer version stands for; what stays counts for nothing: see `_settle`."""
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
    def _told(self, what: str) -> Iterator[None]:
        """Turn the library's errors into ours."""
        try:
            yield
        except _error() as error:
            raise StoreFailed.of(self._name, what, error) from None


def _error() -> type[Exception]:
    """What obstore raises."""
    from obstore.exceptions import BaseError

    return BaseError


def _is_content(key: str) -> bool:
    """Whether what lies there is told by its key, or written once."""
    return key.startswith(_CONTENT)


def _path(key: str, number: int) -> str:
    return f"{key}/{number:020d}"


def _next(versions: Sequence[_Version]) -> int:
    """The next odd number."""
    newest = versions[-1].number if versions else 0
    return newest + 1 + newest % 2


def _newest(versions: Sequence[_Version]) -> _Version | None:
    """The version that counts; None: there is none, or it says that the key is deleted."""
    return versions[-1] if versions and not versions[-1].deleted else None


def _by_key(listed: Iterable[ObjectMeta]) -> dict[str, list[_Version]]:
    """All versions by key, the oldest first."""
    found: dict[str, list[_Version]] = defaultdict(list)
    for each in listed:
        match = _OBJECT.fullmatch(each["path"])
        if match is not None:
            version = _Version(int(match[2]), each["path"], each["size"], each["last_modified"])
            found[match[1]].append(version)
    return {key: sorted(versions) for key, versions in found.items()}


def _checked(prefix: str) -> str:
    safe_key(prefix.removesuffix("/"))
    return prefix


def _parts(chunks: Iterable[Buffer]) -> Iterator[bytes]:
    """The same bytes in parts of one size, each its own; the last may be shorter."""
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
