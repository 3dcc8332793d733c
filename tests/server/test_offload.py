"""Large bodies and results are computed in another process, with the same outcome."""

from __future__ import annotations

import gzip
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard

from everstep.engine import Model
from everstep.runtime.admission import passes as admission
from everstep.server import conversion, passes, receive
from everstep.server.offload import pool
from everstep.server.offload.budget import ByteBudget
from everstep.server.offload.pool import Offload
from everstep.spool import Spool, read_all
from everstep.wire.codecs.proto import PROTOBUF, encode_forward_backward_request
from everstep.wire.messages.requests import ForwardBackwardRequest
from tests.runtime.local import Local, batch

INLINE_BYTES = 1 << 10
LARGE = 16
"""Datums of a pass that is computed in the process, in JSON and in protobuf."""
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "identity": bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    with Local(tmp_path_factory.mktemp("offload"), pico) as service:
        yield service


def set_inline_bytes(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(receive, "INLINE_BYTES", size)
    monkeypatch.setattr(conversion, "INLINE_RESULT_BYTES", size)


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the size up to which bodies and results are computed in the service."""

    def set_bytes(size: int) -> None:
        set_inline_bytes(monkeypatch, size)

    set_bytes(INLINE_BYTES)
    return set_bytes


@pytest.fixture
def not_in_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the service itself decodes or encodes a pass, or converts a result."""

    def fail(*_: Any) -> None:
        raise AssertionError("computed in the service")

    monkeypatch.setattr(passes.PassForm, "decode", fail)
    monkeypatch.setattr(admission, "encode_training_pass", fail)
    monkeypatch.setattr(conversion, "json_result_bytes", fail)


def protobuf(model_id: str, seq_id: int, passed: dict[str, Any]) -> bytes:
    request = {"model_id": model_id, "seq_id": seq_id, "forward_backward_input": passed}
    return encode_forward_backward_request(ForwardBackwardRequest.model_validate(request))


def open_spools() -> int:
    """How many this process has open, where that can be told. Other files come and go."""
    found = 0
    for each in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):  # closed meanwhile
            found += "memfd:everstep" in str(each.readlink())
    return found


def offload(local: Local) -> Offload:
    found: Offload = local.app.state.offload
    return found


