"""Requests over direct connections mean what they mean over httpx's."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from everstep.client._transport.credentials import Credential
from everstep.client._transport.direct import client as direct_client
from everstep.client._transport.errors import APIConnectionError, APITimeoutError
from everstep.client._transport.http import Http
from tests.client.fake_service import GIVE_UP_SECONDS
from tests.client.scripted_bytes import CHUNKED, CLOSE, OK, Answer, Peer, peer

Run = Callable[[Peer, Callable[[Http], Any]], Any]


@pytest.fixture(params=["direct", "httpx"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a coroutine with an `Http` of a peer, over either."""
    if request.param == "httpx":
        monkeypatch.setattr(direct_client, "find_spec", lambda name: None)

    def run(service: Peer, work: Callable[[Http], Any]) -> Any:
        async def with_http() -> Any:
            http = Http(service.url, Credential("tml-key", service.url))
            assert http._direct is not None
            try:
                async with asyncio.timeout(GIVE_UP_SECONDS):
                    result = await work(http)
                if request.param == "direct":
                    used = http._direct._pool is not None
                    assert used or not service.requests, "httpx sent what can go directly"
                return result
            finally:
                await http.close()

        return asyncio.run(with_http())

    return run


def posts(count: int, **options: Any) -> Callable[[Http], Any]:
    async def post(http: Http) -> list[httpx.Response]:
        return [await http.send("POST", "/x", json={"n": n}, **options) for n in range(count)]

    return post


def test_requests_share_a_connection(run: Run) -> None:
    with peer([OK]) as service:
        answers = run(service, posts(5))
    assert [each.json() for each in answers] == [{}] * 5
    assert service.connections == [0] * 5


def test_httpx_sends_where_the_system_has_no_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    async def get(url: str) -> int:
        http = Http(url, None)
        response = await http.send("GET", "/x")
        await http.close()
        return response.status_code

    monkeypatch.delattr("everstep.client._transport.direct.client.select.poll")
    with peer([OK]) as service:
        assert asyncio.run(get(service.url)) == 200
    assert len(service.requests) == 1


def test_requests_go_over_uvloop_where_a_program_installs_it() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def post(url: str) -> list[int]:
        http = Http(url, None)
        answers = await posts(3)(http)
        await http.close()
        return [each.status_code for each in answers]

    with peer([OK]) as service, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(post(service.url)) == [200] * 3
    assert service.connections == [0] * 3


def test_both_ways_send_the_same_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send(http: Http) -> None:
        await http.send("POST", "/x?y=%20z", json={"a": "ü"}, headers={"Accept": "text/x", "B": ""})
        await http.send("GET", "/sessions/a b")
        await http.send("DELETE", "/x", headers={"x-api-key": "other"})
        await http.send("POST", "/x", content=b"\0" * 100_000)
        await http.send("PUT", "/x")

    heads = []
    for spec in (True, None):
        monkeypatch.setattr(direct_client, "find_spec", lambda name, spec=spec: spec)
        with peer([OK]) as service:

            async def with_http(service: Peer = service) -> None:
                http = Http(service.url + "/prefix", Credential("tml-key", service.url))
                await send(http)
                await http.close()

            asyncio.run(with_http())
            port = service.url.rpartition(":")[2].encode()
            heads.append([_fields(head.replace(port, b"PORT")) for _, head in service.requests])
    assert heads[0] == heads[1]
    assert len(heads[0]) == 5 and heads[0][0][0] == b"POST /prefix/api/v1/x?y=%20z HTTP/1.1"


