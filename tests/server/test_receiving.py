"""Bodies are received within bounds, and large ones away from the event loop."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from everstep.engine import Model
from everstep.runtime import Rejected
from everstep.server import receive
from everstep.server.offload import budget
from everstep.server.offload.budget import ByteBudget
from everstep.server.offload.pool import Offload
from everstep.wire.base import parse
from everstep.wire.codecs.proto import PROTOBUF
from tests.runtime.local import Local, batch
from tests.runtime.test_samples import body as sample_body
from tests.runtime.test_samples import sampler
from tests.server.asgi import request
from tests.server.test_offload import open_spools, protobuf

INLINE_BYTES = 1 << 10
MIB = 1 << 20
NUMBERS = itertools.count(1)
"""Of samplers, which share a session."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    with Local(tmp_path_factory.mktemp("receiving"), pico) as service:
        yield service


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "INLINE_BYTES", INLINE_BYTES)


def offload(local: Local) -> Offload:
    found: Offload = local.app.state.offload
    return found


ROUTES = {
    "/api/v1/forward_backward": PROTOBUF,
    "/api/v1/forward": "application/json",
    "/api/v1/optim_step": "application/json",
    "/api/v1/asample": "application/json",
    "/api/v1/retrieve_future": "application/json",
    "/api/v1/telemetry": "application/json",
    "/v1/completions": "application/json",
    "/v1/chat/completions": "application/json",
}


@pytest.mark.parametrize("size", [10, 10 * INLINE_BYTES])
@pytest.mark.parametrize("path", ROUTES)
def test_client_that_goes_away_in_mid_upload_is_no_error(
    local: Local, path: str, size: int
) -> None:
    """The server logs whatever the application raises, with its traceback."""
    before = open_spools()
    headers = {"content-type": ROUTES[path], "content-length": str(1000 * size)}
    request(local, path, [bytes(size)], headers=headers, then="disconnect")
    assert open_spools() == before
    assert offload(local).budget._free == offload(local).budget._limit


@pytest.mark.parametrize("path", ["/api/v1/forward_backward", "/api/v1/optim_step"])
def test_large_body_that_stops_arriving_gives_its_room_back(
    local: Local, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "_MAX_SILENCE_SECONDS", 0.0)
    start, body = request(local, path, [bytes(10 * INLINE_BYTES)], then="silence")
    assert start["status"] == 408
    assert "send it again" in json.loads(body["body"])["detail"]
    assert offload(local).budget._free == offload(local).budget._limit


