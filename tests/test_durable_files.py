"""Durable files: a file is whole or absent after any power cut, and there if acknowledged."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import pytest

from everstep import service_home
from everstep.durable_files import replace_file, sync_directory, sync_tree, write_new
from everstep.ledger import Ledger, Session
from everstep.ledger.sqlite import commit_counter
from everstep.runtime.checkpoints.signed_urls import SignedUrls
from everstep.runtime.queries.traces import Traces
from everstep.service_home import ServiceRecord
from everstep.testing.memoryfs import Log, Recorded
from everstep.vault import open as opening
from everstep.vault.backup import BackupDirectory, BackupNote, file_ref
from everstep.vault.export import whole_directory

CRASHES = 12
Write = Callable[[Path], object]


def replaced(home: Path) -> None:
    replace_file(home / "file", b"first" * 1000)
    replace_file(home / "file", b"second" * 1000)


def signing_key(home: Path) -> None:
    SignedUrls(home)


def service_address(home: Path) -> None:
    service_home.publish(home, ServiceRecord("http://127.0.0.1:1", 7))


def bucket_of_a_vault(home: Path) -> None:
    opening._remember(home, opening._Bucket("s3://bucket/prefix", "0" * 32))


def trace_of_a_session(home: Path) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    session = Session(
        session_id="s",
        user_metadata={},
        tags=[],
        sdk_version="",
        project_id=None,
        display_name=None,
        created_at=now,
        last_seen_at=now,
    )
    traces = Traces.__new__(Traces)
    traces._directory = home / "traces"
    traces._write(session, [])


def exported_directory(home: Path) -> None:
    with whole_directory(home / "target") as stage:
        (stage / "inner").mkdir()
        (stage / "inner" / "a").write_bytes(b"a" * 5000)


def backup(home: Path) -> None:
    place = BackupDirectory(home)
    try:
        with place.stage() as stage:
            write_new(stage / "ledger.sqlite", [b"ledger"])
            note = BackupNote(
                id="20260101T000000.000000Z",
                made_at=datetime(2026, 1, 1, tzinfo=UTC),
                checkpoints=0,
                files=0,
                size=0,
                ledger=file_ref(stage / "ledger.sqlite"),
                left_out={},
            )
            place.finish(stage, note, [])
    finally:
        place.close()


WRITERS: dict[str, tuple[Write, str]] = {
    "replace_file": (replaced, "file"),
    "signing key": (signing_key, "links.key"),
    "service address": (service_address, "service.json"),
    "bucket of a vault": (bucket_of_a_vault, "vault.json"),
    "trace": (trace_of_a_session, "traces/"),
    "exported directory": (exported_directory, "target/"),
    "backup": (backup, "backups/2026"),
}


def record(write: Write, root: Path) -> tuple[Log, dict[str, bytes]]:
    """Run a writer; returns the calls that it made, and the files that it left."""
    root.mkdir()
    with Recorded(root) as log:
        write(root)
    found = (path for path in root.rglob("*") if path.is_file())
    return log, {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def crashes(log: Log, position: int) -> list[dict[str, bytes]]:
    chance = random.Random(position)
    return [
        log.crash(position, chance, ordered=bool(number % 2)).files for number in range(CRASHES)
    ]


@pytest.mark.parametrize("writer", WRITERS)
def test_written_file_survives_a_power_cut(writer: str, tmp_path: Path) -> None:
    write, prefix = WRITERS[writer]
    log, files = record(write, tmp_path / "home")
    wanted = {name: content for name, content in files.items() if name.startswith(prefix)}
    assert wanted
    for found in crashes(log, len(log.entries)):
        assert {name: found.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("writer", WRITERS)
def test_power_cut_leaves_a_file_whole_or_absent(writer: str, tmp_path: Path) -> None:
    write, prefix = WRITERS[writer]
    log, files = record(write, tmp_path / "home")
    before = {b"first" * 1000} if writer == "replace_file" else set()
    assert log.entries
    for position in range(len(log.entries) + 1):
        for found in crashes(log, position):
            for name, content in found.items():
                if name.startswith(prefix) and not Path(name).name.startswith("."):
                    assert content == files[name] or content in before


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("forgotten", ["files", "directories"])
def test_model_notices_a_forgotten_fsync(writer: str, forgotten: str, tmp_path: Path) -> None:
    write, prefix = WRITERS[writer]
    real = os.fsync

    def fsync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir() != (forgotten == "directories"):
            real(handle)

    def forgetful(root: Path) -> None:
        with mock.patch.object(os, "fsync", fsync):
            write(root)

    log, files = record(forgetful, tmp_path / "home")
    wanted = {name: content for name, content in files.items() if name.startswith(prefix)}
    assert wanted
    assert any(
        {name: found.get(name) for name in wanted} != wanted
        for position in range(len(log.entries) + 1)
        for found in crashes(log, len(log.entries))[: 1 + position]
    )


def test_commit_counter_is_named_durably(tmp_path: Path) -> None:
    async def work() -> None:
        await (await Ledger.open(tmp_path / "home" / "l.sqlite")).close()

    log, files = record(lambda _: asyncio.run(work()), tmp_path / "home")
    name = commit_counter.counter_path(Path("l.sqlite")).name
    assert name in files
    for found in crashes(log, len(log.entries)):
        assert name in found


def test_new_file_refuses_to_replace_another(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", [b"new"])
    assert (tmp_path / "a").read_bytes() == b"old"


def test_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    replace_file(tmp_path / "a", b"old", mode=0o600)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    with (
        mock.patch.object(os, "fsync", side_effect=OSError(5, "no")),
        pytest.raises(OSError, match="no"),
    ):
        replace_file(tmp_path / "a", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_tree_is_synced_from_the_leaves_up(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"c")
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        real(handle)

    with mock.patch.object(os, "fsync", fsync):
        sync_tree(tmp_path / "a")
        sync_directory(tmp_path)
    assert synced == ["c", "b", "a", tmp_path.name]
