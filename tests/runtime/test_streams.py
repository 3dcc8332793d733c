"""Streams yield a sample's tokens as they are drawn, and they equal its result."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.ledger import Operation
from everstep.runtime import Rejected, Runtime, UnknownFuture
from everstep.wire.codecs.proto import decode_sample_response
from everstep.wire.messages.streams import DrawnTokens
from tests.runtime.local import Gate, Local
from tests.scenario import MODEL

LENGTH = 12


class Steps(Gate):
    """A gate that lets a number of steps through and handles messages in between."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._allowed = 0
        self._free = False
        self._knocked = False

    def pass_through(self) -> bool:
        with self._changed:
            woken = self._changed.wait_for(
                lambda: self._free or self._allowed > 0 or self._knocked, timeout=60
            )
            assert woken, "nobody let a step through"
            if self._knocked:
                self._knocked = False
                return False
            self._allowed -= 0 if self._free else 1
            return True

    def knock(self) -> None:
        with self._changed:
            self._knocked = True
            self._changed.notify()

    def let(self, count: int) -> None:
        with self._changed:
            self._allowed += count
            self._changed.notify()

    def open(self) -> None:
        with self._changed:
            self._free = True
            self._changed.notify()


@pytest.fixture
def local(home: Path, pico: Model) -> Any:
    with Local(home, pico) as running:
        yield running


def sampler(local: Local) -> str:
    body: dict[str, Any] = {
        "session_id": local.session(),
        "sampling_session_seq_id": 0,
        "base_model": MODEL,
    }
    return str(local.post("create_sampling_session", **body)["sampling_session_id"])


def submit(local: Local, seq_id: int = 0, **more: Any) -> str:
    """A sample of three sequences that end at their length."""
    body = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7, 8]}]},
        "num_samples": 3,
        "sampling_params": {"max_tokens": LENGTH, "seed": 3, "stop": []},
        **more,
    }
    answer = local.post("asample", sampling_session_id=sampler(local), seq_id=seq_id, **body)
    return str(answer["request_id"])


def on(local: Local, work: Callable[[Runtime], Coroutine[Any, Any, Any]]) -> Any:
    """Run a function on the service's event loop."""
    portal = local.http.portal
    assert portal is not None
    return portal.call(work, local.app.state.runtime)


async def read(
    runtime: Runtime, request_id: str, position: int = 0
) -> tuple[list[DrawnTokens], Operation]:
    """Read a whole stream: the drawn tokens, and the end."""
    *drawn, end = [event async for event in await runtime.follow(request_id, position)]
    assert isinstance(end, Operation)
    return [each for each in drawn if isinstance(each, DrawnTokens)], end


def sequences(drawn: list[DrawnTokens]) -> list[list[tuple[int, float]]]:
    """The streamed tokens and logprobs by sequence."""
    found: list[list[tuple[int, float]]] = [[], [], []]
    for at, each in enumerate(drawn):
        assert each.position == at
        for token in each.tokens:
            assert token.position == at
            found[token.sequence].append((token.token, token.logprob))
    return found


def held(operation: Operation) -> list[list[tuple[int, float]]]:
    """The tokens and logprobs of a result, by sequence."""
    response = decode_sample_response(operation.result or b"")
    return [list(zip(s.tokens, s.logprobs or [], strict=True)) for s in response.sequences]


def test_stream_yields_tokens_as_drawn_and_matches_result(home: Path, pico: Model) -> None:
    local = Local(home, pico)
    local.steps = steps = Steps()
    with local:

        async def follow(runtime: Runtime) -> tuple[list[DrawnTokens], Operation]:
            events = await runtime.follow(request_id)
            drawn: list[DrawnTokens] = []
            for position in range(LENGTH - 1):
                steps.let(1)
                event = await anext(events)
                assert isinstance(event, DrawnTokens)
                assert event.position == position
                assert await runtime.wait(request_id, 0) is None, "it goes on"
                drawn.append(event)
            steps.open()
            rest = [event async for event in events]
            assert isinstance(rest[0], DrawnTokens)
            assert isinstance(rest[1], Operation)
            return [*drawn, rest[0]], rest[1]

        request_id = submit(local)
        drawn, end = on(local, follow)
        assert sequences(drawn) == held(end)
        assert [len(sequence) for sequence in sequences(drawn)] == [LENGTH] * 3


def test_stream_starts_at_any_position_before_and_after_end(local: Local) -> None:
    request_id = submit(local, topk_sample_logprobs=2)

    async def several(runtime: Runtime) -> list[Any]:
        places = (0, 0, 5, LENGTH - 1, LENGTH + 7)
        return await asyncio.gather(*(read(runtime, request_id, place) for place in places))

    before = on(local, several)
    after = on(local, several)
    for (drawn, _), (again, _), place in zip(before, after, (0, 0, 5, 11, 19), strict=True):
        assert drawn == again == before[0][0][place:]
    tokens = [token for each in before[0][0] for token in each.tokens]
    assert tokens
    assert all(len(token.topk_logprobs) == 2 for token in tokens)


def test_stream_after_restart_has_same_tokens(home: Path, pico: Model) -> None:
    first = Local(home, pico)
    first.steps = steps = Steps()
    with first:
        request_id = submit(first)

        async def some(runtime: Runtime) -> list[Any]:
            events = await runtime.follow(request_id)
            steps.let(5)
            return [await anext(events) for _ in range(4)]

        drawn = on(first, some)
    with first.after() as second:
        rest, end = on(second, lambda runtime: read(runtime, request_id, len(drawn)))
    assert sequences([*drawn, *rest]) == held(end)


def test_stream_ends_with_failure(local: Local) -> None:
    request_id = submit(local, sampling_params={"max_tokens": 5000})
    drawn, end = on(local, lambda runtime: read(runtime, request_id))
    assert drawn == []
    assert end.failure is not None
    assert "context window" in end.failure.message


def test_other_operations_cannot_be_streamed(local: Local) -> None:
    run = local.new_run()
    pending = local.send(run, "save_weights", path="s")
    with pytest.raises(Rejected, match="is not a sample"):
        on(local, lambda runtime: runtime.follow(pending))
    with pytest.raises(UnknownFuture):
        on(local, lambda runtime: runtime.follow("nobody"))
    assert local.http.get(f"everstep/samples/{pending}/events").status_code == 400
    assert local.http.get("everstep/samples/nobody/events").status_code == 404


def test_http_stream_is_server_sent_events(local: Local) -> None:
    request_id = submit(local)
    answer = local.http.get(f"everstep/samples/{request_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    assert [block[0] for block in blocks] == ["event: drawn"] * LENGTH + ["event: result"]
    assert [block[2] for block in blocks[:-1]] == [f"id: {at}" for at in range(LENGTH)]
    rest = local.http.get(
        f"everstep/samples/{request_id}/events", headers={"Last-Event-ID": str(LENGTH - 3)}
    )
    assert [b.split("\n") for b in rest.text.strip().split("\n\n")] == blocks[LENGTH - 2 :]
