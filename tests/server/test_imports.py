"""Imports: PEFT adapters and archives become checkpoints, and everything else is rejected."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import everstep
from everstep.interchange.archive import adapter_files, pack
from everstep.vault import Vault
from everstep.vault.export import export
from everstep.wire.paths import parse_path
from tests.conftest import Service
from tests.scenario import MODEL, connect, data, train

TEXT = "The adapter was made by somebody else."
IMPORT = "/api/v1/everstep/checkpoints/import"


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service without runs, whose files change only by requests."""
    running = Service(tmp_path_factory.mktemp("quiet") / "home")
    yield running
    running.stop()


def base_directory(service: Service) -> str:
    return str(service.home / "models/everstep/pico")


def peft_model(service: Service, seed: int = 0, **config: Any) -> PeftModel:
    """A PEFT model whose adapter changes every logit."""
    base = AutoModelForCausalLM.from_pretrained(base_directory(service))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05)
    return model.eval()


def saved(model: PeftModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def upload(
    service: Service, body: bytes, *, key: str | None = None, **query: Any
) -> httpx.Response:
    headers = {"X-API-Key": "tml-test"} | ({"X-Idempotency-Key": key} if key else {})
    url = service.url + IMPORT
    return httpx.post(url, params=query, content=body, headers=headers, timeout=60)


def import_checkpoint(service: Service, directory: Path, **query: Any) -> dict[str, Any]:
    answer = upload(service, b"".join(pack(adapter_files(directory))), **query)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(service: Service, body: bytes, **query: Any) -> str:
    answer = upload(service, body, **query)
    assert answer.status_code in (400, 413), answer.text
    return str(answer.json()["detail"])


def tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def peft_logprobs(model: PeftModel) -> np.ndarray:
    ids = torch.tensor([list(TEXT.encode())])
    with torch.no_grad():
        scores = torch.log_softmax(model(ids[:, :-1]).logits.float(), -1)
    return scores[0].gather(-1, ids[0, 1:, None])[:, 0].numpy()


def our_logprobs(client: Any) -> np.ndarray:
    tokens = list(TEXT.encode())
    datum = everstep.types.Datum(
        model_input=everstep.types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
    output = client.forward([datum], "cross_entropy").result()
    return np.asarray(output.loss_fn_outputs[0]["logprobs"].tolist())


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        {"r": 9, "lora_alpha": 7, "target_modules": ["down_proj", "lm_head"], "use_rslora": True},
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": r".*\.0\..*(q|k|v|o)_proj",
            "lora_dropout": 0.1,
        },
    ],
    ids=["q-v", "all-linear", "rslora-mlp-head", "regex-first-layer"],
)
def test_peft_adapter_gives_the_same_logits_and_trains(
    service: Service, tmp_path: Path, config: dict[str, Any]
) -> None:
    model = peft_model(service, **config)
    imported = import_checkpoint(service, saved(model, tmp_path / "peft"), name="theirs")
    assert imported["is_new"] and not imported["has_optimizer"]
    assert bool(imported["notes"]) == ("lora_dropout" in config)

    client = connect(everstep, service.url)
    training = client.create_training_client_from_state(imported["tinker_path"]).result()
    assert np.abs(our_logprobs(training) - peft_logprobs(model)).max() < 1e-5
    losses = [loss for loss, _ in train(everstep, training, 3)]
    assert losses[-1] < losses[0]

    path = training.save_state("later").result().path
    parsed = parse_path(path)
    vault = Vault(service.home / "vault", writer=False)
    manifest = vault.manifest("training", parsed.run_id, "later")
    trained = {name.split(".lora_")[0] for name in _tensors(vault, manifest)}
    theirs = load_file(tmp_path / "peft/adapter_model.safetensors")
    wanted = {name.split(".lora_")[0] for name in theirs if ".lora_" in name}
    assert trained == wanted  # exactly the adapted layers


def _tensors(vault: Vault, manifest: Any) -> list[str]:
    content = bytes(vault.read(manifest, "adapter_model.safetensors"))
    size = int.from_bytes(content[:8], "little")
    return [n for n in json.loads(content[8 : 8 + size]) if n != "__metadata__"]


def test_imported_checkpoint_is_listed_with_its_lineage(service: Service, tmp_path: Path) -> None:
    model = peft_model(service, r=4, target_modules=["q_proj"])
    imported = import_checkpoint(
        service,
        saved(model, tmp_path / "peft"),
        name="from-them",
        source="https://example.org/adapter",
        user_metadata='{"by": "them"}',
    )
    rest = connect(everstep, service.url).create_rest_client()
    run = parse_path(imported["tinker_path"]).run_id
    [listed] = rest.list_checkpoints(run).result().checkpoints
    assert listed.tinker_path == imported["tinker_path"]
    assert listed.user_metadata == {"by": "them"}
    assert rest.get_training_run(run).result().lora_rank == 4
    manifest = Vault(service.home / "vault", writer=False).manifest("training", run, "from-them")
    assert manifest.parents == ["https://example.org/adapter"]
    assert set(manifest.imported or {}) == {
        "from",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_half_precision_adapter_is_imported_exactly(service: Service, tmp_path: Path) -> None:
    model = peft_model(service, r=4, target_modules=["q_proj", "up_proj"])
    directory = saved(model, tmp_path / "peft")
    weights = load_file(directory / "adapter_model.safetensors")
    half = {name: array.astype(np.float16) for name, array in weights.items()}
    save_file(half, directory / "adapter_model.safetensors")
    imported = import_checkpoint(service, directory)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.half().float())
    client = connect(everstep, service.url)
    training = client.create_training_client_from_state(imported["tinker_path"]).result()
    assert np.abs(our_logprobs(training) - peft_logprobs(model)).max() < 1e-5


