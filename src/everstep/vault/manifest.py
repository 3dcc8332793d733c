"""Manifests: a checkpoint's description and the hashes of its files.

A manifest is one self-hashed JSON object and never changes. Values that change later are in
`everstep.vault.mutable_metadata`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from everstep.vault import self_hashed_json
from everstep.vault.errors import CheckpointDamaged, FormatTooNew
from everstep.vault.storage.keys import CheckpointId

FORMAT_VERSION = 2
"""The newest layout that this release reads. Whatever earlier releases can read is written as 1."""


class FileRef(BaseModel):
    """A file by its content: BLAKE3 in hex, and size in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    blake3: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """The description of a checkpoint.

    Attributes:
        format_version: version of this layout.
        kind: ``training``, ``sampler``, ``external`` or ``snapshot``.
        run_id: the run that it belongs to.
        name: unique among the run's checkpoints of that kind.
        created_at: time of creation.
        base_model: the base model's name.
        base_fingerprint: hash of the base model's weights and configuration.
        lora: rank, alpha, seed and target modules of the adapter.
        optimizer: the optimizer's family, None without optimizer state.
        step: how many optimizer steps the state has seen.
        position: sequence id of the last operation that the state includes.
        request_id: the operation that created it.
        rng: state of random generators, if any.
        parents: paths of the checkpoints that it descends from.
        imported: source and file hashes of an imported checkpoint.
        user_metadata: the user's tags.
        expires_at: when it expires, None for never.
        public: whether others may read it.
        listed: False for an unnamed sampler save.
        run_metadata: the user's metadata of the run.
        environment: the numeric environment that it was computed in.
        diverged: whether a weight is NaN or infinite. Written only if it is.
        zero_moments: whether the optimizer's moments are zero, and have no file. Layout 2.
        files: hash and size of each file, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: int = 1
    kind: str
    run_id: str
    name: str
    created_at: datetime
    base_model: str
    base_fingerprint: str
    lora: dict[str, Any]
    optimizer: dict[str, Any] | None
    step: int
    position: int
    request_id: str | None = None
    rng: dict[str, Any] = Field(default_factory=dict)
    parents: list[str] = Field(default_factory=list)
    imported: dict[str, str] | None = None
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None
    public: bool = False
    listed: bool = True
    run_metadata: dict[str, str] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    diverged: bool = False
    zero_moments: bool = False
    files: dict[str, FileRef]

    @property
    def id(self) -> CheckpointId:
        """The checkpoint's id."""
        return CheckpointId(self.kind, self.run_id, self.name)

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(ref.size for ref in self.files.values())

    def encode(self) -> bytes:
        """Encode the manifest with its hash."""
        absent = {name for name in ("diverged", "zero_moments") if not getattr(self, name)}
        content = self.model_dump(mode="json", exclude=absent)
        if self.zero_moments:
            content["format_version"] = FORMAT_VERSION
        return self_hashed_json.encode(content)

    @classmethod
    def decode(cls, data: bytes, where: str) -> Manifest:
        """Decode a manifest and verify its hash.

        Args:
            data: the file's bytes.
            where: its name in an error message.

        Raises:
            CheckpointDamaged: the bytes are not those that were written.
            FormatTooNew: a newer release wrote it.
        """
        content = self_hashed_json.decode(data, f"{where}: the manifest")
        version = content.get("format_version")
        if version not in range(1, FORMAT_VERSION + 1):
            raise FormatTooNew(
                f"{where}: format {version}; this release reads up to {FORMAT_VERSION}. "
                "Upgrade everstep."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise CheckpointDamaged(f"{where}: the manifest is not valid: {error}") from error
