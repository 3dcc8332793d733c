"""Keys: the storage keys of checkpoints and files, made of checked names."""

from __future__ import annotations

import re
from typing import NamedTuple

from everstep.vault.errors import UnsafeName

SEGMENTS = {
    "training": "weights",
    "sampler": "sampler_weights",
    "external": "external_weights",
}
"""The path segments of the kinds that have paths. Equal to those of `everstep.wire.paths`."""
KINDS = (*SEGMENTS, "snapshot")
BLOBS = "blobs/"
MANIFESTS = "manifests/"
METADATA = "marks/"
_PART = re.compile(r"[A-Za-z0-9_+=-][A-Za-z0-9._+=:-]{0,127}", re.ASCII)


class CheckpointId(NamedTuple):
    """Identifies a checkpoint or a snapshot.

    Attributes:
        kind: one of `KINDS`.
        run_id: its run.
        name: its name, unique in the run among those of its kind.
    """

    kind: str
    run_id: str
    name: str

    def __str__(self) -> str:
        return f"{self.run_id}/{self.kind}/{self.name}"

    @property
    def label(self) -> str:
        """The name of it in messages: its path, if clients know one."""
        return f"checkpoint {self.path}" if self.has_path else f"snapshot {self}"

    @property
    def has_path(self) -> bool:
        """Whether it has a path that clients know. A snapshot has none."""
        return self.kind in SEGMENTS

    @property
    def path(self) -> str:
        """The path that clients know it by, ``tinker://<run>/<segment>/<name>``.

        Raises:
            ValueError: it has none.
        """
        if not self.has_path:
            raise ValueError(f"{self} has no path")
        return f"tinker://{self.run_id}/{SEGMENTS[self.kind]}/{self.name}"


def part(text: str) -> str:
    """Return a part of a key if it is safe as a file name, or raise `UnsafeName`."""
    if not _PART.fullmatch(text):
        raise UnsafeName(f"{text[:200]!r} can't be part of a checkpoint's name")
    return text


def manifest_key(kind: str, run_id: str, name: str) -> str:
    """Return the key of a checkpoint's manifest."""
    return f"{MANIFESTS}{_relative(kind, run_id, name)}"


def metadata_key(kind: str, run_id: str, name: str) -> str:
    """Return the key of a checkpoint's mutable metadata."""
    return f"{METADATA}{_relative(kind, run_id, name)}"


def _relative(kind: str, run_id: str, name: str) -> str:
    if kind not in KINDS:
        raise UnsafeName(f"{kind!r} is not a kind of checkpoint; it is one of {', '.join(KINDS)}")
    return f"{kind}/{part(run_id)}/{part(name)}.json"


def blob_key(digest: str) -> str:
    """Return the key of a file, by its BLAKE3 in hex."""
    return f"{BLOBS}{digest[:2]}/{digest}"


def digest_of(key: str) -> str:
    """Return the hash in a file's key."""
    return key.rsplit("/", 1)[-1]


def checkpoint_of(key: str) -> CheckpointId | None:
    """Return the checkpoint whose manifest or metadata a key names, or None for another key."""
    parts = key.removesuffix(".json").split("/")
    if len(parts) < 3 or not key.endswith(".json") or parts[-3] not in KINDS:
        return None
    return CheckpointId(*parts[-3:])
