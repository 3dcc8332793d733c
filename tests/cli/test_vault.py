"""``everstep vault``, as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from everstep.cli.app import app
from everstep.engine import Model
from everstep.ledger import Ledger, Run
from everstep.runtime.checkpoints.catalog import CheckpointCatalog
from everstep.runtime.errors import Rejected
from everstep.vault.storage.keys import manifest_key
from tests.cli.gateway import listening
from tests.runtime.local import Local, pico
from tests.vault.homes import RUN, Home, rot

__all__ = ["pico"]
PATH = f"tinker://{RUN}/weights"
Serve = Callable[[], AbstractContextManager[Local]]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home whose run has been created."""
    home = Home(tmp_path / "home")

    async def finish_creation(ledger: Ledger) -> None:
        (creation,) = await ledger.operations(RUN)
        await ledger.succeed(creation.request_id, b"{}", "json")

    home.ledger(finish_creation)
    return home


@pytest.fixture
def serve(home: Home, pico: Model) -> Serve:
    """Run a service on the home, in a ``with`` block."""

    @contextmanager
    def running() -> Iterator[Local]:
        with Local(home.path, pico) as local, listening(local):
            yield local

    return running


def vault(
    home: Path, *arguments: str, code: int = 0, answer: str = "", columns: str = "200"
) -> str:
    """Standard output and error of a command."""
    done = CliRunner().invoke(
        app, ["vault", *arguments, "--home", str(home)], input=answer, env={"COLUMNS": columns}
    )
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def read_json(home: Path, *arguments: str, code: int = 0) -> Any:
    """The JSON that a command prints."""
    return json.loads(vault(home, *arguments, "--json", code=code))


def names(home: Home) -> set[str]:
    """Names of the checkpoints in the vault."""
    return {manifest.name for manifest in home.vault.manifests()}


# verify, quarantined


def test_intact_home_verifies(home: Home) -> None:
    home.save("x", b"content")
    assert "1 checkpoint, 2 files, 13 bytes: all intact." in vault(home.path, "verify")
    assert read_json(home.path, "verify", "--all")["ok"] is True


def test_verify_names_affected_checkpoints_and_exits_with_1(home: Home) -> None:
    manifest = home.save("x", b"content")
    home.save("y", b"content", kind="sampler")
    home.save("z", b"other")
    home.snapshot(b"content")
    rot(home.blob(manifest))
    report = read_json(home.path, "verify", code=1)
    (damaged,) = report["damaged"]
    assert damaged["file"] == f"blobs/{home.blob(manifest).parent.name}/{home.blob(manifest).name}"
    assert damaged["runs"] == [RUN]
    assert set(damaged["checkpoints"]) == {
        f"{PATH}/x",
        f"tinker://{RUN}/sampler_weights/y",
        f"snapshot {home.seq:020d} of run {RUN}",
    }
    text = vault(home.path, "verify", code=1)
    assert damaged["file"] in text and f"{PATH}/x" in text and "1 damaged" in text
    assert home.blob(manifest).exists()  # without --quarantine nothing changes


def test_quarantine_hides_checkpoint_until_same_bytes_are_saved(home: Home, serve: Serve) -> None:
    manifest = home.save("x", b"content")
    home.save("z", b"other")
    home.snapshot(b"content")
    rot(home.blob(manifest))
    assert "1 moved to quarantine" in vault(home.path, "verify", "--quarantine", code=1)
    assert not home.blob(manifest).exists()
    assert home.listed() == ["z"]
    report = read_json(home.path, "verify")
    snapshot = f"snapshot {2:020d} of run {RUN}"
    assert set(report["quarantined"][0]["checkpoints"]) == {f"{PATH}/x", snapshot}
    with serve():
        assert "In quarantine" in vault(home.path, "quarantined")
        assert read_json(home.path, "quarantined") == report["quarantined"]
    home.save("again", b"content")
    vault(home.path, "verify", "--quarantine")
    assert home.listed() == ["x", "z", "again"]
    with serve():
        assert "The quarantine is empty" in vault(home.path, "quarantined")
        assert read_json(home.path, "quarantined") == []


def test_missing_home_is_reported_and_not_created(tmp_path: Path) -> None:
    prune = ["prune", "--run", RUN, "--keep-last", "1", "--yes"]
    for command in (["verify"], ["gc"], ["rebuild"], ["quarantined"], prune):
        assert "no everstep home" in vault(tmp_path / "none", *command, code=3)
    assert not (tmp_path / "none").exists()


# gc