def _fields(head: bytes) -> list[bytes]:
    first, *lines = head.splitlines()
    pairs = [line.split(b": ", 1) for line in lines]
    return [first, *sorted(name.lower() + b": " + value for name, value in pairs)]


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        ([CHUNKED, b"2\r\nab\r\n", b"1\r\nc\r\n0\r\nx: y\r\n\r\n"], b"abc"),
        ([b"HTTP/1.1 200 OK\r\n\r\nab", b"c", CLOSE], b"abc"),
        ([b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", CLOSE], b"abc"),
        ([b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + OK[:20], OK[20:]], b"{}"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nConnection: close\r\n\r\nabc", CLOSE], b"abc"),
    ],
    ids=["chunked", "until the end", "HTTP/1.0", "informational", "no content", "close"],
)
def test_response_is_read_whole(run: Run, answer: Answer, content: bytes) -> None:
    with peer(answer, [OK]) as service:
        first, second = run(service, posts(2))
    assert (first.content, second.json()) == (content, {})
    assert not {"link", "x"} & set(first.headers), "of an informational response, of a trailer"


@pytest.mark.parametrize(
    "answer",
    [
        [CLOSE],
        [b"HTTP/1.1 200 OK\r\nContent-Le", CLOSE],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", CLOSE],
        [CHUNKED + b"2\r\nab\r\n", CLOSE],
        [b"SSH-2.0-OpenSSH_9\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc", CLOSE],
        [b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"],
        [b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 300_000],
        [b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000],
    ],
    ids=[
        "nothing",
        "half a head",
        "half a body",
        "half of the chunks",
        "no HTTP",
        "two lengths",
        "damaged",
        "endless field",
        "endless head",
    ],
)
def test_response_that_is_cut_or_malformed_is_no_response(run: Run, answer: Answer) -> None:
    async def post(http: Http) -> Any:
        with pytest.raises(APIConnectionError):
            await http.send("POST", "/x", json={})
        return await http.send("POST", "/x", json={})

    with peer(answer, [OK]) as service:
        assert run(service, post).json() == {}
    assert len(set(service.connections)) == 2, "the broken connection is not used again"


def test_silence_is_a_timeout_and_ends_the_connection(run: Run) -> None:
    async def post(http: Http) -> Any:
        with pytest.raises(APITimeoutError, match=r"no answer in 0\.05 s"):
            await http.send("POST", "/x", json={}, timeout=0.05)
        return await http.send("POST", "/y", json={})

    with peer([OK]) as service:
        service.to_x = []
        assert run(service, post).json() == {}
    assert service.connections
    assert len(set(service.connections)) == len(service.connections)


def test_body_that_nobody_reads_is_a_timeout(run: Run) -> None:
    async def post(http: Http) -> None:
        with pytest.raises(APITimeoutError):
            await http.send("POST", "/x", content=bytes(64 << 20), timeout=0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = Peer([], url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        run(service, post)


def test_answer_to_a_part_of_the_body_is_an_answer() -> None:
    refusal = b"HTTP/1.1 413 Large\r\nContent-Length: 2\r\n\r\n{}"

    def refuse(listener: socket.socket) -> None:
        accepted, _ = listener.accept()
        with accepted:
            accepted.recv(1 << 16)
            accepted.sendall(refusal)
            done.wait(GIVE_UP_SECONDS)

    async def post(url: str) -> int:
        http = Http(url, None)
        response = await http.send("POST", "/x", content=bytes(64 << 20), timeout=GIVE_UP_SECONDS)
        assert http._direct is not None and http._direct._pool is not None
        assert http._direct._pool._idle == [], "the rest of the body was not sent"
        await http.close()
        return response.status_code

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=refuse, args=(listener,), daemon=True)
        thread.start()
        assert asyncio.run(post(f"http://127.0.0.1:{listener.getsockname()[1]}")) == 413
        done.set()
        thread.join(GIVE_UP_SECONDS)


def test_refused_connection_is_an_error_at_once(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    async def post(http: Http) -> None:
        with pytest.raises(APIConnectionError, match="ConnectError"):
            await http.send("POST", "/x", json={})

    run(Peer([], url=url), post)


@pytest.mark.parametrize("more", [b"x", OK], ids=["bytes", "a second answer"])
def test_connection_with_more_than_its_answer_is_not_used_again(more: bytes) -> None:
    async def post(http: Http) -> list[Any]:
        return [(await http.send("POST", "/x", json={})).status_code for _ in range(2)]

    async def with_http(service: Peer) -> list[Any]:
        http = Http(service.url, None)
        try:
            return await post(http)
        finally:
            await http.close()

    second = b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n{}"
    with peer([OK + more], [second]) as service:
        assert asyncio.run(with_http(service)) == [200, 201]
    assert service.connections[0] != service.connections[1]


def test_connection_that_the_service_closed_is_not_used_again(run: Run) -> None:
    async def post(http: Http) -> list[httpx.Response]:
        first = await http.send("POST", "/x", json={})
        assert await asyncio.to_thread(closed.wait, GIVE_UP_SECONDS)
        return [first, await http.send("POST", "/x", json={})]

    closed = threading.Event()

    class Closing(Peer):
        def _answer(self, accepted: socket.socket, number: int) -> None:
            super()._answer(accepted, number)
            closed.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = Closing([[OK, CLOSE], [OK]])
        service.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=service.serve, args=(listener,), daemon=True).start()
        assert len(run(service, post)) == 2
        listener.shutdown(socket.SHUT_RDWR)
    assert service.connections[0] != service.connections[1]


def test_cancelled_request_ends_its_connection(run: Run) -> None:
    async def post(http: Http) -> Any:
        task = asyncio.create_task(http.send("POST", "/x", json={}))
        assert await asyncio.to_thread(service.arrived.acquire, timeout=GIVE_UP_SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(service.ended.wait, GIVE_UP_SECONDS)
        return await http.send("POST", "/y", json={})

    with peer([OK]) as service:
        service.to_x = []
        assert run(service, post).json() == {}
    assert service.connections[0] != service.connections[1]


def test_redirects_are_followed_where_that_is_allowed(run: Run) -> None:
    moved = b"HTTP/1.1 307 Moved\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n"

    async def post(http: Http) -> list[int]:
        refused = await http.send("POST", "/x", json={}, follow_redirects=False)
        followed = await http.send("POST", "/x", json={})
        return [refused.status_code, followed.status_code]

    with peer([OK]) as service:
        service.to_x = [moved]
        assert run(service, post) == [307, 200]
    assert service.requests[-1][1].startswith(b"POST /y ")


def test_cookies_are_sent_back(run: Run) -> None:
    sets = b"HTTP/1.1 200 OK\r\nSet-Cookie: server=b7; Path=/\r\nContent-Length: 2\r\n\r\n{}"
    with peer([sets], [OK]) as service:
        run(service, posts(3))
    cookies = [b"cookie: server=b7" in head.lower() for _, head in service.requests]
    assert cookies == [False, True, True]


@pytest.mark.parametrize("value", ["a\r\nX-Admin: 1", "a\nb", "a\0b"])
def test_header_with_a_line_break_is_not_sent(run: Run, value: str) -> None:
    async def post(http: Http) -> None:
        with pytest.raises(APIConnectionError):
            await http.send("POST", "/x", json={}, headers={"X-Own": value})

    with peer([OK]) as service:
        run(service, post)
    assert service.requests == []


def test_proxy_gets_the_requests_to_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    async def get(url: str) -> None:
        http = Http(url, None)
        await http.send("GET", "/x")
        await http.close()

    with peer([OK]) as proxy, peer([OK]) as service:
        monkeypatch.setenv("http_proxy", proxy.url)
        asyncio.run(get("http://service.invalid"))
        asyncio.run(get(service.url))
    assert [head.split()[1] for _, head in proxy.requests] == [b"http://service.invalid/api/v1/x"]
    assert len(service.requests) == 1


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "http://user:word@127.0.0.1:1"])
def test_encrypted_services_and_passwords_in_urls_are_left_to_httpx(url: str) -> None:
    async def get() -> None:
        http = Http(url, None)
        with pytest.raises(APIConnectionError):
            await http.send("GET", "/x")
        assert http._direct is not None and http._direct._pool is None
        await http.close()

    asyncio.run(get())
