"""``everstep checkpoint`` changes, copies, verifies and deletes checkpoints as it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import everstep
from everstep.cli import outcomes
from everstep.cli.errors import Code
from everstep.client._errors import APIConnectionError
from everstep.vault.keys import blob_key
from tests.cli.remote import refused, said, told, typed
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
    found = told(url, "checkpoint", "list", "--run", path.split("/")[2])["checkpoints"]
    return {each["tinker_path"]: each for each in found}.get(path)


def test_published_limited_and_tagged(url: str, save: Callable[..., str]) -> None:
    a, b = save("a", user_metadata={"loss": "1"}), save("b")
    results = told(url, "checkpoint", "publish", a, b)["results"]
    assert results == [{"tinker_path": each, "error": None} for each in (a, b)]
    assert listed(url, a)["public"] and listed(url, b)["public"]
    assert said(url, "checkpoint", "unpublish", a) == f"private {a}\n"
    assert not listed(url, a)["public"]
    assert "expires in 7d" in said(url, "checkpoint", "set-ttl", a, "--ttl", "7d")
    assert listed(url, a)["expires_at"] is not None
    told(url, "checkpoint", "set-ttl", a, "--never")
    assert listed(url, a)["expires_at"] is None
    now = told(url, "checkpoint", "tag", a, "good=yes", "why=a=b", "--remove", "loss")
    assert now["user_metadata"] == {"good": "yes", "why": "a=b"} == listed(url, a)["user_metadata"]
    loop = save("loop", user_metadata={"everstep_run": "loop"})
    assert said(url, "checkpoint", "tag", loop, "x=y") == "x  y\n"
    assert "everstep_run" not in said(url, "checkpoint", "info", loop)


def test_each_of_several_is_done_for_itself(url: str, save: Callable[..., str]) -> None:
    a = save("a")
    missing = a + "0"
    done = typed(url, "checkpoint", "publish", missing, a)
    assert done.exit_code == 3 and missing in done.stderr
    assert listed(url, a)["public"]


def test_what_is_not_there_keeps_nothing_else_from_being_deleted_or_verified(
    url: str, save: Callable[..., str]
) -> None:
    a = save("a")
    missing = a + "0"
    checked = typed(url, "checkpoint", "verify", missing, a, "--json")
    report = json.loads(checked.stdout)
    assert checked.exit_code == 3 and not report["ok"] and missing in checked.stderr
    assert {each["tinker_path"]: each["ok"] for each in report["results"]} == {
        a: True,
        missing: False,
    }
    assert "ok       " + a in typed(url, "checkpoint", "verify", missing, a).stdout
    assert refused(url, "checkpoint", "delete", "nothing", a, "--yes")[0] == 2
    assert listed(url, a) is not None, "wrong usage is told before anything is done"
    done = typed(url, "checkpoint", "delete", missing, a, "--json", "--yes")
    assert done.exit_code == 3 and missing in done.stderr
    errors = {each["tinker_path"]: each["error"] for each in json.loads(done.stdout)["results"]}
    assert errors[a] is None and "checkpoint list" in errors[missing]
    assert listed(url, a) is None


def test_where_nothing_is_meant_programs_are_told_so(url: str) -> None:
    none = ("--name", "no-checkpoint-is-called-that")
    assert told(url, "checkpoint", "delete", *none, "--yes") == {"results": []}
    assert told(url, "checkpoint", "delete", *none, "--dry-run") == {"results": []}
    assert said(url, "checkpoint", "verify", *none) == "No checkpoints.\n"


def test_a_service_that_is_gone_is_not_tried_for_each() -> None:
    tried = []

    def do(path: str) -> None:
        tried.append(path)
        raise APIConnectionError("gone")

    done = outcomes.each(["a", "b", "c"], do)
    assert tried == ["a"] and [each.code for each in done] == [Code.UNREACHABLE] * 3


def test_verified_where_it_lies(url: str, service: Service, save: Callable[..., str]) -> None:
    a, b = save("a"), save("b", user_metadata={"x": "y"})
    report = told(url, "checkpoint", "verify", "--run", a.split("/")[2])
    assert report["ok"] and {each["tinker_path"] for each in report["results"]} == {a, b}
    details = told(url, "checkpoint", "info", b)["details"]
    config = next(each for each in details["files"] if each["name"] == "adapter_config.json")
    blob = service.home / "vault" / blob_key(config["blake3"])
    sound = blob.read_bytes()
    try:
        blob.write_bytes(sound[:-1] + b"?")
        done = typed(url, "checkpoint", "verify", b)
        assert done.exit_code == 1
        assert f"DAMAGED  {b}" in done.stdout and "adapter_config.json" in done.stdout
    finally:
        blob.write_bytes(sound)
    assert "as they were written" in said(url, "checkpoint", "verify", b)
    assert refused(url, "checkpoint", "verify", b + "0")[0] == 3


def test_saved_under_another_name_with_all_that_belongs_to_it(
    url: str, client: Any, service: Service, save: Callable[..., str]
) -> None:
    a = save("a", user_metadata={"loss": "1"})
    made = told(url, "checkpoint", "save-as", a, "released", "--ttl", "2d")["tinker_path"]
    assert made.endswith("/weights/released")
    assert listed(url, made)["user_metadata"] == {"loss": "1"}
    assert told(url, "checkpoint", "info", made)["details"]["parents"] == [a]
    assert hashes(service.home, made) == hashes(service.home, a)
    client.create_training_client_from_state_with_optimizer(made).result()
    assert refused(url, "checkpoint", "save-as", a, "a/b")[0] == 2
    assert refused(url, "checkpoint", "save-as", a + "0", "x")[0] == 3


def test_copied_into_a_project(url: str, save: Callable[..., str]) -> None:
    made = said(url, "checkpoint", "copy", save("a"), "--project", "copies").strip()
    runs = told(url, "run", "list", "--project", "copies")["runs"]
    assert made.split("/")[2] in [each["training_run_id"] for each in runs]


def test_deleted_by_path_and_by_filter_once_that_is_agreed_to(
    url: str, save: Callable[..., str]
) -> None:
    paths = [save(name) for name in ("step-1", "step-2", "final")]
    run = paths[0].split("/")[2]
    mine = ("checkpoint", "delete", "--run", run, "--name", "step-*")
    dry = said(url, *mine, "--dry-run")
    assert paths[0] in dry and paths[1] in dry and paths[2] not in dry
    code, text = refused(url, *mine, answer="n\n")
    assert (code, text) == (1, "everstep: Nothing was deleted.")
    assert refused(url, *mine)[0] == 1, "nobody is there to say yes"
    assert refused(url, *mine, "--json")[0] == 2
    assert listed(url, paths[0]) is not None
    done = typed(url, *mine, answer="y\n")
    assert done.exit_code == 0 and "Delete 2 checkpoints, " in done.output
    assert told(url, "checkpoint", "list", "--run", run)["total"] == 1
    results = told(url, "checkpoint", "delete", paths[2], "--yes")["results"]
    assert results == [{"tinker_path": paths[2], "error": None}]
    assert refused(url, "checkpoint", "delete", paths[2], "--yes")[0] == 3
    assert said(url, *mine, "--yes") == "No checkpoints.\n"


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
def test_wrong_usage_is_told_before_anything_is_done(
    url: str, words: tuple[str, ...], says: str
) -> None:
    code, text = refused(url, "checkpoint", *words)
    assert code == 2 and says in text


def test_collected_on_request(url: str) -> None:
    assert told(url, "checkpoint", "gc", "--dry-run")["dry_run"] is True
    assert "would be removed" in said(url, "checkpoint", "gc", "--dry-run")


def test_another_service_does_what_the_protocol_has_and_says_what_it_lacks() -> None:
    with KeepingService() as other:
        with connect(everstep, other.url) as client:
            run = client.create_lora_training_client("fake/model", 4, 1).result()
            a, b = (run.save_state(name).result().path for name in ("a", "b"))
        told(other.url, "checkpoint", "set-ttl", a, "--ttl", "3600")
        assert other.ttls == [("a", 3600)]
        made = told(other.url, "checkpoint", "save-as", a, "c")["tinker_path"]
        assert made.endswith("/weights/c") and made in other.checkpoints
        assert told(other.url, "checkpoint", "delete", "--name", "[ab]", "--yes")["results"]
        assert [*other.checkpoints] == [made] and sorted(other.deleted) == ["a", "b"]
        for words in (("tag", made, "x=y"), ("gc",), ("copy", made, "--project", "p")):
            code, text = refused(other.url, "checkpoint", *words)
            assert code == 6 and "does not offer" in text, words
        assert b not in other.checkpoints
