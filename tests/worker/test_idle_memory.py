"""Idle memory: a worker without commands gives back what passes have left, once."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from typing import cast

import pytest

from everstep.worker import main
from everstep.worker.protocol.channel import Envelope
from everstep.worker.zygote.fit import worker_environment

PROGRAM = """
from pathlib import Path
from everstep.system_memory import release_unused_memory

def mebibytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

blocks = [bytes([1]) * (1 << 20) for _ in range(200)]
kept = b"x" * 100  # above the blocks in the heap, at least often
used = mebibytes()
del blocks
freed = mebibytes()
release_unused_memory()
print(used, freed, mebibytes(), kept == b"x" * 100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_the_allocator_keeps_goes_back() -> None:
    environment = {**worker_environment(), **os.environ, "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(128 << 20)
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True
    ).stdout.split()
    used, freed, released = map(float, found[:3])
    assert found[3] == "True"
    assert freed > used - 50, "a worker's settings keep it, so the rest shows something"
    assert released < used - 150


def test_idle_worker_releases_memory_once_and_goes_on_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inbox: queue.SimpleQueue[Envelope] = queue.SimpleQueue()
    released = threading.Semaphore(0)
    count = 0

    def release() -> None:
        nonlocal count
        count += 1
        released.release()

    monkeypatch.setattr(main, "release_unused_memory", release)
    monkeypatch.setattr(main, "IDLE_SECONDS", 0.0)
    command = cast(Envelope, object())
    got: list[Envelope] = []
    thread = threading.Thread(target=lambda: got.append(main.next_command(inbox)))
    thread.start()
    assert released.acquire(timeout=60)
    inbox.put(command)
    thread.join(60)
    assert got == [command] and count == 1


def test_busy_worker_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox: queue.SimpleQueue[Envelope] = queue.SimpleQueue()
    command = cast(Envelope, object())
    inbox.put(command)
    monkeypatch.setattr(main, "release_unused_memory", lambda: pytest.fail("released"))
    assert main.next_command(inbox) is command
