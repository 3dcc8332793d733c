"""A poll of ``everstep mirror`` reports every checkpoint that it does not copy."""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from everstep.cli.mirror.copy import Source, _poll, _print
from everstep.cli.train.interrupt import StopRequest


def listed(path: str) -> Any:
    return SimpleNamespace(tinker_path=path, time=datetime(2026, 1, 1, tzinfo=UTC))


def test_checkpoints_that_are_not_copied_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody: Any = SimpleNamespace()
    stop = StopRequest()
    stop.signal = signal.SIGINT
    weights, external = "tinker://r:train:0/weights/a", "tinker://r:train:0/external_weights/b"
    done = _poll(
        nobody,
        nobody,
        Source("http://x", None, "r:train:0", None),
        tmp_path,
        [listed(weights), listed(external)],
        stop,
    )

    assert done.skipped == {
        weights: "stopped before it",
        external: "external checkpoints can't be copied",
    }
    _print(done, as_json=False)
    assert "was skipped: external checkpoints can't be copied" in capsys.readouterr().out
