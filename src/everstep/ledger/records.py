"""The ledger's records. Times are aware datetimes in UTC."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Status = Literal["pending", "succeeded", "failed"]


def as_texts(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """Metadata as the protocol reads it back: what isn't text is told as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in (metadata or {}).items()
    }


@dataclass(frozen=True)
class Failure:
    """Why an operation failed, and whose fault it is (``user``, ``server``)."""

    message: str
    category: str


@dataclass(frozen=True)
class NewOperation:
    """An operation to accept.

    Attributes:
        scope: what orders it: a run's id, or a sampler's.
        seq_id: its place in the scope.
        kind: what it does.
        payload: what it does it with, in a canonical form.
        failure: set when it is born failed: it takes its place and is never executed.
        session_id: the session it belongs to.
        samples: whether it is a sample, and its scope a sampler; it keeps the weights that the
            sampler has when it is accepted.
    """

    scope: str
    seq_id: int
    kind: str
    payload: bytes = field(repr=False)
    failure: Failure | None = None
    session_id: str | None = None
    samples: bool = False


@dataclass(frozen=True)
class Operation:
    """An accepted operation.

    Attributes:
        pruned: its payload was dropped, no replay should need it.
        retrieved: its result was dropped, its client said that it has it.
        weights: of a sample, the path of the checkpoint; None: of the base model.
    """

    request_id: str
    scope: str
    seq_id: int
    kind: str
    payload: bytes = field(repr=False)
    status: Status
    result: bytes | None = field(repr=False)
    media: str | None
    failure: Failure | None
    accepted_at: datetime
    finished_at: datetime | None
    pruned: bool = False
    retrieved: bool = False
    weights: str | None = None


@dataclass(frozen=True)
class Place:
    """A place that is taken in a scope, and by what kind of operation."""

    seq_id: int
    kind: str


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        status: ``live``; ``corrupted``: recovery found that it can't be brought back; ``copy``: it
            holds copies of checkpoints, or imported ones, and takes no operations.
        environment: the numeric environment of its results since its newest snapshot.
        fault: why it is corrupted.
    """

    run_id: str
    session_id: str
    base_model: str
    lora: dict[str, Any]
    optimizer: dict[str, Any]
    user_metadata: dict[str, str]
    created_at: datetime
    last_request_at: datetime
    status: str = "live"
    environment: dict[str, Any] | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Backlog:
    """How many operations of a scope wait, and the kind of one of them."""

    scope: str
    kind: str
    count: int


@dataclass(frozen=True)
class Session:
    """A client's session; ``finished`` is how it ended, ``detail`` what its client said of that."""

    session_id: str
    user_metadata: dict[str, Any]
    tags: list[str]
    sdk_version: str
    project_id: str | None
    display_name: str | None
    created_at: datetime
    last_seen_at: datetime
    finished: str | None = None
    detail: str | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True)
class Sampler:
    """What a sampling session samples from: a checkpoint, or a base model.

    Attributes:
        inflight_run: the run whose newest inflight save it samples from, where it follows one.
        weights_position: the place of that save in the run.
        clients: how many clients have joined the one that created it.
    """

    sampler_id: str
    session_id: str
    base_model: str
    model_path: str | None
    created_at: datetime
    inflight_run: str | None = None
    weights_position: int | None = None
    clients: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in the index.

    Attributes:
        listed: False for an unnamed sampler save.
        quarantined: a file of it was found damaged; it exists for no client until that is healed.
        unmarked: its lifetime, publication or tags were changed, and the vault has not been told.
    """

    path: str
    run_id: str
    kind: str
    name: str
    created_at: datetime
    size_bytes: int
    base_model: str
    lora: dict[str, Any]
    optimizer: dict[str, Any] | None
    user_metadata: dict[str, str] | None
    expires_at: datetime | None
    public: bool = False
    listed: bool = True
    quarantined: bool = False
    unmarked: bool = False


@dataclass(frozen=True)
class Event:
    """Something that was done, for the audit log.

    Attributes:
        event: ``<resource>_<action>``.
        actor: who did it.
        path: of the checkpoint that it was done to, if it was one.
        run_id: of that checkpoint.
        details: whatever else belongs to it.
        at: when; None: as it is written.
        number: its place in the log; None until it is written.
    """

    event: str
    actor: str
    path: str | None = None
    run_id: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    at: datetime | None = None
    number: int | None = None


@dataclass(frozen=True)
class WeightsToken:
    """A token that lets its bearer read one checkpoint; only its digest is kept."""

    token_id: str
    digest: str
    path: str
    created_at: datetime
    expires_at: datetime | None
