"""Maintenance of a vault in a bucket: pruning, the scrubber, an unavailable store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

import everstep
from everstep.vault import open_vault
from everstep.vault.storage.keys import blob_key
from tests.buckets.bucket import Bucket
from tests.buckets.test_service import call, step
from tests.faults.keeper import Keeper
from tests.scenario import MODEL, connect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ALWAYS = 1 << 30


def run_json(*words: object, code: int = 0) -> Any:
    done = call(*words, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def save_checkpoints(keeper: Keeper, count: int) -> list[str]:
    """Save checkpoints of a new run with falling losses and return their paths."""
    client = connect(everstep, keeper.url)
    run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    paths = []
    for number in range(count):
        step(run, number)
        metadata = {"loss": str(count - number)}
        paths.append(run.save_state(f"s{number}", user_metadata=metadata).result().path)
    client.close("success").result()
    return paths


def test_vault_is_pruned_with_and_without_its_service(tmp_path: Path, bucket: Bucket) -> None:
    home = tmp_path / "home"
    with Keeper(home, arguments=("--vault", bucket.url)) as keeper:
        keeper.wait_ready()
        paths = save_checkpoints(keeper, 4)
        run = paths[0].split("/")[2]
        prune = ("vault", "prune", "--home", home, "--run", run)
        policy = ("--keep-last", 1, "--keep-best", 2, "--metric", "loss")
        assert run_json(*prune, *policy, "--dry-run")["deleted"] == paths[:2]
        assert run_json(*prune, *policy, "--yes", "--vault", bucket.url)["deleted"] == paths[:2]
        listed = run_json("run", "info", run, "--base-url", keeper.url)["checkpoints"]
        assert {each["tinker_path"] for each in listed} == set(paths[2:])
        assert run_json("vault", "gc", "--home", home, "--grace", 0)["bytes"] > 0
    assert run_json(*prune, "--keep-last", 1, "--yes")["kept"] == paths[3:]
    vault = open_vault(home, writer=False)
    assert [each.name for each in vault.manifests(kind="training")] == ["s3"]
    assert run_json("vault", "verify", "--all", "--home", home)["ok"]


def test_scrubber_quarantines_damage_and_nothing_while_the_store_is_down(
    tmp_path: Path, bucket: Bucket
) -> None:
    home = tmp_path / "home"
    settings = ("scrub_interval_seconds=0.5", "vault_retry_seconds=0.5")
    with Keeper(home, *settings, arguments=("--vault", bucket.url)) as keeper:
        keeper.wait_ready()
        intact, damaged = save_checkpoints(keeper, 2)
        bucket.fault("reset", count=ALWAYS)
        keeper.wait_until(lambda: "maintenance failed" in keeper.log.read_text())
        bucket.fault()
        assert run_json("vault", "quarantined", "--home", home) == []
        manifest = open_vault(home, writer=False).manifest("training", intact.split("/")[2], "s1")
        key = blob_key(manifest.files["adapter_model.safetensors"].blake3)
        bucket.put(bucket.only(key), b"rot")
        keeper.wait_until(lambda: "a damaged file is quarantined" in keeper.log.read_text())
        (record,) = run_json("vault", "quarantined", "--home", home)
        assert (record["file"], damaged in record["checkpoints"]) == (key, True)
        keeper.wait_until(lambda: _listed(keeper) == {intact})
        assert run_json("checkpoint", "verify", intact, "--base-url", keeper.url)["ok"]


def _listed(keeper: Keeper) -> set[str]:
    found = httpx.get(f"{keeper.url}/api/v1/checkpoints").raise_for_status().json()
    return {each["tinker_path"] for each in found["checkpoints"]}
