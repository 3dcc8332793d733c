"""Ledger integrity: lost transactions are detected, and damaged rows are never served."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from everstep.ledger import (
    Checkpoint,
    Ledger,
    LedgerDamaged,
    LedgerError,
    NewOperation,
    Operation,
    RecordedSample,
    Run,
    Sampler,
    SequenceConflict,
    Session,
)

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
RUN = "s:train:0"
SAMPLER = "s:sample:0"
PATH = f"tinker://{RUN}/weights/a"
NAME = "ledger.sqlite"
TRIES = 40


def run() -> Run:
    return Run(RUN, "s", "m", {"rank": 4}, {"type": "adamw"}, {"a": "b"}, MOMENT, MOMENT)


def checkpoint(path: str = PATH) -> Checkpoint:
    return Checkpoint(path, RUN, "training", path[-1], MOMENT, 7, "m", {}, None, {"k": "v"}, None)


async def fill(ledger: Ledger) -> None:
    """Write rows to every table."""
    await ledger.create_session(Session("s", {}, ["t"], "0.38", None, "d", MOMENT, MOMENT), "key")
    await ledger.create_sampler(Sampler(SAMPLER, "s", "m", PATH, MOMENT))
    sample, _ = await ledger.accept(NewOperation(SAMPLER, 0, "sample", b"{}"))
    kept = RecordedSample(sample.request_id, "s", b"prompt", random.Random(0).randbytes(20_000))
    recorded = ledger.samples.recorded
    await recorded.succeed(sample.request_id, b"result", seconds=1.0, recorded=kept)
    created, _ = await ledger.accept(NewOperation(RUN, 0, "create_model", b"{}"), run=run())
    await ledger.succeed(created.request_id, b"{}", "json")
    for seq_id in range(1, 9):
        payload = random.Random(seq_id).randbytes(400)
        accepted, _ = await ledger.accept(NewOperation(RUN, seq_id, "forward_backward", payload))
        if seq_id < 7:
            made = checkpoint(f"{PATH}{seq_id}") if seq_id == 3 else None
            await ledger.succeed(accepted.request_id, payload[::-1], "protobuf", checkpoint=made)


async def read(ledger: Ledger) -> dict[str, Any]:
    """Return everything that can be read, by query. Queries that report damage are left out."""
    found: dict[str, Any] = {}

    async def look(what: str, reading: Any) -> None:
        try:
            found[what] = await reading
        except (LedgerDamaged, LedgerError, ValueError) as damage:
            assert str(damage)

    await look("session", ledger.session("s"))
    await look("sampler", ledger.sampler(SAMPLER))
    await look("sample", ledger.operations(SAMPLER))
    await look("run", ledger.run(RUN))
    await look("runs", ledger.search.list_runs(9, 0))
    await look("operations", ledger.operations(RUN))
    await look("checkpoint", ledger.checkpoint(f"{PATH}3"))
    await look("checkpoints", ledger.search.list_checkpoints(9, 0))
    await look("recorded", recorded(ledger, found.get("sample", [])))
    for each in found.get("operations", []):
        await look(each.request_id, ledger.operation(each.request_id))
    return found


async def recorded(ledger: Ledger, samples: list[Operation]) -> list[RecordedSample]:
    """Return the records of samples."""
    names = [each.request_id for each in samples]
    return list((await ledger.samples.recorded.read(names)).values())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger after a SIGKILL: the database has no page of the log yet."""
    home, left = tmp_path_factory.mktemp("ledger"), tmp_path_factory.mktemp("killed")

    async def live() -> None:
        ledger = await Ledger.open(home / NAME)
        await fill(ledger)
        for path in home.iterdir():
            shutil.copyfile(path, left / path.name)
        await ledger.close()

    asyncio.run(live())
    assert (left / f"{NAME}-wal").stat().st_size > 20_000
    return left


