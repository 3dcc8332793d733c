"""Sequence ids: gaps wait, then fail what waits in clear words; the rest goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.runtime import runtime
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


def test_what_waits_for_a_missing_operation_fails_and_later_ones_go_on(
    home: Path, pico: Model
) -> None:
    with Local(home, pico, gap_seconds=GAP) as service:
        run, twin = service.new_run(), service.new_run()
        service.train(run, 0)
        service.train(twin, 0)
        late = [service.send(run, "optim_step", seq_id, **STEP) for seq_id in (4, 6)]
        assert all(fails_for_the_gap(service.result(each)) for each in late)
        assert service.train(run, 1) == service.train(twin, 1), "neither step was made"


def test_an_operation_that_comes_after_its_gap_was_given_up_says_so_and_is_not_executed(
    home: Path, pico: Model
) -> None:
    with Local(home, pico, gap_seconds=GAP) as service:
        run, twin = service.new_run(), service.new_run()
        service.result(service.send(run, "optim_step", 2, **STEP))
        body = {"forward_backward_input": batch()}
        first = service.send(run, "forward_backward", 1, **body)
        assert fails_for_the_gap(service.result(first))
        assert service.send(run, "forward_backward", 1, **body) == first, "so does its retry"
        service.send(run, "optim_step", 2, **STEP)
        assert service.train(run, 1) == service.train(twin, 1)


def test_a_gap_is_given_up_after_a_restart_too(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, twin = service.new_run(), service.new_run()
        service.train(twin, 0)
        service.train(run, 0)
        waits = service.send(run, "optim_step", 4, **STEP)
    with service.after(gap_seconds=GAP) as service:
        assert fails_for_the_gap(service.result(waits))
        assert service.train(run, 1) == service.train(twin, 1)
    with service.after() as service:
        assert service.train(run, 2) == service.train(twin, 2), "what was given up stays so"


def test_a_missing_operation_that_comes_in_time_lets_the_others_go_on(
    home: Path, pico: Model
) -> None:
    with Local(home, pico) as service:
        run, twin = service.new_run(), service.new_run()
        second = service.send(run, "optim_step", 2, **STEP)
    with service.after() as service:  # it waits on
        first = service.send(run, "forward_backward", 1, forward_backward_input=batch())
        assert [service.result(first), service.result(second)] == service.train(twin, 0)


def test_a_sequence_id_that_no_client_came_to_by_counting_is_refused(
    home: Path, pico: Model
) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
    with service.after() as service:  # nothing of the run is in memory
        for seq_id in (10**4 + 1, 2**62):
            body = {"model_id": run, "seq_id": seq_id, **STEP}
            status, text = service.refused("optim_step", **body)
            assert (status, "too far ahead" in text) == (400, True)
        assert service.refused("optim_step", **{**body, "seq_id": 2**63})[0] == 400
        service.train(run, 0)


def test_a_long_run_goes_on_after_a_restart(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_FARTHEST_AHEAD", 3)
    with Local(home, pico) as service:
        run, twin = service.new_run(), service.new_run()
        service.train(run, *range(4))
        service.train(twin, *range(4))
    with service.after() as service:
        with service.steps.shut():  # the run is being brought back while operations come
            sent = [*service.step(run, 4), *service.step(run, 5)]
        assert [service.result(each) for each in sent] == service.train(twin, 4, 5)


def test_operations_may_come_before_their_run_has_been_created(home: Path, pico: Model) -> None:
    """Clients compute its id themselves, and wait for nothing."""
    with Local(home, pico, poll_seconds=0.1) as service:
        body = {"session_id": service.session(), "model_seq_id": 9, "base_model": MODEL}
        with service.steps.shut():
            made = service.post("create_model", **body, lora_config={"rank": 4, "seed": 1})
            assert made["model_id"] == f"{service.session()}:train:9"
            sent = service.step(made["model_id"], 0)
            assert service.poll(made["request_id"]).status_code == 408, "not there yet"
        assert [service.result(each) for each in sent] == service.train(service.new_run(), 0)