def test_archive_of_the_hosted_service_is_imported(service: Service, tmp_path: Path) -> None:
    files = contents(saved(peft_model(service, r=4, target_modules=["q_proj"]), tmp_path / "peft"))
    body = tar(
        {f"./{name}": content for name, content in files.items()} | {"checkpoint_complete": b""}
    )
    answer = upload(service, body)
    assert answer.status_code == 200, answer.text


def test_load_with_optimizer_fails_without_optimizer_state(
    service: Service, tmp_path: Path
) -> None:
    directory = saved(peft_model(service, r=4, target_modules=["q_proj"]), tmp_path / "peft")
    imported = import_checkpoint(service, directory)
    client = connect(everstep, service.url)
    with pytest.raises(everstep.RequestFailedError, match="no optimizer state"):
        client.create_training_client_from_state_with_optimizer(imported["tinker_path"]).result()


def test_everstep_checkpoint_is_imported_with_its_optimizer_and_resumes_exactly(
    service: Service, tmp_path: Path
) -> None:
    client = connect(everstep, service.url)
    training = client.create_lora_training_client(base_model=MODEL, rank=8, seed=7).result()
    train(everstep, training, 2)
    training.forward_backward(data(everstep), "cross_entropy").result()  # gradients wait
    parsed = parse_path(training.save_state("here", user_metadata={"a": "b"}).result().path)
    vault = Vault(service.home / "vault", writer=False)
    manifest = vault.manifest("training", parsed.run_id, "here")
    export(vault, manifest, tmp_path / "out")
    (tmp_path / "out/manifest.json").write_bytes(manifest.encode())
    imported = import_checkpoint(service, tmp_path / "out", source=str(parsed))
    assert (imported["has_optimizer"], imported["step"], imported["notes"]) == (True, 2, [])

    path = imported["tinker_path"]
    again = client.create_training_client_from_state_with_optimizer(path).result()
    assert train(everstep, again, 2, shift=5) == train(everstep, training, 2, shift=5)
    theirs = parse_path(imported["tinker_path"])
    copy = vault.manifest("training", theirs.run_id, theirs.name)
    assert copy.files == manifest.files
    assert (copy.lora, copy.user_metadata) == (manifest.lora, {"a": "b"})


def test_retry_imports_no_second_checkpoint(service: Service, tmp_path: Path) -> None:
    directory = saved(peft_model(service, r=4, target_modules=["q_proj"]), tmp_path / "peft")
    first, second = (import_checkpoint(service, directory, key="once-only") for _ in range(2))
    assert first["tinker_path"] == second["tinker_path"]
    assert (first["is_new"], second["is_new"]) == (True, False)
    other = import_checkpoint(service, directory, key="another")
    assert other["tinker_path"] != first["tinker_path"]


def test_collection_is_one_run_of_one_geometry(service: Service, tmp_path: Path) -> None:
    one = saved(peft_model(service, r=4, target_modules=["q_proj"]), tmp_path / "1")
    two = saved(peft_model(service, 1, r=4, target_modules=["q_proj"]), tmp_path / "2")
    other = saved(peft_model(service, r=4, target_modules=["v_proj"]), tmp_path / "3")
    wanted = {"collection": "https://there/run"}
    first = import_checkpoint(service, one, name="a", **wanted)
    second = import_checkpoint(service, two, name="b", kind="sampler", **wanted)
    runs = {parse_path(each["tinker_path"]).run_id for each in (first, second)}
    assert len(runs) == 1
    assert not import_checkpoint(service, one, name="a", **wanted)["is_new"]

    packed = b"".join(pack(adapter_files(two)))
    assert "already exists" in refused(service, packed, name="a", **wanted)
    assert import_checkpoint(service, two, name="a", overwrite=True, **wanted)["is_new"]
    assert "collection" in refused(
        service, b"".join(pack(adapter_files(other))), name="c", **wanted
    )


def with_config(directory: Path, **fields: Any) -> bytes:
    files = contents(directory)
    config = json.loads(files["adapter_config.json"]) | fields
    return tar({**files, "adapter_config.json": json.dumps(config).encode()})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["embed_tokens"]),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("peft_type", "LOHA"),
        ("task_type", "SEQ_CLS"),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["experts.w"]),
        ("trainable_token_indices", [1]),
        ("a_field_of_tomorrow", 1),
        ("r", 0),
        ("r", "4"),
        ("r", 5),
        ("lora_alpha", -1),
        ("lora_alpha", float("inf")),
        ("lora_alpha", None),
        ("base_model_name_or_path", "somebody/else"),
    ],
)
def test_unsupported_configuration_is_rejected_by_field(
    service: Service, peft_directory: Path, field: str, value: Any
) -> None:
    text = refused(service, with_config(peft_directory, **{field: value}))
    assert field in text or (field == "r" and "(r)" in text)


