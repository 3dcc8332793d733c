"""Tokenizers for clients without a network: Everstep's client and clients of the hub."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import everstep
from everstep.engine import Model
from everstep.worker.protocol.tokenizer_files import write_tokenizer
from tests.conformance.proxy import Proxy, Recorder
from tests.conftest import Service
from tests.runtime.local import Local
from tests.scenario import MODEL, connect

FILE = "tokenizer.json"


@pytest.fixture
def local(home: Path, pico: Model) -> Iterator[Local]:
    with Local(home, pico) as service:
        write_tokenizer(home, MODEL, pico.tokenizer, pico.info.source)
        yield service


def at(model: str, file: str, revision: str = "main") -> str:
    return f"http://test/hub/{model}/resolve/{revision}/{file}"


def test_tokenizer_files_are_those_of_the_model(local: Local, pico: Model) -> None:
    directory = Path(pico.info.source)
    files = {path.name: path.read_bytes() for path in directory.glob("*.json")}
    assert {FILE, "tokenizer_config.json", "config.json"} <= set(files)
    offered = local.http.get(f"tokenizers/{MODEL}").json()["files"]
    assert {name: base64.b64decode(content) for name, content in offered.items()} == files
    assert {name: local.http.get(at(MODEL, name)).content for name in files} == files
    assert local.http.get(at(pico.info.tokenizer_id, FILE)).content == files[FILE], "by its source"


def test_hub_clients_can_cache_tokenizer_files(local: Local) -> None:
    got, head = local.http.get(at(MODEL, FILE)), local.http.head(at(MODEL, FILE, "abc"))
    assert (got.status_code, head.status_code, head.content) == (200, 200, b"")
    for header in ("ETag", "X-Repo-Commit", "Content-Length"):
        assert got.headers[header] == head.headers[header]
    assert got.headers["ETag"] != local.http.get(at(MODEL, "tokenizer_config.json")).headers["ETag"]


def test_hub_clients_find_named_chat_templates(home: Path, pico: Model, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(pico.info.source, source)
    template = source / "additional_chat_templates/tool_use.jinja"
    template.parent.mkdir()
    template.write_bytes(b"{{ tools }}")
    name = template.relative_to(source).as_posix()
    with Local(home, pico) as service:
        write_tokenizer(home, MODEL, pico.tokenizer, source)
        api = f"http://test/hub/api/models/{MODEL}"
        (entry,) = service.http.get(f"{api}/tree/main/additional_chat_templates").json()
        assert (entry["type"], entry["path"], entry["size"]) == ("file", name, 11)
        top = {each["path"]: each["type"] for each in service.http.get(f"{api}/tree/main").json()}
        assert (top["additional_chat_templates"], top[FILE]) == ("directory", "file")
        every = service.http.get(f"{api}/tree/main", params={"recursive": True}).json()
        siblings = service.http.get(f"{api}/revision/main").json()["siblings"]
        paths = {each["path"] for each in every}
        assert name in paths and paths == {each["rfilename"] for each in siblings}
        assert service.http.get(at(MODEL, name)).content == b"{{ tools }}"
        assert name in service.http.get(f"tokenizers/{MODEL}").json()["files"]


def test_hub_answers_for_a_directory_or_model_that_is_not_there(local: Local) -> None:
    for path, code in (
        (f"{MODEL}/tree/main/additional_chat_templates", "EntryNotFound"),
        ("org/other/tree/main", "RepoNotFound"),
        ("org/other", "RepoNotFound"),
    ):
        answer = local.http.get(f"http://test/hub/api/models/{path}")
        assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, code)


@pytest.mark.parametrize("file", ["none.json", "..%2F..%2Fledger.sqlite", "%2Fetc%2Fpasswd"])
def test_unknown_tokenizer_file_is_not_found(local: Local, file: str) -> None:
    for answer in (local.http.get(at(MODEL, file)), local.http.head(at(MODEL, file))):
        assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "EntryNotFound")


def test_unserved_model_is_not_found(local: Local) -> None:
    answer = local.http.get(at("org/other", FILE))
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "RepoNotFound")
    assert answer.json()["detail"].startswith("Model 'org/other' is not served here. Served: ")
    assert "--model org/other" in answer.json()["detail"]
    assert local.http.get("tokenizers/org/other").status_code == 404


def test_only_a_local_client_gets_the_model_directory(local: Local, pico: Model) -> None:
    run = local.new_run()
    directories = {}
    for host in ("127.0.0.1", "::1", "10.1.2.3", "testclient"):
        client = TestClient(local.app, base_url="http://test/api/v1", client=(host, 5))
        answer = client.post("get_info", json={"model_id": run})
        directories[host] = answer.json()["model_data"]["tokenizer_id"]
    directory = pico.info.tokenizer_id
    assert directories == {
        "127.0.0.1": directory,
        "::1": directory,
        "10.1.2.3": MODEL,
        "testclient": MODEL,
    }


@pytest.mark.slow
def test_client_fetches_tokenizers_from_the_service(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client fetches them with a directory in the answer and without one, without a hub."""
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
