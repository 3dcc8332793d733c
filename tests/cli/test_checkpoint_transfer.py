"""``everstep checkpoint export`` and ``import``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import everstep
from everstep.cli.app import app
from everstep.cli.common import hub as hugging_face
from everstep.cli.common.errors import Refused
from tests.cli.hub_stand_in import TOKEN, hub
from tests.conftest import Service
from tests.scenario import MODEL, train

pytestmark = pytest.mark.slow
PROMPTS = ("The quick brown fox jumps over the lazy dog.", "def f(x):\n    return x + 1\n")
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}


@dataclass
class Saved:
    """A trained checkpoint, and the service's logprobs of the prompts with it."""

    home: Path
    path: str
    headless: str
    logprobs: list[np.ndarray]


@pytest.fixture(scope="module")
def saved(service: Service) -> Saved:
    with everstep.ServiceClient(base_url=service.url, api_key="tml-test") as client:
        run = client.create_lora_training_client(MODEL, 8, 1).result()
        train(everstep, run, 3)
        for name in ("first", "before"):
            run.save_state(name).result()
        path = run.save_state("trained", user_metadata={"loss": "0.5 | low"}).result().path
        sampler = client.create_sampling_client(path).result()
        tokenizer = run.get_tokenizer()
        logprobs = []
        for text in PROMPTS:
            prompt = everstep.types.ModelInput.from_ints(tokenizer.encode(text))
            logprobs.append(np.array(sampler.compute_logprobs(prompt).result()[1:]))
        plain = client.create_lora_training_client(MODEL, 8, 1, train_unembed=False).result()
        train(everstep, plain, 1)
        headless = plain.save_state("headless").result().path
    return Saved(service.home, path, headless, logprobs)


def invoke(saved: Saved, *words: object) -> Result:
    env = {"EVERSTEP_HOME": str(saved.home), "TERM": "dumb", "COLUMNS": "200"}
    return CliRunner().invoke(app, ["checkpoint", *map(str, words)], env=env)


def read_json(saved: Saved, *words: object) -> Any:
    done = invoke(saved, *words, "--json")
    assert done.exit_code == 0, done.output + done.stderr
    return json.loads(done.stdout)