def test_gc_removes_exactly_what_dry_run_lists(home: Home, serve: Serve) -> None:
    home.save("kept", b"kept")
    home.save("expired", b"expired", expires_in=-10)
    home.write("orphan", b"orphan", "training", 99)
    home.vault.put([b"of no checkpoint"])
    with serve():
        before = sorted((home.path / "vault").rglob("*"))
        dry = read_json(home.path, "gc", "--grace", "0", "--dry-run")
        assert sorted((home.path / "vault").rglob("*")) == before
        assert dry["expired"] == [f"{PATH}/expired"]
        assert dry["orphaned"] == [f"{PATH}/orphan"]
        assert dry["bytes"] == len(b"expired" + b"orphan" + b"of no checkpoint")
        text = vault(home.path, "gc", "--grace", "0", "--dry-run")
        assert "would be removed: 29 bytes" in text
        done = read_json(home.path, "gc", "--grace", "0")
        assert done == {**dry, "dry_run": False}
        assert names(home) == {"kept"}
        assert "0 checkpoints and 0 files removed" in vault(home.path, "gc", "--grace", "0")
    assert read_json(home.path, "verify", "--all")["ok"]


def test_gc_keeps_files_within_grace(home: Home, serve: Serve) -> None:
    home.save("expired", b"expired", expires_in=-10)
    home.vault.put([b"of no checkpoint"])
    with serve():
        assert "0 checkpoints and 0 files removed" in vault(home.path, "gc")


def test_gc_is_refused_when_ledger_is_lost(home: Home) -> None:
    home.save("x", b"content")
    (home.path / "ledger.sqlite").unlink()
    assert "vault rebuild" in vault(home.path, "gc", "--grace", "0", code=1)
    assert names(home) == {"x"}


def test_gc_is_refused_during_backup(home: Home, serve: Serve) -> None:
    home.save("expired", b"expired", expires_in=-10)
    with serve(), home.vault.gc_paused():
        assert "backup" in vault(home.path, "gc", "--grace", "0", code=1)
    assert names(home) == {"expired"}


def test_home_in_use_by_another_command_is_reported(home: Home) -> None:
    home.save("x", b"content")

    async def type_command(_: Ledger) -> str:
        return vault(home.path, "gc", code=1)

    assert "in use by another everstep command" in home.ledger(type_command)


# prune


def save_with_losses(home: Home) -> None:
    """Save checkpoints a, b, c, d, of which b has the lowest loss."""
    for name, loss in (("a", "3"), ("b", "1"), ("c", "2"), ("d", "9")):
        home.save(name, name.encode(), metadata={"loss": loss})


def test_prune_keeps_newest_and_best(home: Home, serve: Serve) -> None:
    save_with_losses(home)
    policy = ["--run", RUN, "--keep-last", "1", "--keep-best", "1", "--metric", "loss"]
    with serve():
        dry = read_json(home.path, "prune", *policy, "--dry-run")
        assert (dry["deleted"], dry["kept"]) == (
            [f"{PATH}/a", f"{PATH}/c"],
            [f"{PATH}/b", f"{PATH}/d"],
        )
        assert names(home) == {"a", "b", "c", "d"}
        assert "Nothing was deleted" in vault(home.path, "prune", *policy, code=1, answer="n\n")
        assert names(home) == {"a", "b", "c", "d"}
        text = vault(home.path, "prune", *policy, answer="y\n")
        assert "2 of 4 checkpoints to be deleted, 2 to be kept" in text and "loss 3.0" in text
        assert names(home) == {"b", "d"}
        done = read_json(home.path, "prune", *policy, "--mode", "max", "--yes")
        assert (done["deleted"], done["kept"]) == ([f"{PATH}/b"], [f"{PATH}/d"])
        assert done["skipped"] == dry["skipped"] == []
    assert home.listed() == ["d"]