def send(local: Local, run: str, seq_id: int, passed: dict[str, Any], encoding: str) -> str:
    """Send a pass in protobuf; returns its request id."""
    answer = local.http.post(
        "forward_backward",
        content=COMPRESSIONS[encoding](protobuf(run, seq_id, passed)),
        headers={"content-type": PROTOBUF, "content-encoding": encoding},
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


@pytest.fixture(scope="module")
def expected(local: Local) -> Iterator[tuple[bytes, bytes]]:
    """A large pass's result in JSON and protobuf, by a service that computes everything itself."""
    with pytest.MonkeyPatch.context() as patch:
        set_inline_bytes(patch, 1 << 30)
        done = send(local, local.new_run(), 1, batch(count=LARGE), "identity")
        local.result(done)
        yield local.poll(done).content, local.poll(done, accept=PROTOBUF).content


@pytest.mark.parametrize("encoding", COMPRESSIONS)
def test_large_pass_and_result_are_computed_elsewhere_to_the_byte(
    local: Local, expected: tuple[bytes, bytes], encoding: str, not_in_the_service: None
) -> None:
    done = send(local, local.new_run(), 1, batch(count=LARGE), encoding)
    local.result(done)
    answers = local.poll(done).content, local.poll(done, accept=PROTOBUF).content
    assert min(map(len, answers)) > INLINE_BYTES
    assert answers == expected


def test_large_pass_in_json_is_the_same_operation(
    local: Local, expected: tuple[bytes, bytes], not_in_the_service: None
) -> None:
    run = local.new_run()
    sent = local.send(run, "forward_backward", forward_backward_input=batch(count=LARGE))
    assert send(local, run, 1, batch(count=LARGE), "identity") == sent, "a retry"
    local.result(sent)
    assert local.poll(sent).content == expected[0]


INVALID: dict[str, Callable[[dict[str, Any]], Any]] = {
    "token": lambda passed: passed["data"][-1]["model_input"]["chunks"][0]["tokens"].append(10**6),
    "length": lambda passed: passed["data"][3]["model_input"]["chunks"][0]["tokens"].append(1),
    "loss": lambda passed: passed.update(loss_fn="hinge"),
    "config": lambda passed: passed.update(loss_fn_config={"beta": 1.0}),
    "tensor": lambda passed: passed["data"][0]["loss_fn_inputs"]["target_tokens"].update(shape=[7]),
    "field": lambda passed: passed.update(data=1),
    "provenance": lambda passed: passed.update(loss_fn="stable_reinforce"),
    "custom": lambda passed: passed.update(loss_fn="custom"),
}


@pytest.mark.parametrize("change", INVALID.values(), ids=INVALID)
def test_invalid_pass_fails_its_future_with_the_same_text(
    local: Local, inline: Callable[[int], None], change: Callable[[dict[str, Any]], Any]
) -> None:
    texts = []
    for size in (1 << 30, 0):
        inline(size)
        passed = batch(count=4)
        change(passed)
        run = local.new_run()
        failed = local.result(local.send(run, "forward_backward", forward_backward_input=passed))
        assert failed["category"] == "user"
        texts.append(failed["error"])
        local.do(run, "optim_step", adam_params={})  # it does not wait for the pass
    assert texts[0] == texts[1]


def test_unknown_field_in_protobuf_fails_the_future_unless_the_sdk_is_newer(
    local: Local, inline: Callable[[int], None]
) -> None:
    texts = []
    for size in (1 << 30, 0):
        inline(size)
        for headers in ({}, {"x-stainless-package-version": "99.0"}):
            content = protobuf(local.new_run(), 1, batch()) + b"\x78\x05"
            sent = {"content-type": PROTOBUF, **headers}
            answer = local.http.post("forward_backward", content=content, headers=sent)
            texts.append(local.result(answer.json()["request_id"]).get("error", "none"))
    assert "no field number 15" in texts[0]
    assert texts == [texts[0], "none"] * 2


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"{", {}),
        (b"[]", {}),
        (b"\xff" * 9, {"content-type": PROTOBUF}),
        (b"x" * 9, {"content-encoding": "zstd"}),
        (b"x" * 9, {"content-encoding": "br"}),
        (zstandard.compress(bytes(70 << 20)), {"content-encoding": "zstd"}),
        (gzip.compress(bytes(70 << 20)), {"content-encoding": "gzip"}),
    ],
)
def test_unreadable_pass_is_refused_with_the_same_text(
    local: Local, inline: Callable[[int], None], content: bytes, headers: dict[str, str]
) -> None:
    answers = []
    for size in (INLINE_BYTES, 0):
        inline(size)
        answer = local.http.post("forward_backward", content=content, headers=headers)
        answers.append((answer.status_code, answer.json()["detail"]))
    assert answers[0] == answers[1]
    assert answers[0][0] in (400, 413)


