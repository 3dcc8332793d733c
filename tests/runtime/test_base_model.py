"""A run only continues on the weights of its base model that it was trained on."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from everstep.engine import Model
from tests.runtime.local import Local
from tests.waiting import eventually


def with_other_weights(model: Model) -> Model:
    """The model as if its weights had changed under the same name."""
    other = copy.copy(model)
    other.info = replace(model.info, fingerprint="0" * 64)
    return other


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_run_waits_while_its_base_model_has_other_weights(
    home: Path, pico: Model, end: str
) -> None:
    with Local(home, pico).killed() if end == "killed" else Local(home, pico) as service:
        run, uninterrupted = service.new_run(), service.new_run()
        expected = service.train(uninterrupted, 0, 1)
        seen = service.train(run, 0)
    with Local(home, with_other_weights(pico), poll_seconds=0.02) as other:
        other._sequence, other._session, other._runs = service._sequence, service._session, 2
        futures = other.step(run, 1)

        def reason() -> str:
            return str(other.poll(futures[0]).json().get("queue_state_reason"))

        why = "has other weights than when it was trained"
        eventually(f"a queue reason: {why}", lambda: why in reason())
    with service.after() as again:
        assert seen + [again.result(future) for future in futures] == expected
        assert again.http.get(f"training_runs/{run}").json()["corrupted"] is False
