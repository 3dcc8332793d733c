"""Records: the ledger's rows as dataclasses. Times are aware datetimes in UTC."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from everstep.ledger.payload_log.log import Location
from everstep.spool import Data

SAMPLE = "sample"
"""The kind of operations that belong to a sampler, and whose completions are numbered."""
Status = Literal["pending", "succeeded", "failed"]


def as_strings(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """Return metadata in the protocol's form: values that aren't strings become JSON."""
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
        scope: the run or sampler whose operations are ordered by ``seq_id``.
        seq_id: its sequence id in the scope.
        kind: the name of the operation, such as ``optim_step``.
        payload: its arguments in a canonical form.
        inline: its row holds the payload, however large: statements read it there.
        failure: set for an operation recorded as failed. It consumes its sequence id and is never
            executed.
        session_id: the session it belongs to.
        is_sample: whether its scope is a sampler. A sample keeps the weights that the sampler has
            when it is accepted.
        uses: request ids of the recorded samples that it reads. It restarts their retention.
    """

    scope: str
    seq_id: int
    kind: str
    payload: Data = field(repr=False)
    failure: Failure | None = None
    session_id: str | None = None
    is_sample: bool = False
    uses: tuple[str, ...] = ()
    inline: bool = False


@dataclass(frozen=True)
class Operation:
    """An accepted operation.

    Attributes:
        pruned: its payload was dropped because no replay will need it.
        retrieved: its result was dropped because the client confirmed that it has it.
        weights: for a sample, the checkpoint's path, or None for the base model.
        payload_at: where its payload lies in the payload log, if there.
        result_at: where its result lies in the payload log, if there.
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
    payload_at: Location | None = field(default=None, compare=False, repr=False)
    result_at: Location | None = field(default=None, compare=False, repr=False)

    def without_contents(self) -> Operation:
        """Return it without the payload and result that the payload log holds."""
        payload = self.payload if self.payload_at is None else b""
        result = self.result if self.result_at is None else None
        return replace(self, payload=payload, result=result)


@dataclass(frozen=True)
class OperationRef:
    """The sequence id and kind of an accepted operation."""

    seq_id: int
    kind: str


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        status: ``live``, ``corrupted`` when recovery could not restore it, ``copy`` when it only
            holds copied or imported checkpoints and takes no operations.
        environment: the numeric environment of its results since its newest snapshot.
        fault: why it is corrupted.
        environment_changes: when and how its environment has changed: ``at``, the last ``seq_id``
            of the former one, and ``changed`` by name.
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
    environment_changes: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Backlog:
    """The number of pending operations of a scope, and the kind of one of them."""

    scope: str
    kind: str
    count: int


@dataclass(frozen=True)
class Session:
    """A client's session. ``finished`` is how it ended, ``detail`` the client's reason."""

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
    """A sampling session on a checkpoint or a base model.

    Attributes:
        inflight_run: the run whose newest inflight save it samples from, where it follows one.
        weights_position: the sequence id of that save in the run.
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
class RecordedSample:
    """The tokens and logprobs of a sample, kept for passes that train on its sequences.

    Attributes:
        request_id: the sample's operation.
        session_id: the session that it belongs to.
        prompt: the prompt's token ids, in the encoding of the caller.
        sequences: the sampled tokens and their logprobs, in the encoding of the caller.
        last_used_at: when it was recorded, or accepted last in a pass. None: now.
    """

    request_id: str
    session_id: str
    prompt: bytes = field(repr=False)
    sequences: bytes = field(repr=False)
    last_used_at: datetime | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in the index.

    Attributes:
        listed: False for an unnamed sampler save.
        quarantined: one of its files was found damaged. No client sees it until it is repaired.
        unmarked: its expiry, publication or user metadata changed, and the vault's metadata file
            is not written yet.
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
    """An entry of the audit log.

    Attributes:
        event: ``<resource>_<action>``.
        actor: who did it.
        path: the checkpoint's path, for an event on a checkpoint.
        run_id: that checkpoint's run.
        details: further fields of the event.
        at: when it happened, or None for the time at which it is written.
        number: its position in the log, or None until it is written.
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
    """A token that lets its bearer read one checkpoint. Only its digest is stored."""

    token_id: str
    digest: str
    path: str
    created_at: datetime
    expires_at: datetime | None


RUN, SESSION, SAMPLER = "run", "session", "sampler"
"""Kinds of what can be deleted."""


@dataclass(frozen=True)
class Tombstone:
    """A deleted run, session or sampler.

    Attributes:
        kind: ``run``, ``session`` or ``sampler``.
        deleted_with: the run or session with which it was deleted, or None if it was named itself.
        unfinished: its operations or its files in the vault may still be there.
        details: what it owned, for the answer to a request that is repeated.
    """

    id: str
    kind: str
    deleted_with: str | None
    deleted_at: datetime
    unfinished: bool
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Owned:
    """What is deleted with a run or a session, which is the first of them.

    Attributes:
        kind: ``run`` or ``session``.
        runs: its runs.
        samplers: its samplers, and those that sample from checkpoints of its runs.
        checkpoints: its rows in the index, whatever their state.
        operations: the number of its operations.
        pending: how many of them have not ended.
    """

    id: str
    kind: str
    runs: list[str]
    samplers: list[str]
    checkpoints: list[Checkpoint]
    operations: int
    pending: int


@dataclass(frozen=True)
class Reader:
    """A run that may be brought back, and the last of its operations that loads a checkpoint.

    Attributes:
        pending: whether one of the operations that load a checkpoint has not ended.
    """

    run_id: str
    seq_id: int
    pending: bool
