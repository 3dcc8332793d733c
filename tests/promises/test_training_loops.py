"""P1 for whole programs: a killed training script resumes exactly, data order included."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

import everstep
from tests.conftest import Service
from tests.faults.keeper import Keeper
from tests.promises.test_exactness import hashes
from tests.scenario import MODEL, connect, train

pytestmark = pytest.mark.slow
STEPS = 9


def program(service: Service, run_name: str, pause_at: int | None = None) -> Any:
    """Start the script."""
    arguments = [sys.executable, "-m", "tests.promises.loop_program", service.url, run_name]
    arguments += [str(STEPS), *([] if pause_at is None else [str(pause_at)])]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def complete(service: Service, run_name: str) -> list[str]:
    """Return the script's lines when it is not disturbed."""
    with program(service, run_name) as process:
        lines: list[str] = process.stdout.read().splitlines()
    assert process.returncode == 0
    return lines


def killed(service: Service, run_name: str, pause_at: int) -> list[str]:
    """Return the script's lines until it is killed at a step."""
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


def test_p1_script_killed_twice_ends_as_the_uninterrupted_one(service: Service) -> None:
    reference = complete(service, "reference")
    first = killed(service, "killed", pause_at=3)
    second = killed(service, "killed", pause_at=7)
    last = complete(service, "killed")
    assert first[0] == "from 0 None" and second[0].startswith("from 2 tinker://")
    assert last[0].startswith("from 6 tinker://")
    assert steps(first) == steps(reference)[:3]
    assert steps(second) == steps(reference)[2:7]
    assert steps(last) == steps(reference)[6:]
    ends = [hashes(service.home, lines[-1].split()[1]) for lines in (reference, last)]
    assert ends[0] == ends[1]
    losses = {n: float(line.split("] ")[1]) for n, line in enumerate(steps(reference), start=1)}
    best = min((2, 4, 6, 8, 9), key=lambda step: losses[step])
    assert _saved_steps(service, "killed") == sorted({best, 8, 9})


@pytest.mark.long(reason="a script and its service are killed and started again and again")
def test_p1_script_killed_at_random_moments_ends_as_the_uninterrupted_one(service: Service) -> None:
    random = Random(1)
    reference = steps(complete(service, "another-reference"))
    seen: dict[str, str] = {}
    for life in range(20):
        process = program(service, "random")
        remaining = random.randrange(2, 6)  # lines, after which a save may be in progress
        for line in process.stdout:
            if line.startswith("step"):
                number = line.split()[1]
                assert seen.setdefault(number, line.strip()) == line.strip()
            remaining -= 1
            if remaining == 0 and life < 19:
                process.kill()
        process.stdout.close()
        process.stdin.close()
        if process.wait() == 0:
            break
    assert process.returncode == 0
    assert [seen[str(number)] for number in range(1, STEPS + 1)] == reference


def _saved_steps(service: Service, run_name: str) -> list[int]:
    with connect(everstep, service.url) as client:
        found = client.create_rest_client().list_user_checkpoints(1000).result().checkpoints
    names = [c.checkpoint_id for c in found if c.checkpoint_id.startswith(f"weights/{run_name}.")]
    found_steps = [re.search(r"\.s(\d+)\.", name) for name in names]
    return sorted(int(match[1]) for match in found_steps if match is not None)


@pytest.mark.parametrize("loss", ["corrupted", "session finished"])
def test_p1_lost_run_is_recovered_bit_for_bit(tmp_path: Path, loss: str) -> None:
    with Keeper(tmp_path / "home") as keeper:
        keeper.wait_ready()
        service = connect(everstep, keeper.url)
        ends = []
        for name, lose_at in (("reference", None), ("lost", 5)):
            resumed = everstep.resume_or_create(service, name, MODEL, rank=4, seed=3).result()
            saves = everstep.Checkpointer(resumed, everstep.CheckpointPolicy(every_steps=2))
            recovery = everstep.Recovery(service, resumed, saves)
            pending = [lose_at]

            def loop(
                state: everstep.LoopState,
                client: everstep.TrainingClient = resumed.client,
                saves: everstep.Checkpointer = saves,
                pending: list[int | None] = pending,
            ) -> str:
                for step in range(state.step, 7):
                    if step == pending[0]:
                        pending.clear()
                        pending.append(None)
                        _lose(keeper, client, loss)
                    train(everstep, client, 1, shift=step)
                    saves.step(everstep.LoopState(step + 1))
                    saves.flush().result()
                return saves.finish(everstep.LoopState(7)).result().path

            ends.append(hashes(keeper.home, recovery.run(loop)))
        assert recovery.state.step == 4 and resumed.client.model_id != "lost"
        assert ends[0] == ends[1]


def _lose(keeper: Keeper, client: everstep.TrainingClient, loss: str) -> None:
    """Have the service lose a run, as if its disk were damaged or an operator had ended it."""
    if loss == "session finished":
        session = client.model_id.split(":")[0]
        body = {"reason": {"type": "interrupted"}}
        url = f"{keeper.url}/api/v1/sessions/{session}/finish"
        assert httpx.post(url, json=body, headers={"X-API-Key": "tml-test"}).status_code == 200
        return
    keeper.pause()
    with contextlib.closing(sqlite3.connect(keeper.home / "ledger.sqlite")) as ledger:
        changed = ledger.execute(
            "UPDATE runs SET seal = NULL, status = 'corrupted', fault = 'a test lost it' "
            "WHERE run_id = ?",
            (client.model_id,),
        )
        assert changed.rowcount == 1
        ledger.commit()
    keeper.resume()
    keeper.wait_ready()
