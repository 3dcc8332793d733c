"""``everstep run``: what a run's information shows."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest

from everstep.cli.common import listing, names
from everstep.cli.common.target import Target
from everstep.cli.run import show
from everstep.wire import types
from everstep.wire.messages.inspection import EnvironmentChange


def test_run_info_tells_of_a_home_that_moved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = types.TrainingRun(
        training_run_id="run",
        base_model="everstep/pico",
        model_owner="local",
        is_lora=True,
        last_request_time=datetime(2026, 1, 2, tzinfo=UTC),
        environment_changes=[
            EnvironmentChange(
                at=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
                seq_id=7,
                changed={"$MKL_CBWR": "None → AVX2", "threads": "2 → 4"},
            )
        ],
    )
    monkeypatch.setattr(names, "run_id", lambda rest, text: text)
    monkeypatch.setattr(listing, "run", lambda rest, run_id: moved)
    monkeypatch.setattr(listing, "checkpoints", lambda rest, wanted: [])
    target = SimpleNamespace(reader=lambda: nullcontext(SimpleNamespace(rest=None)), as_json=False)
    show.print_run(cast(Target, target), "run")
    printed = " ".join(capsys.readouterr().out.split())
    assert "after operation 7: $MKL_CBWR None → AVX2; threads 2 → 4." in printed
    assert "to a tolerance" in printed
