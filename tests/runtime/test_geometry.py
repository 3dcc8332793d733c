"""Checkpoints keep the LoRA geometry of their run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everstep.engine import Model
from tests.runtime.local import Local
from tests.scenario import MODEL

LORA = {
    "rank": 6,
    "seed": 77,
    "train_attn": True,
    "train_mlp": False,
    "train_unembed": False,
}


def weights_info(service: Local, path: str) -> dict[str, Any]:
    """Return a checkpoint's configuration, without its base model's modules."""
    found: dict[str, Any] = service.post("weights_info", tinker_path=path)
    assert found.pop("adapted_modules")["attention"]
    return found


def test_run_created_from_checkpoint_keeps_lora_geometry(home: Path, pico: Model) -> None:
    expected = {
        **{name: value for name, value in LORA.items() if name.startswith("train_")},
        "base_model": MODEL,
        "is_lora": True,
        "lora_rank": 6,
        "lora_alpha": 32.0,
        "lora_seed": 77,
        "optimizer_config": {"type": "adamw"},
    }
    with Local(home, pico) as service:
        session: dict[str, Any] = {"session_id": service.session(), "base_model": MODEL}
        made = service.post("create_model", **session, model_seq_id=0, lora_config=LORA)
        run = service.result(made["request_id"])["model_id"]
        service.train(run, 0)
        for route in ("save_weights", "save_weights_for_sampler"):
            path = service.do(run, route, path="a")["path"]
            assert weights_info(service, path) == expected
        path = f"tinker://{run}/weights/a"
        for number, optimizer in ((1, True), (2, False)):
            loaded = service.post(
                "load_weights", **session, model_seq_id=number, path=path, optimizer=optimizer
            )
            other = service.result(loaded["request_id"])["model_id"]
            again = service.do(other, "save_weights", path="b")["path"]
            assert weights_info(service, again) == expected
            assert service.post("get_info", model_id=other)["lora_rank"] == 6