class Turnstile:
    """Lets the passes of a service through one at a time, when the test says so."""

    def __init__(self, local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived = threading.Semaphore(0)
        self.passes = threading.Semaphore(0)
        exchange = offload(local)._exchange

        def wait(message: bytes, *spools: Spool) -> Any:
            if b"prepare_pass" in message:
                self.arrived.release()
                assert self.passes.acquire(timeout=60)
            return exchange(message, *spools)

        monkeypatch.setattr(offload(local), "_exchange", wait)


def test_other_clients_are_answered_while_a_body_is_computed(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, turnstile = local.new_run(), Turnstile(local, monkeypatch)
    with ThreadPoolExecutor() as threads:
        sent = threads.submit(send, local, run, 1, batch(count=LARGE), "identity")
        assert turnstile.arrived.acquire(timeout=60)
        local.post("session_heartbeat", session_id=local.session())
        assert local.http.get("healthz").status_code == 200
        assert not sent.done()
        turnstile.passes.release()
        local.result(sent.result(60))


def test_concurrent_large_passes_are_applied_by_seq_id(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second arrives, and is accepted, while the first is on its way to the process."""
    first, second = batch(count=LARGE), batch(shift=1, count=LARGE)
    in_order, crossed = local.new_run(), local.new_run()
    step = {"adam_params": {"learning_rate": 0.01}}

    def finish(run: str, ids: list[str]) -> list[Any]:
        ids += [local.send(run, "optim_step", seq_id=3, **step)]
        ids += [local.send(run, "forward", seq_id=4, forward_input=batch())]
        return [local.result(each) for each in ids]

    expected = finish(
        in_order, [send(local, in_order, n, each, "zstd") for n, each in [(1, first), (2, second)]]
    )
    turnstile = Turnstile(local, monkeypatch)
    with ThreadPoolExecutor() as threads:
        later = threads.submit(send, local, crossed, 2, second, "zstd")
        assert turnstile.arrived.acquire(timeout=60)
        turnstile.passes.release()
        accepted = later.result(60)
        earlier = threads.submit(send, local, crossed, 1, first, "zstd")
        turnstile.passes.release(2)  # and the forward pass
        assert finish(crossed, [earlier.result(60), accepted]) == expected


def test_bodies_that_wait_are_bounded(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Spool] = []
    most = 0
    closed_by = set()

    class Counted(Spool):
        def __init__(self) -> None:
            nonlocal most
            super().__init__()
            held.append(self)
            most = max(most, len(held))

        def close(self) -> None:
            held.remove(self)
            closed_by.add(threading.get_ident())
            super().close()

    monkeypatch.setattr(pool, "Spool", Counted)
    monkeypatch.setattr(offload(local), "budget", ByteBudget(3 * (8 << 20)))
    runs = [local.new_run() for _ in range(12)]
    turnstile = Turnstile(local, monkeypatch)
    with ThreadPoolExecutor(12) as threads:
        sent = [threads.submit(send, local, run, 1, batch(count=LARGE), "identity") for run in runs]
        for _ in runs:
            assert turnstile.arrived.acquire(timeout=60)
            turnstile.passes.release()
        for each in sent:
            local.result(each.result(60))
    assert 1 < most <= 3 + 1, "those of three bodies, and one result's"
    assert held == []
    assert local.http.portal is not None
    assert local.http.portal.call(thread_of_the_loop) not in closed_by, "freeing memory takes time"


async def thread_of_the_loop() -> int:
    return threading.get_ident()


def test_request_is_repeated_after_the_process_died(local: Local) -> None:
    run = local.new_run()
    send(local, run, 1, batch(count=LARGE), "identity")
    process = offload(local)._process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    content = protobuf(run, 2, batch(count=LARGE))
    answer = local.http.post(
        "forward_backward", content=content, headers={"content-type": PROTOBUF}
    )
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    local.result(send(local, run, 2, batch(count=LARGE), "identity"))


def test_job_that_fails_is_an_error_of_the_service(local: Local) -> None:
    async def run() -> Any:
        async with offload(local).spool(0) as spool:
            return await offload(local).run("convert_result", {}, spool)

    assert local.http.portal is not None
    with pytest.raises(RuntimeError, match="KeyError: 'kind'"):
        local.http.portal.call(run)
    send(local, local.new_run(), 1, batch(count=LARGE), "identity")


def test_process_ends_with_the_service(tmp_path: Path, pico: Model) -> None:
    with Local(tmp_path, pico) as service:
        send(service, service.new_run(), 1, batch(count=LARGE), "identity")
        process = offload(service)._process
        assert process is not None and process.poll() is None
        before = open_spools()
        send(service, service.new_run(), 1, batch(count=LARGE), "identity")
        assert open_spools() == before, "no spool is left open"
    assert process.poll() is not None


def test_process_ends_when_the_service_dies() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [
            sys.executable,
            "-P",
            "-m",
            "everstep.server.offload.process",
            str(theirs.fileno()),
        ]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    ours.close()
    assert process.wait(60) == 0


def test_process_starts_without_fastapi_and_the_runtime() -> None:
    code = (
        "import sys, everstep.server.offload.process; "
        "print([m for m in ('fastapi', 'torch', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"


def test_spool_keeps_what_is_written() -> None:
    with Spool() as spool:
        for part in (b"abc", b"", b"d" * 100_000):
            spool.write(part)
        assert read_all(spool.descriptor, spool.size) == b"abc" + b"d" * 100_000
        assert read_all(spool.descriptor, 0) == b""
        with pytest.raises(EOFError, match="ends at 100003 of 100004"):
            read_all(spool.descriptor, spool.size + 1)
