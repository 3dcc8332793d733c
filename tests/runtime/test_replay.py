"""Replayed results are compared bit for bit, or to a tolerance in another environment."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model, load_model
from everstep.engine.models.pico import write_pico
from everstep.ledger import Ledger, NewOperation, Run
from everstep.runtime.execution.environment_changes import (
    MAX_CHANGES,
    add_change,
    describe_changes,
)
from everstep.runtime.execution.replay_check import ABSOLUTE, RELATIVE, difference
from everstep.runtime.execution.run import Run as RunState
from tests.runtime.local import Local, batch
from tests.scenario import MODEL


def step(value: float) -> dict[str, Any]:
    return {"metrics": {"grad_norm": value, "optimizer_step": 2.0}, "type": "optim_step"}


def compared(recorded: float, replayed: float, *, exact: bool) -> str | None:
    return difference(json.dumps(step(recorded)).encode(), "json", step(replayed), exact=exact)


@pytest.mark.parametrize("value", [0.0, 1.0, -300.0])
def test_difference_is_exact_or_within_tolerance(value: float) -> None:
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


def test_nan_and_other_fields_are_never_within_tolerance() -> None:
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


def test_other_dtype_is_another_environment(
    home: Path, pico: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Local(home, pico).killed() as service:
        run = service.new_run()
        service.train(run, 0)
    with Local(home, in_dtype(tmp_path / "pico", "bfloat16")) as other:
        other._sequence, other._session, other._runs = service._sequence, service._session, 1
        other.train(run, 1)
        assert "the numeric environment has changed" in caplog.text
        assert "float32 → bfloat16" in caplog.text
        assert other.http.get(f"training_runs/{run}").json()["corrupted"] is False
    caplog.clear()
    with other.after() as again:
        again.train(run, 2)
        assert "has changed" not in caplog.text, "from there on bits count"


def test_run_beyond_tolerance_waits_for_its_former_environment(
    home: Path, pico: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Local(home, pico).killed() as service:
        run, reference = service.new_run(), service.new_run()
        expected = service.train(reference, 0, 1)
        seen = service.train(run, 0)
    monkeypatch.setattr("everstep.runtime.execution.replay_check.ABSOLUTE", 1e-9)
    monkeypatch.setattr("everstep.runtime.execution.replay_check.RELATIVE", 1e-9)
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


def moved(service: Local, run: str) -> list[dict[str, Any]]:
    """Return the changes of environment that a run's information holds."""
    found = service.http.get(f"training_runs/{run}").json()
    assert found["corrupted"] is False
    changes: list[dict[str, Any]] | None = found["environment_changes"]
    return changes or []


