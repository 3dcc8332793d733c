"""Processes that save as a group are killed at every point: a group is complete or absent."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import everstep
from tests.conftest import Service
from tests.scenario import connect

pytestmark = pytest.mark.slow
SIZE = 2
STEPS = 3


def start(service: Service, name: str, index: int, attempt: str, *end: str) -> Any:
    arguments = [service.url, name, str(SIZE), str(index), attempt, str(STEPS), *end]
    command = [sys.executable, "-m", "tests.promises.group_program", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines_of(process: Any) -> list[str]:
    output: str = process.communicate(timeout=120)[0]
    return output.splitlines()


def job(service: Service, name: str, attempt: str) -> list[list[str]]:
    """Run all processes to their end."""
    processes = [start(service, name, index, attempt) for index in range(SIZE)]
    lines = [lines_of(process) for process in processes]
    assert [process.returncode for process in processes] == [0] * SIZE
    return lines


def losses(lines: list[str]) -> dict[int, str]:
    return {int(line.split()[1]): line.split()[2] for line in lines if line.startswith("step")}


@pytest.fixture(scope="module")
def uninterrupted(service: Service) -> list[dict[int, str]]:
    return [losses(lines) for lines in job(service, "uninterrupted", "only")]


@pytest.mark.parametrize(
    ("point", "victim"), [("before", 0), ("sent", 1), ("durable", 0), ("durable", 1), ("whole", 0)]
)
def test_killed_member_leaves_a_complete_group_or_none(
    service: Service, uninterrupted: list[dict[int, str]], point: str, victim: int
) -> None:
    name = f"{point}-{victim}"
    processes = [
        start(service, name, index, "first", *(("2", point) if index == victim else ()))
        for index in range(SIZE)
    ]
    killed = lines_of(processes[victim])
    assert processes[victim].returncode == -9
    assert losses(killed).keys() == {1, 2} and ("whole 2" in killed) == (point == "whole")
    for index, process in enumerate(processes):
        if index != victim:
            # It waits for a member that will not save: the whole job is restarted.
            process.kill() if point == "before" else _kill_once_complete(process)
            process.wait(60)
            process.stdout.close()
    with connect(everstep, service.url) as client:
        group = everstep.CheckpointGroup(client, name, SIZE)
        found = group.checkpoints().result()
    expected = [1] if point == "before" else [1, 2]
    assert [each.step for each in found] == expected
    assert all(len(each.members) == SIZE for each in found)
    after = job(service, name, "second")
    for index, lines in enumerate(after):
        assert lines[0] == f"from {expected[-1]}"
        whole = uninterrupted[index]
        assert losses(lines) == {step: whole[step] for step in whole if step > expected[-1]}


def _kill_once_complete(process: Any) -> None:
    """Kill a process once it saw the second group complete."""
    for line in process.stdout:
        if line.strip() == "whole 2":
            process.kill()
            return
    raise AssertionError("the others' saves did not complete the group")
