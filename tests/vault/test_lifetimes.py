"""Lifetimes in ledger and vault: whole after a crash, safe beside a collection."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from everstep.ledger import Checkpoint, Ledger
from everstep.runtime import Settings
from everstep.runtime.checkpoints import Checkpoints
from everstep.runtime.errors import Rejected
from everstep.runtime.lifetimes import Lifetimes
from everstep.runtime.upkeep import Upkeep
from everstep.vault import Manifest
from everstep.vault.inspection import put_away
from everstep.vault.keys import marks_key
from tests.vault.homes import RUN, Home, row_of

ID = "weights/a"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def saved(home: Home, expires_in: float | None = None, listed: bool = True) -> Manifest:
    manifest = home.write("a", b"content", "training", 1)
    row = Checkpoint(**{**vars(row_of(manifest, expires_in)), "listed": listed})

    async def work(ledger: Ledger) -> None:
        await ledger.recreate([], [row])

    home.ledger(work)
    return manifest


def with_lifetimes(home: Home, work: Any) -> Any:
    async def call(ledger: Ledger) -> Any:
        checkpoints = Checkpoints(ledger, home.vault, Settings())
        return await work(Lifetimes(ledger, home.vault, checkpoints), checkpoints, ledger)

    return home.ledger(call)


def test_what_the_vault_was_not_told_it_is_told_at_the_next_start(home: Home) -> None:
    manifest = saved(home)

    async def publish(lifetimes: Lifetimes, *_: Any) -> None:
        full = mock.patch.object(home.vault, "mark", side_effect=OSError(28, "full"))
        with full, pytest.raises(Rejected, match="try again") as refused:
            await lifetimes.set_public(RUN, ID, True)
        assert refused.value.status == 503

    async def settle(lifetimes: Lifetimes, _: Any, ledger: Ledger) -> list[Checkpoint]:
        with mock.patch.object(home.vault, "mark", side_effect=OSError(28, "full")):
            await lifetimes.settle()
        assert len(await ledger.publication.unmarked()) == 1, "it is tried again"
        await lifetimes.settle()
        return await ledger.publication.unmarked()

    with_lifetimes(home, publish)
    assert not home.vault.marked(manifest).public
    assert with_lifetimes(home, settle) == []
    assert home.vault.marked(manifest).public


def test_a_retry_tells_the_vault_what_the_first_attempt_did_not(home: Home) -> None:
    manifest = saved(home)

    async def publish(lifetimes: Lifetimes, *_: Any) -> None:
        full = mock.patch.object(home.vault, "mark", side_effect=OSError(28, "full"))
        with full, pytest.raises(Rejected):
            await lifetimes.set_public(RUN, ID, True)
        await lifetimes.set_public(RUN, ID, True)

    with_lifetimes(home, publish)
    assert home.vault.marked(manifest).public


def test_marks_that_rotted_are_written_again_from_the_ledger(home: Home) -> None:
    manifest = saved(home)

    async def publish(lifetimes: Lifetimes, *_: Any) -> None:
        await lifetimes.set_public(RUN, ID, True)

    async def settle(lifetimes: Lifetimes, *_: Any) -> None:
        await lifetimes.settle()

    with_lifetimes(home, publish)
    key = marks_key(*manifest.id)
    (home.path / "vault" / key).write_bytes(b"rotten")
    assert put_away(home.vault, key) is not None
    assert not home.vault.marked(manifest).public
    with_lifetimes(home, settle)
    assert home.vault.marked(manifest).public


def test_a_lifetime_that_is_extended_beside_a_collection_counts(home: Home) -> None:
    manifest = saved(home, expires_in=1800)

    async def race(lifetimes: Lifetimes, checkpoints: Checkpoints, ledger: Ledger) -> None:
        upkeep = Upkeep(ledger, home.vault, checkpoints, -3600)  # as if it were an hour later
        found = await upkeep.leftovers()
        assert [row.name for row in found.expired] == ["a"]
        await lifetimes.set_ttl(RUN, ID, 7200)
        await upkeep.remove(found)
        assert [row.name for row in await ledger.checkpoints(RUN)] == ["a"]
        await lifetimes.set_ttl(RUN, ID, 3600)
        found = await Upkeep(ledger, home.vault, checkpoints, -3601).leftovers()
        await lifetimes.set_ttl(RUN, ID, None)
        await Upkeep(ledger, home.vault, checkpoints, -3601).remove(found)

    with_lifetimes(home, race)
    assert home.vault.manifest(*manifest.id) == manifest
    assert home.vault.marked(manifest).expires_at is None


def test_what_expired_comes_back_for_no_one_and_is_collected(home: Home) -> None:
    manifest = saved(home, expires_in=-1)

    async def work(lifetimes: Lifetimes, checkpoints: Checkpoints, ledger: Ledger) -> None:
        for change in (lifetimes.set_ttl(RUN, ID, None), lifetimes.set_public(RUN, ID, True)):
            with pytest.raises(Rejected, match="expired") as refused:
                await change
            assert refused.value.status == 404
        upkeep = Upkeep(ledger, home.vault, checkpoints, 3600)
        assert (await upkeep.leftovers()).expired == [], "it has its grace period"
        upkeep = Upkeep(ledger, home.vault, checkpoints, 0)
        await upkeep.remove(await upkeep.leftovers())
        now = datetime.now(UTC)
        day = now.replace(hour=0, minute=0, second=0, microsecond=0)
        events = await ledger.audit.between(day, now.max.replace(tzinfo=UTC))
        assert [each.event for each in events] == ["checkpoint_expire"]

    with_lifetimes(home, work)
    assert not list(home.vault.names(manifest.kind))


def test_an_unnamed_save_of_a_session_that_ended_is_collected_though_quarantined(
    home: Home,
) -> None:
    manifest = saved(home, listed=False)
    (file,) = [home.blob(manifest, name) for name in list(manifest.files)[:1]]
    file.write_bytes(b"rotten")
    (ref, *_) = manifest.files.values()
    put_away(home.vault, f"blobs/{ref.blake3[:2]}/{ref.blake3}")

    async def work(_: Lifetimes, checkpoints: Checkpoints, ledger: Ledger) -> None:
        await checkpoints.follow_quarantine()
        upkeep = Upkeep(ledger, home.vault, checkpoints, 0)
        found = await upkeep.leftovers()
        assert [row.name for row in found.ended] == ["a"]
        assert found.ended[0].quarantined
        await upkeep.remove(found)
        home.vault.collect(0)

    with_lifetimes(home, work)
    assert not list(home.vault.names(manifest.kind))
    assert list(home.vault.quarantine.standing()) == []
