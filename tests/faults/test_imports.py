"""P4 for imports: an import killed at any failpoint is whole or absent, and never there twice."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

import everstep
import everstep.server.app
from everstep import failpoints
from everstep.interchange.archive import adapter_files, pack
from everstep.vault import Vault
from everstep.wire.paths import parse_path
from tests.faults.keeper import Keeper
from tests.scenario import MODEL, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
POINTS = [name for name in failpoints.registered() if name.startswith("runtime.import")]


def adapter(directory: Path, width: int = 64) -> Path:
    directory.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": np.ones((2, width), np.float32),
        f"{name}.lora_B.weight": np.ones((width, 2), np.float32),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": MODEL}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def upload(url: str, body: bytes) -> dict[str, Any] | None:
    """Import with one idempotency key; returns None if the service died meanwhile."""
    try:
        answer = httpx.post(
            f"{url}/api/v1/everstep/checkpoints/import",
            params={"name": "killed"},
            content=body,
            headers={"X-Idempotency-Key": "the same"},
            timeout=60,
        )
    except httpx.TransportError:
        return None
    return dict(answer.raise_for_status().json())


def test_imports_have_three_failpoints() -> None:
    assert len(POINTS) == 3


@pytest.mark.parametrize("point", POINTS)
def test_killed_import_is_whole_or_absent_and_a_retry_completes_it(
    tmp_path: Path, point: str
) -> None:
    (tmp_path / "fired").mkdir()
    armed = {
        failpoints.VARIABLE: f"{point}=kill",
        failpoints.ONCE_VARIABLE: str(tmp_path / "fired"),
    }
    with Keeper(tmp_path / "home", environment=lambda start: armed) as keeper:
        keeper.wait_until(keeper.ready)
        body = b"".join(
            pack(adapter_files(adapter(tmp_path / "adapter", _width(tmp_path / "home"))))
        )
        assert upload(keeper.url, body) is None
        assert (tmp_path / "fired" / point).exists()
        keeper.wait_until(keeper.ready)
        with everstep.ServiceClient(base_url=keeper.url, api_key="tml-test") as client:
            rest = client.create_rest_client()
            listed = [c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints]
            assert len([p for p in listed if p.endswith("/killed")]) == (
                1 if point.endswith("recorded") else 0
            )
            done = upload(keeper.url, body)
            assert done is not None and done["is_new"] == (not point.endswith("recorded"))
            listed = [c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints]
            assert [p for p in listed if p.endswith("/killed")] == [done["tinker_path"]]
            path = done["tinker_path"]
            train(everstep, client.create_training_client_from_state(path).result(), 1)
        vault = Vault(keeper.home / "vault", writer=False)
        manifest = vault.manifest("training", parse_path(path).run_id, "killed")
        for name in manifest.files:
            vault.read(manifest, name)
        assert not list((keeper.home / "imports").glob("*"))


def _width(home: Path) -> int:
    config = json.loads((home / "models/everstep/pico/config.json").read_text())
    return int(config["hidden_size"])


def test_concurrent_uploads_with_one_key_make_one_checkpoint(tmp_path: Path) -> None:
    with Keeper(tmp_path / "home") as keeper:
        keeper.wait_until(keeper.ready)
        body = b"".join(pack(adapter_files(adapter(tmp_path / "adapter", _width(keeper.home)))))
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda: answers.append(upload(keeper.url, body)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({each["tinker_path"] for each in answers}) == 1
        assert sum(each["is_new"] for each in answers) == 1