@pytest.mark.parametrize("name", ["MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "CUBLAS_WORKSPACE_CONFIG"])
def test_home_that_moved_continues_within_a_tolerance_and_says_so(
    home: Path, pico: Model, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared_exactly: list[bool] = []

    def compare(*arguments: Any, exact: bool) -> str | None:
        compared_exactly.append(exact)
        return difference(*arguments, exact=exact)

    monkeypatch.setattr("everstep.runtime.execution.recovery.difference", compare)
    monkeypatch.delenv(name, raising=False)
    with Local(home, pico).killed() as service:
        run = service.new_run()
        service.train(run, 0)
    with service.after().killed() as again:
        again.train(run, 1)
        assert compared_exactly and all(compared_exactly), "in the same environment bits count"
        assert moved(again, run) == []
    compared_exactly.clear()
    monkeypatch.setenv(name, "COMPATIBLE")
    with again.after() as other:
        other.train(run, 2)
        assert compared_exactly and not any(compared_exactly)
        (change,) = moved(other, run)
    assert change["changed"] == {f"${name}": "None → COMPATIBLE"}
    assert change["seq_id"] == 4


def test_other_bits_of_another_environment_do_not_corrupt_a_run(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Local(home, pico).killed() as service:
        run = service.new_run()
        service.train(run, 0)
    # One row of logits at a time: other shapes, other last bits.
    monkeypatch.setattr("everstep.engine.models.model.HEAD_CELLS", 1)
    with service.after() as other:
        other.train(run, 1)
        (change,) = moved(other, run)
    assert change["changed"] == {"head_cells": "16777216 → 1"}


@pytest.mark.parametrize("mode", [0, 1])
def test_without_determinism_other_bits_do_not_corrupt_a_run(
    home: Path, pico: Model, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_deterministic_debug_mode", lambda: mode)
    with Local(home, pico).killed() as service:
        run = service.new_run()
        service.train(run, 0)
    # One datum a micro-batch, which the environment doesn't show: as atomics do on a GPU.
    monkeypatch.setattr(
        "everstep.engine.training_pass.micro_batches",
        lambda lengths, limit: [[index] for index in range(len(lengths))],
    )
    with service.after() as other:
        futures = other.step(run, 1)
        if mode == 0:
            assert all(map(other.result, futures))
        else:
            assert "corrupted" in other.poll(futures[0]).text
        found = other.http.get(f"training_runs/{run}").json()
    assert found["corrupted"] is (mode == 1)
    assert not found["environment_changes"]


def test_changes_name_the_words_of_a_long_list_and_are_bounded() -> None:
    flags = " ".join(f"avx512_{index}" for index in range(20))
    assert describe_changes({"flags": f"{flags} fma", "a": 1}, {"flags": f"{flags} amx"}) == {
        "a": "1 → None",
        "flags": "-fma +amx",
    }
    record = run_record(environment={"threads": 0})
    for threads in range(1, 2 * MAX_CHANGES):
        added = add_change(record, {"threads": threads}, threads)
        record = replace(record, environment={"threads": threads}, environment_changes=added)
    assert record.environment_changes is not None
    assert [change["seq_id"] for change in record.environment_changes] == list(
        range(MAX_CHANGES, 2 * MAX_CHANGES)
    )
    assert add_change(run_record(environment=None), {"threads": 1}, 1) is None


def run_record(environment: dict[str, Any] | None) -> Run:
    now = datetime.now(UTC)
    return Run("run", "session", MODEL, {}, {}, {}, now, now, environment=environment)


def test_operation_that_was_admitted_as_its_run_became_corrupted_fails_with_the_reason(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its actor is about to end, and nothing would execute it."""
    with Local(home, pico).killed() as service:
        run = service.new_run()
        service.train(run, 0)
    damage = "UPDATE operations SET seal = NULL, payload = CAST(payload || 'x' AS BLOB)"
    with sqlite3.connect(home / "ledger.sqlite") as database:
        database.execute(f"{damage} WHERE scope = ? AND seq_id = 1", (run,))
    admitted, marked, dropping = threading.Event(), threading.Event(), threading.Event()
    accept, drop = Ledger.accept, RunState.drop

    async def accept_late(self: Ledger, new: NewOperation, **rest: Any) -> Any:
        if new.kind == "optim_step":
            admitted.set()
            assert await asyncio.to_thread(marked.wait, 60)
        return await accept(self, new, **rest)

    async def drop_late(self: RunState) -> None:
        marked.set()
        assert await asyncio.to_thread(dropping.wait, 60)
        await drop(self)

    monkeypatch.setattr(Ledger, "accept", accept_late)
    monkeypatch.setattr(RunState, "drop", drop_late)
    with service.after() as again, ThreadPoolExecutor() as pool:
        again.steps.close()
        adam = {"learning_rate": 0.01}
        late = pool.submit(again.send, run, "optim_step", adam_params=adam)
        assert admitted.wait(60)
        again.steps.open()
        first = again.send(run, "forward_backward", 4, forward_backward_input=batch())
        request_id = late.result(60)
        dropping.set()
        assert "is damaged" in again.result(first)["error"]
        assert "is damaged" in again.result(request_id)["error"]
