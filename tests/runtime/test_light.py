"""Each process of the service imports its own side: every start after a crash waits for that."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVICE_ONLY = ("sqlalchemy", "alembic", "fastapi", "everstep.ledger")
WORKER_ONLY = ("torch", "transformers", "safetensors.torch")


@pytest.mark.parametrize(
    ("module", "others"),
    [("everstep.runtime.worker", SERVICE_ONLY), ("everstep.server", WORKER_ONLY)],
)
def test_nothing_of_the_other_process_is_imported(module: str, others: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(m for m in {others} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
