"""What is replayed is compared: to the bit, or to a tolerance in another numeric environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model, load_model
from everstep.engine.pico import write_pico
from everstep.runtime.replay import ABSOLUTE, RELATIVE, difference
from tests.runtime.local import Local
from tests.scenario import MODEL


def step(value: float) -> dict[str, Any]:
    return {"metrics": {"grad_norm": value, "optimizer_step": 2.0}, "type": "optim_step"}


def compared(recorded: float, replayed: float, *, exact: bool) -> str | None:
    return difference(json.dumps(step(recorded)).encode(), "json", step(replayed), exact=exact)


@pytest.mark.parametrize("value", [0.0, 1.0, -300.0])
def test_to_the_bit_or_to_the_stated_tolerance(value: float) -> None:
    within = 0.99 * (ABSOLUTE + RELATIVE * abs(value))
    assert compared(value, value, exact=True) is None
    last_bit = value + 1e-13 * (abs(value) or 1)
    assert (
        compared(value, last_bit, exact=True) == f"grad_norm was {value!r} and is {last_bit!r} now"
    )
    for off in (within, -within):
        assert compared(value, value + off, exact=False) is None
        assert compared(value, value + off, exact=True) is not None
        assert compared(value, value + 1.1 * off, exact=False) is not None


def test_what_is_no_number_and_other_parts_are_never_near() -> None:
    assert compared(1.0, float("nan"), exact=False) is not None
    recorded = json.dumps(step(1.0)).encode()
    for replayed in (
        {"metrics": {"optimizer_step": 2.0}},
        {"metrics": {"grad_norm": 1.0, "optimizer_step": 3.0}},
    ):
        assert difference(recorded, "json", replayed, exact=False) is not None
    assert "can't be read" in str(difference(b"{", "json", step(1.0), exact=False))


def in_dtype(directory: Path, dtype: str) -> Model:
    write_pico(directory)
    return load_model(MODEL, str(directory), device="cpu", dtype=dtype)


def test_the_same_weights_in_another_dtype_are_another_environment(
    home: Path, pico: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Local(home, pico).killed() as service:
        run = service.new_run()
        service.train(run, 0)
    with Local(home, in_dtype(tmp_path / "pico", "bfloat16")) as other:
        other._sequence, other._session, other._runs = service._sequence, service._session, 1
        other.train(run, 1)
        told = capfd.readouterr()
        assert "the numeric environment has changed" in told.out + told.err
        assert "float32 → bfloat16" in told.out + told.err
        assert other.http.get(f"training_runs/{run}").json()["corrupted"] is False
    with other.after() as again:
        again.train(run, 2)
        assert "has changed" not in capfd.readouterr().out, "from there on bits count"


def test_what_is_not_near_in_another_environment_waits_and_is_exact_in_the_former_one(
    home: Path, pico: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Local(home, pico).killed() as service:
        run, twin = service.new_run(), service.new_run()
        expected = service.train(twin, 0, 1)
        seen = service.train(run, 0)
    monkeypatch.setattr("everstep.runtime.replay.ABSOLUTE", 1e-9)
    monkeypatch.setattr("everstep.runtime.replay.RELATIVE", 1e-9)
    with Local(home, in_dtype(tmp_path / "pico", "bfloat16"), poll_seconds=0.02) as other:
        other._sequence, other._session, other._runs = service._sequence, service._session, 2
        futures = other.step(run, 1)
        while "is not near" not in str(other.poll(futures[0]).json().get("queue_state_reason")):
            pass  # pytest's time-out is the bound
        assert (
            "operation 1 (forward_backward)" in other.poll(futures[0]).json()["queue_state_reason"]
        )
    with service.after() as again:
        assert seen + [again.result(each) for each in futures] == expected
