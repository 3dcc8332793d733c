"""What a step costs the ledger: calls, commits, statements and pages, which no clock disturbs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from everstep.engine import Model
from everstep.ledger import Ledger
from everstep.ledger.sqlite.group_commit import GroupCommit
from everstep.worker.protocol import messages
from everstep.worker.protocol.channel import BlockingChannel
from tests.runtime.local import Local, batch

STEPS = 5
ACCEPTS = FINISHES = 2  # of a step: one of the pass, one of the optimizer


@pytest.fixture
def local(home: Path, pico: Model) -> Iterator[Local]:
    with Local(home, pico, poll_seconds=0.05) as service:
        service.seconds = 0.0  # no snapshot is ever due
        yield service


@contextmanager
def counted(local: Local, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the ledger's calls, statements, commits and written pages within the block."""
    found: Counter[str] = Counter()
    run: Callable[..., Any] = GroupCommit.run

    async def count(self: GroupCommit, work: Any, then: Any = None) -> Any:
        found["calls"] += 1
        return await run(self, work, then)

    ledger: Ledger = local.app.state.runtime._context.ledger
    assert local.http.portal is not None

    def on_connection(work: Callable[[Any], Any]) -> Any:
        def of_driver(connection: Connection) -> Any:
            return work(connection.connection.driver_connection)

        return local.http.portal.call(ledger._store.run, of_driver)  # type: ignore[union-attr]

    def durable(driver: Any) -> int:
        return int(driver.execute("SELECT commits FROM position").fetchone()[0])

    def trace(driver: Any) -> None:
        driver.set_trace_callback(lambda sql: found.update([sql.split()[0].upper()]))

    log = next(local.home.glob("*.sqlite-wal"))
    before, pages = on_connection(durable), pages_of(log)
    on_connection(trace)
    found.clear()  # the COMMIT of the call that began it
    with monkeypatch.context() as patch:
        patch.setattr(GroupCommit, "run", count)
        yield found
    on_connection(lambda driver: driver.set_trace_callback(None))
    found["durable"] = on_connection(durable) - before
    found["pages"] = pages_of(log) - pages


def pages_of(log: Path) -> int:
    """Return the number of pages in SQLite's log, which was not begun again since its start."""
    content = log.read_bytes()
    size, salt = int.from_bytes(content[8:12], "big"), content[16:24]
    frames = range(32, len(content), 24 + size)
    assert int.from_bytes(content[12:16], "big") == 0, "no checkpoint of the log"
    return len(list(takewhile(lambda at: content[at + 8 : at + 16] == salt, frames)))


def test_awaited_step_takes_a_call_and_a_commit_for_each_accept_and_result(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = local.new_run()
    local.train(run, 0)
    with counted(local, monkeypatch) as found:
        for shift in range(STEPS):
            local.do(run, "forward_backward", forward_backward_input=batch(shift))
            local.do(run, "optim_step", adam_params={"learning_rate": 0.01})
    each = (ACCEPTS + FINISHES) * STEPS
    assert found["calls"] == each
    assert found["durable"] == each, "one fsync each, before it is acknowledged"
    # An accept looks for a retry, the session and the run; a result for its operation.
    assert found["SELECT"] <= (3 * ACCEPTS + FINISHES) * STEPS + 1  # and this count itself
    assert found["INSERT"] == ACCEPTS * STEPS
    # A result changes its row, and each commit is counted. The use of the run is noted seldom.
    assert found["UPDATE"] <= (FINISHES + ACCEPTS + FINISHES) * STEPS + 1
    # Each transaction writes a page of operations, of the unfinished ones and of the count of
    # commits, and an accept one of both unique indexes. Pages fill and split now and then.
    assert found["pages"] <= (3 * FINISHES + 5 * ACCEPTS + 2) * STEPS + 1
    assert found["SAVEPOINT"] == 0, "a call that is alone in its transaction needs none"


def test_queued_steps_take_no_more_calls_than_awaited_ones(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = local.new_run()
    local.train(run, 0)
    with counted(local, monkeypatch) as found:
        local.train(run, *range(STEPS))
    assert found["calls"] == (ACCEPTS + FINISHES) * STEPS
    assert 0 < found["durable"] <= (ACCEPTS + FINISHES) * STEPS


@pytest.mark.parametrize("queued", [False, True])
def test_step_takes_two_commands_and_two_replies(
    local: Local, monkeypatch: pytest.MonkeyPatch, queued: bool
) -> None:
    run = local.new_run()
    local.train(run, 0)
    before, replies = len(local.received), list[messages.Message]()
    send = BlockingChannel.send

    def counted_send(self: BlockingChannel, call_id: int, message: messages.Message) -> None:
        replies.append(message)
        send(self, call_id, message)

    monkeypatch.setattr(BlockingChannel, "send", counted_send)
    for shifts in [range(STEPS)] if queued else [[shift] for shift in range(STEPS)]:
        local.train(run, *shifts)
    assert [kind for kind, _ in local.received[before:]] == ["pass", "optim_step"] * STEPS
    assert len(replies) == 2 * STEPS


def test_polls_read_nothing(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    run = local.new_run()
    with local.steps.shut():
        request_ids = local.step(run)
        with counted(local, monkeypatch) as found:
            states = [local.poll(each).json()["queue_state"] for each in request_ids * 2]
            assert states == ["active"] * 4
        assert found["calls"] == 0
    results = [local.result(each) for each in request_ids]
    with counted(local, monkeypatch) as found:
        assert [local.result(each) for each in request_ids * 2] == results * 2, "after the end"
    assert found["calls"] == 0
