"""What is downloaded: a sequence of bytes, made of files of a checkpoint and of what stands around.

A checkpoint's archive is a plain tar that is never written down: its headers follow from the
names and sizes of the files, so that any part of it can be had at any time, and is always the same.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from blake3 import blake3

from everstep.vault.errors import CheckpointNotFound
from everstep.vault.manifest import Manifest

_RECORD = 512
_END = bytes(2 * _RECORD)
_COMPLETE = "checkpoint_complete"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Content:
    """Bytes in their order.

    Attributes:
        manifest: of the checkpoint whose files are in it.
        parts: bytes as they are, and names of files.
    """

    manifest: Manifest
    parts: tuple[bytes | str, ...]

    def size_of(self, part: bytes | str) -> int:
        """The size of a part in bytes."""
        return len(part) if isinstance(part, bytes) else self.manifest.files[part].size

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(map(self.size_of, self.parts))

    @property
    def tag(self) -> str:
        """What these bytes are known by: a file's BLAKE3, or a BLAKE3 of those of all parts."""
        digests = [self._digest(part) for part in self.parts]
        return digests[0] if len(digests) == 1 else blake3("".join(digests).encode()).hexdigest()

    def _digest(self, part: bytes | str) -> str:
        if isinstance(part, bytes):
            return blake3(part).hexdigest()
        return self.manifest.files[part].blake3


def file_content(manifest: Manifest, name: str) -> Content:
    """One of a checkpoint's files; raises `CheckpointNotFound` when it has none of that name."""
    if name not in manifest.files:
        raise CheckpointNotFound(f"checkpoint {manifest.id} has no file {name}")
    return Content(manifest, (name,))


def archive_content(manifest: Manifest) -> Content:
    """A checkpoint as a tar: its files, and last an empty one that says that it is complete.

    That of a training checkpoint holds its manifest as well: step, configuration and the hashes
    of the files, without which nobody could go on from them elsewhere.
    """
    parts: list[bytes | str] = []
    for name in sorted(manifest.files):
        size = manifest.files[name].size
        parts += [_header(name, size), name, bytes(-size % _RECORD)]
    if manifest.kind == "training":
        parts.append(_member(_MANIFEST, manifest.encode()))
    parts.append(_member(_COMPLETE, b"") + _END)
    return Content(manifest, tuple(_joined(parts)))


def _member(name: str, content: bytes) -> bytes:
    return _header(name, len(content)) + content + bytes(-len(content) % _RECORD)


def _header(name: str, size: int) -> bytes:
    """A header without time and owner: what they say about the service is nobody's business."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)  # for sizes over 8 GiB as well


def _joined(parts: list[bytes | str]) -> Iterator[bytes | str]:
    """The parts with neighbouring bytes in one."""
    waiting = b""
    for part in parts:
        if isinstance(part, bytes):
            waiting += part
            continue
        if waiting:
            yield waiting
            waiting = b""
        yield part
    if waiting:
        yield waiting
