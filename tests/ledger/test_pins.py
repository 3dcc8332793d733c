"""Pins end with their operations, in the same transaction, and survive a restart until then."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from everstep.ledger import Checkpoint, Ledger, NewOperation


def checkpoint() -> Checkpoint:
    return Checkpoint(
        path="tinker://s:train:0/weights/a",
        run_id="s:train:0",
        kind="training",
        name="a",
        created_at=datetime.now(UTC),
        size_bytes=1,
        base_model="m",
        lora={},
        optimizer=None,
        user_metadata=None,
        expires_at=None,
    )


def test_pin_ends_with_its_operation(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        saved, failed, pending = [
            (await ledger.accept(NewOperation("s:train:0", number, "save_weights", b"{}")))[0]
            for number in (1, 2, 3)
        ]
        for operation in (saved, failed, pending, pending):
            await ledger.pins.add(operation.request_id)
        await ledger.pins.add("snapshot")
        ids = {saved.request_id, failed.request_id, pending.request_id, "snapshot"}
        assert await ledger.pins.active() == ids
        await ledger.close()

        ledger = await Ledger.open(tmp_path / "l.sqlite")
        assert await ledger.pins.active() == ids
        await ledger.succeed(saved.request_id, b"{}", "json", checkpoint=checkpoint())
        await ledger.fail(failed.request_id, "no", "server")
        assert await ledger.pins.active() == {pending.request_id, "snapshot"}
        await ledger.pins.remove("snapshot", "unknown")
        assert await ledger.pins.active() == {pending.request_id}
        await ledger.pins.clear()
        assert await ledger.pins.active() == frozenset()
        await ledger.close()

    asyncio.run(work())
