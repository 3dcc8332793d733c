"""P3 under load: service, worker or both are killed at random moments, and no number changes.

``EVERSTEP_SOAK=SECONDS`` makes it run longer. ``EVERSTEP_SEED`` repeats the moments.
"""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tinker

import everstep
from tests.conftest import Service
from tests.faults.cycle import Looper, uninterrupted
from tests.faults.keeper import Keeper
from tests.faults.test_failpoints import check_all_listed_load, check_lineage

SECONDS = float(os.environ.get("EVERSTEP_SOAK") or 8)
SEED = int(os.environ.get("EVERSTEP_SEED") or 20)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 3 * SECONDS)]
RUNS: list[tuple[Any, int]] = [(everstep, 31), (tinker, 32), (everstep, 33)]


@pytest.mark.long(reason="it kills at random moments for 8 seconds, after three clients began")
def test_random_kills_change_no_number(tmp_path: Path, service: Service) -> None:
    print(f"EVERSTEP_SEED={SEED}")
    chance = random.Random(SEED)
    done = threading.Event()
    kills = {"service": 0, "worker": 0, "both": 0}
    with Keeper(tmp_path / "home", "replay_seconds=0.3") as keeper:
        kill = {"service": keeper.kill, "worker": keeper.kill_worker, "both": keeper.kill_both}
        loopers = [Looper(sdk, keeper.url, seed) for sdk, seed in RUNS]

        def go_round(looper: Looper) -> list[list[Any]]:
            seen = []
            while not done.is_set():
                seen.append(looper.round())
            return seen

        with ThreadPoolExecutor(len(loopers)) as pool:
            running = [pool.submit(go_round, looper) for looper in loopers]
            until = time.monotonic() + SECONDS
            try:
                while time.monotonic() < until or min(kills.values()) == 0:
                    for victim in chance.sample(sorted(kills), len(kills)):
                        done.wait(chance.uniform(0.2, 4.0))  # the moment is what is tested
                        kill[victim]()
                        kills[victim] += 1
            finally:
                done.set()
            seen = [future.result() for future in running]
        for looper in loopers:
            check_all_listed_load(keeper.home, looper.listed())
            check_lineage(keeper.home, looper)
            looper.close()
    print(kills, [len(rounds) for rounds in seen])
    assert min(kills.values()) > 0
    for (sdk, seed), rounds in zip(RUNS, seen, strict=True):
        assert rounds == uninterrupted(sdk, service.url, seed, len(rounds))
