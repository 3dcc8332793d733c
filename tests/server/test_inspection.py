"""Inspection of checkpoints: details, verification and tags, also after restarts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from everstep.cli.app import app
from everstep.engine import Model
from everstep.vault import Vault
from everstep.vault.storage.keys import blob_key
from tests.runtime.local import Local

METADATA = {"note": "é", "loss": "0.5"}


@pytest.fixture
def local(home: Path, pico: Model) -> Iterator[Local]:
    with Local(home, pico) as service:
        yield service


def saved(local: Local, name: str = "a") -> str:
    run = local.new_run()
    local.train(run, 1)
    done = local.do(run, "save_weights", path=name, user_metadata=METADATA)
    return str(done["path"])


def ask(local: Local, call: str, **body: Any) -> Any:
    answer = local.http.post(f"everstep/checkpoints/{call}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(local: Local, call: str, **body: Any) -> tuple[int, str]:
    answer = local.http.post(f"everstep/checkpoints/{call}", json=body)
    return answer.status_code, answer.json()["detail"]


def metadata(local: Local, path: str) -> Any:
    found = local.http.get("checkpoints").json()["checkpoints"]
    return next(each["user_metadata"] for each in found if each["tinker_path"] == path)


def tag_events(local: Local) -> list[Any]:
    entries = local.http.get("audit").json()["entries"]
    return [each for each in entries if each["event"] == "checkpoint_tag"]


def test_info_identifies_the_service(local: Local) -> None:
    assert local.http.get("get_server_capabilities").is_success  # once it has its models
    info = local.http.get("everstep/info").json()
    assert info["service"] == "everstep" and info["ready"] is True and info["version"]


def test_details_describe_a_checkpoint_completely(local: Local) -> None:
    path = saved(local)
    details = ask(local, "details", tinker_path=path)
    assert (details["step"], details["user_metadata"]) == (1, METADATA)
    assert details["lora"]["rank"] == 4 and details["optimizer"]["type"] == "adamw"
    files = {each["name"]: each for each in details["files"]}
    assert files["adapter_model.safetensors"]["size_bytes"] > 0
    assert len(files["optimizer.safetensors"]["blake3"]) == 64


def test_verification_names_the_damaged_file(local: Local, home: Path) -> None:
    path = saved(local)
    sound = ask(local, "verify", tinker_path=path)
    assert sound["ok"] and [each["error"] for each in sound["files"]] == [None] * 3
    victim = next(each for each in sound["files"] if each["name"] == "optimizer.safetensors")
    blob = home / "vault" / blob_key(victim["blake3"])
    content = bytearray(blob.read_bytes())
    content[100] ^= 1
    blob.write_bytes(content)
    damaged = ask(local, "verify", tinker_path=path)
    assert not damaged["ok"]
    assert [each["name"] for each in damaged["files"] if each["error"]] == [victim["name"]]
    blob.unlink()
    assert "missing" in str(ask(local, "verify", tinker_path=path))


def test_tags_can_be_set_changed_and_removed(local: Local) -> None:
    path = saved(local)
    for _ in range(2):  # a retry is no error, and nothing new
        now = ask(local, "tag", tinker_path=path, tags={"good": "yes", "note": "n"}, remove=["x"])
        assert now["user_metadata"] == {"note": "n", "loss": "0.5", "good": "yes"}
    assert metadata(local, path) == now["user_metadata"]
    assert len(tag_events(local)) == 1
    assert (
        ask(local, "tag", tinker_path=path, remove=[*now["user_metadata"]])["user_metadata"] == {}
    )
    assert metadata(local, path) == {}


def test_invalid_tags_are_rejected(local: Local) -> None:
    path = saved(local)
    status, text = refusal(local, "tag", tinker_path=path, tags={"everstep_loop": "x"})
    assert status == 400 and "training loop" in text
    assert refusal(local, "tag", tinker_path=path, tags={"": "x"})[0] == 400
    assert refusal(local, "tag", tinker_path=path, tags={"k": "v" * 10_001})[0] == 400
    for call in ("tag", "verify", "details"):
        assert refusal(local, call, tinker_path=path + "0")[0] == 404, call
        assert refusal(local, call, tinker_path="tinker://a/b")[0] == 400, call
    assert metadata(local, path) == METADATA


def test_tags_survive_a_failure_between_ledger_and_vault_and_a_rebuild(
    home: Path, pico: Model
) -> None:
    with Local(home, pico) as local:
        path = saved(local)
        with mock.patch.object(Vault, "set_metadata", side_effect=OSError("no disk")):
            assert refusal(local, "tag", tinker_path=path, tags={"good": "yes"})[0] == 503
    wanted = METADATA | {"good": "yes"}
    with Local(home, pico) as local:
        assert metadata(local, path) == wanted
    for each in home.glob("ledger.sqlite*"):
        each.unlink()
    done = CliRunner().invoke(app, ["vault", "rebuild", "--home", str(home), "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["ok"], done.output
    with Local(home, pico) as local:
        assert metadata(local, path) == wanted
        copy = local.post("copy_weights", source_path=path, destination_project_id="p")[
            "tinker_path"
        ]
        assert metadata(local, copy) == wanted
        assert ask(local, "details", tinker_path=copy)["user_metadata"] == wanted
