"""Migrations: databases of all earlier releases open with all their rows."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

import everstep.ledger
from everstep.ledger import Ledger, LedgerTooNew
from everstep.ledger.tables import metadata

MIGRATIONS = Path(everstep.ledger.__file__).parent / "migrations"
MOMENT = "2026-01-02 03:04:05.000000"


def configuration() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def revisions() -> list[str]:
    found = ScriptDirectory.from_config(configuration()).walk_revisions()
    return sorted(script.revision for script in found)


def written_by(revision: str, path: Path) -> None:
    """Write a database with the schema of an earlier release."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = configuration()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()
    with sqlite3.connect(path) as database:
        database.execute(
            "INSERT INTO runs (run_id, session_id, base_model, lora, optimizer, user_metadata, "
            "created_at, last_request_at, status) VALUES "
            "('s:train:0', 's', 'm', '{\"rank\": 4}', '{}', '{\"a\": \"b\"}', ?, ?, 'live')",
            (MOMENT, MOMENT),
        )
        database.execute(
            "INSERT INTO operations (request_id, scope, seq_id, place, kind, payload, status, "
            "accepted_at) VALUES ('r1', 's:train:0', 1, 1, 'optim_step', x'7b7d', 'pending', ?)",
            (MOMENT,),
        )
        database.execute(
            "INSERT INTO checkpoints (path, run_id, kind, name, created_at, size_bytes, "
            "base_model, lora, public, listed) VALUES "
            "('tinker://s:train:0/weights/a', 's:train:0', 'training', 'a', ?, 7, 'm', '{}', 0, 1)",
            (MOMENT,),
        )


@pytest.mark.parametrize("revision", revisions())
def test_database_of_an_earlier_release_opens_with_all_its_rows(
    revision: str, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.sqlite"
    written_by(revision, path)

    async def look() -> None:
        ledger = await Ledger.open(path)
        run = await ledger.run("s:train:0")
        assert run is not None
        assert (run.user_metadata, run.status, run.environment) == ({"a": "b"}, "live", None)
        (waiting,) = await ledger.backlog()
        assert (waiting.scope, waiting.count) == ("s:train:0", 1)
        (operation,) = await ledger.operations("s:train:0")
        assert operation.payload == b"{}"
        (checkpoint,) = await ledger.checkpoints("s:train:0")
        assert checkpoint.size_bytes == 7
        await ledger.close()

    asyncio.run(look())
    asyncio.run(look())


def test_migrations_create_the_declared_tables(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"

    async def create() -> None:
        await (await Ledger.open(path)).close()

    asyncio.run(create())
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_database_of_a_later_release_is_rejected_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    written_by(revisions()[-1], path)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LedgerTooNew, match="newer"):
        asyncio.run(Ledger.open(path))
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM operations").fetchone() == (1,)
