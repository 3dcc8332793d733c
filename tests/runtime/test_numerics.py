"""A run keeps its choices of arithmetic where a service would choose others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model, load_model
from everstep.engine.models.pico import write_pico
from everstep.engine.numerics import Numerics
from everstep.runtime.execution.replay_check import difference
from everstep.vault import Vault
from tests.runtime.local import Local
from tests.scenario import MODEL

OTHERS = {"micro-batches": Numerics(1), "products": Numerics(2048, "base")}
"""What another service chooses for new runs."""


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose products may be in its own dtype."""
    directory = tmp_path_factory.mktemp("models") / "pico"
    write_pico(directory)
    return load_model(MODEL, str(directory), device="cpu", dtype="bfloat16")


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest) -> Numerics:
    return OTHERS[request.param]


@pytest.fixture
def model(other: Numerics, half: Model, pico: Model) -> Model:
    """A model whose bits the other choice moves."""
    return half if other.lora_products == "base" else pico


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each replayed result was compared to the bit."""
    seen: list[bool] = []

    def compare(*arguments: Any, exact: bool) -> str | None:
        seen.append(exact)
        return difference(*arguments, exact=exact)

    monkeypatch.setattr("everstep.runtime.execution.recovery.difference", compare)
    return seen


def recorded(home: Path, path: str) -> Numerics | None:
    """The choices that a checkpoint records."""
    run, _, name = path.removeprefix("tinker://").partition("/weights/")
    manifest = Vault(home / "vault", writer=False).manifest("training", run, name)
    return Numerics.recorded(manifest.environment)


def save(service: Local, run: str, name: str) -> str:
    return str(service.do(run, "save_weights", path=name)["path"])


def from_state(service: Local, path: str, *, optimizer: bool = True) -> str:
    body: dict[str, Any] = {
        "session_id": service.session(),
        "model_seq_id": service._runs,
        "path": path,
    }
    service._runs += 1
    asked = service.post("load_weights", **body, optimizer=optimizer)
    return str(service.result(asked["request_id"])["model_id"])


def test_replayed_run_keeps_them_to_the_bit(
    home: Path, model: Model, other: Numerics, compared: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Local(home, model).killed() as service:
        reference, run = service.new_run(), service.new_run()
        expected = service.train(reference, 0, 1, 2)
        seen = service.train(run, 0)
    monkeypatch.setattr(model, "numerics", other)
    with service.after() as again:
        assert seen + again.train(run, 1, 2) == expected
        assert compared and all(compared)
        assert not again.http.get(f"training_runs/{run}").json()["environment_changes"]
        fresh = again.new_run()
        assert again.train(fresh, 0, 1, 2) != expected, "the choice moves bits"
        assert recorded(home, save(again, run, "kept")) == Numerics()
        assert recorded(home, save(again, fresh, "new")) == other


def test_restored_checkpoint_keeps_them_to_the_bit(
    home: Path, model: Model, other: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Local(home, model) as service:
        run = service.new_run()
        service.train(run, 0)
        path = save(service, run, "saved")
        expected = service.train(run, 1, 2)
    monkeypatch.setattr(model, "numerics", other)
    with service.after() as again:
        created = from_state(again, path)
        assert again.train(created, 1, 2) == expected
        loaded = again.new_run()
        again.train(loaded, 5)
        again.do(loaded, "load_weights", path=path, optimizer=True)
        assert again.train(loaded, 1, 2) == expected
        assert recorded(home, save(again, loaded, "loaded")) == Numerics()


def test_weights_alone_bring_none(
    home: Path, model: Model, other: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Local(home, model) as service:
        path = save(service, service.new_run(), "saved")
    monkeypatch.setattr(model, "numerics", other)
    with service.after().killed() as again:
        created, loaded = from_state(again, path, optimizer=False), again.new_run()
        again.do(loaded, "load_weights", path=path, optimizer=False)
        assert again.train(created, 1) == again.train(loaded, 1)
        assert recorded(home, save(again, created, "created")) == other
    monkeypatch.setattr(model, "numerics", None)
    with again.after() as last:
        assert last.train(created, 2) == last.train(loaded, 2)
        assert recorded(home, save(last, created, "later")) == other