def test_large_body_without_room_is_refused_for_a_retry(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_MAX_WAITING", 0)
    run, content = local.new_run(), protobuf("nobody", 1, batch(count=16))
    headers = {"content-type": PROTOBUF}
    for answer in (
        local.http.post("forward_backward", content=content, headers=headers),
        local.http.post(
            "asample", json=sample_body(sampler(local, next(NUMBERS))) | {"x": "y" * 2000}
        ),
        local.http.post("create_session", json={"tags": ["x" * 2000]}),
    ):
        assert (answer.status_code, "try again" in answer.text) == (503, True)
        assert answer.headers["retry-after"] == "1"
    assert local.do(run, "optim_step", adam_params={}) is not None, "small ones need no room"


def test_body_over_the_limit_is_read_and_not_kept_and_an_endless_one_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clients look for an answer only once they have sent everything."""
    monkeypatch.setattr(receive, "_MAX_DISCARDED_BYTES", 1000)
    read = 0

    async def body(size: int) -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(size // 10):
            read += 10
            yield bytes(10)

    async def received(size: int) -> tuple[int, int]:
        kept: list[bytes] = []
        found = await receive.Received(bytes(10), body(size - 10)).each(kept.append, 100)
        return found, sum(map(len, kept))

    assert asyncio.run(received(100)) == (100, 100)
    assert asyncio.run(received(500)) == (500, 100)
    read = 0
    assert asyncio.run(received(10_000_000)) == (1010, 100)
    assert read == 1000


# Messages


def test_large_message_is_parsed_in_a_thread(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []

    def parsed(*arguments: Any, **options: Any) -> Any:
        try:
            asyncio.get_running_loop()
            threads.append(False)
        except RuntimeError:
            threads.append(True)
        return parse(*arguments, **options)

    monkeypatch.setattr(receive, "parse", parsed)
    for size in (10, 2 * MIB):
        assert local.post("create_session", tags=["x" * size])["session_id"]
    content = gzip.compress(json.dumps({"tags": ["x" * 2 * MIB]}).encode())
    headers = {"content-encoding": "gzip"}
    assert local.http.post("create_session", content=content, headers=headers).status_code == 200
    answer = local.http.post("optim_step", json={"model_id": "x", "lr": [1] * 2000})
    assert (answer.status_code, "there is no field 'lr'" in answer.text) == (400, True)
    assert threads == [False, True, True, True]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_message_over_the_bound_is_refused(local: Local, compress: Any) -> None:
    for size, status in ((receive.MAX_MESSAGE_BYTES, 200), (receive.MAX_MESSAGE_BYTES + 1, 413)):
        head, tail = b'{"tags": ["', b'"]}'
        content = compress(head + b"x" * (size - len(head + tail)) + tail)
        headers = {"content-encoding": "gzip"} if compress is gzip.compress else {}
        answer = local.http.post("create_session", content=content, headers=headers)
        assert answer.status_code == status


# Samples


def set_inline(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(receive, "INLINE_BYTES", size)


def prompt(count: int, **more: Any) -> dict[str, Any]:
    return {"prompt": {"chunks": [{"tokens": [5] * count, **more}]}}


def test_large_sample_is_the_same_operation(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    name = sampler(local, next(NUMBERS))
    targets = {"data": [7] * 99, "dtype": "int64", "shape": [99, 1]}
    sent = sample_body(name, 3) | prompt(100) | {"target_prompt_logprobs": targets}
    sent["prompt_logprobs"] = True
    found = []
    for size in (0, 1 << 30):
        set_inline(monkeypatch, size)
        found.append(local.post("asample", **sent)["request_id"])
    assert found[0] == found[1]
    assert len(local.result(found[0])["prompt_logprobs"]) == 100
    other = local.http.post("asample", json=sent | prompt(101))
    assert other.status_code == 400, "another request with its sequence id"


@pytest.mark.parametrize(
    "change",
    [
        prompt(0),
        prompt(100_000),
        {"prompt": {"chunks": [{"tokens": [10**6]}]}},
        {"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}},
        {"num_samples": 5000},
        {"sampling_params": {"max_tokens": 1, "temperature": -1.0}},
        prompt(3, mask=[1]),
        {"temperature": 0.0},
        {"seq_id": None},
        {"sampling_session_id": None},
        {"sampling_session_id": "nobody"},
        {"prompt": 1},
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_invalid_large_sample_fails_with_the_same_text(
    local: Local, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    found = []
    for size in (0, 1 << 30):
        set_inline(monkeypatch, size)
        sent = sample_body(sampler(local, next(NUMBERS))) | change
        answer = local.http.post("asample", json=sent)
        content = answer.json()
        if "request_id" in content:
            found.append((200, local.result(content["request_id"])["error"]))
        else:
            found.append((answer.status_code, content["detail"]))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("content", "encoding"),
    [(b"{" * 2000, None), (b"\xff" * 2000, None), (b"x" * 2000, "zstd"), (b"x" * 2000, "br")],
)
def test_unreadable_large_sample_is_refused_with_the_same_text(
    local: Local, monkeypatch: pytest.MonkeyPatch, content: bytes, encoding: str | None
) -> None:
    headers = {"content-encoding": encoding} if encoding else {}
    answers = []
    for size in (INLINE_BYTES, 1 << 30):
        set_inline(monkeypatch, size)
        answer = local.http.post("asample", content=content, headers=headers)
        answers.append((answer.status_code, answer.json()["detail"]))
    assert answers[0] == answers[1]
    assert answers[0][0] == 400


def test_sample_is_prepared_in_the_process(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[bytes] = []
    exchange = offload(local)._exchange

    def noted(message: bytes, *spools: Any) -> Any:
        jobs.append(message)
        return exchange(message, *spools)

    monkeypatch.setattr(offload(local), "_exchange", noted)
    sent = sample_body(sampler(local, next(NUMBERS))) | prompt(500)
    local.result(local.post("asample", **sent)["request_id"])
    assert any(b'"prepare_sample"' in each for each in jobs)


# The budget

SIZE = 10 * MIB


def test_budget_lets_bodies_in_by_turn_and_never_holds_more() -> None:
    async def run() -> None:
        held = ByteBudget(3 * SIZE)
        entered: list[str] = []
        gates = {name: asyncio.Event() for name in "abcdef"}

        async def hold(name: str, size: int) -> None:
            async with held.reserve(size):
                entered.append(name)
                await gates[name].wait()

        tasks = {}
        for name, size in zip("abcdef", [2, 1, 3, 1, 100, 1], strict=True):
            tasks[name] = asyncio.create_task(hold(name, size * SIZE))
            await asyncio.sleep(0)
        assert entered == ["a", "b"], "the next has no room"
        gates["a"].set()
        await tasks["a"]
        assert entered == ["a", "b"], "the small one behind it waits for its turn"
        tasks["c"].cancel()
        await asyncio.wait([tasks["c"]])
        await asyncio.sleep(0)
        assert entered == ["a", "b", "d"]
        for name in "bdef":
            gates[name].set()
        await asyncio.gather(*(tasks[name] for name in "bdef"))
        assert entered == ["a", "b", "d", "e", "f"]
        assert held._free == 3 * SIZE

    asyncio.run(run())


def test_small_bodies_are_bounded_in_number() -> None:
    async def run() -> None:
        held = ByteBudget(4 * budget._MIN_RESERVED_BYTES)
        async with AsyncExitStack() as stack:
            for _ in range(4):
                await stack.enter_async_context(held.reserve(1))
            assert held._free == 0

    asyncio.run(run())


def test_room_is_given_back_by_those_that_were_let_in_and_cancelled_at_once() -> None:
    async def run() -> None:
        held = ByteBudget(SIZE)

        async def hold() -> None:
            async with held.reserve(SIZE):
                pass

        async with held.reserve(SIZE):
            waiting = [asyncio.create_task(hold()) for _ in range(3)]
            await asyncio.sleep(0)
        waiting[0].cancel()  # it has its room, and did not run since
        await asyncio.wait(waiting)
        assert held._free == SIZE

    asyncio.run(run())


def test_waiting_for_room_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        held = ByteBudget(SIZE)
        async with held.reserve(SIZE):
            for name in ("_MAX_SECONDS", "_MAX_WAITING"):
                with monkeypatch.context() as patch:
                    patch.setattr(budget, name, 0)
                    with pytest.raises(Rejected, match="try again") as refused:
                        async with held.reserve(1):
                            raise AssertionError("there is no room")
                    assert refused.value.status == 503
        async with held.reserve(SIZE):
            assert held._free == 0
        assert held._free == SIZE

    asyncio.run(run())
