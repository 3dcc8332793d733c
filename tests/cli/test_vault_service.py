"""The vault's commands beside a real service, and services on restored homes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import everstep
from everstep.cli.app import app
from everstep.vault import Vault
from tests.conftest import Service
from tests.scenario import MODEL, connect, train


def call(home: Path, *arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments), "--home", str(home)])
    assert done.exit_code == code, done.output
    return done.output


def read_json(home: Path, *arguments: object) -> Any:
    return json.loads(call(home, *arguments, "--json"))


@pytest.mark.slow
def test_backup_restore_and_rebuild_of_served_home(tmp_path: Path) -> None:
    home, copy = tmp_path / "home", tmp_path / "restored"
    service = Service(home)
    client = connect(everstep, service.url)
    run = client.create_lora_training_client(base_model=MODEL, rank=4, seed=1).result()
    train(everstep, run, 2)
    path = run.save_state("x").result().path
    assert read_json(home, "vault", "verify")["ok"]
    assert read_json(home, "vault", "gc", "--grace", "0", "--dry-run")["orphaned"] == []
    for command in (["verify", "--quarantine"], ["rebuild"]):
        assert "in use by another everstep service" in call(home, "vault", *command, code=1)
    call(home, "backup", tmp_path / "backup")
    losses = train(everstep, run, 2, shift=2)
    service.kill()

    call(copy, "restore", tmp_path / "backup")
    assert continue_from(copy, path) == losses
    assert read_json(copy, "vault", "verify", "--all")["ok"]

    for database in home.glob("ledger.sqlite*"):
        database.unlink()
    assert read_json(home, "vault", "rebuild")["recreated"] == 1
    assert continue_from(home, path) == losses


def continue_from(home: Path, path: str) -> list[tuple[float, list[float]]]:
    """Losses of a service that lists a checkpoint and continues from it."""
    service = Service(home)
    try:
        client = connect(everstep, service.url)
        listed = client.create_rest_client().list_user_checkpoints().result().checkpoints
        assert [each.tinker_path for each in listed] == [path]
        again = client.create_training_client_from_state_with_optimizer(path).result()
        losses = train(everstep, again, 2, shift=2)
        saved = again.save_state("y").result().path
    finally:
        service.stop()
    vault = Vault(home / "vault", writer=False)
    assert vault.manifest("training", saved.split("/")[2], "y").step == 4
    return losses
