"""Checkpoint metadata in ledger and vault: consistent after a crash and during a collection."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from everstep.ledger import Checkpoint, Ledger
from everstep.runtime.checkpoints.metadata import CheckpointMetadata
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import Rejected
from everstep.runtime.maintenance.gc import GarbageCollector
from everstep.vault import Manifest, gc
from everstep.vault.integrity import quarantine_damaged
from everstep.vault.storage.keys import metadata_key
from tests.vault.homes import RUN, Home, row_of

ID = "weights/a"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def save_listed(home: Home, expires_in: float | None = None, listed: bool = True) -> Manifest:
    manifest = home.write("a", b"content", "training", 1)
    row = Checkpoint(**{**vars(row_of(manifest, expires_in)), "listed": listed})

    async def work(ledger: Ledger) -> None:
        await ledger.insert_missing([], [row])

    home.ledger(work)
    return manifest


def with_metadata_of(home: Home, work: Any) -> Any:
    async def call(ledger: Ledger) -> Any:
        context = home.context(ledger)
        return await work(CheckpointMetadata(context), context)

    return home.ledger(call)


def test_metadata_missing_in_the_vault_is_written_at_the_next_start(home: Home) -> None:
    manifest = save_listed(home)

    async def publish(metadata: CheckpointMetadata, *_: Any) -> None:
        full = mock.patch.object(home.vault, "set_metadata", side_effect=OSError(28, "full"))
        with full, pytest.raises(Rejected, match="try again") as refused:
            await metadata.set_public(RUN, ID, True)
        assert refused.value.status == 503

    async def write_all(metadata: CheckpointMetadata, context: RuntimeContext) -> list[Checkpoint]:
        with mock.patch.object(home.vault, "set_metadata", side_effect=OSError(28, "full")):
            await metadata.write_unwritten()
        assert len(await context.ledger.checkpoint_metadata.unwritten()) == 1, (
            "the metadata stays unwritten and is retried"
        )
        await metadata.write_unwritten()
        return await context.ledger.checkpoint_metadata.unwritten()

    with_metadata_of(home, publish)
    assert not home.vault.with_metadata(manifest).public
    assert with_metadata_of(home, write_all) == []
    assert home.vault.with_metadata(manifest).public


def test_retry_writes_metadata_that_the_first_attempt_could_not(home: Home) -> None:
    manifest = save_listed(home)

    async def publish(metadata: CheckpointMetadata, *_: Any) -> None:
        full = mock.patch.object(home.vault, "set_metadata", side_effect=OSError(28, "full"))
        with full, pytest.raises(Rejected):
            await metadata.set_public(RUN, ID, True)
        await metadata.set_public(RUN, ID, True)

    with_metadata_of(home, publish)
    assert home.vault.with_metadata(manifest).public


def test_damaged_metadata_is_restored_from_the_ledger(home: Home) -> None:
    manifest = save_listed(home)

    async def publish(metadata: CheckpointMetadata, *_: Any) -> None:
        await metadata.set_public(RUN, ID, True)

    async def write_all(metadata: CheckpointMetadata, *_: Any) -> None:
        await metadata.write_unwritten()

    with_metadata_of(home, publish)
    key = metadata_key(*manifest.id)
    (home.path / "vault" / key).write_bytes(b"rotten")
    assert quarantine_damaged(home.vault, key) is not None
    assert not home.vault.with_metadata(manifest).public
    with_metadata_of(home, write_all)
    assert home.vault.with_metadata(manifest).public


def test_ttl_extended_during_a_collection_takes_effect(home: Home) -> None:
    manifest = save_listed(home, expires_in=1800)

    async def race(metadata: CheckpointMetadata, context: RuntimeContext) -> None:
        collector = GarbageCollector(context, -3600)  # as if it were an hour later
        found = await collector.find()
        assert [row.name for row in found.expired] == ["a"]
        await metadata.set_ttl(RUN, ID, 7200)
        await collector.remove(found)
        assert [row.name for row in await context.ledger.checkpoints(RUN)] == ["a"]
        await metadata.set_ttl(RUN, ID, 3600)
        found = await GarbageCollector(context, -3601).find()
        await metadata.set_ttl(RUN, ID, None)
        await GarbageCollector(context, -3601).remove(found)

    with_metadata_of(home, race)
    assert home.vault.manifest(*manifest.id) == manifest
    assert home.vault.with_metadata(manifest).expires_at is None


def test_expired_checkpoint_can_not_be_renewed_and_is_collected(home: Home) -> None:
    manifest = save_listed(home, expires_in=-1)

    async def work(metadata: CheckpointMetadata, context: RuntimeContext) -> None:
        for change in (metadata.set_ttl(RUN, ID, None), metadata.set_public(RUN, ID, True)):
            with pytest.raises(Rejected, match="expired") as refused:
                await change
            assert refused.value.status == 404
        collector = GarbageCollector(context, 3600)
        assert (await collector.find()).expired == [], "its grace period has not passed"
        collector = GarbageCollector(context, 0)
        await collector.remove(await collector.find())
        now = datetime.now(UTC)
        day = now.replace(hour=0, minute=0, second=0, microsecond=0)
        events = await context.ledger.audit.events_between(day, now.max.replace(tzinfo=UTC))
        assert [each.event for each in events] == ["checkpoint_expire"]

    with_metadata_of(home, work)
    assert not list(home.vault.names(manifest.kind))


def test_quarantined_unnamed_save_of_an_ended_session_is_collected(
    home: Home,
) -> None:
    manifest = save_listed(home, listed=False)
    (file,) = [home.blob(manifest, name) for name in list(manifest.files)[:1]]
    file.write_bytes(b"rotten")
    (ref, *_) = manifest.files.values()
    quarantine_damaged(home.vault, f"blobs/{ref.blake3[:2]}/{ref.blake3}")

    async def work(_: CheckpointMetadata, context: RuntimeContext) -> None:
        await context.catalog.follow_quarantine()
        collector = GarbageCollector(context, 0)
        found = await collector.find()
        assert [row.name for row in found.ended] == ["a"]
        assert found.ended[0].quarantined
        await collector.remove(found)
        gc.collect(home.vault, 0)

    with_metadata_of(home, work)
    assert not list(home.vault.names(manifest.kind))
    assert list(home.vault.quarantine.records()) == []
