"""Rebuilding of publication, expiry and copies, and maintenance beside a service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import everstep
from everstep.cli.app import app
from everstep.engine import Model
from tests.cli.gateway import listening
from tests.runtime.local import Local, pico
from tests.scenario import MODEL, connect, train

__all__ = ["pico"]


def call(home: Path, *arguments: object) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments), "--home", str(home), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def route(path: str) -> str:
    run, checkpoint = path.removeprefix("tinker://").split("/", 1)
    return f"training_runs/{run}/checkpoints/{checkpoint}"


def listed(local: Local) -> dict[str, Any]:
    """The listing of each checkpoint without its time, which the manifest has on its own."""
    found = local.http.get("checkpoints").json()["checkpoints"]
    return {each["tinker_path"]: {**each, "time": None} for each in found}


def test_rebuild_restores_publication_expiry_and_tags(tmp_path: Path, pico: Model) -> None:
    home = tmp_path / "home"
    with Local(home, pico) as local:
        body: dict[str, Any] = {
            "session_id": local.session(),
            "model_seq_id": 0,
            "base_model": MODEL,
        }
        made = local.post("create_model", **body, user_metadata={"who": "me", "n": 3})
        run = local.result(made["request_id"])["model_id"]
        local.train(run, 1)
        a = local.do(run, "save_weights", path="a", user_metadata={"k": "v"}, ttl_seconds=3600)
        b = local.do(run, "save_weights", path="b", ttl_seconds=3600)
        c = local.do(run, "save_weights_for_sampler", path="c")
        unnamed = local.do(run, "save_weights_for_sampler", sampling_session_seq_id=0)
        assert local.http.put(f"{route(a['path'])}/ttl", json={"ttl_seconds": 7200}).is_success
        assert local.http.put(f"{route(b['path'])}/ttl", json={"ttl_seconds": None}).is_success
        assert local.http.post(f"{route(c['path'])}/publish").is_success
        for source in (a, c):
            copied = {"source_path": source["path"], "destination_project_id": "p"}
            local.post("copy_weights", **copied)
        before = listed(local)
        runs = {path.split("/")[2] for path in before}
        known = {each: local.http.get(f"training_runs/{each}").json() for each in runs}
        assert known[run]["user_metadata"] == {"who": "me", "n": "3"}
        assert unnamed["sampling_session_id"]
    for database in home.glob("ledger.sqlite*"):
        database.unlink()
    assert call(home, "vault", "rebuild")["recreated"] == len(before) + 1
    with Local(home, pico) as local:
        assert listed(local) == before, "the unnamed save is not listed"
        for each in runs:
            found = local.http.get(f"training_runs/{each}").json()
            assert found["user_metadata"] == known[each]["user_metadata"]
            if each != run:
                refusal = local.refused("optim_step", model_id=each, seq_id=1, adam_params={})
                assert refusal[0] == 400, "a copy still accepts no operations"
        done = local.post("everstep/vault/collect", grace_seconds=0)
        assert len(done["ended"]) == 1, "the unnamed save is garbage"
        assert listed(local) == before


@pytest.mark.slow
def test_gc_and_prune_beside_running_service_and_without(tmp_path: Path, pico: Model) -> None:
    home = tmp_path / "home"
    with (
        Local(home, pico) as local,
        listening(local) as url,
        connect(everstep, url) as client,
    ):
        run = client.create_lora_training_client(base_model=MODEL, rank=4, seed=1).result()
        paths = []
        for step in range(4):
            train(everstep, run, 1, shift=step)
            metadata = {"loss": str(4 - step)}
            paths.append(run.save_state(f"s{step}", user_metadata=metadata).result().path)
        run_id = paths[0].split("/")[2]
        policy = ("--run", run_id, "--keep-last", "1", "--yes")
        kept = call(home, "vault", "prune", *policy, "--ttl", "3600")
        assert kept["deleted"] == []
        pruned = call(home, "vault", "prune", *policy)
        assert (pruned["deleted"], pruned["kept"]) == (paths[:3], paths[3:])
        rest = client.create_rest_client()
        found = rest.list_user_checkpoints().result().checkpoints
        assert [each.tinker_path for each in found] == paths[3:]
        dry = call(home, "vault", "gc", "--grace", "0", "--dry-run")
        done = call(home, "vault", "gc", "--grace", "0")
        assert set(done["files"]) == set(dry["files"])
        assert done["bytes"] == dry["bytes"] > 0
        assert call(home, "vault", "gc", "--grace", "0")["files"] == []
        assert call(home, "vault", "quarantined") == []
        restored = client.create_training_client_from_state_with_optimizer(paths[3]).result()
        train(everstep, restored, 1)
    assert not (home / "service.json").exists()
    done = call(home, "vault", "gc", "--grace", "0")
    assert done["dry_run"] is False, "works without a service as well"
