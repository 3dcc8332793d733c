"""P1 for whole programs: a training script that is killed goes on exactly, data order included."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

import everstep
from tests.conftest import Service
from tests.promises.test_exactness import hashes
from tests.scenario import connect

pytestmark = pytest.mark.slow
STEPS = 9


def program(service: Service, run_name: str, pause_at: int | None = None) -> Any:
    """The script, running."""
    arguments = [sys.executable, "-m", "tests.promises.loop_program", service.url, run_name]
    arguments += [str(STEPS), *([] if pause_at is None else [str(pause_at)])]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def whole(service: Service, run_name: str) -> list[str]:
    """The script's lines when nothing happens to it."""
    with program(service, run_name) as process:
        lines = process.stdout.read().splitlines()
    assert process.returncode == 0
    return lines


def killed(service: Service, run_name: str, pause_at: int) -> list[str]:
    """The script's lines until it is killed at a step."""
    process = program(service, run_name, pause_at)
    lines = []
    for line in process.stdout:
        if line.strip() == "paused":
            break
        lines.append(line.strip())
    process.kill()
    process.wait()
    process.stdout.close()
    process.stdin.close()
    return lines


def steps(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("step")]


def test_p1_a_script_that_is_killed_twice_ends_as_its_uninterrupted_twin(service: Service) -> None:
    twin = whole(service, "twin")
    first = killed(service, "killed", pause_at=3)
    second = killed(service, "killed", pause_at=7)
    last = whole(service, "killed")
    assert first[0] == "from 0 None" and second[0].startswith("from 2 tinker://")
    assert last[0].startswith("from 6 tinker://")
    assert steps(first) == steps(twin)[:3]
    assert steps(second) == steps(twin)[2:7]
    assert steps(last) == steps(twin)[6:]
    ends = [hashes(service.home, lines[-1].split()[1]) for lines in (twin, last)]
    assert ends[0] == ends[1]
    losses = {n: float(line.split("] ")[1]) for n, line in enumerate(steps(twin), start=1)}
    best = min((2, 4, 6, 8, 9), key=lambda step: losses[step])
    assert _saved_steps(service, "killed") == sorted({best, 8, 9})


def _saved_steps(service: Service, run_name: str) -> list[int]:
    with connect(everstep, service.url) as client:
        found = client.create_rest_client().list_user_checkpoints(1000).result().checkpoints
    names = [c.checkpoint_id for c in found if c.checkpoint_id.startswith(f"weights/{run_name}.")]
    return sorted(int(re.search(r"\.s(\d+)\.", name)[1]) for name in names)
