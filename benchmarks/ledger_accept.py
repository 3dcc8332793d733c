"""Ledger accepts: durable operations per second, relative to the fsync rate of the same disk.

    python benchmarks/ledger_accept.py [--seconds 3] [--payload 2000] [--dir .]

An accept is durable when it returns, so a single caller can't be faster than the disk. Concurrent
callers share commits, so together they can. The limit is a loop of append + fsync to a file, with
as many bytes as the payload.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sqlite3
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from everstep.ledger import Ledger, NewOperation


@dataclass(frozen=True)
class Row:
    name: str
    rate: float
    commits: float
    median: float
    worst: float


def fsyncs(directory: Path, seconds: float, payload: bytes) -> Row:
    """Append and fsync repeatedly."""
    times = []
    with (directory / "plain").open("ab", buffering=0) as file:
        end = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < end:
            file.write(payload)
            os.fsync(file.fileno())
            times.append(time.perf_counter() - begin)
    return row("append + fsync", times, len(times), seconds)


def bare_sqlite(directory: Path, seconds: float, payload: bytes) -> Row:
    """Insert one row per commit with the standard library alone."""
    times = []
    connection = sqlite3.connect(directory / "bare.sqlite", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, payload BLOB)")
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        connection.execute("INSERT INTO t (payload) VALUES (?)", (payload,))
        times.append(time.perf_counter() - begin)
    connection.close()
    return row("SQLite alone, WAL + FULL", times, len(times), seconds)


async def accepts(directory: Path, seconds: float, payload: bytes, callers: int) -> Row:
    """Accept operations of concurrent callers, each of which waits for its previous one."""
    ledger = await Ledger.open(directory / f"{callers}.sqlite")
    times: list[float] = []
    before = ledger.commits
    end = time.perf_counter() + seconds

    async def call(scope: str) -> None:
        seq_id = 0
        while (begin := time.perf_counter()) < end:
            seq_id += 1
            await ledger.accept(NewOperation(scope, seq_id, "forward_backward", payload))
            times.append(time.perf_counter() - begin)

    await asyncio.gather(*(call(f"run-{i}") for i in range(callers)))
    commits = ledger.commits - before
    await ledger.close()
    name = "everstep, one caller" if callers == 1 else f"everstep, {callers} callers"
    return row(name, times, commits, seconds)


def row(name: str, times: list[float], commits: int, seconds: float) -> Row:
    times.sort()
    worst = times[int(len(times) * 0.99)]
    return Row(name, len(times) / seconds, commits / seconds, statistics.median(times), worst)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3, help="duration of each measurement")
    parser.add_argument("--payload", type=int, default=2000, help="size of an operation in bytes")
    parser.add_argument("--dir", type=Path, default=Path(), help="directory on the disk to test")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=options.dir))
    payload = os.urandom(options.payload)
    try:
        rows = [fsyncs(directory, options.seconds, payload)]
        rows.append(bare_sqlite(directory, options.seconds, payload))
        for callers in (1, 8, 64):
            rows.append(asyncio.run(accepts(directory, options.seconds, payload, callers)))
        rows.append(fsyncs(directory, options.seconds, payload))
        rows[-1] = Row("append + fsync, again", *list(vars(rows[-1]).values())[1:])
    finally:
        shutil.rmtree(directory)
    base = (rows[0].rate + rows[-1].rate) / 2
    print(f"{options.payload} bytes each; ratio to append + fsync of the same disk, same run\n")
    print(f"{'':<26}{'accepts/s':>10}{'ratio':>7}{'commits/s':>11}{'median ms':>11}{'99 % ms':>9}")
    for each in rows:
        print(
            f"{each.name:<26}{each.rate:10.0f}{each.rate / base:7.2f}{each.commits:11.0f}"
            f"{each.median * 1e3:11.2f}{each.worst * 1e3:9.2f}"
        )


if __name__ == "__main__":
    main()
