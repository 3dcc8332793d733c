"""Upkeep: what expired or was orphaned goes after its grace, what a save may record stays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from everstep.ledger import Ledger, NewOperation
from everstep.runtime import Settings
from everstep.runtime.checkpoints import Checkpoints, path_of
from everstep.runtime.errors import OperationFailed
from everstep.runtime.upkeep import Leftovers, Upkeep
from everstep.vault import CheckpointId, CheckpointNotFound, Vault
from everstep.vault.inspection import put_away
from everstep.vault.keys import blob_key, manifest_key
from tests.vault.homes import RUN, Home, rot, row_of


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def with_upkeep(home: Home, work: Any, grace: float = 0) -> Any:
    async def call(ledger: Ledger) -> Any:
        checkpoints = Checkpoints(ledger, home.vault, Settings())
        return await work(Upkeep(ledger, home.vault, checkpoints, grace), checkpoints, ledger)

    return home.ledger(call)


def leftovers(home: Home, grace: float = 0) -> tuple[list[str], list[str]]:
    async def work(upkeep: Upkeep, *_: Any) -> Leftovers:
        return await upkeep.leftovers()

    found = with_upkeep(home, work, grace)
    return [each.name for each in found.expired], [each.name for each in found.orphaned]


def names(vault: Vault) -> set[str]:
    return {manifest.name for manifest in vault.manifests()}


def age(home: Home, *of: str, seconds: float) -> None:
    """Make it as if a manifest had been written so long ago."""
    path = home.path / "vault" / manifest_key(*of)
    moment = path.stat().st_mtime - seconds
    os.utime(path, (moment, moment))


def test_only_what_is_in_no_one_s_use_goes(home: Home) -> None:
    home.save("kept", b"1")
    home.save("lives", b"2", expires_in=3600)
    home.save("expired", b"3", expires_in=-10)
    home.write("orphan", b"4", "training", 99)
    home.save("pending", b"5", record=False)
    home.snapshot(b"7")
    assert leftovers(home) == (["expired"], ["orphan"])

    async def remove(upkeep: Upkeep, *_: Any) -> None:
        await upkeep.remove(await upkeep.leftovers())

    with_upkeep(home, remove)
    assert names(home.vault) == {"kept", "lives", "pending", f"{home.seq:020d}"}
    assert leftovers(home) == ([], [])
    assert {ref.size for ref in home.vault.collect(0)} == {1}
    assert home.listed() == ["kept", "lives"]


def test_nothing_goes_before_its_grace(home: Home) -> None:
    home.save("expired", b"3", expires_in=-10)
    home.write("orphan", b"4", "training", 99)
    assert leftovers(home, grace=60) == ([], [])
    age(home, "training", RUN, "orphan", seconds=61)
    assert leftovers(home, grace=60) == ([], ["orphan"])
    assert leftovers(home, grace=5) == (["expired"], ["orphan"])


def test_what_is_saved_under_the_name_of_a_leftover_stays(home: Home) -> None:
    home.save("expired", b"1", expires_in=-10)
    home.write("orphan", b"2", "training", 99)

    async def overtaken(upkeep: Upkeep, _: Any, ledger: Ledger) -> None:
        found = await upkeep.leftovers()
        for name in ("expired", "orphan"):
            payload = json.dumps({"name": name}).encode()
            operation, _ = await ledger.accept(
                NewOperation(RUN, home.seq + 1, "save_weights", payload)
            )
            home.seq += 1
            manifest = home.write(name, b"new", "training", home.seq, operation.request_id)
            await ledger.succeed(operation.request_id, b"", "json", checkpoint=row_of(manifest))
        await upkeep.remove(found)

    with_upkeep(home, overtaken)
    assert names(home.vault) == {"expired", "orphan"}
    assert home.listed() == ["expired", "orphan"]


def test_a_leftover_that_a_save_begins_to_write_stays(home: Home) -> None:
    home.write("orphan", b"2", "training", 99)

    async def overtaken(upkeep: Upkeep, _: Any, ledger: Ledger) -> None:
        found = await upkeep.leftovers()
        payload = json.dumps({"name": "orphan"}).encode()
        await ledger.accept(NewOperation(RUN, home.seq + 1, "save_weights", payload))
        await upkeep.remove(found)

    with_upkeep(home, overtaken)
    assert names(home.vault) == {"orphan"}


def test_the_index_follows_the_quarantine_and_the_healing(home: Home) -> None:
    manifest = home.save("x", b"content")
    home.save("y", b"other")
    path = str(path_of(CheckpointId("training", RUN, "x")))
    rot(home.blob(manifest))
    note = put_away(home.vault, blob_key(manifest.files["adapter"].blake3))
    assert note is not None

    async def follow(_: Any, checkpoints: Checkpoints, ledger: Ledger) -> list[str]:
        changed = await checkpoints.follow_quarantine()
        assert changed == 1
        assert await checkpoints.follow_quarantine() == 0
        _, total = await ledger.directory.checkpoints(10, 0)
        assert total == 1
        with pytest.raises(OperationFailed, match="x is quarantined: adapter") as told:
            await checkpoints.find(path)
        assert told.value.category == "server"
        return [each.name for each in await ledger.checkpoints(RUN)]

    assert with_upkeep(home, follow) == ["y"]
    home.vault.put([b"content"])

    async def heal(_: Any, checkpoints: Checkpoints, ledger: Ledger) -> str:
        assert await checkpoints.follow_quarantine() == 1
        return (await checkpoints.find(path)).name

    assert with_upkeep(home, heal) == "x"


def test_a_quarantined_checkpoint_can_be_deleted(home: Home) -> None:
    manifest = home.save("x", b"content")
    rot(home.path / "vault" / manifest_key(*manifest.id))
    put_away(home.vault, manifest_key(*manifest.id))

    async def delete(_: Any, checkpoints: Checkpoints, ledger: Ledger) -> None:
        await checkpoints.follow_quarantine()
        await checkpoints.delete(RUN, "weights/x")
        with pytest.raises(OperationFailed, match="does not exist"):
            await checkpoints.find(str(path_of(manifest.id)))

    with_upkeep(home, delete)
    with pytest.raises(CheckpointNotFound):
        home.vault.manifest("training", RUN, "x")
