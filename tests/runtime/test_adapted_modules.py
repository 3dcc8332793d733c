"""Adapted modules: a service says what a flag adapts and what not; routers are never adapted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tinker
from transformers import AutoTokenizer

from everstep.engine import Model
from everstep.engine.models.info import ModelInfo, Projections
from everstep.engine.models.peft_names import PeftNames
from everstep.engine.models.pico import write_pico
from everstep.runtime.adapted_modules import adapted_modules, peft_note
from everstep.safetensors_files import decode_header
from everstep.vault import Vault
from tests.runtime.local import Local
from tests.scenario import MODEL
from tests.zoo.specimens import specimen

FAMILY = "hunyuan_v1_moe"
BLOCK = "model.layers.*.mlp."
MLP = {f"{BLOCK}shared_mlp.{name}_proj": 2 for name in ("gate", "up", "down")}
NEVER = {
    "routed experts": {f"{BLOCK}experts.gate_up_proj": 2, f"{BLOCK}experts.down_proj": 2},
    "routers": {f"{BLOCK}gate.wg": 2},
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A mixture of experts with shared MLPs and routers that are projections."""
    root = tmp_path_factory.mktemp("mixture")
    write_pico(root / "pico")
    tokenizer = AutoTokenizer.from_pretrained(root / "pico")
    return specimen(FAMILY, root / "model", tokenizer).served


def test_a_service_says_which_modules_a_run_adapts(
    home: Path, mixture: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "everstep.run")
    with Local(home, mixture) as service:
        body: dict[str, Any] = {"session_id": service.session(), "base_model": MODEL}
        made = service.post("create_model", **body, model_seq_id=0, lora_config={"rank": 4})
        reply = service.result(made["request_id"])
        run = reply["model_id"]
        path = service.do(run, "save_weights", path="a")["path"]
        described = [
            reply,
            service.post("get_info", model_id=run),
            service.post("weights_info", tinker_path=path),
        ]
    for each in described:
        found = each["adapted_modules"]
        assert found["mlp"] == MLP
        assert found["unembed"] == {"lm_head": 1}
        assert sum(found["attention"].values()) == 8
        assert found["not_adapted"] == NEVER
    official: tuple[Any, ...] = (
        tinker.types.CreateModelResponse,
        tinker.types.GetInfoResponse,
        tinker.types.WeightsInfoResponse,
    )
    for kind, each in zip(official, described, strict=True):
        assert not hasattr(kind.model_validate(each), "adapted_modules")
    (line,) = [each for each in caplog.messages if each.startswith("run created")]
    assert "adapted={'attention': 8, 'mlp': 6, 'unembed': 1}" in line
    assert "not_adapted={'routed experts': 4, 'routers': 2}" in line


def info(**projections: Any) -> ModelInfo:
    forms = {"attention": {"l.*.q": 2, "l.*.k": 2}, "mlp": {"l.*.up": 2}, "unembed": {"head": 1}}
    known = Projections(**{**forms, **projections})
    return ModelInfo("m", "m", "A", 9, 9, "", (), "m", "cpu", "float32", projections=known)


def test_kinds_whose_flag_is_off_and_modules_left_out_are_not_adapted() -> None:
    lora = {"train_attn": True, "train_mlp": False, "train_unembed": True}
    found = adapted_modules(info(), {**lora, "modules": ["l.0.q", "head"]})
    assert found is not None
    assert found.model_dump() == {
        "attention": {"l.*.q": 1},
        "mlp": {},
        "unembed": {"head": 1},
        "not_adapted": {"attention": {"l.*.q": 1, "l.*.k": 2}, "mlp": {"l.*.up": 2}},
    }


def test_modules_of_a_model_that_is_not_served_are_not_known() -> None:
    assert adapted_modules(None, {}) is None


def test_modules_that_peft_loses_are_named_where_they_are_adapted() -> None:
    lost = info(peft_lost=("l.*.up",))
    assert "l.*.up" in (peft_note(lost, {"train_mlp": True}) or "")
    assert peft_note(lost, {"train_mlp": False}) is None


def routers(home: Path, path: str) -> set[str]:
    """Return the routers in a checkpoint's file."""
    vault = Vault(home / "vault")
    run, name = path.removeprefix("tinker://").split("/weights/")
    file = vault.read(vault.manifest("training", run, name), "adapter_model.safetensors")
    return {key for key in decode_header(memoryview(file)) if ".gate.wg." in key}


def test_a_checkpoint_that_adapts_routers_still_loads(
    home: Path, mixture: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier releases adapted routers in some families."""
    selected = Model._selected
    with monkeypatch.context() as earlier:
        retired = list(mixture._targets.retired)
        earlier.setattr(Model, "_selected", lambda *args: [*selected(*args), *retired])
        with Local(home, mixture) as service:
            run = service.new_run()
            service.train(run, 0)
            path = service.do(run, "save_weights", path="a")["path"]
            (before,) = service.train(run, 1)[:1]
    assert routers(home, path)

    with service.after() as later:
        fresh = later.new_run()
        assert not routers(home, later.do(fresh, "save_weights", path="none")["path"])
        assert later.do(fresh, "load_weights", path=path, optimizer=True)
        made = later.post(
            "load_weights",
            session_id=later.session(),
            model_seq_id=7,
            path=path,
            optimizer=True,
        )
        again = later.result(made["request_id"])["model_id"]
        for each in (fresh, again):
            assert later.train(each, 1)[0] == before
        saved = later.do(again, "save_weights", path="b")["path"]
        assert routers(home, saved) == routers(home, path)


def test_an_adapter_of_an_earlier_release_is_told_to_load_as_something_else_in_peft(
    home: Path, mixture: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(mixture, "_peft", PeftNames())
        with Local(home, mixture) as service:
            run = service.new_run()
            old = service.do(run, "save_weights", path="old")["path"]
    with service.after() as later:
        new = later.do(run, "save_weights", path="new")["path"]
        described = {
            path: later.post("everstep/checkpoints/details", tinker_path=path)
            for path in (old, new)
        }
    assert described[new]["notes"] == []
    (note,) = described[old]["notes"]
    assert "down_proj, gate_proj, up_proj" in note and "earlier release" in note
    assert {"gate_proj", "up_proj", "down_proj"} <= set(described[old]["peft_parameters"])


def test_configurations_in_the_vault_name_experts_of_no_kind(home: Path, mixture: Model) -> None:
    with Local(home, mixture) as service:
        path = service.do(service.new_run(), "save_weights", path="a")["path"]
    vault = Vault(home / "vault")
    run, name = path.removeprefix("tinker://").split("/weights/")
    saved = json.loads(
        bytes(vault.read(vault.manifest("training", run, name), "adapter_config.json"))
    )
    assert set(saved["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    assert len(saved["target_parameters"]) == 6
    assert all(each.endswith("_proj.weight") for each in saved["target_parameters"])
