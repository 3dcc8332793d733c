"""Service with a vault in a bucket: the same promises as with a directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

import everstep
from everstep.cli.app import app
from everstep.vault import VaultError, gc_journal, open_vault
from everstep.vault.errors import StoreFailed
from everstep.vault.open import set_location
from everstep.vault.storage.keys import blob_key
from tests.buckets.bucket import Bucket
from tests.conftest import Service
from tests.faults.cycle import Looper, uninterrupted
from tests.faults.keeper import Keeper
from tests.scenario import MODEL, connect, data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROUNDS = 3


def call(*arguments: object) -> Result:
    """Run a command in the test's process."""
    return CliRunner().invoke(app, [*map(str, arguments)])


def serve_refusal(home: Path, *arguments: object) -> str:
    """Return the error output of a service that refuses to start."""
    command = [sys.executable, "-m", "everstep.cli", "serve", "--port", "0", "--home", str(home)]
    refused = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    return refused.stderr


def test_kills_evictions_and_maintenance_change_no_number(
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
        report = json.loads(call("vault", "verify", "--all", "--home", home, "--json").stdout)
        assert (report["damaged"], report["checkpoints"] > len(paths)) == ([], True)
        assert call("vault", "gc", "--grace", "0", "--home", home).exit_code == 0
    local = [path for path in (home / "vault").rglob("*") if path.is_file()]
    assert local == [home / "vault" / gc_journal.NAME], "a checkpoint's file is outside the bucket"
    vault = open_vault(home, writer=False)
    manifests = list(vault.manifests())
    assert manifests
    for manifest in manifests:
        assert manifest.files
        for name in manifest.files:
            vault.read(manifest, name)
    assert seen == uninterrupted(everstep, service.url, 5, ROUNDS)


def step(run: Any, number: int) -> float:
    passed = run.forward_backward(data(everstep, 2, number), "cross_entropy")
    run.optim_step(everstep.types.AdamParams(learning_rate=0.01)).result()
    loss: float = passed.result().metrics["loss:sum"]
    return loss


def unload(keeper: Keeper, run: Any) -> None:
    """Make the service evict a run to the vault."""
    answer = httpx.post(f"{keeper.url}/api/v1/unload_model", json={"model_id": run.model_id})
    answer.raise_for_status()


def test_saves_fail_and_training_continues_while_the_store_is_down(
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


def test_home_records_its_vault_and_rejects_another(tmp_path: Path, bucket: Bucket) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    with Keeper(home, arguments=("--vault", bucket.url)) as keeper:
        keeper.wait_ready()
        client = connect(everstep, keeper.url)
        run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        step(run, 0)
        run.save_state("x").result()
        client.close("success").result()
    elsewhere = f"{bucket.url}/elsewhere"
    refused = call("vault", "verify", "--home", home, "--vault", elsewhere)
    assert refused.exit_code == 1
    for error in (refused.stderr, serve_refusal(home, "--vault", elsewhere)):
        assert f"The vault of {home} is {bucket.url}, not {elsewhere}" in error
    error = serve_refusal(other, "--vault", bucket.url)
    assert f"{bucket.url} is the vault of another home than {other}" in error
    for option in ((), ("--vault", bucket.url)):
        assert call("vault", "verify", "--all", "--home", home, *option).exit_code == 0
    check_backup(home, tmp_path)
    check_rebuild(tmp_path / "new", bucket)
    assert "is the vault of another home" in serve_refusal(home), (
        "the service took over a vault of another home"
    )


def check_backup(home: Path, tmp_path: Path) -> None:
    made = call("backup", tmp_path / "backup", "--home", home)
    assert made.exit_code == 0, made.stderr
    restored = tmp_path / "restored"
    assert call("restore", tmp_path / "backup", "--home", restored).exit_code == 0
    assert call("vault", "verify", "--all", "--home", restored).exit_code == 0
    names = [each.name for each in open_vault(restored, writer=False).manifests(kind="training")]
    assert names == ["x"]


def check_rebuild(home: Path, bucket: Bucket) -> None:
    done = call("vault", "rebuild", "--home", home, "--vault", bucket.url, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["recreated"], report["runs"]) == (1, 1)
    (manifest,) = open_vault(home).manifests(kind="training")
    key = blob_key(next(iter(manifest.files.values())).blake3)
    bucket.put(bucket.only(key), b"rot")
    found = call("vault", "verify", "--home", home)
    assert found.exit_code == 1
    assert key[:20] in found.stdout.replace("\n", "")


def test_store_that_can_not_hold_a_vault_is_rejected(tmp_path: Path, bucket: Bucket) -> None:
    home = tmp_path / "home"
    bucket.fault("unconditional", count=1 << 30)
    assert "does not honour conditional puts" in serve_refusal(home, "--vault", bucket.url)
    bucket.fault()
    for url, reason in (
        ("s3://not-there/x", "there is no such bucket"),
        ("ftp://x", "is no bucket"),
        ("s3://key:secret@vaults/x", "holds no credentials"),
    ):
        with pytest.raises((StoreFailed, VaultError), match=reason):
            set_location(home, url)
    assert not (home / "vault.json").exists()
