"""Large results: from the worker to the segment and to the client a little at a time."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.ledger import Ledger, NotWritten
from everstep.ledger.payload_log import contents
from everstep.ledger.payload_log.segments import SegmentFiles, segments_path
from everstep.runtime.workers import result_room
from everstep.runtime.workers.result_room import ResultRoom
from everstep.server import conversion, piecewise
from everstep.server.routes import futures
from everstep.spool import Spool
from everstep.wire.codecs.proto import PROTOBUF
from everstep.worker.protocol import channel
from everstep.worker.protocol.channel import BlockingChannel, Envelope, read_envelope
from everstep.worker.protocol.messages import PassDone
from tests.runtime.local import Local, batch
from tests.server.test_offload import open_spools
from tests.waiting import eventually

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of any size are handled as large ones."""
    monkeypatch.setattr(channel, "SPOOLED_BYTES", 1)
    monkeypatch.setattr(contents, "LOGGED_BYTES", 1)
    monkeypatch.setattr(futures, "MAX_INLINE_BYTES", 1)
    monkeypatch.setattr(conversion, "INLINE_RESULT_BYTES", 1)
    monkeypatch.setattr(piecewise, "PIECE_BYTES", 100)


@pytest.fixture
def local(home: Path, pico: Model) -> Iterator[Local]:
    with Local(home, pico, poll_seconds=0.05) as service:
        yield service


def passes(local: Local) -> list[str]:
    run = local.new_run()
    return [local.send(run, "forward_backward", forward_backward_input=batch(n)) for n in (1, 2)]


def answers(local: Local, ids: list[str]) -> list[tuple[bytes, str]]:
    """The results in each form, once they are there."""
    found = []
    for accept in ("application/json", PROTOBUF):
        for each in ids:
            local.result(each)
            answer = local.poll(each, accept)
            assert answer.status_code == 200
            assert int(answer.headers["content-length"]) == len(answer.content)
            found.append((answer.content, answer.headers["content-type"]))
    return found


def held(local: Local) -> int:
    worker = local.pool._worker
    assert worker is not None
    return worker._room.held


def test_large_results_are_those_of_small_ones(
    home: Path, pico: Model, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with Local(tmp_path / "small", pico) as small:
        expected = answers(small, passes(small))
    request.getfixturevalue("all_large")
    with Local(home, pico) as local:
        sent = passes(local)
        assert answers(local, sent) == expected
        metadata = local.poll(sent[0], PROTOBUF, allow_metadata_only=True).json()
        assert metadata["response_payload_size"] == len(expected[2][0])
        eventually("spools are freed", lambda: open_spools() == 0)
        eventually("room is freed", lambda: held(local) == 0)
        log = local.app.state.runtime._ledger._store.payloads
        eventually("no response holds a segment", lambda: not log._unsettled)
    with Local(home, pico) as local:
        assert answers(local, sent) == expected


def test_poll_reads_no_large_result_into_memory(local: Local, all_large: None) -> None:
    ids = passes(local)
    expected = answers(local, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentFiles, "read", None)
        assert answers(local, ids) == expected


def test_damaged_large_result_is_reported_and_not_sent(local: Local, all_large: None) -> None:
    (first, second) = passes(local)
    expected = local.result(second)
    local.result(first)
    operation = local.http.portal.call(  # type: ignore[union-attr]
        local.app.state.runtime._ledger.operation, first
    )
    at = operation.result_at
    (path,) = [
        each
        for each in segments_path(local.home / "ledger.sqlite").iterdir()
        if each.stem.endswith(f"-{at.segment:010d}")
    ]
    whole = bytearray(path.read_bytes())
    whole[at.offset + at.size] ^= 1
    path.write_bytes(whole)
    for accept in ("application/json", PROTOBUF):
        answer = local.poll(first, accept).json()
        assert "The result of operation 1 (forward_backward)" in answer["error"]
        assert answer["category"] == "server"
    assert local.result(second) == expected
    log = local.app.state.runtime._ledger._store.payloads
    assert not log._unsettled, "nothing is held"


def test_result_that_is_not_recorded_is_freed(
    local: Local, all_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed, failures = Ledger.succeed, [NotWritten("the disk is full")]

    async def fail_once(*arguments: Any, **also: Any) -> Any:
        if failures and isinstance(arguments[2], Spool):
            raise failures.pop()
        return await succeed(*arguments, **also)

    monkeypatch.setattr(Ledger, "succeed", fail_once)
    for each in passes(local):
        assert local.result(each)["loss_fn_outputs"]
    assert not failures
    eventually("room is freed", lambda: held(local) == 0)


# The socket


async def read_once(ours: socket.socket, room: ResultRoom) -> Envelope | None:
    reader, writer = await asyncio.open_connection(sock=ours)
    try:
        return await read_envelope(reader, room.spool)
    finally:
        writer.close()


def test_large_body_is_in_the_memory_of_neither_interpreter_twice() -> None:
    content = bytes(range(256)) * (SIZE // 256)
    ours, theirs = socket.socketpair()

    async def receive() -> None:
        room = ResultRoom()
        envelope = await read_once(ours, room)
        assert envelope is not None and isinstance(envelope.message, PassDone)
        body = envelope.message.body
        assert isinstance(body, Spool)
        assert room.held == SIZE
        with body.mapped() as view:
            assert view == content
        body.close()
        await asyncio.sleep(0)
        assert room.held == 0
        (await room.spool(1)).close()
        assert room.held == 8 * MIB, "descriptors are bounded too"

    sender = threading.Thread(target=BlockingChannel(theirs).send, args=(1, PassDone(content)))
    tracemalloc.start()
    try:
        sender.start()
        asyncio.run(receive())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    sender.join(60)
    theirs.close()
    assert peak < 2 * MIB


def test_worker_that_ends_within_a_large_body_leaves_nothing() -> None:
    ours, theirs = socket.socketpair()
    header = json.dumps({"id": 1, "kind": "pass-done"}).encode()
    frame = channel._FRAME.pack(len(header), SIZE) + header + bytes(MIB)

    async def receive() -> None:
        room = ResultRoom()
        assert await read_once(ours, room) is None
        await asyncio.sleep(0)
        assert room.held == 0

    def send() -> None:
        theirs.sendall(frame)
        theirs.close()

    sender = threading.Thread(target=send)
    sender.start()
    before = open_spools()
    asyncio.run(receive())
    sender.join(60)
    assert open_spools() == before


def test_room_bounds_results_and_lets_a_lone_one_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_room, "_MIN_TAKEN_BYTES", 1)

    async def work() -> None:
        room = ResultRoom(100)
        first = await room.spool(300)
        waiting = [asyncio.create_task(room.spool(60)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(each.done() for each in waiting)
        await asyncio.to_thread(first.close)
        first.close()
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert (room.held, [each.done() for each in waiting].count(True)) == (60, 1)
        for _ in range(2):
            done = [each for each in waiting if each.done()]
            for each in done:
                waiting.remove(each)
            del each, done
            gc.collect()  # a result that nobody takes is freed too
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            assert room.held == 60

    asyncio.run(work())
