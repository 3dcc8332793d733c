"""``everstep backup`` and ``everstep restore``: consistent, complete or absent, verified."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import everstep.cli.backup.create as command
from everstep.cli.app import app
from everstep.ledger import Ledger, NewOperation
from everstep.ledger.payload_log.contents import LOGGED_BYTES
from everstep.ledger.payload_log.segments import SegmentFiles, segments_path
from everstep.ledger.sqlite.copy import copy_database
from everstep.vault import CheckpointDamaged, Vault, gc
from everstep.vault.backup import BackupNote
from everstep.vault.storage.keys import blob_key, manifest_key
from tests.vault.checkpoints import load
from tests.vault.homes import RUN, Home, rot

FIRST = 101
LARGE = 2 * LOGGED_BYTES
PATH = f"tinker://{RUN}/weights"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.save("x", b"content of x")
    home.save("y", b"content of y", kind="sampler")
    home.snapshot(b"snapshot")
    return home


def call(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def backup(home: Home, to: Path, *options: str, code: int = 0) -> Any:
    return json.loads(call("backup", to, "--home", home.path, "--json", *options, code=code))


def restored(place: Path, to: Path, *options: str) -> dict[str, dict[str, bytes]]:
    """All checkpoints of a restored home, which are exactly those of its ledger."""
    call("restore", place, "--home", to, *options)
    vault = Vault(to / "vault")
    found = {each.name: load(vault, each) for each in vault.manifests() if each.kind != "snapshot"}

    async def listed(ledger: Ledger) -> set[str]:
        return {row.name for row in await ledger.all_checkpoints()}

    again = Home.__new__(Home)
    again.path = to
    assert again.ledger(listed) == set(found)
    return found


def content(name: str) -> dict[str, bytes]:
    return {"adapter": f"content of {name}".encode(), "config": b"config"}


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("options", [[], ["--copy"]])
def test_backup_restores_the_same_home(home: Home, tmp_path: Path, options: list[str]) -> None:
    note = backup(home, tmp_path / "b", *options)
    assert (note["checkpoints"], note["files"], note["left_out"]) == (3, 4, {})
    links = home.blob(home.vault.manifest("training", RUN, "x")).stat().st_nlink
    assert links == (1 if options else 2)
    text = call("backup", tmp_path / "b2", "--home", home.path)
    assert "3 checkpoints and snapshots, 4 files" in text
    shutil.rmtree(home.path)
    assert restored(tmp_path / "b", home.path) == {"x": content("x"), "y": content("y")}
    assert len(list(Vault(home.path / "vault").manifests(kind="snapshot"))) == 1
    home.vault = Vault(home.path / "vault")
    home.save("z", b"content of z")  # after the backup
    assert call("vault", "verify", "--all", "--home", home.path)


def test_backup_transfers_only_new_files(home: Home, tmp_path: Path) -> None:
    backup(home, tmp_path / "b", "--copy")
    first = {path: path.stat().st_ino for path in (tmp_path / "b" / "blobs").glob("*/*")}
    home.save("z", b"content of z")
    delete(home, "x")
    backup(home, tmp_path / "b", "--copy")
    second = {path: path.stat().st_ino for path in (tmp_path / "b" / "blobs").glob("*/*")}
    assert len(first.items() & second.items()) == 3  # y, the snapshot, the shared configuration
    assert len(second) == 4
    assert restored(tmp_path / "b", tmp_path / "r") == {"y": content("y"), "z": content("z")}


def test_any_of_several_backups_can_be_restored(home: Home, tmp_path: Path) -> None:
    first = backup(home, tmp_path / "b", "--keep", "2")["id"]
    home.save("z", b"content of z")
    second = backup(home, tmp_path / "b", "--keep", "2")["id"]
    assert set(restored(tmp_path / "b", tmp_path / "r1", "--at", first)) == {"x", "y"}
    assert set(restored(tmp_path / "b", tmp_path / "r2")) == {"x", "y", "z"}
    text = call("restore", tmp_path / "b", "--home", tmp_path / "r3", "--at", "other", code=1)
    assert first in text and second in text
    backup(home, tmp_path / "b")
    assert len(list((tmp_path / "b" / "backups").iterdir())) == 1


def test_home_with_rebuilt_database_is_backed_up(home: Home, tmp_path: Path) -> None:
    for path in home.path.glob("ledger.sqlite*"):
        path.unlink()
    call("vault", "rebuild", "--home", home.path)
    assert backup(home, tmp_path / "b")["checkpoints"] == 3
    assert restored(tmp_path / "b", tmp_path / "r") == {"x": content("x"), "y": content("y")}


def test_backup_is_complete_without_expired_and_removed_checkpoint(
    home: Home, tmp_path: Path
) -> None:
    home.save("z", b"content of z", expires_in=-10)
    home.vault.delete("training", RUN, "z")
    assert backup(home, tmp_path / "b")["left_out"] == {}
    assert set(restored(tmp_path / "b", tmp_path / "r")) == {"x", "y"}


def test_backup_leaves_out_and_reports_damaged_checkpoint(home: Home, tmp_path: Path) -> None:
    home.save("z", b"content of z")
    rot(home.blob(home.vault.manifest("training", RUN, "x")))
    rot(home.path / "vault" / manifest_key("training", RUN, "z"))
    (home.path / "vault" / manifest_key("sampler", RUN, "lost")).write_bytes(b"of no row")
    note = backup(home, tmp_path / "b", code=1)
    assert set(note["left_out"]) == {f"{PATH}/x", f"{PATH}/z"}
    assert restored(tmp_path / "b", tmp_path / "r") == {"y": content("y")}


def test_incomplete_backup_keeps_the_earlier_one(home: Home, tmp_path: Path) -> None:
    first = backup(home, tmp_path / "b", "--copy")["id"]
    home.vault.delete("training", RUN, "x")  # its row remains
    note = backup(home, tmp_path / "b", "--copy", code=1)
    assert note["left_out"] == {f"{PATH}/x": "its manifest is missing"}
    assert set(restored(tmp_path / "b", tmp_path / "r1")) == {"y"}
    assert set(restored(tmp_path / "b", tmp_path / "r2", "--at", first)) == {"x", "y"}


def test_backup_takes_damaged_file_from_earlier_backup(home: Home, tmp_path: Path) -> None:
    backup(home, tmp_path / "b", "--copy")
    rot(home.blob(home.vault.manifest("training", RUN, "x")))
    assert backup(home, tmp_path / "b", "--copy")["left_out"] == {}
    assert restored(tmp_path / "b", tmp_path / "r")["x"] == content("x")


def test_next_backup_repairs_damaged_backup(home: Home, tmp_path: Path) -> None:
    backup(home, tmp_path / "b", "--copy")
    blob = home.blob(home.vault.manifest("training", RUN, "x")).relative_to(home.path / "vault")
    rot(tmp_path / "b" / blob)
    text = call("restore", tmp_path / "b", "--home", tmp_path / "r", code=1)
    assert "damaged in the backup" in text and blob.name in text
    assert not (tmp_path / "r").exists()
    assert not list(tmp_path.glob(".r*"))
    backup(home, tmp_path / "b", "--copy")
    assert restored(tmp_path / "b", tmp_path / "r")["x"] == content("x")


@pytest.mark.parametrize("file", ["ledger.sqlite", "backup.json", "x.json", "gone"])
def test_damaged_backup_is_not_restored(home: Home, tmp_path: Path, file: str) -> None:
    note = backup(home, tmp_path / "b", "--copy")
    (path,) = Path(note["path"]).rglob("x.json" if file == "gone" else file)
    if file == "gone":
        path.unlink()
    else:
        rot(path)
    call("restore", tmp_path / "b", "--home", tmp_path / "r", code=1)
    assert not (tmp_path / "r").exists()


def test_every_flipped_bit_of_a_backup_note_is_detected(home: Home, tmp_path: Path) -> None:
    note = backup(home, tmp_path / "b")
    data = (Path(note["path"]) / "backup.json").read_bytes()
    assert BackupNote.decode(data, "note").id == note["id"]
    for place in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(CheckpointDamaged, match="note"):
            BackupNote.decode(bytes(damaged), "note")


def test_restore_refuses_home_that_is_not_empty(home: Home, tmp_path: Path) -> None:
    backup(home, tmp_path / "b")
    before = tree(home.path)
    assert "is not empty" in call("restore", tmp_path / "b", "--home", home.path, code=1)
    assert tree(home.path) == before
    (tmp_path / "r").mkdir()
    assert restored(tmp_path / "b", tmp_path / "r")


def test_backup_refuses_directory_with_other_content(home: Home, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis").write_bytes(b"mine")
    assert "holds no backup" in call("backup", tmp_path / "b", "--home", home.path, code=1)
    assert "holds no backup" in call("restore", tmp_path / "b", "--home", tmp_path / "r", code=1)
    assert tree(tmp_path / "b") == {"thesis": b"mine"}
    inside = home.path / "backup"
    assert "lies in the home" in call("backup", inside, "--home", home.path, code=1)


# Large requests and results


def accept(home: Home, *seq_ids: int) -> None:
    """Accept large passes, each in a segment of its own."""

    async def work(ledger: Ledger) -> None:
        log = ledger._store.payloads
        assert isinstance(log, SegmentFiles)
        log._segment_bytes = 1
        for seq_id in seq_ids:
            new = NewOperation(RUN, seq_id, "forward_backward", bytes([seq_id]) * LARGE)
            await ledger.accept(new)

    home.ledger(work)


def payloads(path: Path) -> list[tuple[int, bytes]]:
    """Return the large passes of a home, and check that nothing of it is damaged."""

    async def work(ledger: Ledger) -> list[tuple[int, bytes]]:
        assert await ledger.find_damaged_rows() == []
        found = await ledger.operations(RUN)
        return [(each.seq_id, each.payload) for each in found if each.seq_id >= FIRST]

    again = Home.__new__(Home)
    again.path = path
    found: list[tuple[int, bytes]] = again.ledger(work)
    return found


def expected(*seq_ids: int) -> list[tuple[int, bytes]]:
    return [(seq_id, bytes([seq_id]) * LARGE) for seq_id in seq_ids]


def prune(home: Home, upto: int) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.mark_corrupted(RUN, "ended")
        await ledger.prune(RUN, after=0, upto=upto, kinds=["forward_backward"])

    home.ledger(work)


@pytest.mark.parametrize("options", [[], ["--copy"]])
def test_backup_restores_large_requests(home: Home, tmp_path: Path, options: list[str]) -> None:
    accept(home, 101, 102)
    backup(home, tmp_path / "b", *options)
    restored(tmp_path / "b", tmp_path / "r")
    assert payloads(tmp_path / "r") == expected(101, 102)
    assert payloads(home.path) == expected(101, 102)


def test_backups_share_the_segments_that_both_need(home: Home, tmp_path: Path) -> None:
    accept(home, 101, 102)
    first = backup(home, tmp_path / "b", "--keep", "2")
    before = tree(tmp_path / "b" / "blobs").keys()
    accept(home, 103)
    second = backup(home, tmp_path / "b", "--keep", "2")
    assert first["segments"].items() < second["segments"].items()
    assert len(tree(tmp_path / "b" / "blobs").keys() - before) == 1
    restored(tmp_path / "b", tmp_path / "r1", "--at", first["id"])
    restored(tmp_path / "b", tmp_path / "r2")
    assert payloads(tmp_path / "r1") == expected(101, 102)
    assert payloads(tmp_path / "r2") == expected(101, 102, 103)
    backup(home, tmp_path / "b", "--keep", "1")
    assert len([key for key in tree(tmp_path / "b" / "blobs") if key in before]) == len(before)
    restored(tmp_path / "b", tmp_path / "r3")
    assert payloads(tmp_path / "r3") == expected(101, 102, 103)


@pytest.mark.parametrize("harm", [rot, Path.unlink])
def test_backup_with_a_damaged_segment_is_not_restored(
    home: Home, tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    accept(home, 101)
    note = backup(home, tmp_path / "b")
    ((_, ref),) = note["segments"].items()
    harm(tmp_path / "b" / blob_key(ref["blake3"]))
    output = call("restore", tmp_path / "b", "--home", tmp_path / "r", code=1)
    assert ".segment" in output
    assert not (tmp_path / "r").exists()
    backup(home, tmp_path / "b")
    restored(tmp_path / "b", tmp_path / "r")
    assert payloads(tmp_path / "r") == expected(101)


def test_segment_that_is_gone_is_reported(home: Home, tmp_path: Path) -> None:
    accept(home, 101)
    (segment,) = segments_path(home.path / "ledger.sqlite").iterdir()
    segment.unlink()
    note = backup(home, tmp_path / "b", code=1)
    assert note["left_out"] == {segment.name: "this segment of the payload log is missing"}


def test_segment_that_is_dropped_during_a_backup_is_not_missed(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(home, 101, 102)
    while_copying(monkeypatch, nothing, lambda: prune(home, upto=101))
    note = backup(home, tmp_path / "b")
    assert len(note["segments"]) == 1
    restored(tmp_path / "b", tmp_path / "r")
    assert payloads(tmp_path / "r") == [(101, b""), *expected(102)]


# Beside a service


def while_copying(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[], object], after: Callable[[], object]
) -> None:
    """Call functions just before and just after the ledger is copied, once."""
    real = copy_database

    def copy(source: Path, target: Path) -> None:
        monkeypatch.setattr(command, "copy_database", real)
        before()
        real(source, target)
        after()

    monkeypatch.setattr(command, "copy_database", copy)


def nothing() -> None: ...


def delete(home: Home, name: str) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.delete_checkpoint(f"{PATH}/{name}")

    home.ledger(work)
    home.vault.delete("training", RUN, name)
    gc.collect(home.vault, 0)


CHANGES: dict[str, tuple[Callable[[Home], object], Callable[[Home], object], dict[str, str]]] = {
    "saved before": (lambda h: h.save("z", b"content of z"), id, {"x": "x", "z": "z"}),
    "saved after": (id, lambda h: h.save("z", b"content of z"), {"x": "x"}),
    "deleted before": (lambda h: delete(h, "x"), id, {}),
    "deleted after": (id, lambda h: delete(h, "x"), {"x": "x"}),
    "overwritten before": (lambda h: h.save("x", b"content of new"), id, {"x": "new"}),
    "overwritten after": (id, lambda h: h.save("x", b"content of new"), {"x": "x"}),
    "overwritten twice": (
        lambda h: h.save("x", b"content of new"),
        lambda h: h.save("x", b"content of newer"),
        {"x": "newer"},  # the state in between was not seen, so the ledger was copied again
    ),
    "saved and deleted": (
        lambda h: h.save("z", b"content of z"),
        lambda h: delete(h, "z"),
        {"x": "x"},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_backup_beside_service_is_one_consistent_state(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before, after, expected = CHANGES[change]
    while_copying(monkeypatch, lambda: before(home), lambda: after(home))
    assert backup(home, tmp_path / "b")["left_out"] == {}
    found = restored(tmp_path / "b", tmp_path / "r")
    del found["y"]
    assert found == {name: content(of) for name, of in expected.items()}


def test_backup_has_no_state_ahead_of_the_ledger(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def goes_on() -> None:
        home.save("z", b"content of z")
        home.snapshot(b"later")

    while_copying(monkeypatch, nothing, goes_on)
    backup(home, tmp_path / "b")
    restored(tmp_path / "b", tmp_path / "r")
    positions = [each.position for each in Vault(tmp_path / "r" / "vault").manifests()]
    assert max(positions) == 2


def test_restored_service_repeats_save_that_was_not_recorded(home: Home, tmp_path: Path) -> None:
    home.save("pending", b"content of pending", record=False)
    backup(home, tmp_path / "b")
    assert set(restored(tmp_path / "b", tmp_path / "r")) == {"x", "y"}

    async def work(ledger: Ledger) -> list[str]:
        return [each.kind for each in await ledger.pending_operations(["save_weights"])]

    again = Home.__new__(Home)
    again.path = tmp_path / "r"
    assert again.ledger(work) == ["save_weights"]


def test_gc_removes_nothing_during_backup(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_copying(monkeypatch, nothing, lambda: delete(home, "x"))
    backup(home, tmp_path / "b")
    assert [ref.size for ref in gc.collect(home.vault, 0)] == [len(b"content of x")]


def test_interrupted_backup_leaves_the_earlier_one(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(home, tmp_path / "b")
    home.save("z", b"content of z")
    real = os.rename

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", broken)
        assert "Input/output" in call("backup", tmp_path / "b", "--home", home.path, code=1)
    assert os.rename is real
    assert set(restored(tmp_path / "b", tmp_path / "r1")) == {"x", "y"}
    backup(home, tmp_path / "b")
    assert list((tmp_path / "b" / "tmp").iterdir()) == []
    assert set(restored(tmp_path / "b", tmp_path / "r2")) == {"x", "y", "z"}