def logprobs(model: Any, directory: Path) -> list[np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for text in PROMPTS:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            scores = torch.log_softmax(model(ids[:, :-1]).logits.float(), -1)
        found.append(scores[0].gather(-1, ids[0, 1:, None])[:, 0].numpy())
    return found


def farthest(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merged_model_has_the_service_logprobs_in_transformers(
    saved: Saved, tmp_path: Path, dtype: str
) -> None:
    out = tmp_path / "merged"
    done = read_json(saved, "export", saved.path, out, "--format", "merged", "--dtype", dtype)
    assert done["merged_as"] == dtype and "model.safetensors" in done["files"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert farthest(logprobs(model, out), saved.logprobs) < TOLERANCE[dtype]


def test_exported_adapter_has_the_service_logprobs_in_peft(saved: Saved, tmp_path: Path) -> None:
    done = read_json(saved, "export", saved.path, tmp_path / "adapter")
    assert set(done["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    directory = saved.home / "models/everstep/pico"
    base = AutoModelForCausalLM.from_pretrained(directory)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert farthest(logprobs(model, directory), saved.logprobs) < TOLERANCE["fp32"]


def test_export_by_address_equals_export_by_home(saved: Saved, tmp_path: Path) -> None:
    read_json(saved, "export", saved.path, tmp_path / "here")
    url = ("--base-url", address(saved), "--api-key", "tml-test")
    read_json(saved, "export", saved.path, tmp_path / "there", *url)
    here, there = (
        {f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("here", "there")
    )
    assert here == there


def test_export_notes_adapter_that_vllm_can_not_serve(saved: Saved, tmp_path: Path) -> None:
    [note] = read_json(saved, "export", saved.path, tmp_path / "a")["notes"]
    assert "lm_head" in note and "--format merged" in note
    assert read_json(saved, "export", saved.headless, tmp_path / "b")["notes"] == []


def test_model_card_has_the_lineage(saved: Saved, tmp_path: Path) -> None:
    read_json(saved, "export", saved.path, tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    manifest = everstep_manifest(saved)
    for wanted in (
        f'base_model: "{MODEL}"',
        'library_name: "peft"',
        saved.path,
        "| step | 3 |",
        "| LoRA rank | 8 |",
        '| optimizer | {"type": "adamw"} |',
        manifest.base_fingerprint,
        manifest.files["adapter_model.safetensors"].blake3,
        "0.5 \\| low",
        f"| parents | {saved.path.replace('trained', 'before')} |",
        f"| base model's dtype | {manifest.environment['dtype']} |",
    ):
        assert wanted in card


def test_info_and_diff_show_the_lineage(saved: Saved) -> None:
    first, before = (saved.path.replace("trained", name) for name in ("first", "before"))
    assert read_json(saved, "info", saved.path)["details"]["parents"] == [before]
    for older in (first, before):
        done = invoke(saved, "diff", older, saved.path, "--json")
        assert json.loads(done.stdout)["lineage"] == "B descends from A"


def test_merge_refuses_another_base_model(saved: Saved, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(saved.home / "models/everstep/pico", other)
    weights = load_file(other / "model.safetensors")
    name = next(each for each in weights if "norm" in each)
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", {"format": "pt"})
    words = ("--format", "merged", "--base-model", other)
    done = invoke(saved, "export", saved.path, tmp_path / "out", *words)
    assert done.exit_code == 1 and "is not the everstep/pico that" in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("cut", [20, 200])
def test_import_reports_truncated_archive(
    saved: Saved, peft_directory: Path, tmp_path: Path, cut: int
) -> None:
    source = tmp_path / "adapter.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        archive.add(peft_directory, arcname="adapter")
    source.write_bytes(source.read_bytes()[:cut])
    done = invoke(saved, "import", source)
    assert done.exit_code == 1 and "truncated" in done.stderr


def everstep_manifest(saved: Saved) -> Any:
    from everstep.vault import Vault
    from everstep.wire.paths import parse_path

    path = parse_path(saved.path)
    return Vault(saved.home / "vault", writer=False).manifest("training", path.run_id, path.name)


def test_export_refuses_directory_that_is_not_empty(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    done = invoke(saved, "export", saved.path, tmp_path / "out")
    assert done.exit_code == 1 and "not empty" in done.stderr
    assert [each.name for each in tmp_path.rglob("*")] == ["out", "mine"]


def test_failed_export_leaves_nothing(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    words = ("--format", "merged", "--base-model", tmp_path / "base")
    done = invoke(saved, "export", saved.path, tmp_path / "out", *words)
    assert done.exit_code == 1 and "config.json" in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["base"]


def push(saved: Saved, url: str, directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "everstep.cli", "checkpoint", "export", saved.path]
    env = {
        **os.environ,
        "EVERSTEP_HOME": str(saved.home),
        "HF_ENDPOINT": url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DEBUG": "1",  # the most verbose logs
    }
    whole = [*command, str(directory), "--push-to-hub", "me/adapter", *words]
    return subprocess.run(whole, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("words", [(), ("--public",)])
def test_push_is_private_by_default_and_never_prints_the_token(
    saved: Saved, tmp_path: Path, words: tuple[str, ...]
) -> None:
    with hub() as stand_in:
        done = push(saved, stand_in.url, tmp_path / "out", *words)
        assert done.returncode == 0, done.stderr
        assert stand_in.repositories == {"me/adapter": not words}
        pushed = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert stand_in.files == pushed
    assert "/me/adapter" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_refused_push_is_reported_and_leaves_the_export(saved: Saved, tmp_path: Path) -> None:
    with hub() as stand_in:
        stand_in.refuses = True
        done = push(saved, stand_in.url, tmp_path / "out")
    assert done.returncode == 1
    assert "could not be pushed" in done.stderr and "401" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert (tmp_path / "out/README.md").exists()


@pytest.fixture(scope="module")
def peft_directory(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("peft") / "their adapter"
    base = AutoModelForCausalLM.from_pretrained(saved.home / "models/everstep/pico")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(directory)
    config_file = directory / "adapter_config.json"
    named = json.loads(config_file.read_text()) | {"base_model_name_or_path": MODEL}
    config_file.write_text(json.dumps(named))
    return directory


@pytest.mark.parametrize("form", ["directory", "tar", "tar.gz"])
def test_adapter_is_imported_from_directory_or_archive(
    saved: Saved, peft_directory: Path, tmp_path: Path, form: str
) -> None:
    source = peft_directory
    if form != "directory":
        source = tmp_path / f"their adapter.{form}"
        with tarfile.open(source, "w:gz" if form.endswith("gz") else "w") as archive:
            archive.add(peft_directory, arcname="adapter")
    done = read_json(saved, "import", source)
    assert done["notes"] == ["Not imported, as a checkpoint has no such files: README.md."]
    assert done["tinker_path"].endswith("/weights/their-adapter")
    listed = read_json(saved, "list", "--name", "their-adapter")["checkpoints"]
    assert done["tinker_path"] in [each["tinker_path"] for each in listed]


def test_import_of_everstep_archive_includes_the_optimizer(saved: Saved, tmp_path: Path) -> None:
    with everstep.ServiceClient(base_url=address(saved), api_key="tml-test") as client:
        answer = archive_of(client, saved.path)
    (tmp_path / "ours.tar").write_bytes(answer)
    done = read_json(saved, "import", tmp_path / "ours.tar", "--name", "again")
    assert (done["has_optimizer"], done["step"], done["notes"]) == (True, 3, [])


def address(saved: Saved) -> str:
    return str(json.loads((saved.home / "service.json").read_text())["address"])


def archive_of(client: Any, path: str) -> bytes:
    import httpx

    from everstep.wire.paths import parse_path

    parsed = parse_path(path)
    where = f"/api/v1/training_runs/{parsed.run_id}/checkpoints/{parsed.checkpoint_id}/archive"
    answer = httpx.get(client.base_url + where, follow_redirects=True)
    return answer.raise_for_status().content


def test_refused_import_names_the_field(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    done = invoke(saved, "import", tmp_path)
    assert done.exit_code == 1 and "safe_serialization=True" in done.stderr
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    done = invoke(saved, "import", tmp_path)
    assert done.exit_code == 1 and "r: None" in done.stderr


def test_push_without_a_network_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(Refused) as caught:
        hugging_face.push(tmp_path, "me/model", public=False, message="m")
    text = str(caught.value)
    assert "\n" not in text and "could not be pushed" in text and "hf upload" in text
    assert "hf_secret" not in text
