"""Reading parts of files, verified: a byte that is not what was written is never handed out.

A file's hash is that of all of it. So it is read through before anything of it is used for the
first time, and the hashes of its blocks are kept; from then on a part costs the blocks that it
lies in, each checked as it is read.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

from blake3 import blake3

from everstep.vault.content import Content
from everstep.vault.errors import CheckpointDamaged
from everstep.vault.keys import blob_key
from everstep.vault.manifest import Manifest
from everstep.vault.vault import Vault

BLOCK = 1 << 20
_DIGEST = 32
_MOST_BLOCKS = 1 << 18
_MOST_SUMS = 1 << 12


class VerifiedReader:
    """Reads contents of a vault; safe to use from several threads.

    Args:
        vault: the vault.
        most_blocks: of how many blocks the hashes are kept, those of the files used last.
    """

    def __init__(self, vault: Vault, most_blocks: int = _MOST_BLOCKS) -> None:
        self._vault = vault
        self._most_blocks = most_blocks
        self._lock = threading.Lock()
        self._blocks: OrderedDict[str, bytes] = OrderedDict()
        self._sums: OrderedDict[str, bytes] = OrderedDict()

    def sha256(self, content: Content) -> bytes:
        """Read a content through, verified; returns its SHA-256. At once when it is known.

        Raises:
            CheckpointDamaged: a file is missing, or not what was written.
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
                self._survey(content.manifest, part, hasher.update)
        with self._lock:
            self._sums[content.tag] = hasher.digest()
            while len(self._sums) > _MOST_SUMS:
                self._sums.popitem(last=False)
        return hasher.digest()

    def read(self, content: Content, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``stop``, a block at a time.

        Raises:
            CheckpointDamaged: a file is missing, or not what was written; nothing wrong was given.
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
                raise CheckpointDamaged(
                    f"checkpoint {manifest.id}: {name} changed after it was verified",
                    blob_key(manifest.files[name].blake3),
                )
            at = number * BLOCK
            yield block[max(start - at, 0) : stop - at]
            number += 1
            if number * BLOCK >= stop:
                return
        raise CheckpointDamaged(
            f"checkpoint {manifest.id}: {name} became shorter after it was verified",
            blob_key(manifest.files[name].blake3),
        )

    def _hashes(self, manifest: Manifest, name: str) -> bytes:
        """The hashes of a file's blocks, one behind the other; of a file that is sound."""
        digest = manifest.files[name].blake3
        with self._lock:
            known = self._blocks.get(digest)
            if known is not None:
                self._blocks.move_to_end(digest)
                return known
        return self._survey(manifest, name, lambda _: None)

    def _survey(self, manifest: Manifest, name: str, also: Callable[[bytes], None]) -> bytes:
        """Read a file through, keep the hashes of its blocks, and hand each block on.

        Raises:
            CheckpointDamaged: it is not what was written.
        """
        ref = manifest.files[name]
        hasher = blake3(max_threads=blake3.AUTO)
        found = bytearray()
        for block in self._read(manifest, name, 0):
            hasher.update(block)
            found += blake3(block).digest()
            also(block)
        if hasher.hexdigest() != ref.blake3:
            raise CheckpointDamaged(
                f"checkpoint {manifest.id}: {name} hashes to {hasher.hexdigest()[:16]}… instead "
                f"of {ref.blake3[:16]}…",
                blob_key(ref.blake3),
            )
        with self._lock:
            self._blocks[ref.blake3] = bytes(found)
            while sum(map(len, self._blocks.values())) > self._most_blocks * _DIGEST:
                self._blocks.popitem(last=False)
        return bytes(found)

    def _read(self, manifest: Manifest, name: str, start: int) -> Iterator[bytes]:
        """A file's blocks from a multiple of their size on; the last one is what is left."""
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
