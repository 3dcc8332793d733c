"""Ledger model: the promised state of a ledger as dictionaries, for the stateful test."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime

from everstep.ledger import (
    Checkpoint,
    Failure,
    NewOperation,
    Operation,
    Run,
    Sampler,
    SequenceConflict,
    Session,
)
from everstep.spool import as_bytes


@dataclass
class Model:
    """All acknowledged rows. Operations are stored by request id."""

    operations: dict[str, Operation] = field(default_factory=dict)
    seq_ids: dict[tuple[str, int], str] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    details: dict[str, str | None] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    samplers: dict[str, Sampler] = field(default_factory=dict)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)

    def known(
        self, new: NewOperation, replace_failed: bool, match_payload: bool
    ) -> Operation | None:
        """Return the operation that `accept` must find, or None if it must append one.

        Raises:
            SequenceConflict: `accept` must reject it.
        """
        request_id = self.seq_ids.get((new.scope, new.seq_id))
        if request_id is None:
            return None
        known = self.operations[request_id]
        if replace_failed and known.status == "failed":
            return None
        if known.kind != new.kind or (match_payload and known.payload != new.payload):
            raise SequenceConflict
        return known

    def append(self, new: NewOperation, request_id: str, run: Run | None, now: datetime) -> None:
        """Append an operation, with the run that it creates."""
        failed = new.failure is not None
        self.operations[request_id] = Operation(
            request_id=request_id,
            scope=new.scope,
            seq_id=new.seq_id,
            kind=new.kind,
            payload=as_bytes(new.payload),
            status="failed" if failed else "pending",
            result=None,
            media=None,
            failure=new.failure,
            accepted_at=now,
            finished_at=now if failed else None,
            weights=self.samplers[new.scope].model_path
            if new.is_sample and new.scope in self.samplers
            else None,
        )
        self.seq_ids[new.scope, new.seq_id] = request_id
        if run is not None and not failed:
            self.runs[run.run_id] = run
        elif new.scope in self.runs:
            self.runs[new.scope] = replace(self.runs[new.scope], last_request_at=now)

    def succeed(
        self,
        request_id: str,
        result: bytes,
        media: str,
        checkpoint: Checkpoint | None,
        sampler: Sampler | None,
        now: datetime,
    ) -> None:
        """Record a success with everything it created, unless the operation has ended."""
        old = self.operations[request_id]
        if old.status != "pending":
            return
        self.operations[request_id] = replace(
            old, status="succeeded", result=result, media=media, finished_at=now
        )
        if checkpoint is not None:
            self.checkpoints[checkpoint.path] = checkpoint
        if sampler is not None:
            self.samplers[sampler.sampler_id] = sampler

    def fail(self, request_id: str, failure: Failure, now: datetime) -> None:
        """Record a failure, unless the operation has ended, and remove a run that it created."""
        old = self.operations[request_id]
        if old.status != "pending":
            return
        self.operations[request_id] = replace(
            old, status="failed", failure=failure, finished_at=now
        )
        if old.seq_id == 0:
            self.runs.pop(old.scope, None)

    # Expected results of queries

    def in_order(self) -> list[Operation]:
        """All operations that hold a sequence id, in order."""
        return [self.operations[self.seq_ids[key]] for key in sorted(self.seq_ids)]

    def runs_by_use(self) -> list[Run]:
        """The runs, the latest used first."""
        by_id = sorted(self.runs.values(), key=lambda run: run.run_id)
        return sorted(by_id, key=lambda run: run.last_request_at, reverse=True)

    def live(self, now: datetime) -> list[Checkpoint]:
        """The checkpoints that have not expired, by path."""
        return [
            checkpoint
            for _, checkpoint in sorted(self.checkpoints.items())
            if checkpoint.expires_at is None or checkpoint.expires_at > now
        ]

    def listed(self, run_id: str, now: datetime) -> list[Checkpoint]:
        """A run's checkpoints as clients see them, oldest first."""
        mine = [c for c in self.live(now) if c.run_id == run_id and c.listed]
        return sorted(mine, key=lambda c: c.created_at)

    def listed_newest_first(self, now: datetime) -> list[Checkpoint]:
        """All checkpoints as clients see them, newest first."""
        mine = [c for c in self.live(now) if c.listed]
        return sorted(mine, key=lambda c: c.created_at, reverse=True)

    def unlisted_and_unneeded(self) -> list[Checkpoint]:
        """The unnamed sampler saves that no sampler of an open session and no sample needs."""
        open_sessions = {name for name, each in self.sessions.items() if each.finished is None}
        sampled = [s for s in self.samplers.values() if s.session_id in open_sessions]
        waiting = [each for each in self.operations.values() if each.status == "pending"]
        needed = {s.model_path for s in sampled} | {each.weights for each in waiting}
        return [c for c in self.checkpoints.values() if not c.listed and c.path not in needed]
