"""``everstep vault``, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from everstep.cli import app
from everstep.ledger import Ledger, Run
from everstep.runtime import pruning
from everstep.vault.keys import manifest_key
from tests.vault.homes import RUN, Home, rot

PATH = f"tinker://{RUN}/weights"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def vault(
    home: Path, *arguments: str, code: int = 0, answer: str = "", columns: str = "200"
) -> str:
    """The command's standard output and error."""
    done = CliRunner().invoke(
        app, ["vault", *arguments, "--home", str(home)], input=answer, env={"COLUMNS": columns}
    )
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def told(home: Path, *arguments: str, code: int = 0) -> Any:
    return json.loads(vault(home, *arguments, "--json", code=code))


def names(home: Home) -> set[str]:
    return {manifest.name for manifest in home.vault.manifests()}


# verify, quarantined


def test_a_sound_home_verifies(home: Home) -> None:
    home.save("x", b"content")
    assert "1 checkpoint, 2 files, 13 bytes: all as they were written." in vault(
        home.path, "verify"
    )
    assert told(home.path, "verify", "--all")["ok"] is True


def test_damage_is_told_with_whom_it_touches_and_is_exit_code_1(home: Home) -> None:
    manifest = home.save("x", b"content")
    home.save("y", b"content", kind="sampler")
    home.save("z", b"other")
    home.snapshot(b"content")
    rot(home.blob(manifest))
    report = told(home.path, "verify", code=1)
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
    assert home.blob(manifest).exists()  # it only looks


def test_quarantine_moves_hides_and_is_healed(home: Home) -> None:
    manifest = home.save("x", b"content")
    home.save("z", b"other")
    rot(home.blob(manifest))
    assert "1 moved to quarantine" in vault(home.path, "verify", "--quarantine", code=1)
    assert not home.blob(manifest).exists()
    assert home.listed() == ["z"]
    assert told(home.path, "verify")["quarantined"][0]["checkpoints"] == [f"{PATH}/x"]
    assert "In quarantine" in vault(home.path, "quarantined")
    assert len(told(home.path, "quarantined")) == 1
    home.save("again", b"content")
    vault(home.path, "verify", "--quarantine")
    assert home.listed() == ["x", "z", "again"]
    assert "Nothing is in quarantine" in vault(home.path, "quarantined")


def test_a_home_that_is_none_is_told(tmp_path: Path) -> None:
    for command in ("verify", "gc", "rebuild", "quarantined"):
        assert "no everstep home" in vault(tmp_path / "none", command, code=3)
    assert not (tmp_path / "none").exists()


# gc


def test_a_dry_run_tells_what_the_collection_removes(home: Home) -> None:
    home.save("kept", b"kept")
    home.save("expired", b"expired", expires_in=-10)
    home.write("orphan", b"orphan", "training", 99)
    home.vault.put([b"of no checkpoint"])
    before = sorted((home.path / "vault").rglob("*"))
    dry = told(home.path, "gc", "--grace", "0", "--dry-run")
    assert sorted((home.path / "vault").rglob("*")) == before
    assert dry["expired"] == [f"{PATH}/expired"]
    assert dry["orphaned"] == [f"{PATH}/orphan"]
    assert dry["bytes"] == len(b"expired" + b"orphan" + b"of no checkpoint")
    assert "would be removed: 29 bytes" in vault(home.path, "gc", "--grace", "0", "--dry-run")
    done = told(home.path, "gc", "--grace", "0")
    assert done == {**dry, "dry_run": False}
    assert names(home) == {"kept"}
    assert "0 checkpoints and 0 files removed" in vault(home.path, "gc", "--grace", "0")
    assert told(home.path, "verify", "--all")["ok"]


def test_what_is_young_stays(home: Home) -> None:
    home.save("expired", b"expired", expires_in=-10)
    home.vault.put([b"of no checkpoint"])
    assert "0 checkpoints and 0 files removed" in vault(home.path, "gc")


def test_nothing_is_collected_without_a_ledger(home: Home) -> None:
    home.save("x", b"content")
    (home.path / "ledger.sqlite").unlink()
    assert "vault rebuild" in vault(home.path, "gc", "--grace", "0", code=1)
    assert names(home) == {"x"}


def test_nothing_is_collected_while_a_backup_is_made(home: Home) -> None:
    home.save("expired", b"expired", expires_in=-10)
    with home.vault.held():
        assert "backup" in vault(home.path, "gc", "--grace", "0", code=1)
    assert names(home) == {"expired"}


# prune


def scored(home: Home) -> None:
    for name, loss in (("a", "3"), ("b", "1"), ("c", "2"), ("d", "9")):
        home.save(name, name.encode(), metadata={"loss": loss})


def test_prune_keeps_the_last_and_the_best(home: Home) -> None:
    scored(home)
    policy = ["--run", RUN, "--keep-last", "1", "--keep-best", "1", "--metric", "loss"]
    dry = told(home.path, "prune", *policy, "--dry-run")
    assert (dry["deleted"], dry["kept"]) == (
        [f"{PATH}/a", f"{PATH}/c"],
        [f"{PATH}/b", f"{PATH}/d"],
    )
    assert home.listed() == ["a", "b", "c", "d"]
    assert "Nothing was deleted" in vault(home.path, "prune", *policy, code=1, answer="n\n")
    assert home.listed() == ["a", "b", "c", "d"]
    text = vault(home.path, "prune", *policy, answer="y\n")
    assert "2 of 4 checkpoints go, 2 stay" in text and "loss 3.0" in text
    assert home.listed() == ["b", "d"]
    assert names(home) == {"b", "d"}
    vault(home.path, "prune", *policy, "--mode", "max", "--yes")
    assert home.listed() == ["d"]


