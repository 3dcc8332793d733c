"""Optimizers: AdamW is supported, others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from tests.runtime.local import Local
from tests.scenario import MODEL


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"type": "dimuon", "version": 1}, "'dimuon' is not supported here: how it is defined"),
        ({"type": "sgd", "momentum": 0.9}, "'sgd' is not supported here: there is no such"),
    ],
)
def test_unsupported_optimizer_creates_no_run(
    home: Path, pico: Model, config: dict[str, Any], words: str
) -> None:
    with Local(home, pico) as service:
        body: dict[str, Any] = {
            "session_id": service.session(),
            "model_seq_id": 0,
            "base_model": MODEL,
        }
        made = service.post("create_model", **body, optimizer_config=config)
        failure = service.result(made["request_id"])
        assert failure["category"] == "user"
        assert words in failure["error"]
        assert "'adamw'" in failure["error"]
        run = service.new_run()  # its place is free again
        service.train(run, 0)


@pytest.mark.parametrize("kind", ["dimuon", "sgd"])
def test_step_of_unsupported_optimizer_fails_and_is_not_executed(
    home: Path, pico: Model, kind: str
) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        params = {"type": kind, "learning_rate": 0.1}
        failure = service.do(run, "optim_step", optimizer_params=params)
        assert failure["category"] == "user"
        assert repr(kind) in failure["error"]
        assert service.train(run, 0) == service.train(reference, 0)


def test_adamw_can_be_named(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        body: dict[str, Any] = {
            "session_id": service.session(),
            "model_seq_id": 0,
            "base_model": MODEL,
        }
        made = service.post("create_model", **body, optimizer_config={"type": "adamw"})
        run = service.result(made["request_id"])["model_id"]
        info = service.post("get_info", model_id=run)
        assert info["optimizer_config"] == {"type": "adamw"}
        assert service.do(run, "optim_step", optimizer_params={"type": "adamw"})["metrics"]
