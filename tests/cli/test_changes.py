"""Changes, copies, verification and deletion by ``everstep checkpoint``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import everstep
from everstep.cli.common import outcomes
from everstep.cli.common.errors import Code
from everstep.client._transport.errors import APIConnectionError
from everstep.vault.storage.keys import blob_key
from tests.cli.remote import failure, invoke, print_of, read_json
from tests.client.keeping_service import KeepingService
from tests.conftest import Service
from tests.promises.test_exactness import hashes
from tests.scenario import MODEL, connect, train

pytestmark = pytest.mark.slow


@pytest.fixture
def url(service: Service) -> str:
    return service.url


@pytest.fixture
def client(service: Service) -> Iterator[Any]:
    with connect(everstep, service.url) as client:
        yield client


@pytest.fixture
def run(client: Any) -> Any:
    run = client.create_lora_training_client(MODEL, 4, 1).result()
    train(everstep, run, 1)
    return run


@pytest.fixture
def save(run: Any) -> Callable[..., str]:
    return lambda name, **more: run.save_state(name, **more).result().path


def listed(url: str, path: str) -> Any:
    found = read_json(url, "checkpoint", "list", "--run", path.split("/")[2])["checkpoints"]
    return {each["tinker_path"]: each for each in found}.get(path)


def test_checkpoint_is_published_limited_and_tagged(url: str, save: Callable[..., str]) -> None:
    a, b = save("a", user_metadata={"loss": "1"}), save("b")
    results = read_json(url, "checkpoint", "publish", a, b)["results"]
    assert results == [{"tinker_path": each, "error": None} for each in (a, b)]
    assert listed(url, a)["public"] and listed(url, b)["public"]
    assert print_of(url, "checkpoint", "unpublish", a) == f"private {a}\n"
    assert not listed(url, a)["public"]
    assert "expires in 7d" in print_of(url, "checkpoint", "set-ttl", a, "--ttl", "7d")
    assert listed(url, a)["expires_at"] is not None
    read_json(url, "checkpoint", "set-ttl", a, "--never")
    assert listed(url, a)["expires_at"] is None
    now = read_json(url, "checkpoint", "tag", a, "good=yes", "why=a=b", "--remove", "loss")
    assert now["user_metadata"] == {"good": "yes", "why": "a=b"} == listed(url, a)["user_metadata"]
    loop = save("loop", user_metadata={"everstep_run": "loop"})
    assert print_of(url, "checkpoint", "tag", loop, "x=y") == "x  y\n"
    assert "everstep_run" not in print_of(url, "checkpoint", "info", loop)


def test_failure_of_one_path_does_not_stop_the_others(url: str, save: Callable[..., str]) -> None:
    a = save("a")
    missing = a + "0"
    done = invoke(url, "checkpoint", "publish", missing, a)
    assert done.exit_code == 3 and missing in done.stderr
    assert listed(url, a)["public"]


def test_missing_checkpoint_does_not_stop_delete_and_verify(
    url: str, save: Callable[..., str]
) -> None:
    a = save("a")
    missing = a + "0"
    checked = invoke(url, "checkpoint", "verify", missing, a, "--json")
    report = json.loads(checked.stdout)
    assert checked.exit_code == 3 and not report["ok"] and missing in checked.stderr
    assert {each["tinker_path"]: each["ok"] for each in report["results"]} == {
        a: True,
        missing: False,
    }
    assert "ok       " + a in invoke(url, "checkpoint", "verify", missing, a).stdout
    assert failure(url, "checkpoint", "delete", "nothing", a, "--yes")[0] == 2
    assert listed(url, a) is not None, "wrong usage is reported before any change"
    done = invoke(url, "checkpoint", "delete", missing, a, "--json", "--yes")
    assert done.exit_code == 3 and missing in done.stderr
    errors = {each["tinker_path"]: each["error"] for each in json.loads(done.stdout)["results"]}
    assert errors[a] is None and "checkpoint list" in errors[missing]
    assert listed(url, a) is None


def test_json_of_empty_result_is_printed(url: str) -> None:
    none = ("--name", "no-checkpoint-is-called-that")
    assert read_json(url, "checkpoint", "delete", *none, "--yes") == {"results": []}
    assert read_json(url, "checkpoint", "delete", *none, "--dry-run") == {"results": []}
    assert print_of(url, "checkpoint", "verify", *none) == "No checkpoints.\n"


def test_unreachable_service_is_not_called_for_every_path() -> None:
    tried = []

    def do(path: str) -> None:
        tried.append(path)
        raise APIConnectionError("gone")

    done = outcomes.for_each(["a", "b", "c"], do)
    assert tried == ["a"] and [each.code for each in done] == [Code.UNREACHABLE] * 3


def test_service_verifies_its_own_files(
    url: str, service: Service, save: Callable[..., str]
) -> None:
    a, b = save("a"), save("b", user_metadata={"x": "y"})
    report = read_json(url, "checkpoint", "verify", "--run", a.split("/")[2])
    assert report["ok"] and {each["tinker_path"] for each in report["results"]} == {a, b}
    details = read_json(url, "checkpoint", "info", b)["details"]
    config = next(each for each in details["files"] if each["name"] == "adapter_config.json")
    blob = service.home / "vault" / blob_key(config["blake3"])
    sound = blob.read_bytes()
    try:
        blob.write_bytes(sound[:-1] + b"?")
        done = invoke(url, "checkpoint", "verify", b)
        assert done.exit_code == 1
        assert f"DAMAGED  {b}" in done.stdout and "adapter_config.json" in done.stdout
    finally:
        blob.write_bytes(sound)
    assert "all intact" in print_of(url, "checkpoint", "verify", b)
    assert failure(url, "checkpoint", "verify", b + "0")[0] == 3


def test_save_as_copies_the_complete_checkpoint(
    url: str, client: Any, service: Service, save: Callable[..., str]
) -> None:
    a = save("a", user_metadata={"loss": "1"})
    made = read_json(url, "checkpoint", "save-as", a, "released", "--ttl", "2d")["tinker_path"]
    assert made.endswith("/weights/released")
    assert listed(url, made)["user_metadata"] == {"loss": "1"}
    assert read_json(url, "checkpoint", "info", made)["details"]["parents"] == [a]
    assert hashes(service.home, made) == hashes(service.home, a)
    client.create_training_client_from_state_with_optimizer(made).result()
    assert failure(url, "checkpoint", "save-as", a, "a/b")[0] == 2
    assert failure(url, "checkpoint", "save-as", a + "0", "x")[0] == 3


def test_copy_puts_checkpoint_into_project(url: str, save: Callable[..., str]) -> None:
    made = print_of(url, "checkpoint", "copy", save("a"), "--project", "copies").strip()
    runs = read_json(url, "run", "list", "--project", "copies")["runs"]
    assert made.split("/")[2] in [each["training_run_id"] for each in runs]


def test_delete_by_path_and_filter_asks_for_confirmation(
    url: str, save: Callable[..., str]
) -> None:
    paths = [save(name) for name in ("step-1", "step-2", "final")]
    run = paths[0].split("/")[2]
    mine = ("checkpoint", "delete", "--run", run, "--name", "step-*")
    dry = print_of(url, *mine, "--dry-run")
    assert paths[0] in dry and paths[1] in dry and paths[2] not in dry
    code, text = failure(url, *mine, answer="n\n")
    assert (code, text) == (1, "everstep: Nothing was deleted.")
    assert failure(url, *mine)[0] == 1, "nobody is there to say yes"
    assert failure(url, *mine, "--json")[0] == 2
    assert listed(url, paths[0]) is not None
    done = invoke(url, *mine, answer="y\n")
    assert done.exit_code == 0 and "Delete 2 checkpoints, " in done.output
    assert read_json(url, "checkpoint", "list", "--run", run)["total"] == 1
    results = read_json(url, "checkpoint", "delete", paths[2], "--yes")["results"]
    assert results == [{"tinker_path": paths[2], "error": None}]
    assert failure(url, "checkpoint", "delete", paths[2], "--yes")[0] == 3
    assert print_of(url, *mine, "--yes") == "No checkpoints.\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("delete",), "--run"),
        (("delete", "tinker://a/weights/b", "--kind", "training"), "--run"),
        (("set-ttl", "tinker://a/weights/b"), "--never"),
        (("set-ttl", "tinker://a/weights/b", "--ttl", "1h", "--never"), "--never"),
        (("set-ttl", "tinker://a/weights/b", "--ttl", "soon"), "7d"),
        (("set-ttl", "tinker://a/weights/b", "--ttl", "999999999w"), "longer"),
        (("tag", "tinker://a/weights/b"), "KEY=VALUE"),
        (("tag", "tinker://a/weights/b", "x"), "KEY=VALUE"),
        (("verify", "tinker://a/weights/b", "--run", "a"), "filters"),
    ],
)
def test_wrong_usage_is_reported_before_any_change(
    url: str, words: tuple[str, ...], says: str
) -> None:
    code, text = failure(url, "checkpoint", *words)
    assert code == 2 and says in text


def test_gc_reports_dry_run(url: str) -> None:
    assert read_json(url, "checkpoint", "gc", "--dry-run")["dry_run"] is True
    assert "would be removed" in print_of(url, "checkpoint", "gc", "--dry-run")


def test_other_service_supports_protocol_routes_and_lacks_the_rest() -> None:
    other = KeepingService()
    with other:
        with connect(everstep, other.url) as client:
            run = client.create_lora_training_client("fake/model", 4, 1).result()
            a, b = (run.save_state(name).result().path for name in ("a", "b"))
        read_json(other.url, "checkpoint", "set-ttl", a, "--ttl", "3600")
        assert other.ttls == [("a", 3600)]
        copied = read_json(other.url, "checkpoint", "save-as", a, "c")["tinker_path"]
        assert copied.endswith("/weights/c") and copied in other.checkpoints
        assert read_json(other.url, "checkpoint", "delete", "--name", "[ab]", "--yes")["results"]
        assert [*other.checkpoints] == [copied] and sorted(other.deleted) == ["a", "b"]
        for words in (("tag", copied, "x=y"), ("gc",), ("copy", copied, "--project", "p")):
            code, text = failure(other.url, "checkpoint", *words)
            assert code == 6 and "does not offer" in text, words
        assert b not in other.checkpoints