def test_prune_tells_programs_what_is_deleted_when_it_is(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(home)

    async def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(pruning, "delete", full)
    policy = ["--run", RUN, "--keep-last", "1", "--yes", "--json"]
    text = vault(home.path, "prune", *policy, code=1)
    assert text == "everstep: the disk is full\n" and home.listed() == ["a", "b", "c", "d"]


def test_a_path_is_never_broken_however_narrow_the_terminal_is(home: Home) -> None:
    manifest = home.save("a-checkpoint-with-a-long-name", b"content")
    home.save("b", b"b")
    rot(home.blob(manifest))
    text = vault(home.path, "prune", "--run", RUN, "--keep-last", "1", "--dry-run", columns="40")
    path = f"{PATH}/a-checkpoint-with-a-long-name"
    assert path in text
    assert path in vault(home.path, "verify", code=1, columns="40")
    vault(home.path, "verify", "--quarantine", code=1)
    text = vault(home.path, "quarantined", columns="40")
    assert path in text and told(home.path, "quarantined")[0]["file"] in text


def test_prune_spares_the_only_good_one(home: Home) -> None:
    scored(home)
    for name in "bcd":
        rot(home.blob(home.vault.manifest("training", RUN, name)))
    told(home.path, "prune", "--run", RUN, "--keep-last", "1", "--yes")
    assert home.listed() == ["a", "d"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--run", RUN], 2, "keep something"),
        (["--run", RUN, "--keep-best", "1"], 2, "needs a metric"),
        (["--run", "none:train:0", "--keep-last", "1"], 3, "There is no run none:train:0"),
        (["--run", RUN, "--keep-last", "1", "--json"], 2, "--yes or --dry-run"),
        (["--run", RUN, "--keep-last", "1"], 1, "There is nobody to ask: give --yes"),
    ],
)
def test_prune_refuses_what_makes_no_sense(
    home: Home, arguments: list[str], code: int, text: str
) -> None:
    scored(home)
    assert text in vault(home.path, "prune", *arguments, code=code)
    assert home.listed() == ["a", "b", "c", "d"]


# rebuild


def lose_the_database(home: Path) -> None:
    for path in home.glob("ledger.sqlite*"):
        path.unlink()


def rows(home: Home) -> tuple[list[Any], list[Run]]:
    async def work(ledger: Ledger) -> tuple[list[Any], list[Run]]:
        return await ledger.every_checkpoint(), (await ledger.directory.runs(10, 0))[0]

    found: tuple[list[Any], list[Run]] = home.ledger(work)
    return found


def test_a_lost_index_is_made_anew(home: Home) -> None:
    home.save("x", b"x", metadata={"loss": "1"}, expires_in=9999)
    home.save("y", b"y", kind="sampler")
    home.snapshot(b"s")
    before, (run,) = rows(home)
    lose_the_database(home.path)
    assert "2 checkpoints and 1 run are back" in vault(home.path, "rebuild")
    after, (again,) = rows(home)
    assert [each.path for each in after] == [each.path for each in before]
    for old, new in zip(before, after, strict=True):
        fields = {"expires_at": None} if old.name == "x" else {}
        assert vars(new) == {**vars(old), **fields}  # these manifests carry no expiry
    assert (again.run_id, again.session_id) == (RUN, "session")
    assert (again.base_model, again.lora, again.optimizer) == ("m", run.lora, run.optimizer)
    assert "0 checkpoints and 0 runs are back" in vault(home.path, "rebuild")


def test_what_was_deleted_does_not_come_back_into_an_index_that_is_there(home: Home) -> None:
    manifest = home.save("x", b"x")

    async def delete(ledger: Ledger) -> None:
        await ledger.delete_checkpoint(f"{PATH}/x")

    home.ledger(delete)
    assert manifest in list(home.vault.manifests())
    vault(home.path, "rebuild")
    assert home.listed() == []


def test_what_is_damaged_is_left_out_of_the_index(home: Home) -> None:
    manifest = home.save("x", b"x")
    home.save("y", b"y")
    other = home.save("z", b"z")
    rot(home.blob(manifest))
    rot(home.path / "vault" / manifest_key(*other.id))
    lose_the_database(home.path)
    report = told(home.path, "rebuild", code=1)
    assert (len(report["damaged"]), report["recreated"]) == (2, 1)
    assert home.listed() == ["y"]


def test_a_database_that_is_damaged_is_not_written_over(home: Home) -> None:
    home.save("x", b"x")
    lose_the_database(home.path)
    (home.path / "ledger.sqlite").write_bytes(b"this is no database" * 99)
    assert "not a database" in vault(home.path, "rebuild", code=1)
    lose_the_database(home.path)
    (home.path / "ledger.sqlite-wal").write_bytes(b"x")
    assert "without its database" in vault(home.path, "rebuild", code=1)
