"""The protocols of connections: what is read, bounded and refused, and one write an answer."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from everstep.server import protocols
from everstep.server.protocols import http_protocol
from everstep.server.protocols.h11_protocol import H11Protocol
from everstep.server.protocols.httptools_protocol import HttptoolsProtocol
from everstep.server.protocols.joined_writes import JoinedWrites
from everstep.server.protocols.malformed import MAX_HEAD_BYTES
from everstep.server.serve import listen

LARGE = 8 << 20
LONG = 1 << 20
"""More than the bound and one read of a socket."""


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what was read: the path, the headers and the size of the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    content = json.dumps(
        {
            "path": scope["path"],
            "headers": [
                [name.decode(), value.decode("latin-1")] for name, value in scope["headers"]
            ],
            "body": len(body),
        }
    ).encode()
    if scope["path"] == "/large":
        content = b"x" * LARGE
    headers = [(b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send(
        {"type": "http.response.body", "body": content[: len(content) // 2], "more_body": True}
    )
    await send({"type": "http.response.body", "body": content[len(content) // 2 :]})


@contextmanager
def serving(protocol: type[asyncio.Protocol], loop: str) -> Iterator[tuple[str, int]]:
    """Serve `echo` in a thread."""
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        echo,
        http=protocol,
        loop=loop,
        ws="none",
        lifespan="off",
        log_config=None,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()


STACKS = [
    (protocol, loop)
    for protocol in (HttptoolsProtocol, H11Protocol)
    for loop in ("uvloop", "asyncio")
]


@pytest.fixture(scope="module", params=STACKS, ids=lambda stack: f"{stack[0].__name__}-{stack[1]}")
def address(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    with serving(*request.param) as found:
        yield found


class Answer:
    """One response, as it was read from a connection."""

    def __init__(self, file: Any) -> None:
        self.status = int(file.readline().split()[1])
        self.headers: dict[str, str] = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(": ")
            self.headers[name.lower()] = value
        self.body: bytes = file.read(int(self.headers.get("content-length", 0)))

    def json(self) -> Any:
        return json.loads(self.body)


@contextmanager
def connected(address: tuple[str, int]) -> Iterator[tuple[socket.socket, Any]]:
    with socket.create_connection(address, timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection.makefile("rb") as file:
            yield connection, file


def request(path: str = "/", *headers: str, body: bytes = b"") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize(("protocol", "loop"), STACKS)
def test_response_is_one_write(protocol: type[Any], loop: str) -> None:
    writes: list[int] = []

    class Counted(JoinedWrites):
        """The connection's transport, which hands on what it is given and records it."""

        def write(self, data: Any) -> None:
            writes.append(len(data))
            self._transport.write(data)

    class Protocol(protocol):  # type: ignore[misc]  # its class is a parameter
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(Counted(transport))

    with serving(Protocol, loop) as address, connected(address) as (connection, file):
        for count in range(1, 20):
            connection.sendall(request())
            assert Answer(file).status == 200
            assert len(writes) == count
            assert min(writes) > 100


def test_connection_is_kept_for_requests_with_bodies_of_any_framing(
    address: tuple[str, int],
) -> None:
    with connected(address) as (connection, file):
        for path, headers, body, size in [
            ("/a%20b?c=d", [], b"abc", 3),
            ("/a b", ["Expect: 100-continue"], b"abc", 3),
            ("/a b", ["Transfer-Encoding: chunked"], b"", 5),
            ("/a b", [], b"x" * LARGE, LARGE),
            ("/a b", ["Connection: Upgrade", "Upgrade: h2c"], b"", 0),
        ]:
            connection.sendall(request(path.replace(" ", "%20"), *headers, body=body))
            if "Expect: 100-continue" in headers:
                assert Answer(file).status == 100
            if "Transfer-Encoding: chunked" in headers:
                connection.sendall(b"2\r\nab\r\n3;x=y\r\ncde\r\n0\r\nX-Trailer: 1\r\n\r\n")
            answer = Answer(file)
            assert (answer.status, answer.json()["path"], answer.json()["body"]) == (
                200,
                "/a b",
                size,
            )
            assert "x-trailer" not in dict(answer.json()["headers"])


