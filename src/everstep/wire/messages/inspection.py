"""Inspection, an extension of Everstep: service info, checkpoint details, verification, tags."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field, field_validator

from everstep.wire.base import Request, Response

_MAX_KEY_LENGTH = 256
_MAX_VALUE_LENGTH = 10_000
_MAX_TAGS = 100


class EnvironmentChange(Response):
    """A change of the numeric environment of a run, which went on within a tolerance.

    Attributes:
        at: when the run was snapshotted in the new environment.
        seq_id: the last operation whose result is of the former one.
        changed: what has changed, by name.
    """

    at: datetime
    seq_id: int
    changed: dict[str, str]


class ServiceInfoResponse(Response):
    """The service's release, and whether requests succeed now.

    Attributes:
        refused_models: the models that can't be served, by name, with the reason.
    """

    service: Literal["everstep"] = "everstep"
    version: str
    ready: bool
    refused_models: dict[str, str] = Field(default_factory=dict)


class CheckpointRequest(Request):
    """Names one checkpoint."""

    tinker_path: str


class CheckpointFile(Response):
    """A file of a checkpoint: its size in bytes, and its BLAKE3 in hex."""

    name: str
    size_bytes: int
    blake3: str


class CheckpointDetailsResponse(Response):
    """The details of a checkpoint.

    Attributes:
        tinker_path: the checkpoint's path.
        created_at: when it was saved.
        base_model: its base model's name.
        base_fingerprint: a hash of the base model's weights and configuration.
        lora: rank, alpha, seed and the adapted layers.
        optimizer: the optimizer's family, None without optimizer state.
        step: the number of optimizer steps.
        parents: the paths of its ancestors.
        imported: for an imported checkpoint, the source and the BLAKE3 of its files.
        user_metadata: its present user metadata.
        environment: the numeric environment in which it was made.
        diverged: whether it was saved with weights that are NaN or infinite.
        files: its files.
        peft_parameters: last names of modules that PEFT must find in ``target_parameters``.
        notes: what other programs can't load of it, and why.
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
    diverged: bool = False
    files: list[CheckpointFile]
    peft_parameters: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class VerifiedFile(CheckpointFile):
    """A file that was read and hashed, with an ``error`` if it is damaged."""

    error: str | None = None


class VerifyCheckpointResponse(Response):
    """The result of a verification.

    Attributes:
        tinker_path: the checkpoint's path.
        ok: whether its files are intact.
        files: its files.
        error: why it could not be read at all.
        diverged: whether a weight is NaN or infinite. Intact files may hold such weights.
    """

    tinker_path: str
    ok: bool
    files: list[VerifiedFile]
    error: str | None = None
    diverged: bool = False


class TagCheckpointRequest(Request):
    """Changes a checkpoint's ``user_metadata``.

    Attributes:
        tinker_path: the checkpoint's path.
        tags: the pairs to set.
        remove: the keys to remove. An unknown key is no error.
    """

    tinker_path: str
    tags: dict[str, str] = Field(default_factory=dict)
    remove: list[str] = Field(default_factory=list, max_length=_MAX_TAGS)

    @field_validator("tags")
    @classmethod
    def _bounded(cls, tags: dict[str, str]) -> dict[str, str]:
        if len(tags) > _MAX_TAGS:
            raise ValueError(f"at most {_MAX_TAGS} at once; got {len(tags)}")
        for key, value in tags.items():
            if not 0 < len(key) <= _MAX_KEY_LENGTH or len(value) > _MAX_VALUE_LENGTH:
                raise ValueError(
                    f"a key has 1 to {_MAX_KEY_LENGTH} characters and a value at most "
                    f"{_MAX_VALUE_LENGTH:,}; got {key[:_MAX_KEY_LENGTH]!r} with {len(value):,}"
                )
        return tags


class TagCheckpointResponse(Response):
    """The checkpoint's present ``user_metadata``."""

    tinker_path: str
    user_metadata: dict[str, str]
