"""Hashed content: a file's chunks, hashed while the storage writes them.

Large chunks are hashed by another thread, beside the writing. A thread that writes in the
background (`background_io.lower_priority`) leaves that to idle processors: hashing takes most of
the processor time of a save, and a step of training would wait for it at each of its barriers.
Where processors are never idle, the rest of the file is hashed as if in the foreground.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from blake3 import blake3

from everstep.background_io import is_background, only_idle
from everstep.durable_files import Buffer
from everstep.vault.disk_guard import size_of
from everstep.vault.gc_journal import GcJournal
from everstep.vault.manifest import FileRef
from everstep.vault.storage.base import NewContent, as_bytes
from everstep.vault.storage.keys import blob_key

PATIENCE_SECONDS = 0.05
"""How long a chunk may wait for an idle processor before the rest of the file does not."""
_PARALLEL_FROM = 1 << 20
_hashing = ThreadPoolExecutor(4, "hash")
_hashing_idly = ThreadPoolExecutor(2, "hash idly", initializer=only_idle)


class HashedContent:
    """A file's content that is hashed while it is written.

    Args:
        chunks: the content.
        journal: where the key is noted before the file gets it.
        cold: whether nobody is likely to read it soon.

    Attributes:
        expected: the bytes of all chunks, None if they are generated.
        content: what the storage is to write.
    """

    def __init__(self, chunks: Iterable[Buffer], journal: GcJournal, cold: bool = False) -> None:
        self.expected = size_of(chunks)
        self.content = NewContent(self._read(chunks), self._key, self.expected, cold)
        self._journal = journal
        self._hasher = blake3()
        self._size = 0

    @property
    def ref(self) -> FileRef:
        """Hash and size, once the last chunk was read."""
        return FileRef(blake3=self._hasher.hexdigest(), size=self._size)

    def _read(self, chunks: Iterable[Buffer]) -> Iterator[Buffer]:
        pool = _hashing_idly if is_background() else _hashing
        for chunk in chunks:
            view = as_bytes(chunk)
            self._size += len(view)
            if len(view) < _PARALLEL_FROM:
                self._hasher.update(view)
                yield view
                continue
            hashing = pool.submit(self._hasher.update, view)
            try:
                yield view
            finally:  # the chunk may be reused then
                begin = time.monotonic()
                hashing.result()
                if time.monotonic() - begin > PATIENCE_SECONDS:
                    pool = _hashing

    def _key(self) -> str:
        key = blob_key(self.ref.blake3)
        self._journal.note(key)
        return key