@pytest.fixture(scope="session")
def peft_directory(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("peft") / "adapter"
    return saved(peft_model(service, r=4, target_modules=["q_proj", "v_proj"]), directory)


def with_tensors(directory: Path, change: Any) -> bytes:
    files = contents(directory)
    weights = load_file(directory / "adapter_model.safetensors")
    change(weights)
    buffer = directory.parent / "changed.safetensors"
    save_file(weights, buffer)
    return tar({**files, "adapter_model.safetensors": buffer.read_bytes()})


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop(A), "lora_A"),
        (lambda w: w.update({A.replace("q_proj", "x_proj"): w[A]}), "x_proj"),
        (
            lambda w: w.update({n.replace("q_proj", "x_proj"): w[n] for n in (A, B)}),
            "target_modules: model.layers.0.self_attn.x_proj",
        ),
        (lambda w: w.update({A: w[A][:, :-1].copy()}), "target_modules"),
        (lambda w: w.update({A: w[A].ravel()}), "no matrix"),
        (lambda w: w.update({A: w[A].astype(np.int32)}), "I32"),
        (lambda w: w.update({A: w[A] * np.float32("nan")}), "has diverged"),
        (lambda w: w.update({"lm_head.weight": w[A]}), "lm_head.weight"),
    ],
    ids=["alone", "odd", "unknown", "width", "flat", "integers", "nan", "foreign"],
)
def test_misshaped_tensors_are_rejected_by_name(
    service: Service, peft_directory: Path, change: Any, named: str
) -> None:
    assert named in refused(service, with_tensors(peft_directory, change))


def test_weight_of_an_unknown_module_is_rejected(service: Service, tmp_path: Path) -> None:
    """PEFT saves the head's weight beside its adapter. A changed one is not supported."""
    model = peft_model(service, r=4, target_modules=["lm_head"])
    directory = saved(model, tmp_path / "adapter")
    [name] = [n for n in load_file(directory / "adapter_model.safetensors") if "lora" not in n]
    assert "modules_to_save" in refused(
        service, with_tensors(directory, lambda w: w.update({name: w[name] + 1}))
    )


def test_different_base_model_must_be_named(service: Service, peft_directory: Path) -> None:
    body = with_config(peft_directory, base_model_name_or_path="somebody/else")
    assert "--base-model" in refused(service, body)
    assert upload(service, body, base_model=MODEL).status_code == 200
    assert "not served" in refused(service, body, base_model="no/such")


def test_pickle_is_rejected_with_the_remedy(service: Service, peft_directory: Path) -> None:
    files = contents(peft_directory)
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    text = refused(service, tar(files))
    assert "adapter_model.bin" in text and "safe_serialization=True" in text


def member(name: str, **fields: Any) -> bytes:
    """A tar with one member, of any kind."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        member("../adapter_config.json"),
        member("/adapter_config.json"),
        member("a/../../adapter_config.json"),
        member("adapter_config.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("adapter_config.json", type=tarfile.LNKTYPE, linkname="x"),
        member("adapter_config.json", type=tarfile.CHRTYPE),
        member("adapter_config.json", type=tarfile.FIFOTYPE),
        b"no tar at all",
        b"",
        b"\0" * 1024,
        tar({"adapter_config.json": b"{}"})[:700],
        tar({"adapter_config.json": b"{}", "x/adapter_config.json": b"{}"}),
        tar({"adapter_config.json": b"[" * 100_000, "adapter_model.safetensors": b""}),
        tar({"adapter_config.json": b" " * (2 << 20), "adapter_model.safetensors": b""}),
        tar(
            {"adapter_config.json": b'{"r": 4, "lora_alpha": 1}', "adapter_model.safetensors": b""}
        ),
        tar(
            {
                "adapter_config.json": b'{"r": 4, "lora_alpha": 1}',
                "adapter_model.safetensors": (1 << 62).to_bytes(8, "little") + b"{}",
            }
        ),
    ],
)
def test_untrusted_archives_are_rejected(quiet: Service, body: bytes) -> None:
    before = {path for path in quiet.home.rglob("*") if path.is_file()}
    assert refused(quiet, body)
    made = {path for path in quiet.home.rglob("*") if path.is_file()} - before
    assert not [path for path in made if "imports" in path.parts or "blobs" in path.parts]


def test_optimizer_state_requires_its_manifest(service: Service, peft_directory: Path) -> None:
    files = contents(peft_directory) | {"optimizer.safetensors": b"\2\0\0\0\0\0\0\0{}"}
    assert "manifest.json" in refused(service, tar(files))


@pytest.mark.parametrize("name", ["../x", "", ".x", "a b"])
def test_invalid_names_are_rejected(service: Service, peft_directory: Path, name: str) -> None:
    assert "name" in refused(service, b"".join(pack(adapter_files(peft_directory))), name=name)
