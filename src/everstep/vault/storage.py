"""Where blobs and manifests lie: what every storage promises.

storage.py     this seam
local.py       a directory
objects.py     a bucket of an object store
location.py    which of them a vault lies in

Every write is whole or absent, and durable when the call returns; what each call does where it
could be doubted is said here, and `tests/vault/test_storage.py` holds all storages to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from everstep.failpoints import Failpoint
from everstep.vault.errors import UnsafeName

Buffer = bytes | bytearray | memoryview
WRITTEN = Failpoint("vault.write.written", "a temporary file is written, and not durable")
SYNCED = Failpoint("vault.write.synced", "a file's content is durable, its name is not there")
NAMED = Failpoint("vault.write.named", "a file has its name, and the name is not durable")
DURABLE = Failpoint("vault.write.durable", "a file is durable, and no one was told")
REMOVED = Failpoint("vault.delete.removed", "a file is unlinked, and that is not durable")


class Storage(Protocol):
    """Keys are relative paths with ``/``; one that could lead elsewhere raises `UnsafeName`."""

    def write(self, chunks: Iterable[Buffer], key_of: Callable[[], str], *, replace: bool) -> str:
        """Write chunks durably under the key that is known after the last one.

        A chunk is done with when the next is asked for: its buffer may be used again. Readers see
        what was there or all of what is new, at any moment, and go on reading what they began
        with. A write that raises has changed nothing, or (the last reply of an object store was
        lost) all of it; one whose process dies likewise. Of writers at the same time without
        ``replace`` one wins.

        Returns the key. Raises FileExistsError when it is taken and ``replace`` is False; what was
        there is then untouched.
        """

    def read(self, key: str) -> memoryview:
        """The bytes of a key; raises FileNotFoundError."""

    def chunks(self, key: str, *, start: int = 0, cold: bool = False) -> Iterator[memoryview]:
        """The bytes of a key one after the other, each valid until the next is asked for.

        Raises FileNotFoundError; ``start``: from this byte on, without reading those before it,
        nothing from the end on; ``cold``: from the medium, not from a cache of it.
        """

    def size(self, key: str) -> int | None:
        """The size of a key in bytes; None when there is none."""

    def modified(self, key: str) -> float:
        """When a key was written, in seconds since the epoch; raises FileNotFoundError."""

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys under a prefix that ends in ``/``, sorted; what was written before is listed."""

    def delete(self, key: str) -> bool:
        """Remove a key durably; returns whether it was there."""

    def move(self, key: str, to: str) -> bool:
        """Give what lies under a key another one, durably; returns whether it was there.

        One that dies in between leaves it under the old key, the new one, or both.
        """

    def sync(self, prefix: str) -> None:
        """Make durable what reads show under a prefix, also what its writer died over."""

    def free(self) -> int | None:
        """Bytes that can still be written; None when there is no bound."""

    def clean(self) -> None:
        """Remove what writes that a crash broke off left. For the one process that writes."""


def safe_key(key: str) -> str:
    """A key that leads nowhere else; raises `UnsafeName` for any other."""
    parts = key.split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or "\\" in key or not key.isprintable():
        raise UnsafeName(f"{key[:200]!r} can't be a key")
    return key


def as_bytes(chunk: Buffer) -> memoryview:
    """A buffer as bytes; an array with no elements has no bytes."""
    view = memoryview(chunk)
    return view.cast("B") if view.nbytes else memoryview(b"")
