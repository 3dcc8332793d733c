"""The client is light."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tinker

import everstep

HEAVY = ("torch", "transformers", "fastapi", "sqlalchemy")


def importtime_ms(code: str) -> float:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stderr.splitlines() if line.endswith("| everstep")]
    return int(lines[-1].split("|")[1]) / 1000


def test_the_import_takes_under_250_ms_and_nothing_heavy() -> None:
    assert min(importtime_ms("import everstep") for _ in range(3)) < 250
    code = "import sys, everstep; everstep.ServiceClient; "
    code += f"print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", everstep.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(everstep, name) is not None


def test_the_names_of_scripts_are_those_of_the_official_sdk() -> None:
    clients = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "APIFuture")
    for name in clients:
        theirs = {n for n in dir(getattr(tinker, name)) if not n.startswith("_")}
        ours = getattr(everstep, name)
        own = {n for n in theirs if hasattr(ours, n)}
        assert own, name
    for method in ("save_state", "load_state", "load_state_with_optimizer", "forward_backward"):
        assert hasattr(everstep.TrainingClient, method)
        assert hasattr(everstep.TrainingClient, f"{method}_async")
