"""Download content: the bytes of a download, made of a checkpoint's files and literal bytes.

A checkpoint's archive is a plain tar that is never stored. Its headers follow from the names and
sizes of the files, so any range of it can be produced at any time, and is always the same.
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
    """A sequence of bytes.

    Attributes:
        manifest: the checkpoint whose files it contains.
        parts: literal bytes and names of files, in order.
    """

    manifest: Manifest
    parts: tuple[bytes | str, ...]

    def size_of(self, part: bytes | str) -> int:
        """Return the size of a part in bytes."""
        return len(part) if isinstance(part, bytes) else self.manifest.files[part].size

    @property
    def size(self) -> int:
        """Total size in bytes."""
        return sum(map(self.size_of, self.parts))

    @property
    def tag(self) -> str:
        """Identifies the bytes: a file's BLAKE3, or the BLAKE3 of those of all parts."""
        digests = [self._digest(part) for part in self.parts]
        return digests[0] if len(digests) == 1 else blake3("".join(digests).encode()).hexdigest()

    def _digest(self, part: bytes | str) -> str:
        if isinstance(part, bytes):
            return blake3(part).hexdigest()
        return self.manifest.files[part].blake3


def file_content(manifest: Manifest, name: str) -> Content:
    """Return one of a checkpoint's files, or raise `CheckpointNotFound`."""
    if name not in manifest.files:
        raise CheckpointNotFound(f"checkpoint {manifest.id} has no file {name}")
    return Content(manifest, (name,))


def archive_content(manifest: Manifest) -> Content:
    """Return a checkpoint as a tar of its files. An empty last file marks it as complete.

    The tar of a training checkpoint also holds its manifest: step, configuration and file hashes,
    which another service needs to continue from it.
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
    """Return a header without time and owner, which would reveal details of the service."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)  # for sizes over 8 GiB as well


def _joined(parts: list[bytes | str]) -> Iterator[bytes | str]:
    """Join neighbouring literal bytes."""
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