def test_large_response_is_whole(address: tuple[str, int]) -> None:
    with connected(address) as (connection, file):
        for _ in range(3):
            connection.sendall(request("/large"))
            assert Answer(file).body == b"x" * LARGE


MALFORMED = {
    "nul": request("/", "X: \0"),
    "space before colon": request("/", "X : 1"),
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": request("/", "Host: y"),
    "two lengths": request("/", "Content-Length: 1", "Content-Length: 2"),
    "unknown transfer encoding": request("/", "Transfer-Encoding: gzip"),
    "no http": b"hello\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "text in the path": "GET /é HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    "chunk size": request("/", "Transfer-Encoding: chunked") + b"zz\r\n",
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED)
def test_malformed_request_is_refused_in_json(address: tuple[str, int], sent: bytes) -> None:
    with connected(address) as (connection, file):
        connection.sendall(request())
        assert Answer(file).status == 200
        connection.sendall(sent)
        answer = Answer(file)
        assert (answer.status, answer.headers["connection"]) == (400, "close")
        assert answer.json() == {
            "detail": "Invalid HTTP request received. Its head is malformed, or too long."
        }
    with connected(address) as (connection, file):
        connection.sendall(request())
        assert Answer(file).status == 200


ENDLESS = {
    "long header, unfinished": request("/", "X: " + "a" * LONG)[:-4],
    "long target, unfinished": b"GET /" + b"a" * LONG,
    "many headers, unfinished": request("/", *["X: " + "a" * 100] * (LONG // 100))[:-4],
    "long chunk extension": request("/", "Transfer-Encoding: chunked") + b"1;" + b"a" * LONG,
    "long trailer": request("/", "Transfer-Encoding: chunked") + b"0\r\nX: " + b"a" * LONG,
}


@pytest.mark.parametrize("sent", ENDLESS.values(), ids=ENDLESS)
def test_endless_head_is_cut_off(address: tuple[str, int], sent: bytes) -> None:
    with connected(address) as (connection, file):
        try:
            for start in range(0, len(sent), 5000):
                connection.sendall(sent[start : start + 5000])
            assert Answer(file).status == 400
        except ConnectionError:
            pass  # refused before its end, and the answer is lost


def test_whole_request_is_answered_before_malformed_data_ends_the_connection(
    address: tuple[str, int],
) -> None:
    with connected(address) as (connection, file):
        connection.sendall(request("/1") + request("/2") + b"\0\0\r\n\r\n")
        assert [Answer(file).json()["path"] for _ in range(2)] == ["/1", "/2"]


@pytest.mark.parametrize(
    "headers",
    [["X: " + "a" * 1000] * 20, ["Transfer-Encoding: chunked", "Content-Length: 2"]],
    ids=["long head at once", "length and chunks"],
)
def test_httptools_refuses_what_h11_reads(headers: list[str]) -> None:
    with serving(HttptoolsProtocol, "asyncio") as address, connected(address) as (connection, file):
        connection.sendall(request("/", *headers))
        assert Answer(file).status == 400


def test_old_clients_are_answered_and_disconnected(address: tuple[str, int]) -> None:
    for sent in (b"GET / HTTP/1.0\r\n\r\n", request("/", "Connection: close")):
        with connected(address) as (connection, file):
            connection.sendall(sent)
            assert Answer(file).status == 200
            assert file.read() == b""


class Transport(asyncio.Transport):
    """A transport that records what is written."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.writes.append(b"closed")


def test_writes_of_a_turn_of_the_loop_are_joined_and_bounded() -> None:
    async def write() -> list[bytes]:
        transport = Transport()
        joined = JoinedWrites(transport)
        for _ in range(2):
            joined.write(b"head ")
            joined.write(b"body")
            await asyncio.sleep(0)
        joined.write(b"a" * (64 << 10))
        joined.write(b"b")
        joined.write(b"last")
        joined.write(large)
        joined.close()
        return transport.writes

    large = b"c" * (1 << 20)
    held = b"a" * (64 << 10) + b"b"
    assert asyncio.run(write()) == [b"head body"] * 2 + [held, b"last", large, b"closed"]


def test_h11_serves_where_httptools_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert http_protocol() is HttptoolsProtocol
    monkeypatch.setattr(protocols, "find_spec", lambda name: None)
    assert http_protocol() is H11Protocol
