"""Damage of the database file: it is detected, and damaged rows are never served."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from everstep.ledger import Failure, Ledger, LedgerDamaged, LedgerError, NewOperation, Operation

FLIPS = 150
RUN = "s:train:0"


async def filled(path: Path) -> list[Operation]:
    """Fill a ledger with operations in every state and return them."""
    ledger = await Ledger.open(path)
    done = []
    for seq_id in range(1, 7):
        payload = bytes(random.Random(seq_id).randbytes(300))
        new = NewOperation(RUN, seq_id, "forward_backward", payload)
        done.append((await ledger.accept(new))[0])
    await ledger.succeed(done[0].request_id, b"r" * 500, "protobuf")
    await ledger.fail(done[1].request_id, "no", "user")
    await ledger.accept(NewOperation(RUN, 7, "optim_step", b"{}", Failure("wrong", "user")))
    found = await ledger.operations(RUN)
    await ledger.close()
    return found


@pytest.mark.parametrize("column", ["payload", "result", "error", "kind", "status"])
def test_changed_cell_raises_ledger_damaged(column: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    operations = asyncio.run(filled(path))
    victim = operations[1] if column == "error" else operations[0]
    with sqlite3.connect(path) as database:
        kind = "BLOB" if column in ("payload", "result") else "TEXT"
        value = "'failed'" if column == "status" else f"CAST({column} || 'x' AS {kind})"
        database.execute(
            f"UPDATE operations SET {column} = {value} WHERE request_id = ?", (victim.request_id,)
        )

    async def look() -> None:
        ledger = await Ledger.open(path)
        with pytest.raises(LedgerDamaged, match=f"operation {victim.seq_id} .* of {RUN}"):
            await ledger.operations(RUN)
        if column != "payload":
            with pytest.raises(LedgerDamaged, match=f"operation {victim.seq_id} "):
                await ledger.operation(victim.request_id)
        else:
            future = await ledger.operation(victim.request_id)
            assert future is not None and future.result == victim.result
        failed = await ledger.mark_corrupted(RUN, "damaged")
        assert [each.seq_id for each in failed if each.failure] == [3, 4, 5, 6]
        await ledger.close()

    asyncio.run(look())


def test_flipped_bit_is_never_served(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    expected = asyncio.run(filled(path))
    whole = path.read_bytes()
    chance = random.Random(7)

    async def look(copy: Path) -> list[Operation] | None:
        try:
            ledger = await Ledger.open(copy)
        except LedgerError:
            return None
        try:
            return await ledger.operations(RUN)
        except Exception as error:  # noqa: BLE001  the type depends on the damaged page
            assert str(error)
            return None
        finally:
            await ledger.close()

    detected, known = 0, {each.request_id: each for each in expected}
    for _ in range(FLIPS):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        copy = tmp_path / "damaged.sqlite"
        for leftover in tmp_path.glob("damaged.sqlite*"):
            leftover.unlink()
        copy.write_bytes(damaged)
        found = asyncio.run(look(copy))
        if found is None:
            detected += 1
            continue
        assert found
        for each in found:
            before = known[each.request_id]
            assert (each.payload, each.result, each.failure, each.seq_id) == (
                before.payload,
                before.result,
                before.failure,
                before.seq_id,
            )
    assert 0 < detected < FLIPS


def test_file_that_is_no_database_is_rejected_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(LedgerDamaged, match="everstep vault rebuild"):
        asyncio.run(Ledger.open(path))
    shutil.rmtree(tmp_path)
