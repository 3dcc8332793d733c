"""Downloads over HTTP, with both clients and with the official command line."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pyrage
import pytest
import tinker

import everstep
from everstep.client import RestClient, download_checkpoint
from tests.conftest import Service
from tests.interop.sdks import Releases
from tests.interop.test_publication import SDKS, clients
from tests.scenario import MODEL, connect, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PEFT = ["adapter_config.json", "adapter_model.safetensors"]


def fetched(urls: dict[str, str]) -> dict[str, bytes]:
    """Fetch files without headers, as the official SDK does."""
    got = {}
    for name, url in urls.items():
        with urllib.request.urlopen(url) as answer:
            got[name] = answer.read()
            assert int(answer.headers["Content-Length"]) == len(got[name])
    return got


@SDKS
def test_external_weights_are_fetched_plain_and_encrypted(sdk: Any, service: Service) -> None:
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


def test_official_command_line_downloads_external_and_training_checkpoints(
    service: Service, releases: Releases, tmp_path: Path
) -> None:
    def run_cli(*arguments: str) -> tuple[int, str]:
        return releases.command_line(service.url, *arguments)

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
        code, text = run_cli("checkpoint", "download", path, "-o", str(tmp_path))
        assert code == 0, text
        directory = tmp_path / path.removeprefix("tinker://").replace("/", "_")
        assert {file.name: file.read_bytes() for file in directory.iterdir()} == wanted
    assert len(rest.list_user_checkpoints(limit=1000).result().checkpoints) == before
    code, text = run_cli("checkpoint", "download", sampler, "-o", str(tmp_path))
    assert code == 1
    code, text = run_cli("checkpoint", "push-hf", external)
    assert (code, "Not logged in" in text) == (1, True), "there is no hub here"
    assert "external_weights/cli" in run_cli("checkpoint", "info", external)[1]


@pytest.fixture(scope="module")
def saved(service: Service) -> dict[str, str]:
    """One state, saved as each of the three kinds."""
    client = connect(everstep, service.url)
    run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    train(everstep, run, 1)
    return {
        "training": run.save_state("all").result().path,
        "sampler": run.save_weights_for_sampler("all").result().path,
        "external": run.save_weights_external("all").result().path,
    }


@pytest.mark.parametrize("kind", ["training", "sampler", "external"])
def test_download_checkpoint_fetches_every_kind(
    kind: str, service: Service, saved: dict[str, str], tmp_path: Path
) -> None:
    client = connect(everstep, service.url)
    reported: dict[str, tuple[int, int | None]] = {}
    paths = download_checkpoint(
        client,
        saved[kind],
        tmp_path / "got",
        progress=lambda name, there, total: reported.update({name: (there, total)}),
    )
    assert paths == sorted((tmp_path / "got").iterdir())
    got = {path.name: path.read_bytes() for path in paths}
    rest = client.create_rest_client()
    urls = rest.get_external_weights_urls(saved["external"]).result().urls
    assert {name: got[name] for name in PEFT} == fetched(urls)
    more = {"training": ["checkpoint_complete", "manifest.json", "optimizer.safetensors"]}
    more["sampler"] = ["checkpoint_complete"]
    assert sorted(got) == sorted([*PEFT, *more.get(kind, [])])
    assert sorted(reported) == (PEFT if kind == "external" else ["checkpoint.tar"])
    assert all(there == total for there, total in reported.values())
    assert [path.name for path in tmp_path.iterdir()] == ["got"], "no other file remains"
    with pytest.raises(FileExistsError, match="choose another"):
        download_checkpoint(client, saved[kind], tmp_path / "got")


def record(first: dict[str, int], name: str, there: int) -> None:
    first.setdefault(name, there)


@pytest.mark.parametrize("kind", ["training", "sampler", "external"])
def test_interrupted_download_is_absent_and_resumes(
    kind: str, service: Service, saved: dict[str, str], tmp_path: Path
) -> None:
    client = connect(everstep, service.url)

    def interrupt(name: str, there: int, total: int | None) -> None:
        if there > 0 and "config" not in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_checkpoint(client, saved[kind], tmp_path / "got", progress=interrupt)
    assert not (tmp_path / "got").exists()
    first: dict[str, int] = {}
    download_checkpoint(
        client,
        saved[kind],
        tmp_path / "got",
        progress=lambda name, there, total: record(first, name, there),
    )
    assert max(first.values()) > 0, "it resumed"
    again = download_checkpoint(client, saved[kind], tmp_path / "again")
    assert [p.read_bytes() for p in again] == [
        p.read_bytes() for p in sorted((tmp_path / "got").iterdir())
    ]


def test_training_checkpoints_are_exported_where_a_service_has_no_archives(
    service: Service, saved: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: RestClient, tinker_path: str) -> Any:
        return self._get("/no/such/route", everstep.types.CheckpointArchiveUrlResponse)

    monkeypatch.setattr(RestClient, "get_checkpoint_archive_url_from_tinker_path", missing)
    client = connect(everstep, service.url)
    rest = client.create_rest_client()
    before = rest.list_user_checkpoints(limit=1000).result().checkpoints
    paths = download_checkpoint(client, saved["training"], tmp_path / "got")
    assert [path.name for path in paths] == PEFT
    assert rest.list_user_checkpoints(limit=1000).result().checkpoints == before
    with pytest.raises(everstep.DownloadError, match="save_weights_external"):
        download_checkpoint(client, saved["sampler"], tmp_path / "other")
    with pytest.raises(everstep.NotFoundError, match="does not exist"):
        download_checkpoint(client, saved["training"] + "x", tmp_path / "other")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", ".", "a/../../b"])
def test_file_name_can_not_leave_the_directory(
    name: str, service: Service, saved: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    client = connect(everstep, service.url)
    answer = client.create_rest_client().get_external_weights_urls(saved["external"]).result()
    url = next(iter(answer.urls.values()))

    class Evil:
        def result(self) -> Any:
            return answer.model_copy(update={"urls": {name: url}})

    monkeypatch.setattr(RestClient, "get_external_weights_urls", lambda *_: Evil())
    with pytest.raises(everstep.DownloadError, match="outside of the directory"):
        download_checkpoint(client, saved["external"], tmp_path / "a" / "b" / "got")
    assert not list(tmp_path.rglob("*evil*"))
