"""The client is light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import everstep
import everstep.client

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "sqlalchemy", "alembic", "safetensors")


def importtime_ms(code: str) -> float:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stderr.splitlines() if line.endswith("| everstep")]
    return int(lines[-1].split("|")[1]) / 1000


def test_the_import_takes_under_250_ms() -> None:
    """The best of some tries, as a machine that is busy with other things says nothing of it."""
    assert any(importtime_ms("import everstep") < 250 for _ in range(20))


@pytest.mark.parametrize(
    "code", ["import everstep", "from everstep import *", "import everstep; everstep.ServiceClient"]
)
def test_nothing_heavy_is_imported(code: str) -> None:
    code = f"import sys; {code}; print(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_comforts_are_the_clients_under_the_same_names() -> None:
    comforts = {"Checkpointer", "CheckpointGroup", "CheckpointPolicy", "LoopState", "Recovery"}
    assert comforts | {"RecoveryPolicy", "resume_or_create"} <= set(everstep.client.__all__)
    for name in set(everstep.client.__all__) & set(everstep.__all__):
        assert getattr(everstep.client, name) is getattr(everstep, name)


@pytest.mark.parametrize("name", everstep.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(everstep, name) is not None
