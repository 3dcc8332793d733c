"""What a large body costs the service's process: copies, and work in one callback of its loop."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from everstep import spool as spools
from everstep.engine import Model
from everstep.server import conversion, piecewise, receive
from everstep.server.offload.pool import INLINE_BYTES
from everstep.wire.codecs import everstep_pb2
from everstep.wire.codecs.proto import PROTOBUF
from tests.runtime.local import Local, batch
from tests.server.asgi import PART_BYTES, parts, request
from tests.server.test_offload import protobuf

MIB = 1 << 20
PASS_BYTES = 16 * MIB
WORK_BYTES = 512 << 10
"""The most that a callback may handle: the largest inline body, and what a read adds to it."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    with Local(tmp_path_factory.mktemp("large"), pico) as service:
        yield service


def large_pass(run: str, seq_id: int) -> bytes:
    """A pass that is valid as such; its tensors have more rows than its tokens."""
    message = everstep_pb2.ForwardBackwardRequest(
        model_id=run, seq_id=seq_id, loss_fn="cross_entropy"
    )
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = bytes(4 * 100)
    tensor = datum.loss_fn_inputs["target_tokens"]
    tensor.dtype, tensor.dense = everstep_pb2.DTYPE_INT64, bytes(PASS_BYTES)
    tensor.shape.append(PASS_BYTES // 8)
    encoded: bytes = message.SerializeToString()
    return encoded


def submit(local: Local, content: bytes) -> str:
    headers = {"content-type": PROTOBUF, "content-length": str(len(content))}
    start, body = request(local, "/api/v1/forward_backward", parts(content), headers=headers)
    assert start["status"] == 200, body
    return str(json.loads(body["body"])["request_id"])


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch, local: Local) -> list[tuple[str, int]]:
    """What the event loop's thread itself reads, writes, decompresses, parses or converts."""
    found: list[tuple[str, int]] = []

    async def ident() -> int:
        return threading.get_ident()

    assert local.http.portal is not None
    loop = local.http.portal.call(ident)

    def watch(module: Any, name: str, size_of: Callable[..., int]) -> None:
        function = getattr(module, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == loop:
                found.append((name, size_of(*arguments, **options)))
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    watch(spools, "write_all", lambda _, data, offset=0: len(data))
    watch(os, "pread", lambda _, size, offset: size)
    watch(receive, "decompress", lambda body, encoding, limit: len(body))
    watch(receive, "parse", lambda model, body, **_: len(body))
    watch(conversion, "json_result_bytes", lambda kind, body: len(body))
    return found


def test_large_pass_is_handled_in_small_pieces(
    local: Local, handled: list[tuple[str, int]]
) -> None:
    content = large_pass(local.new_run(), 2)
    handled.clear()
    submit(local, content)
    written = [size for name, size in handled if name == "write_all"]
    assert sum(written) == len(content)
    assert max(size for _, size in handled) <= INLINE_BYTES + PART_BYTES <= WORK_BYTES


def test_large_pass_is_never_in_the_memory_of_the_interpreter(local: Local) -> None:
    """Neither its body nor its canonical form: the interpreter frees them with its lock held."""
    run = local.new_run()
    content = large_pass(run, 2)
    submit(local, content)  # whatever is loaded and allocated the first time
    content = large_pass(run, 3)
    tracemalloc.start()
    try:
        submit(local, content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * MIB


def test_large_result_is_converted_elsewhere_and_sent_in_pieces(
    local: Local, handled: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece when the connection takes more."""
    monkeypatch.setattr(piecewise, "PIECE_BYTES", 512)
    monkeypatch.setattr(conversion, "INLINE_RESULT_BYTES", 1024)
    done = submit(local, protobuf(local.new_run(), 1, batch(count=16)))
    local.result(done)
    asked = json.dumps({"request_id": done}).encode()
    for accept in (PROTOBUF, "application/json"):
        handled.clear()
        headers = {"accept": accept}
        start, *body = request(local, "/api/v1/retrieve_future", [asked], headers=headers)
        assert start["status"] == 200
        sizes = [len(each["body"]) for each in body]
        assert sum(sizes) == int(dict(start["headers"])[b"content-length"]) > 2 * 512
        assert max(sizes) <= 512
        assert [each["more_body"] for each in body] == [True] * (len(body) - 1) + [False]
        assert b"".join(each["body"] for each in body) == local.poll(done, accept).content
        assert {name for name, _ in handled} == {"decompress", "parse"}, "of the request"
