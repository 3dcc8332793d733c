"""A result that follows its acceptance saves the poll, and nothing depends on it."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import everstep
from everstep.client._transport.direct import FOLLOWING
from everstep.client._transport.direct.pool import ConnectionPool
from everstep.client._transport.http import Http
from everstep.wire.codecs.followed import FOLLOWED, result_part
from tests.client.fake_service import GIVE_UP_SECONDS
from tests.client.scripted_bytes import CLOSE, OK, Answer, Peer, peer
from tests.conftest import Service
from tests.scenario import MODEL

HEAD = f"HTTP/1.1 200 OK\r\nContent-Type: {FOLLOWED}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
ACCEPTED = b'{"request_id": "r"}\n'
RESULT = result_part("application/json", b'{"metrics": {}}')
END = b"0\r\n\r\n"
T = GIVE_UP_SECONDS
PATIENCE = 60.0


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def follow(service: Peer, work: Callable[[Http], Any]) -> Any:
    """Run a coroutine with an `Http` of a peer."""

    async def with_http() -> Any:
        http = Http(service.url, None)
        try:
            async with asyncio.timeout(GIVE_UP_SECONDS):
                return await work(http)
        finally:
            await http.close()

    return asyncio.run(with_http())


async def submit(http: Http, timeout: float = T) -> tuple[httpx.Response, asyncio.Future[bytes]]:  # noqa: ASYNC109
    response = await http.send("POST", "/x", json={}, follow=True, timeout=timeout)
    return response, response.extensions[FOLLOWING]


@pytest.mark.parametrize(
    "answer",
    [
        [HEAD + chunk(ACCEPTED), chunk(RESULT), END],
        [HEAD + chunk(ACCEPTED) + chunk(RESULT) + END],
        [HEAD, chunk(ACCEPTED[:7]), chunk(ACCEPTED[7:] + RESULT[:4]), chunk(RESULT[4:]) + END],
    ],
    ids=["parts", "at once", "pieces"],
)
def test_both_parts_are_read_and_the_connection_is_used_again(answer: Answer) -> None:
    async def work(http: Http) -> None:
        for _ in range(2):
            response, following = await submit(http)
            assert response.json() == {"request_id": "r"}
            assert await following == RESULT
            await asyncio.sleep(0)  # the connection's own callback comes first

    with peer(answer) as service:
        follow(service, work)
    assert service.connections == [0, 0]


@pytest.mark.parametrize("rest", [[CLOSE], [chunk(RESULT)[:9], CLOSE], [b"zz\r\n"]])
def test_connection_that_breaks_gives_nothing(rest: Answer) -> None:
    async def work(http: Http) -> None:
        response, following = await submit(http)
        assert response.json() == {"request_id": "r"}
        assert await following == b""
        assert (await http.send("POST", "/y", json={})).json() == {}

    with peer([HEAD + chunk(ACCEPTED), *rest], [OK]) as service:
        follow(service, work)
    assert service.connections == [0, 1]


def test_silence_after_the_acceptance_gives_nothing() -> None:
    async def work(http: Http) -> None:
        _, following = await submit(http, timeout=3.0)
        assert await following == b""

    with peer([HEAD + chunk(ACCEPTED)]) as service:
        follow(service, work)
        assert service.ended.wait(T), "the connection is closed"


def test_cancelled_wait_closes_the_connection() -> None:
    async def work(http: Http) -> None:
        _, following = await submit(http)
        following.cancel()
        assert await asyncio.to_thread(service.ended.wait, T)

    with peer([HEAD + chunk(ACCEPTED)]) as service:
        follow(service, work)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The requests of direct connections, by path."""
    found: Counter[str] = Counter()
    send = ConnectionPool.send

    async def count(self: ConnectionPool, head: bytes, *arguments: Any) -> Any:
        found[head.split()[1].decode().rpartition("/")[2]] += 1
        return await send(self, head, *arguments)

    monkeypatch.setattr(ConnectionPool, "send", count)
    yield found


def train(service: Service) -> list[Any]:
    """Train with a client, and return what came of it."""
    with everstep.ServiceClient(base_url=service.url, api_key="tml-test") as client:
        run = client.create_lora_training_client(MODEL, rank=4, seed=1).result(PATIENCE)
        data = everstep.Datum(
            model_input=everstep.ModelInput.from_ints([1, 2, 3]),
            loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
        )
        futures: list[Any] = []
        for _ in range(3):
            futures += [run.forward_backward([data], "cross_entropy")]
            futures += [run.optim_step(everstep.AdamParams(learning_rate=0.01))]
        results = [future.result(PATIENCE) for future in futures]
        with pytest.raises(everstep.RequestFailedError, match="no_such_loss"):
            run.forward_backward([data], "no_such_loss").result(PATIENCE)
    return [
        [each.metrics, *(row["logprobs"].tolist() for row in getattr(each, "loss_fn_outputs", ()))]
        for each in results
    ]


def test_step_with_our_service_takes_two_requests(
    service: Service, requests: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = train(service)
    assert (requests["forward_backward"], requests["optim_step"]) == (4, 3)
    assert requests["retrieve_future"] == 1, "that of the run's creation"
    requests.clear()
    monkeypatch.setattr("everstep.client._transport.direct.client._ACCEPTED", "*/*")
    polled = train(service)
    assert requests["retrieve_future"] == 8
    assert followed == polled


def test_result_that_does_not_come_is_polled(
    service: Service, requests: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = threading.Event()
    send = ConnectionPool.send

    async def without_rest(self: ConnectionPool, *arguments: Any) -> httpx.Response:
        response = await send(self, *arguments)
        following = response.extensions.get(FOLLOWING)
        if following is not None and not following.done():
            cut.set()
            following.set_result(b"")
        return response

    expected = train(service)
    requests.clear()
    monkeypatch.setattr(ConnectionPool, "send", without_rest)
    assert train(service) == expected
    assert cut.is_set() and requests["retrieve_future"] > 1
