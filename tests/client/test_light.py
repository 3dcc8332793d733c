"""Light import: `import everstep` is quick and loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import everstep
import everstep.client
import everstep.loops
from everstep.wire import types

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "sqlalchemy", "alembic", "safetensors")
LAZY_MESSAGES = tuple(
    f"everstep.wire.messages.{name}"
    for name in ("administration", "inputs", "requests", "responses", "search", "telemetry")
)


def importtime_ms(code: str) -> float:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stderr.splitlines() if line.endswith("| everstep")]
    return int(lines[-1].split("|")[1]) / 1000


def test_import_takes_under_250_ms() -> None:
    """The best of several tries, since a busy machine slows single ones."""
    assert any(importtime_ms("import everstep") < 250 for _ in range(20))


@pytest.mark.parametrize(
    "code", ["import everstep", "from everstep import *", "import everstep; everstep.ServiceClient"]
)
def test_import_loads_nothing_heavy(code: str) -> None:
    code = f"import sys; {code}; print(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import everstep; everstep.ServiceClient", ("numpy", "google.protobuf")),
        ("import everstep; everstep.ServiceClient", LAZY_MESSAGES),
        ("from everstep import types; types.ModelID", ("numpy", "google.protobuf", "httpx")),
        ("from everstep import types; dir(types)", LAZY_MESSAGES),
    ],
)
def test_modules_are_loaded_when_they_are_needed(code: str, unwanted: tuple[str, ...]) -> None:
    """Each of them takes a tenth of the whole, or more."""
    code = f"import sys; {code}; print(*(m for m in {unwanted} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_httpx_is_loaded_without_its_command_line() -> None:
    """Which loads click, rich and pygments. A program that needs it imports it all the same."""
    unwanted = ("click", "rich", "pygments", "httpx._main")
    code = f"""
import sys, everstep
everstep.ServiceClient
print([name for name in {unwanted} if name in sys.modules])
import httpx, httpx._main
print(httpx.AsyncClient.__name__, callable(httpx._main.main))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "AsyncClient True"]


def test_types_are_the_classes_of_the_protocol_and_loaded_once() -> None:
    assert {"Datum", "ModelID", "FutureRetrieveResponse", "parse"} <= set(types.__all__)
    for name in types.__all__:
        assert getattr(everstep.types, name) is getattr(types, name), name
        assert vars(types)[name] is getattr(types, name), name
    with pytest.raises(AttributeError, match="Nothing"):
        types.Nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("room", [everstep.client, everstep.loops])
def test_client_and_loops_export_the_same_objects_as_everstep(room: ModuleType) -> None:
    shared = set(room.__all__) & set(everstep.__all__)
    assert len(shared) >= 10
    for name in shared:
        assert getattr(room, name) is getattr(everstep, name)


def test_loops_export_every_tool_for_training_loops() -> None:
    wanted = {"Checkpointer", "CheckpointGroup", "CheckpointPolicy", "LoopState", "Recovery"}
    assert wanted | {"RecoveryPolicy", "resume_or_create"} <= set(everstep.loops.__all__)


@pytest.mark.parametrize("name", everstep.__all__)
def test_public_names_can_be_loaded(name: str) -> None:
    assert getattr(everstep, name) is not None
