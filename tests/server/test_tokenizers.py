"""Tokenizers for clients without a network: as our client and as the hub's clients fetch them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import everstep
from everstep.engine import Model
from everstep.runtime.tokenizers import write_tokenizer
from tests.conformance.proxy import Proxy, Recorder
from tests.conftest import Service
from tests.runtime.local import Local
from tests.scenario import MODEL, connect

FILE = "tokenizer.json"


@pytest.fixture
def local(home: Path, pico: Model) -> Iterator[Local]:
    with Local(home, pico) as service:
        write_tokenizer(home, MODEL, pico.tokenizer)
        yield service


def at(model: str, file: str, revision: str = "main") -> str:
    return f"http://test/hub/{model}/resolve/{revision}/{file}"


def test_the_files_are_those_of_the_model(local: Local, pico: Model, tmp_path: Path) -> None:
    pico.tokenizer.save_pretrained(tmp_path / "saved")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    offered = local.http.get(f"tokenizers/{MODEL}").json()["files"]
    assert {name: base64.b64decode(content) for name, content in offered.items()} == files
    assert {name: local.http.get(at(MODEL, name)).content for name in files} == files
    assert local.http.get(at(pico.info.tokenizer_id, FILE)).content == files[FILE], "by its source"


def test_the_hub_s_clients_can_keep_what_they_fetched(local: Local) -> None:
    got, told = local.http.get(at(MODEL, FILE)), local.http.head(at(MODEL, FILE, "abc"))
    assert (got.status_code, told.status_code, told.content) == (200, 200, b"")
    for header in ("ETag", "X-Repo-Commit", "Content-Length"):
        assert got.headers[header] == told.headers[header]
    assert got.headers["ETag"] != local.http.get(at(MODEL, "tokenizer_config.json")).headers["ETag"]


@pytest.mark.parametrize("file", ["none.json", "..%2F..%2Fledger.sqlite", "%2Fetc%2Fpasswd"])
def test_a_file_that_is_not_there(local: Local, file: str) -> None:
    for answer in (local.http.get(at(MODEL, file)), local.http.head(at(MODEL, file))):
        assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "EntryNotFound")


def test_a_model_that_is_not_served(local: Local) -> None:
    answer = local.http.get(at("org/other", FILE))
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "RepoNotFound")
    assert answer.json()["detail"] == "Model org/other is not served here."
    assert local.http.get("tokenizers/org/other").status_code == 404


def test_only_a_client_of_this_machine_is_told_of_a_directory(local: Local, pico: Model) -> None:
    run = local.new_run()
    told = {}
    for host in ("127.0.0.1", "::1", "10.1.2.3", "testclient"):
        client = TestClient(local.app, base_url="http://test/api/v1", client=(host, 5))
        answer = client.post("get_info", json={"model_id": run})
        told[host] = answer.json()["model_data"]["tokenizer_id"]
    directory = pico.info.tokenizer_id
    assert told == {
        "127.0.0.1": directory,
        "::1": directory,
        "10.1.2.3": MODEL,
        "testclient": MODEL,
    }


@pytest.mark.slow
def test_our_client_fetches_them_from_the_service(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is told of a directory, and with no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recorder = Recorder()
    with Proxy(service.url, recorder) as proxy:
        client = connect(everstep, proxy.url)
        run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        sampler = client.create_sampling_client(base_model=MODEL).result()
        for each in (run, sampler):
            tokenizer = each.get_tokenizer()
            assert tokenizer.encode("step") == list(b"step")
            assert not Path(tokenizer.name_or_path).is_relative_to(service.home)
        client.close().result()
    assert len(recorder.of(f"/tokenizers/{MODEL}")) == 2
