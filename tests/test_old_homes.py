"""Homes of earlier releases: every release reads them and continues with the same bits.

The homes are stored in `tests/data`, with the requests that continue them and the results that
the release itself gave. `tests/data/make_home.py` makes them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pyrage
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

import everstep.ledger
from everstep.engine import Model
from everstep.engine.environment import environment
from everstep.ledger import Ledger
from everstep.runtime.execution.replay_check import difference
from everstep.vault import Vault
from everstep.vault.verify import verify
from tests.data.make_home import listed, processor
from tests.runtime.local import Local, pico

__all__ = ["pico"]
STORED = Path(__file__).parent / "data" / "home_0_1"
EXPECTED = json.loads((STORED / "expected.json").read_text())
ARITHMETIC_OF_0_1 = 2
HOMES = pytest.mark.parametrize("name", ["stopped", "killed"])


@pytest.fixture
def homes(tmp_path: Path) -> Path:
    """The directory that the archive's homes were extracted into."""
    with tarfile.open(STORED / "homes.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


def file_hashes(home: Path) -> dict[str, dict[str, str]]:
    """The SHA-256 of every file of every named checkpoint, read through the vault."""
    vault = Vault(home / "vault", writer=False)
    return {
        "/".join(manifest.id): {
            name: hashlib.sha256(vault.read(manifest, name)).hexdigest() for name in manifest.files
        }
        for manifest in vault.manifests()
        if manifest.kind != "snapshot"
    }


def numeric_environment_is(recorded: dict[str, Any]) -> bool:
    """Whether this machine computes the bits that the release computed where it ran.

    The release recorded less than this one does. What both record must be the same, and so must
    the processor and the engine's arithmetic, whose revision the release did not record.
    """
    here = environment()
    if here["arithmetic"] != ARITHMETIC_OF_0_1:
        return False
    shared = recorded.keys() & here.keys()
    assert {"torch", "threads"} <= shared
    return processor() == EXPECTED["processor"] and all(recorded[n] == here[n] for n in shared)


@HOMES
def test_checkpoints_of_0_1_list_verify_and_read(homes: Path, name: str) -> None:
    expected = EXPECTED["homes"][name]
    assert expected["checkpoints"]
    assert file_hashes(homes / name) == expected["checkpoints"]
    report = verify(Vault(homes / name / "vault", writer=False), everything=True)
    assert report.ok, report


def test_encrypted_checkpoint_of_0_1_decrypts(homes: Path) -> None:
    vault = Vault(homes / "stopped" / "vault", writer=False)
    by_name = {manifest.name: manifest for manifest in vault.manifests(kind="external")}
    identity = pyrage.x25519.Identity.from_str(EXPECTED["age_identity"])
    sealed, plain = by_name["sealed"], by_name["plain"]
    assert len(sealed.files) == 2
    for file in sealed.files:
        opened = pyrage.decrypt(bytes(vault.read(sealed, file)), [identity])
        assert opened == bytes(vault.read(plain, file.removesuffix(".age")))


@HOMES
def test_ledger_of_0_1_migrates_and_keeps_its_rows(homes: Path, name: str) -> None:
    path = homes / name / "ledger.sqlite"
    rows = listed(homes / name)
    assert rows == EXPECTED["homes"][name]["listed"]

    async def migrate() -> tuple[list[str], int]:
        ledger = await Ledger.open(path)
        try:
            return await ledger.find_damaged_rows(), len(await ledger.all_checkpoints())
        finally:
            await ledger.close()

    damaged, count = asyncio.run(migrate())
    assert (damaged, count) == ([], len(rows))
    assert listed(homes / name) == rows
    config = Config()
    migrations = Path(everstep.ledger.__file__).parent / "migrations"
    config.set_main_option("script_location", str(migrations))
    head = ScriptDirectory.from_config(config).get_current_head()
    with closing(sqlite3.connect(path)) as database:
        (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
    assert revision == head


@HOMES
def test_can_read_0_1(homes: Path, name: str, pico: Model) -> None:
    """Every run goes on with the results and the files that release 0.1 would have given."""
    expected = EXPECTED["homes"][name]
    exact = numeric_environment_is(expected["environment"])
    with Local(homes / name, pico) as local:
        for request_id, result in expected["waiting"]:
            check(result, local.result(request_id), exact)
        for route, body, result in expected["continued"]:
            check(result, local.result(local.post(route, **body)["request_id"]), exact)
    after, wanted = file_hashes(homes / name), expected["checkpoints_after"]
    # Unnamed samplers are collected once their client was silent for long.
    wanted = {path: files for path, files in wanted.items() if "/ephemeral-" not in path}
    assert wanted.keys() - expected["checkpoints"].keys(), "the continued runs save"
    assert wanted.keys() <= after.keys()
    for path in wanted if exact else wanted.keys() & expected["checkpoints"].keys():
        assert after[path] == wanted[path], path


def check(recorded: dict[str, Any], found: dict[str, Any], exact: bool) -> None:
    """Compare a result with the recorded one: bit for bit, or to the tolerance of a replay."""
    later = {"adapted_modules", "lora_seed"} - recorded.keys()  # which release 0.1 did not say
    found = {key: value for key, value in found.items() if key not in later}
    if exact:
        assert found == recorded
    else:
        assert difference(json.dumps(recorded).encode(), "json", found, exact=False) is None
