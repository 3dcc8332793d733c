"""Garbage collector: removes expired and orphaned checkpoints, keeps those of pending saves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from everstep.ledger import Ledger, NewOperation
from everstep.runtime.checkpoints.catalog import CheckpointCatalog
from everstep.runtime.errors import OperationFailed
from everstep.runtime.maintenance.gc import Garbage, GarbageCollector
from everstep.vault import CheckpointId, CheckpointNotFound, Vault, gc
from everstep.vault.integrity import quarantine_damaged
from everstep.vault.storage.keys import blob_key, manifest_key
from tests.vault.homes import RUN, Home, rot, row_of


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def with_collector(home: Home, work: Any, grace: float = 0) -> Any:
    async def call(ledger: Ledger) -> Any:
        context = home.context(ledger)
        return await work(GarbageCollector(context, grace), context.catalog, ledger)

    return home.ledger(call)


def garbage(home: Home, grace: float = 0) -> tuple[list[str], list[str]]:
    async def work(collector: GarbageCollector, *_: Any) -> Garbage:
        return await collector.find()

    found = with_collector(home, work, grace)
    return [each.name for each in found.expired], [each.name for each in found.orphaned]


def names(vault: Vault) -> set[str]:
    return {manifest.name for manifest in vault.manifests()}


def age(home: Home, *of: str, seconds: float) -> None:
    """Move the modification time of a manifest into the past."""
    path = home.path / "vault" / manifest_key(*of)
    moment = path.stat().st_mtime - seconds
    os.utime(path, (moment, moment))


def test_collector_removes_only_expired_and_orphaned_checkpoints(home: Home) -> None:
    home.save("kept", b"1")
    home.save("lives", b"2", expires_in=3600)
    home.save("expired", b"3", expires_in=-10)
    home.write("orphan", b"4", "training", 99)
    home.save("pending", b"5", record=False)
    home.snapshot(b"7")
    assert garbage(home) == (["expired"], ["orphan"])

    async def remove(collector: GarbageCollector, *_: Any) -> None:
        await collector.remove(await collector.find())

    with_collector(home, remove)
    assert names(home.vault) == {"kept", "lives", "pending", f"{home.seq:020d}"}
    assert garbage(home) == ([], [])
    assert {ref.size for ref in gc.collect(home.vault, 0)} == {1}
    assert home.listed() == ["kept", "lives"]


def test_collector_removes_nothing_within_the_grace_period(home: Home) -> None:
    home.save("expired", b"3", expires_in=-10)
    home.write("orphan", b"4", "training", 99)
    assert garbage(home, grace=60) == ([], [])
    age(home, "training", RUN, "orphan", seconds=61)
    assert garbage(home, grace=60) == ([], ["orphan"])
    assert garbage(home, grace=5) == (["expired"], ["orphan"])


def test_new_save_under_the_name_of_garbage_is_kept(home: Home) -> None:
    home.save("expired", b"1", expires_in=-10)
    home.write("orphan", b"2", "training", 99)

    async def overtaken(collector: GarbageCollector, _: Any, ledger: Ledger) -> None:
        found = await collector.find()
        for name in ("expired", "orphan"):
            payload = json.dumps({"name": name}).encode()
            operation, _ = await ledger.accept(
                NewOperation(RUN, home.seq + 1, "save_weights", payload)
            )
            home.seq += 1
            manifest = home.write(name, b"new", "training", home.seq, operation.request_id)
            await ledger.succeed(operation.request_id, b"", "json", checkpoint=row_of(manifest))
        await collector.remove(found)

    with_collector(home, overtaken)
    assert names(home.vault) == {"expired", "orphan"}
    assert home.listed() == ["expired", "orphan"]


def test_orphan_whose_name_a_pending_save_takes_is_kept(home: Home) -> None:
    home.write("orphan", b"2", "training", 99)

    async def overtaken(collector: GarbageCollector, _: Any, ledger: Ledger) -> None:
        found = await collector.find()
        payload = json.dumps({"name": "orphan"}).encode()
        await ledger.accept(NewOperation(RUN, home.seq + 1, "save_weights", payload))
        await collector.remove(found)

    with_collector(home, overtaken)
    assert names(home.vault) == {"orphan"}


def test_catalog_follows_quarantine_and_repair(home: Home) -> None:
    manifest = home.save("x", b"content")
    home.save("y", b"other")
    path = CheckpointId("training", RUN, "x").path
    rot(home.blob(manifest))
    note = quarantine_damaged(home.vault, blob_key(manifest.files["adapter"].blake3))
    assert note is not None

    async def follow(_: Any, checkpoints: CheckpointCatalog, ledger: Ledger) -> list[str]:
        changed = await checkpoints.follow_quarantine()
        assert changed == 1
        assert await checkpoints.follow_quarantine() == 0
        _, total = await ledger.search.list_checkpoints(10, 0)
        assert total == 1
        with pytest.raises(OperationFailed, match="x is quarantined: adapter") as failure:
            await checkpoints.find(path)
        assert failure.value.category == "server"
        return [each.name for each in await ledger.checkpoints(RUN)]

    assert with_collector(home, follow) == ["y"]
    home.vault.put([b"content"])

    async def repair(_: Any, checkpoints: CheckpointCatalog, ledger: Ledger) -> str:
        assert await checkpoints.follow_quarantine() == 1
        return (await checkpoints.find(path)).name

    assert with_collector(home, repair) == "x"


def test_quarantined_checkpoint_can_be_deleted(home: Home) -> None:
    manifest = home.save("x", b"content")
    rot(home.path / "vault" / manifest_key(*manifest.id))
    quarantine_damaged(home.vault, manifest_key(*manifest.id))

    async def delete(_: Any, checkpoints: CheckpointCatalog, ledger: Ledger) -> None:
        await checkpoints.follow_quarantine()
        await checkpoints.delete(manifest.id)
        with pytest.raises(OperationFailed, match="does not exist"):
            await checkpoints.find(manifest.id.path)

    with_collector(home, delete)
    with pytest.raises(CheckpointNotFound):
        home.vault.manifest("training", RUN, "x")
