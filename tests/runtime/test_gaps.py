"""Sequence ids: a gap waits, then fails the operations behind it, and later ones execute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.runtime.admission import gaps
from tests.runtime.local import Local, batch
from tests.scenario import MODEL

STEP = {"adam_params": {"learning_rate": 0.01, "weight_decay": 0.1}}
GAP = 0.2


def fails_for_the_gap(answer: Any) -> bool:
    return bool(
        answer["category"] == "user"
        and f"did not arrive within {GAP:g} s" in answer["error"]
        and "send it again with a new sequence id" in answer["error"]
    )


def test_operation_after_gap_fails_and_later_ones_execute(home: Path, pico: Model) -> None:
    with Local(home, pico, gap_seconds=GAP) as service:
        run, reference = service.new_run(), service.new_run()
        service.train(run, 0)
        service.train(reference, 0)
        late = [service.send(run, "optim_step", seq_id, **STEP) for seq_id in (4, 6)]
        assert all(fails_for_the_gap(service.result(each)) for each in late)
        assert service.train(run, 1) == service.train(reference, 1), "neither step was made"


def test_operation_that_arrives_after_its_gap_failed_is_not_executed(
    home: Path, pico: Model
) -> None:
    with Local(home, pico, gap_seconds=GAP) as service:
        run, reference = service.new_run(), service.new_run()
        service.result(service.send(run, "optim_step", 2, **STEP))
        body = {"forward_backward_input": batch()}
        first = service.send(run, "forward_backward", 1, **body)
        assert fails_for_the_gap(service.result(first))
        assert service.send(run, "forward_backward", 1, **body) == first, "so does its retry"
        service.send(run, "optim_step", 2, **STEP)
        assert service.train(run, 1) == service.train(reference, 1)


def test_gap_times_out_after_restart(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        service.train(reference, 0)
        service.train(run, 0)
        waits = service.send(run, "optim_step", 4, **STEP)
    with service.after(gap_seconds=GAP) as service:
        assert fails_for_the_gap(service.result(waits))
        assert service.train(run, 1) == service.train(reference, 1)
    with service.after() as service:
        assert service.train(run, 2) == service.train(reference, 2), "what was given up stays so"


def test_missing_operation_that_arrives_in_time_closes_gap(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        second = service.send(run, "optim_step", 2, **STEP)
    with service.after() as service:  # it waits on
        first = service.send(run, "forward_backward", 1, forward_backward_input=batch())
        assert [service.result(first), service.result(second)] == service.train(reference, 0)


def test_seq_id_beyond_lookahead_is_refused(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
    with service.after() as service:  # nothing of the run is in memory
        for seq_id in (10**4 + 1, 2**62):
            body = {"model_id": run, "seq_id": seq_id, **STEP}
            status, text = service.refused("optim_step", **body)
            assert (status, "too far ahead" in text) == (400, True)
        assert service.refused("optim_step", **{**body, "seq_id": 2**63})[0] == 400
        service.train(run, 0)


def test_long_run_continues_after_restart(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaps, "MAX_SEQ_ID_LOOKAHEAD", 3)
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        service.train(run, *range(4))
        service.train(reference, *range(4))
    with service.after() as service:
        with service.steps.shut():  # the run is being brought back while operations come
            sent = [*service.step(run, 4), *service.step(run, 5)]
        assert [service.result(each) for each in sent] == service.train(reference, 4, 5)


def test_operations_may_arrive_before_their_run_is_created(home: Path, pico: Model) -> None:
    """Clients compute the run's id themselves."""
    with Local(home, pico, poll_seconds=0.1) as service:
        body: dict[str, Any] = {
            "session_id": service.session(),
            "model_seq_id": 9,
            "base_model": MODEL,
        }
        with service.steps.shut():
            made = service.post("create_model", **body, lora_config={"rank": 4, "seed": 1})
            assert made["model_id"] == f"{service.session()}:train:9"
            sent = service.step(made["model_id"], 0)
            assert service.poll(made["request_id"]).status_code == 408, "not there yet"
        assert [service.result(each) for each in sent] == service.train(service.new_run(), 0)


def in_order(service: Local, run: str, route: str, seq_id: int, **body: Any) -> str:
    """Submit an operation as a client that sends one request at a time."""
    answer = service.http.post(
        route,
        json={"model_id": run, "seq_id": seq_id, **body},
        headers={"user-agent": "AsyncTinkex/0.1"},
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def test_gap_of_client_that_sends_in_order_closes_at_once(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, other = service.new_run(), service.new_run()
        expected = service.train(other, 0)
        first = in_order(service, run, "forward_backward", 1, forward_backward_input=batch())
        assert service.result(first) == expected[0]
        assert service.result(in_order(service, run, "optim_step", 3, **STEP)) == expected[1]
        late = service.result(service.send(run, "optim_step", 2, **STEP))
        assert "did not come before operation 3" in late["error"]


def test_gap_after_forward_stays_open_for_backward(home: Path, pico: Model) -> None:
    """The client computes its own loss between the two, and may send other operations first."""
    with Local(home, pico) as service:
        run, other = service.new_run(), service.new_run()
        expected = service.train(other, 0)
        service.result(in_order(service, run, "forward", 1, forward_input=batch()))
        step = in_order(service, run, "optim_step", 3, **STEP)
        backward = in_order(service, run, "forward_backward", 2, forward_backward_input=batch())
        assert [service.result(backward), service.result(step)] == expected