@pytest.fixture(scope="module")
def closed(killed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same ledger after it was closed: everything is in the database."""
    home = tmp_path_factory.mktemp("closed") / "home"
    shutil.copytree(killed, home)

    async def close() -> None:
        await (await Ledger.open(home / NAME)).close()

    asyncio.run(close())
    assert not (home / f"{NAME}-wal").exists()
    return home


def opened(home: Path) -> dict[str, Any] | None:
    """Return everything that can be read, or None if the ledger rejects the database."""

    async def look() -> dict[str, Any] | None:
        try:
            ledger = await Ledger.open(home / NAME)
        except LedgerError as error:
            assert NAME in str(error)
            return None
        try:
            return await read(ledger)
        finally:
            await ledger.close()

    return asyncio.run(look())


def whole(found: dict[str, Any]) -> bool:
    return len(found["operations"]) == 9 and found["checkpoints"][1] == 1


Harm = Callable[[bytearray, random.Random], None]


def flip(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def zero(data: bytearray, chance: random.Random) -> None:
    page = chance.randrange(max(1, len(data) // 4096)) * 4096
    data[page : page + 4096] = bytes(len(data[page : page + 4096]))


def swap(data: bytearray, chance: random.Random) -> None:
    a, b = (chance.randrange(max(1, len(data) // 4096)) * 4096 for _ in range(2))
    data[a : a + 4096], data[b : b + 4096] = data[b : b + 4096], data[a : a + 4096]


def harmed(source: Path, where: Path, file: str, harm: Harm) -> Iterator[Path]:
    """Yield copies of a home, each with one damage in one file."""
    chance = random.Random(f"{file} {harm.__name__}")
    for number in range(TRIES):
        home = where / str(number)
        shutil.copytree(source, home)
        data = bytearray((home / file).read_bytes())
        before = bytes(data)
        harm(data, chance)
        (home / file).write_bytes(data)
        if data != before:
            yield home
        shutil.rmtree(home)


@pytest.mark.parametrize("harm", [flip, cut, zero, swap])
def test_truncated_log_is_detected_on_open(killed: Path, tmp_path: Path, harm: Harm) -> None:
    expected = opened_copy(killed, tmp_path)
    detected = 0
    for home in harmed(killed, tmp_path, f"{NAME}-wal", harm):
        found = opened(home)
        detected += found is None
        assert found is None or found == expected
    assert detected > TRIES / 3


@pytest.mark.parametrize("harm", [flip, cut, zero, swap])
def test_damaged_database_is_detected(closed: Path, tmp_path: Path, harm: Harm) -> None:
    expected = opened_copy(closed, tmp_path)
    detected = 0
    for home in harmed(closed, tmp_path, NAME, harm):
        found = opened(home)
        if found is None or found.keys() != expected.keys():
            detected += 1
        for query, value in (found or {}).items():
            if query in ("runs", "checkpoints"):  # damaged rows are left out
                assert [each for each in value[0] if each not in expected[query][0]] == []
            elif query in ("operations", "sample", "recorded"):
                assert [each for each in value if each not in expected[query]] == []
            else:
                assert value in (expected[query], None)
    assert detected


def opened_copy(source: Path, where: Path) -> dict[str, Any]:
    home = where / "whole"
    shutil.copytree(source, home)
    found = opened(home)
    assert found is not None
    assert whole(found)
    return found


@pytest.mark.parametrize("gone", [f"{NAME}-wal", NAME])
def test_missing_file_is_detected_on_open(killed: Path, tmp_path: Path, gone: str) -> None:
    home = tmp_path / "home"
    shutil.copytree(killed, home)
    (home / gone).unlink()
    with pytest.raises(LedgerDamaged, match=r"acknowledged transactions.*everstep restore"):
        asyncio.run(Ledger.open(home / NAME))


def test_older_copy_of_the_database_is_detected_on_open(killed: Path, tmp_path: Path) -> None:
    home, older = tmp_path / "home", tmp_path / "older"
    shutil.copytree(killed, home)
    opened(home)
    shutil.copytree(home, older)

    async def go_on() -> None:
        ledger = await Ledger.open(home / NAME)
        await ledger.accept(NewOperation(RUN, 9, "optim_step", b"{}"))
        await ledger.close()

    asyncio.run(go_on())
    shutil.copyfile(older / NAME, home / NAME)
    with pytest.raises(LedgerDamaged, match="lacks 1 of"):
        asyncio.run(Ledger.open(home / NAME))


def test_foreign_database_is_detected_on_open(killed: Path, tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    shutil.copytree(killed, home)
    other.mkdir()
    opened(other)
    shutil.copyfile(other / NAME, home / NAME)
    (home / f"{NAME}-wal").unlink()
    with pytest.raises(LedgerDamaged, match="not the database that was here"):
        asyncio.run(Ledger.open(home / NAME))


def test_torn_unacknowledged_transaction_is_tolerated(killed: Path, tmp_path: Path) -> None:
    """A crash during a commit leaves a part of it in the log after the durable commits."""
    home = tmp_path / "home"
    shutil.copytree(killed, home)
    log = (home / f"{NAME}-wal").read_bytes()
    (home / f"{NAME}-wal").write_bytes(log + log[32 : 32 + 4096])
    found = opened(home)
    assert found is not None
    assert whole(found)


def test_stale_commit_counter_is_tolerated(killed: Path, tmp_path: Path) -> None:
    """The counter is stale after a power cut, or after a kill between commit and counter."""
    home = tmp_path / "home"
    shutil.copytree(killed, home)
    position = (home / f"{NAME}.position").read_bytes()
    opened(home)

    async def go_on() -> None:
        ledger = await Ledger.open(home / NAME)
        await ledger.accept(NewOperation(RUN, 9, "optim_step", b"{}"))
        await ledger.close()

    asyncio.run(go_on())
    (home / f"{NAME}.position").write_bytes(position)
    assert opened(home) is not None


@pytest.mark.parametrize("content", [b"", b"x", bytes(32)])
def test_damaged_commit_counter_is_tolerated(killed: Path, tmp_path: Path, content: bytes) -> None:
    home = tmp_path / "home"
    shutil.copytree(killed, home)
    (home / f"{NAME}.position").write_bytes(content)
    assert opened(home) is not None
    (home / f"{NAME}-wal").unlink(missing_ok=True)
    assert opened(home) is not None, "it is in the database by now"


def test_reads_do_not_advance_the_commit_counter(killed: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(killed, home)
    before = (home / f"{NAME}.position").read_bytes()
    assert opened(home) is not None
    assert (home / f"{NAME}.position").read_bytes() == before


CELLS = [
    ("runs", "base_model", "'x'"),
    ("runs", "status", "'corrupted'"),
    ("sessions", "finished", "'success'"),
    ("samplers", "model_path", "'tinker://x:train:0/weights/b'"),
    ("checkpoints", "size_bytes", "8"),
    ("checkpoints", "expires_at", "'2026-01-02 03:04:05.000000'"),
    ("operations", "status", "'failed'"),
    ("operations", "seconds", "5.5"),
]


@pytest.mark.parametrize(("table", "column", "value"), CELLS)
def test_changed_cell_is_named_by_its_row(
    closed: Path, tmp_path: Path, table: str, column: str, value: str
) -> None:
    home = tmp_path / "home"
    shutil.copytree(closed, home)
    with sqlite3.connect(home / NAME) as database:
        database.execute(f"UPDATE {table} SET {column} = {value}")

    async def look() -> list[str]:
        ledger = await Ledger.open(home / NAME)
        try:
            return await ledger.find_damaged_rows()
        finally:
            await ledger.close()

    damaged = asyncio.run(look())
    assert damaged
    of_operation = f"of operation .* of ({RUN}|{SAMPLER}) is"
    named = of_operation if table == "operations" else rf"row of .* \({table}\)"
    assert [each for each in damaged if not re.search(named, each)] == []
    whole_again = opened(home)
    assert whole_again is not None
    gone = {"runs": "run", "sessions": "session", "samplers": "sampler"}.get(table, table)
    missing = gone not in whole_again or whole_again[gone] in (None, ([], 1), ([], 0))
    assert missing, "it is not served"


def test_damaged_index_row_is_restored_from_manifests(closed: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(closed, home)
    with sqlite3.connect(home / NAME) as database:
        database.execute("UPDATE checkpoints SET size_bytes = 99")

    async def rebuild() -> list[str]:
        ledger = await Ledger.open(home / NAME)
        assert await ledger.insert_missing([], [checkpoint(f"{PATH}3")]) == (0, 1)
        damaged = await ledger.find_damaged_rows()
        await ledger.close()
        return damaged

    assert asyncio.run(rebuild()) == []


def test_payloads_that_no_replay_needs_are_dropped(closed: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(closed, home)
    payload = random.Random(2).randbytes(400)

    async def prune() -> None:
        ledger = await Ledger.open(home / NAME)
        kinds = ["forward_backward"]
        assert await ledger.prune(RUN, after=0, upto=4, kinds=kinds) == 4
        assert await ledger.prune(RUN, after=0, upto=8, kinds=kinds) == 2, "what waits stays"
        found = {each.seq_id: each for each in await ledger.operations(RUN)}
        assert [n for n, each in found.items() if each.pruned] == [1, 2, 3, 4, 5, 6]
        assert found[2].payload == b""
        assert found[2].result == payload[::-1]
        again, is_new = await ledger.accept(NewOperation(RUN, 2, "forward_backward", payload))
        assert not is_new
        assert again.request_id == found[2].request_id
        assert again.payload == payload, "the retry has brought it"
        with pytest.raises(SequenceConflict):
            await ledger.accept(NewOperation(RUN, 2, "forward_backward", b"other"))
        assert await ledger.find_damaged_rows() == []
        await ledger.close()

    asyncio.run(prune())
