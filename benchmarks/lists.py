"""Does a page of a list cost what the page holds, or what the whole list would?

    python benchmarks/lists.py [--quick]

Asks one service for pages of 20 checkpoints and of 20 runs. Its home holds 20 runs with 50
checkpoints, and later with 5,000. The rows are written to the ledger while no service runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from figures import Figure, median_seconds, run
from serving import serving

from everstep.ledger import Checkpoint, Ledger, NewOperation, Run, Session

FEW, MANY, RUNS, PAGE = 50, 5000, 20, 20
LORA = {"rank": 16, "alpha": 32.0, "seed": 1}
LORA |= {"train_attn": True, "train_mlp": True, "train_unembed": True}
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
PAGES = {
    "page of checkpoints": f"checkpoints?limit={PAGE}&offset=0",
    "page of runs": f"training_runs?limit={PAGE}&offset=0",
    "one run": "training_runs/s:train:0",
}


async def fill(home: Path, begin: int, end: int) -> None:
    """Write runs and their checkpoints, from one number to another, to a home's ledger."""
    ledger = await Ledger.open(home / "ledger.sqlite")
    adam = {"type": "adamw"}
    if not begin:
        await ledger.create_session(Session("s", {}, [], "", None, None, BEGIN, BEGIN), None)
    for number in range(RUNS if not begin else 0):
        record = Run(f"s:train:{number}", "s", "everstep/pico", LORA, adam, {}, BEGIN, BEGIN)
        await ledger.accept(NewOperation(record.run_id, 0, "create_model", b"{}"), run=record)
    found = [checkpoint(number) for number in range(begin, end)]
    await ledger.insert_missing([], found)
    await ledger.close()


def checkpoint(number: int) -> Checkpoint:
    """Return the record of a checkpoint, whose files don't matter here."""
    run_id, name = f"s:train:{number % RUNS}", f"{number:06d}"
    return Checkpoint(
        path=f"tinker://{run_id}/weights/{name}",
        run_id=run_id,
        kind="training",
        name=name,
        created_at=BEGIN + timedelta(seconds=number),
        size_bytes=1 << 20,
        base_model="everstep/pico",
        lora=LORA,
        optimizer={"type": "adamw"},
        user_metadata={"step": str(number)},
        expires_at=None,
    )


def seconds_of(address: str, times: int) -> dict[str, float]:
    """Return the median duration of each page."""
    with httpx.Client(base_url=f"{address}/api/v1/", trust_env=False) as http:
        found = {}
        for name, route in PAGES.items():
            answer = http.get(route)
            assert answer.status_code == 200 and json.loads(answer.text), answer.text
            found[name] = median_seconds(lambda r=route: http.get(r), time.perf_counter, times)
        return found


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    times = 30 if arguments.quick else 200
    found: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "home"
        home.mkdir()
        for begin, end in ((0, FEW), (FEW, MANY)):
            asyncio.run(fill(home, begin, end))
            with serving(home) as served:
                found[end] = seconds_of(served.address, times)
    for name, seconds in found[MANY].items():
        few = found[FEW][name] * 1e3
        what = f"{name}, {MANY} checkpoints"
        yield Figure(what, seconds * 1e3, "ms", f"{FEW} checkpoints, ms", few, 1.3)


if __name__ == "__main__":
    run(__doc__, measure)
