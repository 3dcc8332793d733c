"""Each process imports only its side of the service: a restart waits for its imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVICE_ONLY = ("sqlalchemy", "alembic", "fastapi", "everstep.ledger")
WORKER_ONLY = ("torch", "transformers", "safetensors.torch")


@pytest.mark.parametrize(
    ("module", "others"),
    [("everstep.worker.main", SERVICE_ONLY), ("everstep.server", WORKER_ONLY)],
)
def test_process_does_not_import_the_other_side(module: str, others: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(m for m in {others} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
