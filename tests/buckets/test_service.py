"""A whole service whose vault lies in a bucket: nothing is different but where checkpoints lie."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

import everstep
from everstep.vault import open_vault
from everstep.vault.keys import blob_key
from tests.buckets.bucket import Bucket
from tests.conftest import Service
from tests.faults.cycle import Looper, uninterrupted
from tests.faults.keeper import Keeper
from tests.scenario import MODEL, connect, data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROUNDS = 3


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, as a user calls it."""
    command = [sys.executable, "-m", "everstep.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_killed_evicted_and_cared_for_no_number_changes(
    tmp_path: Path, bucket: Bucket, service: Service
) -> None:
    home = tmp_path / "home"
    settings = ("replay_seconds=0.1", "idle_seconds=0.5")
    with Keeper(home, *settings, arguments=("--vault", bucket.url)) as keeper:
        looper = Looper(everstep, keeper.url, seed=5)
        seen = []
        for number in range(ROUNDS):
            seen.append(looper.round())
            if number == 0:
                keeper.kill()
            elif number == 1:
                keeper.kill_worker()
        paths = looper.listed()
        looper.close()
        told = json.loads(call("vault", "verify", "--all", "--home", home, "--json").stdout)
        assert (told["damaged"], told["checkpoints"] > len(paths)) == ([], True)
        assert call("vault", "gc", "--grace", "0", "--home", home).returncode == 0
    assert not any(path.is_file() for path in (home / "vault").rglob("*"))
    vault = open_vault(home, writer=False)
    for manifest in vault.manifests():
        for name in manifest.files:
            vault.read(manifest, name)
    assert seen == uninterrupted(everstep, service.url, 5, ROUNDS)


def step(run: Any, number: int) -> float:
    passed = run.forward_backward(data(everstep, 2, number), "cross_entropy")
    run.optim_step(everstep.types.AdamParams(learning_rate=0.01)).result()
    loss: float = passed.result().metrics["loss:sum"]
    return loss


def unload(keeper: Keeper, run: Any) -> None:
    """Have a run leave the worker's memory, for the vault."""
    answer = httpx.post(f"{keeper.url}/api/v1/unload_model", json={"model_id": run.model_id})
    answer.raise_for_status()


def test_while_the_store_is_gone_saves_fail_and_training_goes_on(
    tmp_path: Path, bucket: Bucket
) -> None:
    home = tmp_path / "home"
    settings = ("vault_retry_seconds=0.5", "replay_seconds=0.1")
    with Keeper(home, *settings, arguments=("--vault", bucket.url)) as keeper:
        keeper.wait_ready()
        client = connect(everstep, keeper.url)
        run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        step(run, 0)
        path = run.save_state("before").result().path
        bucket.fault("reset", count=1 << 30)
        with pytest.raises(everstep.TinkerError, match=f"{bucket.url}: .*HTTP error"):
            run.save_state("during").result()
        losses = [step(run, number) for number in (1, 2)]
        bucket.fault()
        unload(keeper, run)
        bucket.fault("reset", count=1 << 30)
        pending = run.forward_backward(data(everstep, 2, 3), "cross_entropy")
        keeper.wait_until(lambda: "the run waits for its vault" in keeper.log.read_text())
        bucket.fault()
        assert pending.result().metrics["loss:sum"] > 0
        assert step(run, 4) > 0
        again = client.create_training_client_from_state_with_optimizer(path).result()
        assert [step(again, number) for number in (1, 2)] == losses
        client.close("success").result()


def test_a_home_remembers_its_vault_and_takes_no_other(tmp_path: Path, bucket: Bucket) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    with Keeper(home, arguments=("--vault", bucket.url)) as keeper:
        keeper.wait_ready()
        client = connect(everstep, keeper.url)
        run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        step(run, 0)
        run.save_state("x").result()
        client.close("success").result()
    elsewhere = f"{bucket.url}/elsewhere"
    for arguments in (
        ("serve", "--port", "0", "--home", home, "--vault", elsewhere),
        ("vault", "verify", "--home", home, "--vault", elsewhere),
    ):
        refused = call(*arguments)
        assert refused.returncode == 1
        assert f"The vault of {home} is {bucket.url}, not {elsewhere}" in refused.stderr
    refused = call("serve", "--port", "0", "--home", other, "--vault", bucket.url)
    assert refused.returncode == 1
    assert f"{bucket.url} is the vault of another home than {other}" in refused.stderr
    for option in ((), ("--vault", bucket.url)):
        assert call("vault", "verify", "--all", "--home", home, *option).returncode == 0
    check_backup(home, tmp_path)
    check_rebuild(tmp_path / "new", bucket)
    refused = call("serve", "--port", "0", "--home", home)
    assert "is the vault of another home" in refused.stderr, "it was taken over"


def check_backup(home: Path, tmp_path: Path) -> None:
    made = call("backup", tmp_path / "backup", "--home", home)
    assert made.returncode == 0, made.stderr
    restored = tmp_path / "restored"
    assert call("restore", tmp_path / "backup", "--home", restored).returncode == 0
    assert call("vault", "verify", "--all", "--home", restored).returncode == 0
    names = [each.name for each in open_vault(restored, writer=False).manifests(kind="training")]
    assert names == ["x"]


def check_rebuild(home: Path, bucket: Bucket) -> None:
    done = call("vault", "rebuild", "--home", home, "--vault", bucket.url, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["recreated"], told["runs"]) == (1, 1)
    (manifest,) = open_vault(home).manifests(kind="training")
    key = blob_key(next(iter(manifest.files.values())).blake3)
    bucket.put(bucket.only(key), b"rot")
    found = call("vault", "verify", "--home", home)
    assert found.returncode == 1
    assert key[:20] in found.stdout.replace("\n", "")


def test_a_store_that_can_not_hold_a_vault_is_refused(tmp_path: Path, bucket: Bucket) -> None:
    def start(url: str) -> str:
        refused = call("serve", "--port", "0", "--home", tmp_path / "home", "--vault", url)
        assert refused.returncode == 1
        assert "Traceback" not in refused.stderr
        return refused.stderr

    bucket.fault("unconditional", count=1 << 30)
    assert "does not honour conditional puts" in start(bucket.url)
    bucket.fault()
    assert "there is no such bucket" in start("s3://not-there/x")
    assert "is no bucket" in start("ftp://x")
    assert "holds no credentials" in start("s3://key:secret@vaults/x")
    assert not (tmp_path / "home" / "vault.json").exists()
