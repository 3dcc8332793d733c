"""Verified reader: reads ranges of files and never returns a byte that was not written.

A hash covers a whole file. So a file is read through before its first use, and the hashes of its
blocks are cached. A later range costs the blocks that it lies in. Each is checked as it is read.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator

from blake3 import blake3
from cachetools import LRUCache

from everstep.vault.download_content import Content
from everstep.vault.errors import damaged
from everstep.vault.manifest import Manifest
from everstep.vault.storage.keys import blob_key
from everstep.vault.vault import Vault

BLOCK = 1 << 20
_DIGEST = 32
_MAX_BLOCKS = 1 << 18
_MAX_SUMS = 1 << 12


class VerifiedReader:
    """Reads download contents of a vault. Safe to use from several threads.

    Args:
        vault: the vault.
        max_blocks: how many block hashes are cached. Those of least recently used files go first.
    """

    def __init__(self, vault: Vault, max_blocks: int = _MAX_BLOCKS) -> None:
        self._vault = vault
        self._lock = threading.Lock()
        self._blocks: LRUCache[str, bytes] = LRUCache(max_blocks * _DIGEST, getsizeof=len)
        self._sums: LRUCache[str, bytes] = LRUCache(_MAX_SUMS)

    def sha256(self, content: Content) -> bytes:
        """Verify a content and return its SHA-256. Returns at once if it is cached.

        Raises:
            CheckpointDamaged: a file is missing, or its bytes are not those that were written.
        """
        with self._lock:
            known = self._sums.get(content.tag)
        if known is not None:
            return known
        hasher = hashlib.sha256()
        for part in content.parts:
            if isinstance(part, bytes):
                hasher.update(part)
            else:
                self._hash_blocks(content.manifest, part, hasher.update)
        with self._lock:
            self._sums[content.tag] = hasher.digest()
        return hasher.digest()

    def read(self, content: Content, start: int, stop: int) -> Iterator[bytes]:
        """Read the bytes from ``start`` up to ``stop``, a block at a time.

        Raises:
            CheckpointDamaged: a file is missing, or not as written. No wrong byte was returned.
        """
        begin = 0
        for part in content.parts:
            size = content.size_of(part)
            first, last = max(start - begin, 0), min(stop - begin, size)
            if first < last:
                if isinstance(part, bytes):
                    yield part[first:last]
                else:
                    yield from self._part(content.manifest, part, first, last)
            begin += size

    def _part(self, manifest: Manifest, name: str, start: int, stop: int) -> Iterator[bytes]:
        hashes = self._hashes(manifest, name)
        number = start // BLOCK
        for block in self._read(manifest, name, number * BLOCK):
            if blake3(block).digest() != hashes[number * _DIGEST : (number + 1) * _DIGEST]:
                key = blob_key(manifest.files[name].blake3)
                raise damaged(manifest.id.label, name, "changed after it was verified", key)
            at = number * BLOCK
            yield block[max(start - at, 0) : stop - at]
            number += 1
            if number * BLOCK >= stop:
                return
        key = blob_key(manifest.files[name].blake3)
        raise damaged(manifest.id.label, name, "became shorter after it was verified", key)

    def _hashes(self, manifest: Manifest, name: str) -> bytes:
        """Return the concatenated block hashes of a file, verifying it if they aren't cached."""
        digest = manifest.files[name].blake3
        with self._lock:
            known = self._blocks.get(digest)
        if known is not None:
            return known
        return self._hash_blocks(manifest, name, lambda _: None)

    def _hash_blocks(self, manifest: Manifest, name: str, also: Callable[[bytes], None]) -> bytes:
        """Read a file through, cache the hashes of its blocks, and pass each block on.

        Raises:
            CheckpointDamaged: its bytes are not those that were written.
        """
        ref = manifest.files[name]
        hasher = blake3(max_threads=blake3.AUTO)
        found = bytearray()
        for block in self._read(manifest, name, 0):
            hasher.update(block)
            found += blake3(block).digest()
            also(block)
        if hasher.hexdigest() != ref.blake3:
            found_hash = f"hashes to {hasher.hexdigest()[:16]}… instead of {ref.blake3[:16]}…"
            raise damaged(manifest.id.label, name, found_hash, blob_key(ref.blake3))
        with self._lock:
            if len(found) <= self._blocks.maxsize:
                self._blocks[ref.blake3] = bytes(found)
        return bytes(found)

    def _read(self, manifest: Manifest, name: str, start: int) -> Iterator[bytes]:
        """Read a file's blocks from a block boundary on. The last one may be shorter."""
        waiting = bytearray()
        try:
            for chunk in self._vault.storage.chunks(
                blob_key(manifest.files[name].blake3), start=start
            ):
                waiting += chunk
                while len(waiting) >= BLOCK:
                    yield bytes(waiting[:BLOCK])
                    del waiting[:BLOCK]
        except FileNotFoundError as error:
            raise self._vault.missing(manifest, name) from error
        if waiting:
            yield bytes(waiting)
