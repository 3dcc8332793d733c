"""The examples run, and those that resume continue where they stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Service

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(service: Service, name: str, *arguments: str) -> list[str]:
    """Run an example against a service; returns the lines that it printed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        env={**os.environ, "TINKER_BASE_URL": service.url},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_train_and_resume_prints_equal_losses(service: Service) -> None:
    first, second = run(service, "train_and_resume")
    assert first == second


def test_sample_prints_three_sequences(service: Service) -> None:
    assert len(run(service, "sample")) == 3


def test_training_loop_resumes_exactly(service: Service) -> None:
    whole = run(service, "training_loop", "9", "whole")
    first = run(service, "training_loop", "4", "parts")
    rest = run(service, "training_loop", "9", "parts")
    assert first[0] == "from step 0: a new run" and rest[0].startswith("from step 4: tinker://")
    assert first[1:5] + rest[1:-1] == whole[1:-1]


def test_checkpoint_group_resumes_whole(service: Service) -> None:
    assert run(service, "checkpoint_group")[:2] == ["from step 0", "complete at step 3"]
    assert run(service, "checkpoint_group")[:2] == ["from step 3", "complete at step 6"]
