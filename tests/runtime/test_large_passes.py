"""Large requests through the service: bounded by bytes, read by the worker where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from everstep.engine import Model
from everstep.ledger.payload_log.contents import LOGGED_BYTES
from everstep.ledger.payload_log.segments import SegmentFiles, segments_path
from everstep.runtime.workers import connection
from everstep.worker import commands, samplers
from everstep.worker.protocol import channel, messages
from everstep.worker.protocol.stored_request import read_request
from tests.runtime.local import Local, batch
from tests.scenario import MODEL

LARGE = 32  # datums


@pytest.fixture
def local(home: Path, pico: Model) -> Iterator[Local]:
    with Local(home, pico, poll_seconds=0.05, queue_bytes=4 * LOGGED_BYTES) as service:
        yield service


def segments(local: Local) -> list[Path]:
    return sorted(segments_path(local.home / "ledger.sqlite").iterdir())


def large(shift: int) -> dict[str, Any]:
    return {"forward_backward_input": batch(shift, LARGE)}


def test_full_queue_refuses_a_pass_until_others_have_ended(local: Local) -> None:
    run = local.new_run()
    sent = []
    with local.steps.shut():
        for seq_id in range(1, 9):
            body = {"model_id": run, "seq_id": seq_id, **large(seq_id)}
            answer = local.http.post("forward_backward", json=body)
            if answer.status_code != 200:
                break
            sent.append(answer.json()["request_id"])
        assert 1 <= len(sent) < 8
        assert answer.status_code == 429
        assert "queue_bytes" in answer.json()["detail"]
        assert float(answer.headers["Retry-After"]) > 0
        again = local.post("forward_backward", **{**body, "seq_id": 1, **large(1)})
        assert again["request_id"] == sent[0], "a retry is answered"
    for each in sent:
        assert local.result(each)["loss_fn_outputs"]
    sent.append(local.post("forward_backward", **body)["request_id"])
    assert local.result(sent[-1])["loss_fn_outputs"]


def test_damaged_pass_in_the_queue_corrupts_its_run_by_name_and_no_other(local: Local) -> None:
    run, other = local.new_run(), local.new_run(seed=2)
    local.train(other, 0)
    with local.steps.shut():
        first = local.send(run, "forward_backward", **large(1))
        (segment,) = segments(local)
        before = segment.stat().st_size
        second = local.send(run, "forward_backward", **large(2))
        whole = bytearray(segment.read_bytes())
        whole[before + 1000] ^= 1
        segment.write_bytes(whole)
    assert local.result(first)["loss_fn_outputs"]
    failed = local.result(second)
    assert f"The request of operation 2 (forward_backward) of {run} is damaged" in failed["error"]
    assert segment.name in failed["error"]
    assert local.train(other, 1)


# What the service touches of a request


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[tuple[messages.Message, int]]:
    """The commands that the service sends, and the bytes that each takes on the socket."""
    sent: list[tuple[messages.Message, int]] = []
    pack = channel.pack

    def noted(call_id: int, message: messages.Message) -> bytes:
        frame = pack(call_id, message)
        sent.append((message, len(frame)))
        return frame

    monkeypatch.setattr(connection, "pack", noted)
    return sent


def long_sample(local: Local, seq_id: int) -> str:
    """Submit a sample of few tokens and a large request."""
    sampler = local.post(
        "create_sampling_session",
        session_id=local.session(),
        sampling_session_seq_id=0,
        base_model=MODEL,
    )
    empty = {"type": "encoded_text", "tokens": []}
    chunks = [{"type": "encoded_text", "tokens": [7, 8]}, *[empty] * (LOGGED_BYTES // 16)]
    sent = local.post(
        "asample",
        sampling_session_id=sampler["sampling_session_id"],
        seq_id=seq_id,
        prompt={"chunks": chunks},
        num_samples=2,
        sampling_params={"max_tokens": 4, "seed": 1},
    )
    assert len(sent["sample_sequence_ids"]) == 2
    return str(sent["request_id"])


def test_service_neither_reads_nor_sends_a_pass_that_it_has_accepted(
    local: Local, frames: list[tuple[messages.Message, int]]
) -> None:
    run = local.new_run()
    with mock.patch.object(SegmentFiles, "read", side_effect=AssertionError("it was read")):
        done = [local.send(run, "forward_backward", **large(n)) for n in (1, 2)]
        done.append(local.send(run, "optim_step", adam_params={"learning_rate": 0.01}))
        for each in done:
            assert "error" not in local.result(each)
    sizes = [size for message, size in frames if isinstance(message, messages.TrainingPass)]
    assert len(sizes) == 2
    assert max(sizes) < 1024


def test_service_does_not_hold_the_requests_of_samples_that_wait(
    local: Local, frames: list[tuple[messages.Message, int]]
) -> None:
    with local.steps.shut():
        request_id = long_sample(local, 1)
        ((command, size),) = [each for each in frames if isinstance(each[0], messages.Sample)]
        assert isinstance(command, messages.Sample)
        assert (command.body, size < 1024) == (b"", True)
    assert len(local.result(request_id)["sequences"]) == 2


# Workers that can't read one, and damage


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """Workers that see an empty home. Whether each request was stored."""
    asked: list[bool] = []

    def read(_: Path, body: bytes, stored: Any) -> bytes:
        asked.append(stored is not None)
        return read_request(tmp_path / "elsewhere", body, stored)

    monkeypatch.setattr(commands, "read_request", read)
    monkeypatch.setattr(samplers, "read_request", read)
    return asked


def trained(local: Local) -> list[Any]:
    """Steps of large passes that are all sent before the first is executed."""
    run, sent = local.new_run(), []
    with local.steps.shut():
        for shift in range(3):
            sent.append(local.send(run, "forward_backward", **large(shift)))
            sent.append(local.send(run, "optim_step", adam_params={"learning_rate": 0.01}))
    return [local.result(each) for each in sent]


def test_worker_that_does_not_see_the_home_is_sent_requests_in_order(
    home: Path, pico: Model, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with Local(home, pico) as local:
        expected = trained(local)
    unread: list[bool] = request.getfixturevalue("unread")
    with Local(tmp_path / "other", pico) as local:
        assert trained(local) == expected
        assert unread.count(True) == 1, "the first tells"
        assert len(local.result(long_sample(local, 1))["sequences"]) == 2


def test_damaged_sample_fails_by_name_and_no_other(local: Local) -> None:
    with local.steps.shut():
        damaged = long_sample(local, 1)
        (segment,) = segments(local)
        kept = segment.read_bytes()
        segment.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        whole = long_sample(local, 2)
    failed = local.result(damaged)
    assert "The request of operation 1 (sample)" in failed["error"]
    assert failed["category"] == "server"
    assert len(local.result(whole)["sequences"]) == 2


def test_worker_that_ends_while_it_reads_a_pass_is_followed_by_one_that_reads_it(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, run = local.new_run(), local.new_run()
    expected = local.do(other, "forward_backward", **large(1))
    log = local.app.state.runtime._ledger._store.payloads
    reads: list[int] = []

    def read(*arguments: Any) -> bytes:
        reads.append(log._unsettled.total())
        if len(reads) == 1:
            local.lose_worker()
        return read_request(*arguments)

    monkeypatch.setattr(commands, "read_request", read)
    assert local.do(run, "forward_backward", **large(1)) == expected
    assert reads == [1, 1], "it is held where it is while a worker has the command"
    assert not log._unsettled