def test_prune_prints_no_json_for_deletions_that_failed(
    home: Home, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_with_losses(home)

    async def refuse(*_: object) -> None:
        raise Rejected(409, "the disk is full")

    monkeypatch.setattr(CheckpointCatalog, "delete", refuse)
    with serve():
        policy = ["--run", RUN, "--keep-last", "3", "--yes", "--json"]
        text = vault(home.path, "prune", *policy, code=1)
    reason = f"{PATH}/a: the disk is full"
    assert text == f"everstep: Some checkpoints were not deleted: {reason}\n"
    assert home.listed() == ["a", "b", "c", "d"]


def test_prune_route_deletes_without_dry_run(home: Home, serve: Serve) -> None:
    save_with_losses(home)
    with serve() as local:
        done = local.post("everstep/vault/prune", run_id=RUN, keep_last=1)
    assert [each["tinker_path"] for each in done["deleted"]] == [f"{PATH}/{n}" for n in "abc"]
    assert home.listed() == ["d"]


def test_paths_are_not_wrapped_in_narrow_terminal(home: Home, serve: Serve) -> None:
    manifest = home.save("a-checkpoint-with-a-long-name", b"content")
    home.save("b", b"b")
    rot(home.blob(manifest))
    policy = ["--run", RUN, "--keep-last", "1", "--dry-run"]
    with serve():
        text = vault(home.path, "prune", *policy, columns="40")
    path = f"{PATH}/a-checkpoint-with-a-long-name"
    assert path in text
    assert path in vault(home.path, "verify", code=1, columns="40")
    vault(home.path, "verify", "--quarantine", code=1)
    with serve():
        text = vault(home.path, "quarantined", columns="40")
        assert path in text and read_json(home.path, "quarantined")[0]["file"] in text


def test_prune_keeps_the_only_intact_checkpoint(home: Home, serve: Serve) -> None:
    save_with_losses(home)
    for name in "bcd":
        rot(home.blob(home.vault.manifest("training", RUN, name)))
    with serve():
        read_json(home.path, "prune", "--run", RUN, "--keep-last", "1", "--yes")
    assert home.listed() == ["a", "d"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--run", RUN], "keep something"),
        (["--run", RUN, "--keep-best", "1"], "needs a metric"),
        (["--run", RUN, "--keep-last", "1", "--json"], "--yes or --dry-run"),
    ],
)
def test_prune_refuses_wrong_usage_before_it_starts_a_service(
    home: Home, arguments: list[str], text: str
) -> None:
    assert text in vault(home.path, "prune", *arguments, code=2)


def test_prune_refuses_unknown_run_and_missing_confirmation(home: Home, serve: Serve) -> None:
    save_with_losses(home)
    policy = ["--keep-last", "1"]
    with serve():
        unknown = vault(home.path, "prune", "--run", "none:train:0", *policy, code=3)
        assert "There is no run none:train:0" in unknown
        silent = vault(home.path, "prune", "--run", RUN, *policy, code=1)
        assert "There is no terminal to ask on: give --yes" in silent
    assert home.listed() == ["a", "b", "c", "d"]


# rebuild


def lose_database(home: Path) -> None:
    """Remove the ledger with its write-ahead log."""
    for path in home.glob("ledger.sqlite*"):
        path.unlink()


def rows(home: Home) -> tuple[list[Any], list[Run]]:
    """Rows of the checkpoints and runs in the ledger."""

    async def work(ledger: Ledger) -> tuple[list[Any], list[Run]]:
        return await ledger.all_checkpoints(), (await ledger.search.list_runs(10, 0))[0]

    found: tuple[list[Any], list[Run]] = home.ledger(work)
    return found


def test_rebuild_restores_lost_rows(home: Home) -> None:
    home.save("x", b"x", metadata={"loss": "1"}, expires_in=9999)
    home.save("y", b"y", kind="sampler")
    home.snapshot(b"s")
    before, (run,) = rows(home)
    lose_database(home.path)
    assert "2 checkpoints and 1 run restored" in vault(home.path, "rebuild")
    assert len(before) == 2
    after, (again,) = rows(home)
    assert [each.path for each in after] == [each.path for each in before]
    for old, new in zip(before, after, strict=True):
        fields = {"expires_at": None} if old.name == "x" else {}
        assert vars(new) == {**vars(old), **fields}  # these manifests carry no expiry
    assert (again.run_id, again.session_id) == (RUN, "session")
    assert (again.base_model, again.lora, again.optimizer) == ("m", run.lora, run.optimizer)
    assert "0 checkpoints and 0 runs restored" in vault(home.path, "rebuild")


def test_rebuild_does_not_restore_deleted_checkpoint_into_existing_database(home: Home) -> None:
    manifest = home.save("x", b"x")

    async def delete(ledger: Ledger) -> None:
        await ledger.delete_checkpoint(f"{PATH}/x")

    home.ledger(delete)
    assert manifest in list(home.vault.manifests())
    vault(home.path, "rebuild")
    assert home.listed() == []


def test_rebuild_leaves_out_damaged_checkpoints(home: Home) -> None:
    manifest = home.save("x", b"x")
    home.save("y", b"y")
    other = home.save("z", b"z")
    rot(home.blob(manifest))
    rot(home.path / "vault" / manifest_key(*other.id))
    lose_database(home.path)
    report = read_json(home.path, "rebuild", code=1)
    assert (len(report["damaged"]), report["recreated"]) == (2, 1)
    assert home.listed() == ["y"]


def test_rebuild_does_not_overwrite_damaged_database(home: Home) -> None:
    home.save("x", b"x")
    lose_database(home.path)
    (home.path / "ledger.sqlite").write_bytes(b"this is no database" * 99)
    assert "not a database" in vault(home.path, "rebuild", code=1)
    lose_database(home.path)
    (home.path / "ledger.sqlite-wal").write_bytes(b"x")
    assert "without its database" in vault(home.path, "rebuild", code=1)
