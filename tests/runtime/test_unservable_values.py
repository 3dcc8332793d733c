"""What is accepted can be served back, and an old record that can't takes no list down."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from everstep.engine import Model
from everstep.runtime.checkpoints import import_
from tests.runtime.local import Local
from tests.scenario import MODEL

POISON = '{"note": "\\ud800"}'
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    with Local(tmp_path_factory.mktemp("unservable") / "home", pico) as local:
        yield local


def archive(pico: Model, **config: Any) -> bytes:
    """An adapter of one layer, as PEFT writes it."""
    layer = pico.module.get_submodule("model.layers.0.self_attn.q_proj")
    outputs, inputs = layer.weight.shape
    tensors = {
        f"{PREFIX}.lora_A.weight": np.zeros((2, inputs), np.float32),
        f"{PREFIX}.lora_B.weight": np.zeros((outputs, 2), np.float32),
    }
    peft = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "base_model_name_or_path": MODEL,
    }
    files = {
        "adapter_config.json": json.dumps(peft | config).encode(),
        "adapter_model.safetensors": save(tensors),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def upload(local: Local, body: bytes, **query: Any) -> Any:
    return local.http.post("everstep/checkpoints/import", content=body, params=query)


@pytest.mark.parametrize("metadata", [POISON, '{"\\udfff": "x"}', "[" * 5000, '{"a": 1}'])
def test_import_with_metadata_that_can_not_be_served_is_refused(
    local: Local, pico: Model, metadata: str
) -> None:
    answer = upload(local, archive(pico), user_metadata=metadata)
    assert answer.status_code == 400, answer.text
    assert "user_metadata" in answer.json()["detail"]


@pytest.mark.parametrize("value", ["\ud800", float("nan"), 1 << 80])
def test_import_with_a_configuration_that_can_not_be_served_is_refused(
    local: Local, pico: Model, value: Any
) -> None:
    answer = upload(local, archive(pico, note=value))
    assert answer.status_code == 400, answer.text
    assert "adapter_config.json" in answer.json()["detail"]


def test_operation_of_a_run_with_an_unreadable_id_is_refused(local: Local) -> None:
    body = b'{"model_id": "\\ud800", "seq_id": 1, "adam_params": {"beta1": "x"}}'
    answer = local.http.post("optim_step", content=body)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("number", [1 << 64, -(1 << 64), 10**400])
def test_integer_beyond_64_bits_is_refused(local: Local, number: int) -> None:
    metadata = json.dumps({"user_metadata": {"a": [number]}})
    answer = local.http.post("create_session", content=metadata)
    assert (answer.status_code, "user_metadata" in answer.text) == (400, True), answer.text


def test_null_learning_rate_is_refused_and_consumes_its_seq_id(home: Path, pico: Model) -> None:
    with Local(home, pico) as local:
        run = local.new_run()
        first = local.train(run, 0)
        failed = local.do(run, "optim_step", adam_params={"learning_rate": None})
        assert "learning_rate: a number is required" in failed["error"]
        assert failed["category"] == "user"
        assert local.train(run, 0) != first  # nothing waits for a gap


def test_old_record_that_can_not_be_sent_takes_no_list_down(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Local(home, pico) as local:
        run = local.new_run()
        local.do(run, "save_weights", path="sound")
        with monkeypatch.context() as earlier_release:
            earlier_release.setattr(import_, "check_json", lambda *_: None)
            imported = upload(local, archive(pico), user_metadata=POISON, name="spoiled")
        assert imported.status_code == 200, imported.text
        spoiled = imported.json()["tinker_path"]
        listed = local.http.get("checkpoints")
        assert [each["checkpoint_id"] for each in listed.json()["checkpoints"]] == ["weights/sound"]
        found = local.post("checkpoints/search")
        assert [each["checkpoint_id"] for each in found["checkpoints"]] == ["weights/sound"]
        runs = local.http.get("training_runs").json()["training_runs"]
        assert run in [each["training_run_id"] for each in runs]
        assert spoiled in caplog.text
        status, text = local.refused("everstep/checkpoints/details", tinker_path=spoiled)
        assert status == 422 and spoiled in text
    with Local(home, pico) as local:
        assert local.http.get("checkpoints").status_code == 200
