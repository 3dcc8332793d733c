"""Downloads with both clients and the official command line, over HTTP as users do it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pyrage
import pytest
import tinker

from tests.conftest import Service
from tests.interop.test_publication import SDKS, clients
from tests.scenario import MODEL, connect, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PEFT = ["adapter_config.json", "adapter_model.safetensors"]


def fetched(urls: dict[str, str]) -> dict[str, bytes]:
    """As the official SDK fetches: without headers."""
    got = {}
    for name, url in urls.items():
        with urllib.request.urlopen(url) as answer:
            got[name] = answer.read()
            assert int(answer.headers["Content-Length"]) == len(got[name])
    return got


@SDKS
def test_an_adapter_is_saved_and_fetched(sdk: Any, service: Service) -> None:
    client, rest = clients(sdk, service.url)
    run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    train(sdk, run, 1)
    identity = pyrage.x25519.Identity.generate()
    plain = run.save_weights_external("plain", ttl_seconds=3600).result().path
    sealed = run.save_weights_external(
        "sealed", age_encryption_recipients=[str(identity.to_public())]
    ).result()
    answer = rest.get_external_weights_urls(plain).result()
    assert answer.expires.tzinfo is not None
    files = fetched(answer.urls)
    assert sorted(files) == PEFT
    assert json.loads(files[PEFT[0]])["base_model_name_or_path"] == MODEL
    encrypted = fetched(rest.get_external_weights_urls(sealed.path).result().urls)
    opened = {n.removesuffix(".age"): pyrage.decrypt(d, [identity]) for n, d in encrypted.items()}
    assert opened == files
    found = {c.tinker_path: c for c in rest.list_checkpoints(run.model_id).result().checkpoints}
    assert found[plain].checkpoint_type == "external"
    assert found[plain].size_bytes == sum(map(len, files.values()))
    with pytest.raises(sdk.RequestFailedError, match=r"age_encryption_recipients\[0\]"):
        run.save_weights_external("bad", age_encryption_recipients=["nobody"]).result()
    with pytest.raises(sdk.RequestFailedError, match="already exists"):
        run.save_weights_external("plain").result()
    train(sdk, run, 1)


def tinker_cli(service: Service, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tinker.cli", *arguments],
        env={"TINKER_BASE_URL": service.url, "TINKER_API_KEY": "tml-test", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_official_command_line_downloads(service: Service, tmp_path: Path) -> None:
    client = connect(tinker, service.url)
    rest = tinker.RestClient(base_url=service.url, api_key="tml-test")
    run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    train(tinker, run, 1)
    external = run.save_weights_external("cli").result().path
    training = run.save_state("cli").result().path
    sampler = run.save_weights_for_sampler("cli").result().path
    wanted = fetched(rest.get_external_weights_urls(external).result().urls)
    before = len(rest.list_user_checkpoints(limit=1000).result().checkpoints)
    for path in (external, training):
        code, text = tinker_cli(service, "checkpoint", "download", path, "-o", str(tmp_path))
        assert code == 0, text
        directory = tmp_path / path.removeprefix("tinker://").replace("/", "_")
        assert {file.name: file.read_bytes() for file in directory.iterdir()} == wanted
    assert len(rest.list_user_checkpoints(limit=1000).result().checkpoints) == before
    code, text = tinker_cli(service, "checkpoint", "download", sampler, "-o", str(tmp_path))
    assert code == 1
    code, text = tinker_cli(service, "checkpoint", "push-hf", external)
    assert (code, "Not logged in" in text) == (1, True), "there is no hub here"
    assert "external_weights/cli" in tinker_cli(service, "checkpoint", "info", external)[1]
