"""Manifests: what a checkpoint is, and the hashes of its files.

A manifest is one sealed JSON object, and never changes; what is changed later lies in `marks`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from everstep.vault import sealed
from everstep.vault.errors import CheckpointDamaged, FormatTooNew
from everstep.vault.keys import CheckpointId

FORMAT_VERSION = 1


class FileRef(BaseModel):
    """A file by its content: BLAKE3 in hex, and size in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    blake3: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """What a checkpoint is.

    Attributes:
        format_version: of this layout.
        kind: ``training``, ``sampler``, ``external`` or ``snapshot``.
        run_id: whose it is.
        name: unique among the run's checkpoints of that kind.
        created_at: when.
        base_model: the base model's name.
        base_fingerprint: a hash of the base model's weights and configuration.
        lora: rank, alpha, seed and what the adapter is put on.
        optimizer: the optimizer's family; None without optimizer state.
        step: how many optimizer steps the state has seen.
        position: the sequence id of the last operation that the state includes.
        request_id: the operation that made it.
        rng: state of random generators, if any.
        parents: paths of the checkpoints it descends from.
        imported: of one that was brought in, where from, and the BLAKE3 of what was.
        user_metadata: the user's.
        expires_at: when it may be collected; None: never.
        public: whether others may read it.
        listed: False for an unnamed sampler save.
        run_metadata: the user's, of the run.
        environment: the numeric environment that made it.
        files: by name, what they hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: int = FORMAT_VERSION
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
    files: dict[str, FileRef]

    @property
    def id(self) -> CheckpointId:
        """Kind, run and name."""
        return CheckpointId(self.kind, self.run_id, self.name)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(ref.size for ref in self.files.values())

    def encode(self) -> bytes:
        """The manifest as it is written."""
        return sealed.encode(self.model_dump(mode="json"))

    @classmethod
    def decode(cls, data: bytes, where: str) -> Manifest:
        """Read a manifest.

        Args:
            data: the file's bytes.
            where: what to call it in an error.

        Raises:
            CheckpointDamaged: it is not what was written.
            FormatTooNew: a newer release wrote it.
        """
        content = sealed.decode(data, f"{where}: the manifest")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatTooNew(
                f"{where}: format {version}; this release reads {FORMAT_VERSION}. Upgrade everstep."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise CheckpointDamaged(f"{where}: the manifest is not valid: {error}") from error
