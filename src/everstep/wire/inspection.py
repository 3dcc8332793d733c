"""What an Everstep service tells of itself and of one checkpoint, beyond the protocol.

Its release; what a checkpoint is made of; whether that is as it was written; and tags.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field, field_validator

from everstep.wire.base import Request, Response

_LONGEST_KEY = 256
_LONGEST_VALUE = 10_000
_MOST_TAGS = 100


class ServiceInfoResponse(Response):
    """What the service is; ``ready``: requests succeed now."""

    service: Literal["everstep"] = "everstep"
    version: str
    ready: bool


class CheckpointRequest(Request):
    """Asks about one checkpoint."""

    tinker_path: str


class CheckpointFile(Response):
    """A file of a checkpoint: its size in bytes, and its BLAKE3 in hex."""

    name: str
    size_bytes: int
    blake3: str


class CheckpointDetailsResponse(Response):
    """What a checkpoint is made of.

    Attributes:
        tinker_path: of the checkpoint.
        created_at: when it was saved.
        base_model: its base model's name.
        base_fingerprint: a hash of the base model's weights and configuration.
        lora: rank, alpha, seed and what the adapter is put on.
        optimizer: its family; None without optimizer state.
        step: how many optimizer steps the state has seen.
        parents: paths of the checkpoints that it descends from.
        imported: of one that was brought in, where from, and the BLAKE3 of what was.
        user_metadata: as it is now.
        environment: the numeric environment that made it.
        files: what it holds.
    """

    tinker_path: str
    created_at: datetime
    base_model: str
    base_fingerprint: str
    lora: dict[str, Any]
    optimizer: dict[str, Any] | None
    step: int
    parents: list[str]
    imported: dict[str, str] | None = None
    user_metadata: dict[str, str] | None
    environment: dict[str, Any]
    files: list[CheckpointFile]


class VerifiedFile(CheckpointFile):
    """A file that was read through; ``error``: what is wrong with it, None where nothing is."""

    error: str | None = None


class VerifyCheckpointResponse(Response):
    """Whether a checkpoint is as it was written; ``error``: why nothing could be read."""

    tinker_path: str
    ok: bool
    files: list[VerifiedFile]
    error: str | None = None


class TagCheckpointRequest(Request):
    """Changes a checkpoint's ``user_metadata``.

    Attributes:
        tinker_path: of the checkpoint.
        tags: what is set.
        remove: what is taken away; a key that is not there is no error.
    """

    tinker_path: str
    tags: dict[str, str] = Field(default_factory=dict)
    remove: list[str] = Field(default_factory=list, max_length=_MOST_TAGS)

    @field_validator("tags")
    @classmethod
    def _bounded(cls, tags: dict[str, str]) -> dict[str, str]:
        if len(tags) > _MOST_TAGS:
            raise ValueError(f"at most {_MOST_TAGS} at once; got {len(tags)}")
        for key, value in tags.items():
            if not 0 < len(key) <= _LONGEST_KEY or len(value) > _LONGEST_VALUE:
                raise ValueError(
                    f"a key has 1 to {_LONGEST_KEY} characters and a value at most "
                    f"{_LONGEST_VALUE:,}; got {key[:_LONGEST_KEY]!r} with {len(value):,}"
                )
        return tags


class TagCheckpointResponse(Response):
    """The checkpoint's ``user_metadata`` as it is now."""

    tinker_path: str
    user_metadata: dict[str, str]
