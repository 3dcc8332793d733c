"""What does a training step cost the ledger?

    python benchmarks/step_ledger.py [--quick] [--dir DIRECTORY]

A step accepts a pass and a step of the optimizer and records their results: four durable
transactions, one after the other. The peer writes the same rows into the same tables with the
standard library alone: what SQLite and the disk cost. Both take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import statistics
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from figures import Figure, run

from everstep.ledger import Ledger, NewOperation, Run, Session

PASS, RESULT, STEP, METRICS = os.urandom(2000), os.urandom(600), b'{"params": {}}', b'{"type": ""}'
RUN = "session:train:0"


class OfLedger:
    """Steps of the ledger."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ledger.sqlite"
        self._next = 1

    async def create(self) -> None:
        """Create the run."""
        moment = datetime.now(UTC)
        ledger = await Ledger.open(self.path)
        await ledger.create_session(Session("s", {}, [], "", None, None, moment, moment), None)
        record = Run(RUN, "s", "m", {"rank": 16}, {"type": "adamw"}, {}, moment, moment)
        new = NewOperation(RUN, 0, "create_model", b"{}", None, "s")
        created, _ = await ledger.accept(new, run=record)
        await ledger.succeed(created.request_id, b"{}", "json")
        await ledger.close()

    async def steps(self, count: int) -> dict[str, float]:
        """Make steps and return CPU and wall time and transactions of one."""
        ledger = await Ledger.open(self.path)
        commits, cpu, begin = ledger.commits, time.process_time(), time.perf_counter()
        for _ in range(count):
            for kind, payload, result, media in (
                ("forward_backward", PASS, RESULT, "protobuf"),
                ("optim_step", STEP, METRICS, "json"),
            ):
                new = NewOperation(RUN, self._next, kind, payload, None, "s")
                self._next += 1
                accepted, _ = await ledger.accept(new)
                await ledger.succeed(accepted.request_id, result, media, seconds=0.01)
        found = {
            "cpu": (time.process_time() - cpu) / count,
            "wall": (time.perf_counter() - begin) / count,
            "commits": (ledger.commits - commits) / count,
        }
        await ledger.close()
        return found


class OfSqlite:
    """The same rows by the standard library.

    Args:
        path: a ledger with a run.
    """

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA synchronous=FULL")
        self._next = 1

    def steps(self, count: int) -> dict[str, float]:
        """Make steps and return CPU and wall time of one."""
        cpu, begin = time.process_time(), time.perf_counter()
        for _ in range(count):
            self._operation("forward_backward", PASS, RESULT, "protobuf")
            self._operation("optim_step", STEP, METRICS, "json")
        return {
            "cpu": (time.process_time() - cpu) / count,
            "wall": (time.perf_counter() - begin) / count,
        }

    def _operation(self, kind: str, payload: bytes, result: bytes, media: str) -> None:
        execute, request_id, moment = self._database.execute, uuid.uuid4().hex, _now()
        checksum = os.urandom(16)
        execute("BEGIN IMMEDIATE")
        execute(
            "INSERT INTO operations (request_id, scope, seq_id, place, kind, payload, session_id, "
            "status, accepted_at, payload_digest, seal) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
            (request_id, RUN, self._next, self._next, kind, payload, "s", "pending", moment)
            + (checksum,) * 2,
        )
        execute(
            "UPDATE runs SET last_request_at = ?, seal = ? WHERE run_id = ?",
            (moment, checksum, RUN),
        )
        self._commit()
        execute("BEGIN IMMEDIATE")
        execute(
            "UPDATE operations SET status = 'succeeded', result = ?, media = ?, seconds = 0.01, "
            "finished_at = ?, result_digest = ?, seal = ?, completion = ? WHERE request_id = ?",
            (result, media, _now(), checksum, checksum, self._next, request_id),
        )
        self._commit()
        self._next += 1

    def _commit(self) -> None:
        self._database.execute("UPDATE position SET commits = commits + 1")
        self._database.execute("COMMIT")

    def close(self) -> None:
        """Close the database."""
        self._database.close()


def _now() -> str:
    return datetime.now(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    rounds, count = (3, 100) if arguments.quick else (9, 200)
    found: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        for side in ("ledger", "sqlite"):
            (Path(name) / side).mkdir()
        ours, twin = OfLedger(Path(name) / "ledger"), OfLedger(Path(name) / "sqlite")
        for each in (ours, twin):
            asyncio.run(each.create())
        peer = OfSqlite(twin.path)
        for _ in range(rounds):
            for key, value in asyncio.run(ours.steps(count)).items():
                found[key].append(value)
            for key, value in peer.steps(count).items():
                found[f"peer {key}"].append(value)
        peer.close()
    median = {key: statistics.median(values) for key, values in found.items()}
    cpu, peer_cpu = median["cpu"] * 1e3, median["peer cpu"] * 1e3
    wall, peer_wall = median["wall"] * 1e3, median["peer wall"] * 1e3
    yield Figure("ledger, CPU a step", cpu, "ms", "SQLite alone, ms", peer_cpu, 3.0)
    yield Figure("ledger, duration of a step's commits", wall, "ms", "the same, ms", peer_wall, 1.5)
    yield Figure("ledger, transactions a step", median["commits"], "", "accepts + results", 4, 1.0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--dir", type=Path, default=Path(), help="directory on the disk to test")


if __name__ == "__main__":
    run(__doc__, measure, add_options)
