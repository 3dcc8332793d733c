"""The process for large bodies and its channel: messages of any size, and one job at a time."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from everstep import spool
from everstep.server.offload import jobs, process
from everstep.server.offload.jobs import raise_described
from everstep.server.offload.pool import Offload
from everstep.server.passes import InvalidOperation
from everstep.spool import Spool, read_all, taken, write_all
from everstep.wire.codecs.proto import encode_forward_backward_request
from everstep.wire.errors import BodyTooLarge, InvalidRequest
from everstep.wire.messages.requests import ForwardBackwardRequest
from tests.runtime.local import batch
from tests.server.test_offload import open_spools

LONG = "x" * (3 << 20)
"""Longer than one read of the socket."""


class Jobs:
    """Jobs of a process, which is a thread of this one."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.bodies: list[bytes] = []

    def echo(self, arguments: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        return dict(arguments), body[::-1]

    def fail(self, arguments: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        raise ValueError(LONG)

    def wait(self, arguments: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        self.begun.release()
        assert self.may_end.acquire(timeout=60)
        self.bodies.append(body)
        return {}, body


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made = Jobs()
    named = {"echo": made.echo, "fail": made.fail, "wait": made.wait}
    monkeypatch.setattr(process, "JOBS", named)
    return made


class Watched(Offload):
    """Records when exchanges with the process begin and end, and when bodies are freed."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self.events: list[str] = []
        self._ours = connection

    def _connected(self) -> socket.socket:
        return self._ours

    def _exchange(self, message: bytes, body: Spool) -> tuple[Any, Spool]:
        self.events.append("begin")
        try:
            return super()._exchange(message, body)
        finally:
            self.events.append("end")

    @asynccontextmanager
    async def spool(self, size: int) -> AsyncIterator[Spool]:
        async with super().spool(size) as held:
            try:
                yield held
            finally:
                self.events.append("free")


@pytest.fixture
def offload(done: Jobs) -> Iterator[Watched]:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=process.serve, args=(theirs,))
    thread.start()
    yield Watched(ours)
    ours.close()
    thread.join(60)
    theirs.close()
    assert not thread.is_alive(), "it ends with the service's end of the socket"


async def computed(offload: Watched, job: str, body: bytes, **arguments: Any) -> tuple[Any, bytes]:
    async with offload.spool(len(body)) as held:
        held.write(body)
        facts, result = await offload.run(job, arguments, held)
        return facts, await taken(result)


def test_messages_and_bodies_of_any_size_arrive_whole(offload: Watched) -> None:
    for text, body in (("", b""), ("a", b"abc"), (LONG, bytes(range(256)) * 20_000)):
        found = asyncio.run(computed(offload, "echo", body, text=text))
        assert found == ({"text": text}, body[::-1])


def test_no_descriptor_is_left_open(offload: Watched) -> None:
    before = open_spools()
    for job in ("echo", "fail") * 3:
        try:
            asyncio.run(computed(offload, job, b"abc"))
        except RuntimeError as error:
            assert LONG in str(error), "the whole traceback"
    assert open_spools() == before


def test_one_job_is_computed_at_a_time_and_gets_its_own_body(offload: Watched, done: Jobs) -> None:
    async def run() -> None:
        jobs = [asyncio.create_task(computed(offload, "wait", body)) for body in (b"1", b"2")]
        await asyncio.to_thread(done.begun.acquire)
        await settle()
        done.may_end.release(2)
        assert [await each for each in jobs] == [({}, b"1"), ({}, b"2")]

    asyncio.run(run())
    events = [each for each in offload.events if each != "free"]
    assert events == ["begin", "end"] * 2


def test_job_of_a_client_that_is_gone_ends_before_its_body_is_freed(
    offload: Watched, done: Jobs
) -> None:
    """Its descriptors would become another's, and its reply the next job's."""

    async def run() -> None:
        first = asyncio.create_task(computed(offload, "wait", b"1"))
        await asyncio.to_thread(done.begun.acquire)
        first.cancel()
        second = asyncio.create_task(computed(offload, "echo", b"ab"))
        await settle()
        done.may_end.release()
        await asyncio.wait([first])
        assert first.cancelled()
        assert await second == ({}, b"ba")

    asyncio.run(run())
    assert done.bodies == [b"1"]
    assert offload.events[:3] == ["begin", "end", "free"]


async def settle() -> None:
    """Let everything run that doesn't wait for something else."""
    for _ in range(100):
        await asyncio.sleep(0)


def test_process_is_shielded_from_the_terminal_and_the_working_directory() -> None:
    offload = Offload()
    try:
        offload._connected()
        assert offload._process is not None
        pid = offload._process.pid
        assert os.getsid(pid) == pid, "Ctrl-C is the service's"
        assert "-P" in offload._process.args  # type: ignore[operator]  # it is a list
        assert offload._connected() is offload._socket, "it is started once"
    finally:
        offload.close()
    assert offload._process is None
    offload.close()


def test_spool_is_read_and_written_in_bounded_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux transfers at most 2 GiB at a time."""
    sizes: list[int] = []
    pread, pwrite = os.pread, os.pwrite

    def read(descriptor: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return pread(descriptor, size, offset)

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(descriptor, data[:2], offset)  # less than was asked for

    monkeypatch.setattr(spool, "_CHUNK_BYTES", 3)
    monkeypatch.setattr(os, "pread", read)
    monkeypatch.setattr(os, "pwrite", write)
    with Spool() as held:
        write_all(held.descriptor, b"abcdefgh")
        write_all(held.descriptor, b"XY", 3)
        assert read_all(held.descriptor, 7) == b"abcXYfg"
    assert sizes and max(sizes) == 3


def test_spool_is_not_inherited() -> None:
    with Spool() as held:
        assert not os.get_inheritable(held.descriptor)
    closed = Path(f"/proc/self/fd/{held.descriptor}")
    assert not closed.exists() or "everstep" not in str(closed.resolve())


# Jobs


def content(**passed: Any) -> bytes:
    body = {"model_id": "r", "seq_id": 7, "forward_backward_input": {**batch(), **passed}}
    return encode_forward_backward_request(ForwardBackwardRequest.model_validate(body))


def prepared(body: bytes, *, protobuf: bool = True, **more: Any) -> tuple[dict[str, Any], bytes]:
    form = {"protobuf": protobuf, "forward": False, "newer_client": False, "encoding": None}
    arguments = {"models": [[100_000, 4096], [1, 4096]], "refuse_stable_reinforce": False}
    return jobs.prepare_pass({"form": form, **arguments, **more}, body)


def test_pass_is_checked_for_every_model() -> None:
    facts, payload = prepared(content())
    assert (facts["model_id"], facts["seq_id"], facts["forward_only"]) == ("r", 7, False)
    fits, other = jobs.failures_of(facts).items()
    assert (fits[0].vocab_size, fits[1]) == (100_000, None)
    assert other[0].vocab_size == 1 and "vocabulary" in str(other[1])
    assert payload == prepared(payload)[1], "it is canonical"


@pytest.mark.parametrize(
    ("body", "kind", "operation"),
    [
        (b"\xff", InvalidRequest, None),
        (content() + b"\x78\x05", InvalidOperation, ("r", 7)),
        (b"\x0a\x01r\x10\x07" + bytes(70 << 20), InvalidOperation, ("r", 7)),
        (bytes(70 << 20), BodyTooLarge, None),
    ],
    ids=["damaged", "unknown field", "too large, of a run", "too large"],
)
def test_error_is_raised_in_the_service_as_in_the_process(
    body: bytes, kind: type[Exception], operation: Any
) -> None:
    facts, payload = prepared(body)
    assert payload == b""
    with pytest.raises(kind) as raised:
        raise_described(facts["error"])
    assert type(raised.value) is kind
    assert getattr(raised.value, "operation", None) == operation
