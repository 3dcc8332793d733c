"""Storage: the seam between the vault and the place where its files lie.

base.py        this seam
local.py       a directory
objects.py     a bucket of an object store
../open.py     chooses one of them for a home

Every write is whole or absent, and durable when the call returns. The docstrings here state the
edge cases. `tests/vault/test_storage.py` holds all implementations to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from everstep.durable_files import Buffer
from everstep.failpoints import Failpoint
from everstep.vault.errors import UnsafeName

WRITTEN = Failpoint("vault.write.written", "a temporary file is written, and not durable")
SYNCED = Failpoint("vault.write.synced", "a file's content is durable, its name is not there")
NAMED = Failpoint("vault.write.named", "a file has its name, and the name is not durable")
DURABLE = Failpoint("vault.write.durable", "a file is durable, and the call has not returned")
REMOVED = Failpoint("vault.delete.removed", "a file is unlinked, and that is not durable")


@dataclass(frozen=True)
class NewContent:
    """A file to be written.

    Attributes:
        chunks: the content. A chunk's buffer may be reused once the next one is asked for.
        key_of: returns the key. Called after the last chunk.
        size: the bytes of all chunks, if known.
        cold: whether nobody is likely to read it soon, so that it needs no place in a cache.
    """

    chunks: Iterable[Buffer]
    key_of: Callable[[], str]
    size: int | None = None
    cold: bool = False


class Storage(Protocol):
    """Files by key: a relative path with ``/``. An unsafe key raises `UnsafeName`."""

    def write(self, chunks: Iterable[Buffer], key_of: Callable[[], str], *, replace: bool) -> str:
        """Write chunks durably under the key that ``key_of`` returns after the last one.

        A chunk's buffer may be reused once the next chunk is asked for. Readers see the old
        content or all of the new one, at any moment, and continue to read the content that they
        opened. A write that raises, or whose process dies, has changed nothing or everything: the
        latter when only the last reply of an object store was lost. Of concurrent writers without
        ``replace`` one wins.

        Returns:
            The key.

        Raises:
            FileExistsError: the key is taken and ``replace`` is False. The old file is untouched.
        """

    def write_all(
        self, files: Sequence[NewContent], last: NewContent | None = None, *, replace: bool = True
    ) -> None:
        """Write several files durably, replacing those under the same keys.

        After an error or a death any of them may be there, each whole.

        Args:
            files: the files. Their chunks are asked for in this order.
            last: a further file. Its chunks are asked for after all others, and its key exists
                only once all others are durable.
            replace: whether the last one may replace another.

        Raises:
            FileExistsError: the last one's key is taken, and ``replace`` is False.
        """

    def read(self, key: str) -> memoryview:
        """Return the bytes of a key, or raise FileNotFoundError."""

    def chunks(self, key: str, *, start: int = 0, cold: bool = False) -> Iterator[memoryview]:
        """Read a key in chunks. Each is valid until the next is asked for.

        Args:
            key: the key.
            start: the first byte. Those before it are not read. At the end or behind it: no chunk.
            cold: read from the medium rather than from a cache.

        Raises:
            FileNotFoundError: the key does not exist.
        """

    def size(self, key: str) -> int | None:
        """Return the size of a key in bytes, or None if it does not exist."""

    def modified(self, key: str) -> float:
        """Return when a key was written, in seconds since the epoch, or raise FileNotFoundError."""

    def keys(self, prefix: str) -> Iterator[str]:
        """List the keys under a prefix that ends in ``/``, sorted. Earlier writes are listed."""

    def delete(self, key: str) -> bool:
        """Remove a key durably. Return whether it existed."""

    def move(self, key: str, to: str) -> bool:
        """Rename a key durably. Return whether it existed.

        A process that dies in between leaves the file under the old key, the new one, or both.
        """

    def sync(self, prefix: str) -> None:
        """Make everything that is visible under a prefix durable, even if its writer died."""

    def free(self) -> int | None:
        """Return how many bytes can still be written, or None if there is no bound."""

    def clean(self) -> None:
        """Remove the temporary files of interrupted writes. Only for the one writing process."""


def safe_key(key: str) -> str:
    """Return a key that is safe as a relative path, or raise `UnsafeName`."""
    parts = key.split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or "\\" in key or not key.isprintable():
        raise UnsafeName(f"{key[:200]!r} can't be a key")
    return key


def as_bytes(chunk: Buffer) -> memoryview:
    """View a buffer as bytes. An array with no elements has no bytes."""
    view = memoryview(chunk)
    return view.cast("B") if view.nbytes else memoryview(b"")
