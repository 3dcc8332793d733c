"""Stateful test of the ledger against a model, through restarts and crashes.

A crash is a copy of the database file and its write-ahead log, taken without closing anything,
which the next ledger opens. One kind of crash takes the copy inside an open transaction, between
the writes of requests in flight.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from everstep.ledger import (
    Checkpoint,
    Failure,
    Ledger,
    NewOperation,
    Run,
    Sampler,
    SequenceConflict,
    Session,
    queries,
)
from tests.ledger.model import Model
from tests.profiles import example_count

Result = TypeVar("Result")

RUNS = ["run-a", "run-b"]
SCOPES = [*RUNS, "sampler-x"]
KINDS = ["optim_step", "save_state"]
KEYS = [None, "key-1", "key-2"]

payloads = st.sampled_from([b"", b"one", b"two"])
failures = st.builds(
    Failure, st.sampled_from(["no", "nö \U0001f600 '\"\0"]), st.sampled_from(["user", "server"])
)
numbers = st.integers(0, 50)
sometimes = st.sampled_from([False, False, True])


class LedgerMachine(RuleBasedStateMachine):
    """Rules do the same to a ledger and to its model."""

    @initialize()
    def begin(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="everstep-ledger-"))
        self.loop = asyncio.new_event_loop()
        self.moment = datetime(2026, 1, 1, tzinfo=UTC)
        self.clock = mock.patch.object(queries, "now", lambda: self.moment)
        self.clock.start()
        self.model = Model()
        self.crashes = 0
        self.path = self.home / "0.sqlite"
        self.ledger = self.wait(Ledger.open(self.path))

    def teardown(self) -> None:
        try:
            self.check_everything()
        finally:
            self.wait(self.ledger.close())
            self.clock.stop()
            self.wait(self.loop.shutdown_default_executor())
            self.loop.close()
            shutil.rmtree(self.home)

    def wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    # Operations

    def accept(
        self,
        new: NewOperation,
        run: Run | None = None,
        replace_failed: bool = False,
        match_payload: bool = True,
    ) -> None:
        call = self.ledger.accept(
            new, run=run, replace_failed=replace_failed, match_payload=match_payload
        )
        try:
            known = self.model.known(new, replace_failed, match_payload)
        except SequenceConflict:
            with pytest.raises(SequenceConflict, match=str(new.seq_id)):
                self.wait(call)
            return
        operation, is_new = self.wait(call)
        assert is_new == (known is None)
        if known is None:
            assert operation.request_id not in self.model.operations
            self.model.append(new, operation.request_id, run, self.moment)
            known = self.model.operations[operation.request_id]
        assert operation == known

    @rule(
        scope=st.sampled_from(SCOPES),
        seq_id=st.integers(1, 4),
        kind=st.sampled_from(KINDS),
        payload=payloads,
        failure=st.none() | failures,
        match_payload=st.booleans(),
    )
    def accept_operation(
        self,
        scope: str,
        seq_id: int,
        kind: str,
        payload: bytes,
        failure: Failure | None,
        match_payload: bool,
    ) -> None:
        samples = scope == "sampler-x"
        new = NewOperation(scope, seq_id, kind, payload, failure, "session-0", is_sample=samples)
        self.accept(new, match_payload=match_payload)

    @rule(run_id=st.sampled_from(RUNS), payload=payloads, failure=st.none() | st.none() | failures)
    def accept_creation(self, run_id: str, payload: bytes, failure: Failure | None) -> None:
        new = NewOperation(run_id, 0, "create_model", payload, failure)
        self.accept(new, run=self.run_record(run_id), replace_failed=True)

    @precondition(lambda self: self.model.seq_ids)
    @rule(index=numbers, change=st.booleans())
    def retry(self, index: int, change: bool) -> None:
        known = pick(self.model.in_order(), index)
        payload = known.payload + b"!" if change else known.payload
        self.accept(NewOperation(known.scope, known.seq_id, known.kind, payload, known.failure))

    @precondition(lambda self: self.model.operations)
    @rule(
        index=numbers,
        late=sometimes,
        result=payloads,
        media=st.sampled_from(["json", "protobuf"]),
        checkpoint=st.booleans(),
        sampler=st.booleans(),
        data=st.data(),
    )
    def succeed(
        self,
        index: int,
        late: bool,
        result: bytes,
        media: str,
        checkpoint: bool,
        sampler: bool,
        data: st.DataObject,
    ) -> None:
        request_id = pick(self.ids(late), index)
        made = data.draw(self.checkpoint_records()) if checkpoint else None
        served = self.sampler_record("sampler-x") if sampler else None
        operation = self.wait(
            self.ledger.succeed(
                request_id, result, media, checkpoint=made, sampler=served, seconds=0.5
            )
        )
        self.model.succeed(request_id, result, media, made, served, self.moment)
        assert operation == self.model.operations[request_id]

    @precondition(lambda self: self.model.operations)
    @rule(index=numbers, late=sometimes, failure=failures)
    def fail(self, index: int, late: bool, failure: Failure) -> None:
        request_id = pick(self.ids(late), index)
        operation = self.wait(self.ledger.fail(request_id, failure.message, failure.category))
        self.model.fail(request_id, failure, self.moment)
        assert operation == self.model.operations[request_id]

    def ids(self, ended: bool) -> list[str]:
        """The ids of operations that ended or did not, or of all operations if there are none."""
        operations = self.model.operations
        return [
            key for key, each in operations.items() if (each.status != "pending") == ended
        ] or list(operations)

    @rule(data=st.data())
    def save_checkpoint(self, data: st.DataObject) -> None:
        new = NewOperation("run-a", 50 + len(self.model.operations), "save_state", b"")
        self.accept(new)
        request_id = self.model.seq_ids[new.scope, new.seq_id]
        made = data.draw(self.checkpoint_records())
        self.wait(self.ledger.succeed(request_id, b"{}", "json", checkpoint=made))
        self.model.succeed(request_id, b"{}", "json", made, None, self.moment)

    @rule(run_id=st.sampled_from(RUNS), failure=failures)
    def fail_a_creation_and_create_again(self, run_id: str, failure: Failure) -> None:
        new = NewOperation(run_id, 0, "create_model", b"")
        for _ in range(2):
            self.accept(new, run=self.run_record(run_id), replace_failed=True)
            first = self.model.seq_ids[run_id, 0]
            operation = self.wait(self.ledger.fail(first, failure.message, failure.category))
            self.model.fail(first, failure, self.moment)
            assert operation == self.model.operations[first]
        self.accept(new, run=self.run_record(run_id), replace_failed=True)

    # Sessions and samplers

    @rule(name=st.sampled_from(["session-0", "session-1"]), key=st.sampled_from(KEYS))
    def open_session(self, name: str, key: str | None) -> None:
        if name in self.model.sessions and key not in self.model.keys:
            return  # session ids are made by the service and never come twice
        session = Session(name, {"é": [1]}, ["t"], "0.1", None, "d", self.moment, self.moment, None)
        known = self.wait(self.ledger.create_session(session, key))
        if key is not None and key in self.model.keys:
            session = self.model.sessions[self.model.keys[key]]
        elif key is not None:
            self.model.keys[key] = name
        self.model.sessions[session.session_id] = session
        self.model.details.setdefault(session.session_id, None)
        assert known == session

    @precondition(lambda self: self.model.sessions)
    @rule(index=numbers, reason=st.sampled_from(["done", "error"]), detail=st.none() | st.text())
    def finish_session(self, index: int, reason: str, detail: str | None) -> None:
        name = pick(list(self.model.sessions), index)
        self.wait(self.ledger.finish_session(name, reason, detail))
        session = self.model.sessions[name]
        if session.finished is None:
            self.model.sessions[name] = changed(
                session, finished=reason, detail=detail, finished_at=self.moment
            )
            self.model.details[name] = detail

    @precondition(lambda self: self.model.sessions)
    @rule(index=numbers)
    def touch_session(self, index: int) -> None:
        name = pick(list(self.model.sessions), index)
        self.wait(self.ledger.touch_session(name))
        self.model.sessions[name] = changed(self.model.sessions[name], last_seen_at=self.moment)

    @rule(name=st.sampled_from(["sampler-x", "sampler-y"]), model=st.sampled_from(["m", "n"]))
    def create_sampler(self, name: str, model: str) -> None:
        sampler = Sampler(name, "session-0", model, None, self.moment)
        first = self.model.samplers.setdefault(name, sampler)
        assert self.wait(self.ledger.create_sampler(sampler)) == first

    # Checkpoints and time

    @rule(path=st.integers(0, 5))
    def delete_checkpoint(self, path: int) -> None:
        there = self.model.checkpoints.pop(f"path-{path}", None) is not None
        assert self.wait(self.ledger.delete_checkpoint(f"path-{path}")) == there

    @rule(seconds=st.sampled_from([0.000001, 1, 60, 3600]))
    def time_passes(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)

    @rule(limit=st.integers(0, 4), offset=st.integers(0, 3))
    def list_pages(self, limit: int, offset: int) -> None:
        end = offset + limit
        runs = self.model.runs_by_use()
        assert self.wait(self.ledger.search.list_runs(limit, offset)) == (
            runs[offset:end],
            len(runs),
        )
        checkpoints = self.model.listed_newest_first(self.moment)
        assert self.wait(self.ledger.search.list_checkpoints(limit, offset)) == (
            checkpoints[offset:end],
            len(checkpoints),
        )

    # Restarts and crashes

    @rule()
    def restart(self) -> None:
        self.wait(self.ledger.close())
        self.ledger = self.wait(Ledger.open(self.path))
        self.check_everything()

    @rule()
    def crash(self) -> None:
        self.go_on_with(self.copy())

    @rule(
        before=st.lists(st.sampled_from(SCOPES), max_size=3),
        after=st.lists(st.sampled_from(SCOPES), max_size=2),
        payload=payloads,
    )
    def crash_in_a_transaction(self, before: list[str], after: list[str], payload: bytes) -> None:
        sent = [
            NewOperation(scope, 100 + len(self.model.operations) + i, "optim_step", payload)
            for i, scope in enumerate(before + after)
        ]
        copies: list[Path] = []
        acknowledged: dict[int, str] = {}
        answered_at_crash: set[int] = set()

        async def send(index: int) -> None:
            operation, is_new = await self.ledger.accept(sent[index])
            assert is_new
            acknowledged[index] = operation.request_id

        def crash(_connection: Any) -> None:  # runs between the writes of a transaction
            answered_at_crash.update(acknowledged)
            copies.append(self.copy())

        async def all_at_once() -> None:
            tasks = [asyncio.ensure_future(send(i)) for i in range(len(before))]
            tasks.append(asyncio.ensure_future(self.ledger._store.run(crash)))
            tasks += [asyncio.ensure_future(send(i)) for i in range(len(before), len(sent))]
            await asyncio.gather(*tasks)

        self.wait(all_at_once())
        self.wait(self.ledger.close())
        self.ledger = self.wait(Ledger.open(copies[0]))
        self.path = copies[0]
        for index, new in enumerate(sent):  # each was lost whole, or is there as it was sent
            operation, is_new = self.wait(self.ledger.accept(new))
            assert not (is_new and index in answered_at_crash)
            assert is_new or operation.request_id == acknowledged[index]
            self.model.append(new, operation.request_id, None, self.moment)
        self.check_everything()

    def copy(self) -> Path:
        self.crashes += 1
        copy = self.home / f"{self.crashes}.sqlite"
        for suffix in ("", "-wal"):
            source = self.path.with_name(self.path.name + suffix)
            if source.exists():
                shutil.copyfile(source, copy.with_name(copy.name + suffix))
        return copy

    def go_on_with(self, copy: Path) -> None:
        self.wait(self.ledger.close())
        self.path = copy
        self.ledger = self.wait(Ledger.open(copy))
        self.check_everything()

    # What must hold

    @invariant()
    def pending_work_is_known(self) -> None:
        if not hasattr(self, "ledger"):
            return
        pending = [o for o in self.model.in_order() if o.status == "pending"]
        waiting: dict[str, int] = {}
        for operation in pending:
            waiting[operation.scope] = waiting.get(operation.scope, 0) + 1
        backlog = self.wait(self.ledger.backlog())
        assert {each.scope: each.count for each in backlog} == waiting
        assert [each.count for each in backlog] == sorted(waiting.values(), reverse=True)
        for scope in waiting:
            mine = [operation for operation in pending if operation.scope == scope]
            assert self.wait(self.ledger.operations(scope, status="pending")) == mine

    @invariant()
    def checkpoints_are_listed_oldest_first(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for run_id in RUNS:
            expected = self.model.listed(run_id, self.moment)
            assert self.wait(self.ledger.checkpoints(run_id)) == expected

    def check_everything(self) -> None:
        """Every acknowledged row exists once, and no others."""
        ask = self.ledger
        for request_id, operation in self.model.operations.items():
            assert self.wait(ask.operation(request_id)) == operation
        in_order = self.model.in_order()
        for scope in SCOPES:
            mine = [o for o in in_order if o.scope == scope]
            assert self.wait(ask.operations(scope)) == mine
            assert self.wait(ask.operations(scope, after=2, status="failed")) == [
                o for o in mine if o.seq_id > 2 and o.status == "failed"
            ]
            for seq_id in range(5):
                found = self.model.seq_ids.get((scope, seq_id))
                there = self.wait(ask.operation_by_seq_id(scope, seq_id))
                assert (there and there.request_id) == found
        runs = self.model.runs_by_use()
        assert self.wait(ask.search.list_runs(10, 0)) == (runs, len(runs))
        for run_id in RUNS:
            assert self.wait(ask.run(run_id)) == self.model.runs.get(run_id)
        for session_id, session in self.model.sessions.items():
            assert self.wait(ask.session(session_id)) == session
        for name in ("sampler-x", "sampler-y"):
            assert self.wait(ask.sampler(name)) == self.model.samplers.get(name)
        live = {c.path: c for c in self.model.live(self.moment)}
        for number in range(6):
            path = f"path-{number}"
            assert self.wait(ask.checkpoint(path)) == live.get(path)
        ended = sorted(c.path for c in self.model.unlisted_and_unneeded())
        assert [c.path for c in self.wait(ask.search.unneeded_sampler_saves())] == ended
        self.check_rows()

    def check_rows(self) -> None:
        """No row exists that was not acknowledged."""
        copy = self.copy()
        connection = sqlite3.connect(copy)
        count = {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("operations", "runs", "sessions", "samplers", "checkpoints")
        }
        details = dict(connection.execute("SELECT session_id, detail FROM sessions"))
        connection.close()
        assert count == {table: len(getattr(self.model, table)) for table in count}
        assert details == self.model.details

    # Records

    def run_record(self, run_id: str) -> Run:
        return Run(run_id, "session-0", "m", {"rank": 4}, {}, {"k": "v"}, self.moment, self.moment)

    def sampler_record(self, sampler_id: str) -> Sampler:
        return Sampler(sampler_id, "session-0", "m", "path-0", self.moment)

    def checkpoint_records(self) -> st.SearchStrategy[Checkpoint]:
        expiries = st.sampled_from([None, -1, 0, 1, 60, 3600])
        return st.builds(
            Checkpoint,
            path=st.integers(0, 5).map(lambda number: f"path-{number}"),
            run_id=st.sampled_from(RUNS),
            kind=st.just("training"),
            name=st.just("n"),
            created_at=st.just(self.moment),
            size_bytes=st.sampled_from([0, 1 << 40]),
            base_model=st.just("m"),
            lora=st.just({"rank": 4}),
            optimizer=st.sampled_from([None, {"type": "adam"}]),
            user_metadata=st.sampled_from([None, {"k": "\u2028"}]),
            expires_at=expiries.map(lambda s: None if s is None else self.moment + timedelta(0, s)),
            listed=st.booleans(),
        )


def pick(items: list[Result], index: int) -> Result:
    return items[index % len(items)]


def changed(record: Session, **values: Any) -> Session:
    return Session(**{**vars(record), **values})


TestLedger = pytest.mark.long(reason="40 histories of 25 steps, each with restarts and crashes")(
    LedgerMachine.TestCase
)
TestLedger.settings = example_count(
    40,
    stateful_step_count=25,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
