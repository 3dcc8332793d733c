"""Encrypted saves killed at every step are whole or absent, and never two under one name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pyrage
import pytest

import everstep
from everstep import failpoints
from everstep.engine import Model
from everstep.ledger import Ledger, NotWritten
from everstep.vault import Manifest, Vault
from tests.faults.cycle import IDENTITY, RECIPIENT
from tests.faults.keeper import Keeper
from tests.runtime.local import Local, home, pico
from tests.scenario import MODEL, connect, train

__all__ = ["home", "pico"]
POINTS = {
    "worker.save.captured": 1,
    "vault.write.written": 2,
    "vault.write.durable": 3,
    "worker.save.committed": 1,
    "runtime.save.written": 1,
    "runtime.execute.recorded": 4,
}
"""The failpoints of one save, each with the n-th call that kills."""
MAX_SAVES = 20


def sealed(vault: Vault, name: str, run: str | None = None) -> Manifest:
    found = [each for each in vault.manifests(run, "external") if each.name == name]
    assert len(found) == 1
    return found[0]


def opened(vault: Vault, manifest: Manifest) -> dict[str, bytes]:
    """Return a checkpoint's files, decrypted where they are encrypted."""
    return {
        name.removesuffix(".age"): pyrage.decrypt(bytes(vault.read(manifest, name)), [IDENTITY])
        if name.endswith(".age")
        else bytes(vault.read(manifest, name))
        for name in manifest.files
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_encrypted_save_killed_at_every_step_is_whole_and_its_future_resolves(
    tmp_path: Path,
) -> None:
    fired = tmp_path / "fired"
    fired.mkdir()
    armed = {
        failpoints.VARIABLE: ";".join(f"{name}=kill@{count}" for name, count in POINTS.items()),
        failpoints.ONCE_VARIABLE: str(fired),
    }
    settings = ("replay_seconds=1000", "worker_attempts=100")
    keeper = Keeper(tmp_path / "home", *settings, environment=lambda start: armed)
    with keeper, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = connect(everstep, keeper.url)
        run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        train(everstep, run, 1)
        names: list[str] = []
        while not all((fired / name).exists() for name in POINTS):
            assert len(names) < MAX_SAVES, sorted(path.name for path in fired.iterdir())
            names.append(f"sealed{len(names)}")
            saving = run.save_weights_external(names[-1], age_encryption_recipients=[RECIPIENT])
            assert saving.result().path.endswith(names[-1])
        run.save_weights_external("plain").result()
        listed = client.create_rest_client().list_checkpoints(run.model_id).result().checkpoints
        client.close("success").result()
    assert sorted(c.tinker_path.rsplit("/")[-1] for c in listed) == sorted([*names, "plain"])
    vault = Vault(tmp_path / "home" / "vault", writer=False)
    plain = opened(vault, sealed(vault, "plain"))
    for name in names:
        assert opened(vault, sealed(vault, name)) == plain


def test_retry_keeps_a_checkpoint_that_was_written_but_not_recorded(
    home: Path, pico: Model
) -> None:
    seen: list[Manifest] = []
    succeed = Ledger.succeed

    async def not_at_first(self: Ledger, *arguments: Any, **also: Any) -> Any:
        if also.get("checkpoint") is not None and len(seen) < 2:
            seen.append(sealed(Vault(home / "vault", writer=False), "sealed"))
            raise NotWritten("the disk is away for a moment")
        return await succeed(self, *arguments, **also)

    with mock.patch.object(Ledger, "succeed", not_at_first), Local(home, pico) as local:
        run = local.new_run()
        local.train(run, 1)
        body = {"path": "sealed", "age_encryption_recipients": [RECIPIENT]}
        saved = local.do(run, "save_weights_external", **body)
        local.do(run, "save_weights_external", path="plain")
    vault = Vault(home / "vault", writer=False)
    last = sealed(vault, "sealed")
    assert [each.files for each in seen] == [last.files, last.files]
    assert last.size == saved["size_bytes"]
    assert opened(vault, last) == opened(vault, sealed(vault, "plain"))


@pytest.mark.parametrize("damaged", ["file", "manifest"])
def test_retry_rewrites_a_damaged_checkpoint(home: Path, pico: Model, damaged: str) -> None:
    seen: list[Manifest] = []
    succeed = Ledger.succeed

    async def not_at_first(self: Ledger, *arguments: Any, **also: Any) -> Any:
        if also.get("checkpoint") is not None and not seen:
            seen.append(sealed(Vault(home / "vault", writer=False), "sealed"))
            for path in (home / "vault" / ("blobs" if damaged == "file" else "manifests")).rglob(
                "*"
            ):
                if path.is_file() and "snapshot" not in path.parts:
                    path.write_bytes(path.read_bytes()[:-1] + b"?")
            raise NotWritten("the disk is away for a moment")
        return await succeed(self, *arguments, **also)

    with mock.patch.object(Ledger, "succeed", not_at_first), Local(home, pico) as local:
        run = local.new_run()
        local.train(run, 1)
        body = {"path": "sealed", "age_encryption_recipients": [RECIPIENT]}
        local.do(run, "save_weights_external", **body)
        local.do(run, "save_weights_external", path="plain")
    vault = Vault(home / "vault", writer=False)
    last = sealed(vault, "sealed")
    assert last.files != seen[0].files
    assert opened(vault, last) == opened(vault, sealed(vault, "plain"))
