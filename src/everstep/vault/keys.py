"""Keys: where checkpoints and files lie in a storage, from names that were checked."""

from __future__ import annotations

import re
from typing import NamedTuple

from everstep.vault.errors import UnsafeName

KINDS = ("training", "sampler", "external", "snapshot")
BLOBS = "blobs/"
MANIFESTS = "manifests/"
MARKS = "marks/"
_PART = re.compile(r"[A-Za-z0-9_+=-][A-Za-z0-9._+=:-]{0,127}", re.ASCII)


class CheckpointId(NamedTuple):
    """Which checkpoint: unique in a vault."""

    kind: str
    run_id: str
    name: str

    def __str__(self) -> str:
        return f"{self.run_id}/{self.kind}/{self.name}"


def part(text: str) -> str:
    """A part of a key, checked: nothing else becomes a file name."""
    if not _PART.fullmatch(text):
        raise UnsafeName(f"{text[:200]!r} can't be part of a checkpoint's name")
    return text


def manifest_key(kind: str, run_id: str, name: str) -> str:
    """Where a checkpoint's manifest lies."""
    return f"{MANIFESTS}{_place(kind, run_id, name)}"


def marks_key(kind: str, run_id: str, name: str) -> str:
    """Where a checkpoint's marks lie."""
    return f"{MARKS}{_place(kind, run_id, name)}"


def _place(kind: str, run_id: str, name: str) -> str:
    if kind not in KINDS:
        raise UnsafeName(f"{kind!r} is not a kind of checkpoint; it is one of {', '.join(KINDS)}")
    return f"{kind}/{part(run_id)}/{part(name)}.json"


def blob_key(digest: str) -> str:
    """Where a file lies."""
    return f"{BLOBS}{digest[:2]}/{digest}"


def digest_of(key: str) -> str:
    """The hash that a file's key says."""
    return key.rsplit("/", 1)[-1]


def checkpoint_of(key: str) -> CheckpointId | None:
    """The checkpoint whose manifest or marks lie under a key; None for any other key."""
    parts = key.removesuffix(".json").split("/")
    if len(parts) < 3 or not key.endswith(".json") or parts[-3] not in KINDS:
        return None
    return CheckpointId(*parts[-3:])
