"""Large passes through the service: a queue that is bounded by bytes, and damage that is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.ledger.payload_log.contents import LOGGED_BYTES
from everstep.ledger.payload_log.segments import segments_path
from tests.runtime.local import Local, batch

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
