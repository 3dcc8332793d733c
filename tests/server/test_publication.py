"""Expiry, publication, tokens and copies over HTTP, and after restarts."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from everstep.engine import Model
from everstep.ledger import queries
from everstep.vault import CheckpointNotFound, Vault
from tests.runtime.local import Local
from tests.scenario import MODEL

METADATA = {"note": "é", "loss": "0.5"}


@pytest.fixture
def local(home: Path, pico: Model) -> Iterator[Local]:
    with Local(home, pico, min_ttl_seconds=1) as service:
        yield service


def route(path: str) -> str:
    run, checkpoint = path.removeprefix("tinker://").split("/", 1)
    return f"training_runs/{run}/checkpoints/{checkpoint}"


def listed(local: Local) -> dict[str, Any]:
    found = local.http.get("checkpoints").json()["checkpoints"]
    return {each["tinker_path"]: each for each in found}


def saved(local: Local, name: str = "a", **body: Any) -> tuple[str, str]:
    run = local.new_run()
    return run, str(local.do(run, "save_weights", path=name, **body)["path"])


def later(seconds: float) -> Any:
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return mock.patch.object(queries, "now", lambda: moment)


def test_expiry_can_be_set_changed_and_cleared(local: Local) -> None:
    _, path = saved(local)
    before = datetime.now(UTC)
    for _ in range(2):  # a retry is no error
        assert local.http.put(f"{route(path)}/ttl", json={"ttl_seconds": 60}).status_code == 204
    expires = datetime.fromisoformat(listed(local)[path]["expires_at"])
    assert before + timedelta(seconds=60) <= expires <= datetime.now(UTC) + timedelta(seconds=60)
    assert local.http.put(f"{route(path)}/ttl", json={"ttl_seconds": None}).status_code == 204
    assert listed(local)[path]["expires_at"] is None


@pytest.mark.parametrize("body", [{}, {"ttl_seconds": 0}, {"ttl_seconds": 10**12}, {"x": 1}])
def test_out_of_range_expiry_is_rejected(local: Local, body: Any) -> None:
    _, path = saved(local)
    answer = local.http.put(f"{route(path)}/ttl", json=body)
    assert answer.status_code == 400
    assert "ttl_seconds" in answer.json()["detail"]
    assert listed(local)[path]["expires_at"] is None


def test_expired_checkpoint_is_gone_for_every_call(local: Local) -> None:
    _, path = saved(local)
    local.http.put(f"{route(path)}/ttl", json={"ttl_seconds": 60})
    with later(61):
        assert listed(local) == {}
        for method, end, body in (
            ("PUT", "/ttl", {"ttl_seconds": None}),
            ("POST", "/publish", None),
            ("DELETE", "/publish", None),
        ):
            answer = local.http.request(method, route(path) + end, json=body)
            assert answer.status_code == 404, (method, end)
        assert local.refused("weights_info", tinker_path=path)[0] == 404
        assert local.refused("copy_weights", source_path=path, destination_project_id="p")[0] == 404
    assert list(listed(local)) == [path], "and nothing of that brought it back, or took it away"


@pytest.mark.parametrize("escape", [False, True])
def test_checkpoint_can_be_published_and_unpublished_repeatedly(local: Local, escape: bool) -> None:
    _, path = saved(local)
    at = route(path).replace(":", "%3A") if escape else route(path)
    for method, public in (("POST", True), ("POST", True), ("DELETE", False), ("DELETE", False)):
        assert local.http.request(method, f"{at}/publish").status_code == 204
        assert listed(local)[path]["public"] is public
    events = [each["event"] for each in local.http.get("audit").json()["entries"]]
    assert events.count("checkpoint_publish") == events.count("checkpoint_unpublish") == 1


@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
def test_unknown_checkpoints_are_rejected(local: Local, kind: str) -> None:
    run = local.new_run()
    for method, end, body in (
        ("PUT", "/ttl", {"ttl_seconds": 60}),
        ("POST", "/publish", None),
        ("DELETE", "/publish", None),
        ("DELETE", "", None),
    ):
        at = f"training_runs/{run}/checkpoints/{kind}/none{end}"
        answer = local.http.request(method, at, json=body)
        assert (answer.status_code, "none" in answer.json()["detail"]) == (404, True), at
    answer = local.http.post(f"training_runs/{run}/checkpoints/{kind}/a%20b/publish")
    assert answer.status_code == 400


def test_metadata_changes_reach_the_vault_and_survive_a_restart(local: Local, home: Path) -> None:
    run, path = saved(local)
    local.http.put(f"{route(path)}/ttl", json={"ttl_seconds": 600})
    local.http.post(f"{route(path)}/publish")
    row = listed(local)[path]
    vault = Vault(home / "vault", writer=False)
    manifest = vault.manifest("training", run, "a")
    assert (manifest.expires_at, manifest.public) == (None, False), "a manifest never changes"
    marked = vault.with_metadata(manifest)
    assert (marked.expires_at, marked.public) == (
        datetime.fromisoformat(row["expires_at"]),
        True,
    )
    local.__exit__()
    with local.after() as again:
        assert listed(again)[path] == row
    local.__enter__()


def test_overwrite_is_private_and_has_its_own_expiry(local: Local, home: Path) -> None:
    run, path = saved(local, user_metadata=METADATA)
    local.http.put(f"{route(path)}/ttl", json={"ttl_seconds": 600})
    local.http.post(f"{route(path)}/publish")
    local.do(run, "save_weights", path="a", overwrite=True)
    now = listed(local)[path]
    assert (now["public"], now["expires_at"], now["user_metadata"]) == (False, None, None)
    vault = Vault(home / "vault", writer=False)
    manifest = vault.manifest("training", run, "a")
    assert vault.with_metadata(manifest) == manifest, (
        "marks of the old one say nothing of the new one"
    )


def test_deletion_removes_the_checkpoints_metadata(local: Local, home: Path) -> None:
    _, path = saved(local)
    local.http.post(f"{route(path)}/publish")
    storage = Vault(home / "vault", writer=False).storage
    assert len(list(storage.keys("marks/"))) == 1
    for _ in range(2):
        assert local.http.delete(route(path)).status_code == 204
    assert list(storage.keys("marks/")) == []
    assert local.http.post(f"{route(path)}/publish").status_code == 404


def test_bulk_deletion_handles_each_checkpoint_independently(local: Local) -> None:
    run, first = saved(local)
    second = str(local.do(run, "save_weights_for_sampler", path="a")["path"])
    missing, wrong = f"tinker://{run}/weights/none", "tinker://x"
    asked = [first, missing, wrong, second, first]
    for _ in range(2):
        found = local.post("everstep/checkpoints/delete", tinker_paths=asked)["results"]
        assert [each["tinker_path"] for each in found] == asked
        assert [each["error"] is None for each in found] == [True, False, False, True, True]
    assert listed(local) == {}


# Copies


def copy(local: Local, path: str, key: str | None = None, **body: Any) -> str:
    headers = {"X-Idempotency-Key": key} if key else None
    body = {"source_path": path, "destination_project_id": "p", **body}
    return str(local.post("copy_weights", headers=headers, **body)["tinker_path"])


@pytest.mark.parametrize("save", ["save_weights", "save_weights_for_sampler"])
def test_copy_is_an_independent_checkpoint(local: Local, home: Path, save: str) -> None:
    run = local.new_run()
    local.train(run, 1)
    path = str(local.do(run, save, path="a", user_metadata=METADATA, ttl_seconds=3600)["path"])
    copied = copy(local, path)
    assert copied.rsplit("/", 2)[1:] == path.rsplit("/", 2)[1:]
    theirs, ours = listed(local)[path], listed(local)[copied]
    for same in ("checkpoint_id", "checkpoint_type", "size_bytes", "user_metadata", "base_model"):
        assert ours[same] == theirs[same]
    assert (ours["expires_at"], ours["public"]) == (None, False)
    vault = Vault(home / "vault", writer=False)
    kind = theirs["checkpoint_type"]
    copied_run = copied.split("/")[2]
    source, made = vault.manifest(kind, run, "a"), vault.manifest(kind, copied_run, "a")
    assert (made.files, made.step, made.parents) == (source.files, source.step, [path])
    assert local.post("weights_info", tinker_path=copied) == local.post(
        "weights_info", tinker_path=path
    )
    assert local.http.delete(route(path)).status_code == 204
    local.post("everstep/vault/collect", grace_seconds=0)
    again: dict[str, Any] = {"session_id": local.session(), "model_seq_id": 7, "path": copied}
    resumed = local.post("load_weights", **again, optimizer=save == "save_weights")
    assert local.result(resumed["request_id"])["path"] == copied


def test_copy_is_made_once_per_key(local: Local) -> None:
    _, path = saved(local)
    first = copy(local, path, "k1")
    assert copy(local, path, "k1") == first
    assert copy(local, path, "k2") != first != copy(local, path)
    body = {"source_path": path, "destination_project_id": "other"}
    answer = local.http.post("copy_weights", json=body, headers={"X-Idempotency-Key": "k1"})
    assert answer.status_code == 400, "the key stands for another request"
    local.http.delete(route(first))
    local.__exit__()
    with local.after() as again:
        assert copy(again, path, "k1") == first, "a retry gets the same copy after a restart"
        assert len(listed(again)) == 3
    local.__enter__()


def test_copy_cannot_be_trained(local: Local) -> None:
    _, path = saved(local)
    copied = copy(local, path, ttl_seconds=60).split("/")[2]
    session = copied.removesuffix(":train:0")
    status, text = local.refused("optim_step", model_id=copied, seq_id=1, adam_params={})
    assert status == 400
    assert "takes no new operations" in text
    body = {"session_id": session, "model_seq_id": 1, "base_model": "everstep/pico"}
    assert local.refused("create_model", **body)[0] == 400
    row = local.http.get(f"training_runs/{copied}").json()
    assert row["last_checkpoint"]["expires_at"] is not None
    projects = local.http.get("training_runs", params={"project_id": "p"}).json()
    assert [each["training_run_id"] for each in projects["training_runs"]] == [copied]


def test_copy_into_an_own_session_is_one_of_its_runs(local: Local) -> None:
    _, path = saved(local)
    _, other = saved(local, "b")
    session = {"destination_project_id": None, "session_id": local.session()}
    target: dict[str, Any] = {**session, "model_seq_id": 5}
    copied = copy(local, path, **target)
    run = f"{local.session()}:train:5"
    assert copied == f"tinker://{run}/weights/a"
    assert copy(local, path, **target) == copied, "a retry is no error"
    assert local.refused("copy_weights", source_path=other, **target)[0] == 400, "it is taken"
    status, text = local.refused("optim_step", model_id=run, seq_id=1, adam_params={})
    assert (status, "holds a copy" in text) == (400, True)
    body = {"session_id": local.session(), "model_seq_id": 5, "base_model": "everstep/pico"}
    assert local.refused("create_model", **body)[0] == 400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"source_path": "tinker://s:train:0/weights/none"}, 404),
        ({"source_path": "tinker://s:train:0/none"}, 400),
        ({"destination_project_id": None}, 400),
        ({"session_id": "none", "model_seq_id": 1}, 404),
        ({"session_id": "none"}, 400),
        ({"ttl_seconds": -1}, 400),
    ],
)
def test_invalid_copies_are_rejected(local: Local, body: dict[str, Any], status: int) -> None:
    _, path = saved(local)
    whole = {"source_path": path, "destination_project_id": "p", **body}
    assert local.refused("copy_weights", **whole)[0] == status
    assert list(listed(local)) == [path]


# Tokens


def test_token_gives_access_to_one_checkpoint_until_revoked(local: Local, home: Path) -> None:
    run, path = saved(local)
    other = str(local.do(run, "save_weights", path="b")["path"])
    made = local.post("everstep/weights_access_tokens", tinker_path=path)
    token = made["weights_access_token"]
    assert token.startswith("tml-")
    header = {"X-Tinker-Weights-Access-Token": token}

    def tries(of: str) -> list[bool]:
        key = {"X-API-Key": token}
        load = {"model_id": run, "path": of, "weights_access_token": token, "optimizer": False}
        create = {"session_id": local.session(), "path": of, "weights_access_token": token}
        local._runs += 1
        sampler = {"session_id": local.session(), "sampling_session_seq_id": local._runs}
        sequence = local._sequence[run] = local._sequence[run] + 1
        loads = [
            local.post("load_weights", **load, seq_id=sequence),
            local.post("load_weights", **create, model_seq_id=local._runs),
        ]
        answers = [
            local.http.post("weights_info", json={"tinker_path": of}, headers=key),
            local.http.post(
                "create_sampling_session", json={**sampler, "model_path": of}, headers=header
            ),
            local.http.post(
                "copy_weights",
                json={"source_path": of, "destination_project_id": "p"},
                headers=header,
            ),
        ]
        done = [local.result(each["request_id"]) for each in loads]
        return ["error" not in each for each in done] + [a.status_code == 200 for a in answers]

    assert tries(path) == [True] * 5
    assert tries(other) == [False] * 5
    local.http.post(f"{route(other)}/publish")
    assert tries(other) == [True] * 5, "what is public needs no token"
    for _ in range(2):
        gone = local.http.delete(f"everstep/weights_access_tokens/{made['token_id']}")
        assert gone.status_code == 204
    assert tries(path) == [False] * 5
    files = list(home.glob("ledger.sqlite*"))
    assert files
    for file in files:
        assert token.encode() not in file.read_bytes(), "only its digest is kept"


def test_token_expires(local: Local) -> None:
    _, path = saved(local)
    made = local.post("everstep/weights_access_tokens", tinker_path=path, ttl_seconds=60)
    headers = {"X-Tinker-Weights-Access-Token": made["weights_access_token"]}
    body = {"source_path": path, "destination_project_id": "p"}
    assert local.http.post("copy_weights", json=body, headers=headers).status_code == 200
    with later(61):
        answer = local.http.post("copy_weights", json=body, headers=headers)
    assert (answer.status_code, "expired" in answer.json()["detail"]) == (404, True)
    assert local.refused("everstep/weights_access_tokens", tinker_path=path + "x")[0] == 404


# Lists


def test_checkpoint_search_applies_every_condition(local: Local) -> None:
    run, first = saved(local, user_metadata=METADATA)
    second = str(
        local.do(run, "save_weights_for_sampler", path="s", user_metadata={"note": "n"})["path"]
    )
    local.do(run, "save_weights_for_sampler", sampling_session_seq_id=0)  # is not listed
    third = str(local.do(run, "save_weights_external", path="e")["path"])
    copied = copy(local, first)  # in project p

    def found(headers: dict[str, str] | None = None, **search: Any) -> list[str]:
        paths: list[str] = []
        cursor: Any = None
        while True:
            page = local.post("checkpoints/search", headers, limit=1, cursor=cursor, **search)
            paths += [each["tinker_path"] for each in page["checkpoints"]]
            if (cursor := page["next_cursor"]) is None:
                return paths

    everything = [copied, third, second, first]
    assert found() == found(owner={"type": "accessible"}) == everything
    assert found(project_ids=["p"]) == [copied]
    assert found(project_ids=["default"]) == everything[1:]
    assert found(project_ids=["q"]) == found(owner={"type": "user", "owner_urns": ["x"]}) == []
    assert found(user_metadata={"note": "é"}) == [copied, first]
    assert found(user_metadata={"note": "é", "loss": "1"}) == []
    for kind, paths in (
        ("sampler", [second]),
        ("external", [third]),
        ("training", [copied, first]),
    ):
        assert found(checkpoint_type=kind) == paths
    assert (found(base_models=[]), found(base_models=["a", MODEL])) == ([], everything)
    assert found({"x-stainless-package-version": "0.25.0"}) == [copied, second, first]
    local.http.delete(route(second))
    local.http.put(f"{route(first)}/ttl", json={"ttl_seconds": 60})
    with later(61):
        assert found() == [copied, third]
    for wrong in ({"limit": 201}, {"checkpoint_type": "x"}, {"cursor": {"last_created_at": 1}}):
        assert local.refused("checkpoints/search", **wrong)[0] == 400


def test_uploads_file_by_file_are_rejected_with_the_alternative(local: Local) -> None:
    for route in ("external_weights_upload_start", "external_weights_upload_finish"):
        status, text = local.refused(route, base_model="m", lora_config={}, upload_id="u")
        assert (status, "everstep checkpoint import" in text) == (404, True)


def test_old_clients_get_no_external_checkpoints(local: Local, home: Path) -> None:
    run, _path = saved(local)
    local.__exit__()
    with sqlite3.connect(home / "ledger.sqlite") as database:
        database.execute(
            "INSERT INTO checkpoints SELECT replace(path, '/weights/', '/external_weights/'), "
            "run_id, 'external', name, created_at, size_bytes, base_model, lora, optimizer, "
            "user_metadata, expires_at, public, listed, quarantined, NULL, unmarked "
            "FROM checkpoints"
        )
    database.close()
    with local.after() as again:
        for headers, count in (
            ({"x-stainless-package-version": "0.27.2"}, 1),
            ({"x-stainless-package-version": "0.28.0"}, 2),
            ({"x-stainless-package-version": "1.0.0"}, 2),
            ({"x-stainless-package-version": "0.1.0", "user-agent": "everstep/0.1.0"}, 2),
            ({"user-agent": "AsyncTinkex/Elixir 0.4.0"}, 1),
            ({}, 2),
        ):
            for at in ("checkpoints", f"training_runs/{run}/checkpoints"):
                found = again.http.get(at, headers=headers).json()
                assert len(found["checkpoints"]) == count, (headers, at)
                if found["cursor"]:
                    assert found["cursor"]["total_count"] == count
    local.__enter__()


def test_audit_log_lists_events_in_order(local: Local) -> None:
    run, path = saved(local)
    local.http.post(f"{route(path)}/publish")
    local.do(run, "load_weights", path=path, optimizer=True)
    local.http.put(f"sessions/{local.session()}/project", json={"project_id": "p"})
    local.http.delete(route(path))
    entries = local.http.get("audit").json()["entries"]
    assert [each["event"] for each in entries] == [
        "checkpoint_create",
        "checkpoint_publish",
        "checkpoint_read",
        "project_session_assign",
        "checkpoint_delete",
    ]
    assert {each["tinker_path"] for each in entries} == {path, None}
    assert entries[2]["purpose"] == "training"
    assert all(each["event_details"]["actor"] == "local" for each in entries)
    projects = local.http.get("audit", params={"event_type": "projects"}).json()["entries"]
    assert [each["event"] for each in projects] == ["project_session_assign"]
    paged: list[Any] = []
    cursor: int | None = 0
    while cursor is not None:
        page = local.http.get("audit", params={"limit": 2, "cursor": cursor}).json()
        paged += page["entries"]
        cursor = page["next_cursor"]
    assert paged == entries
    assert local.http.get("audit", params={"day": "2020-01-01"}).json()["entries"] == []
    assert local.http.get("audit", params={"event_type": "none"}).status_code == 400


def test_storage_use_is_reported_by_project(local: Local) -> None:
    _run, path = saved(local)
    copied = copy(local, path)
    found = local.http.get("billing/usage/checkpoints/current").json()["data"]
    sizes = {each["tinker_path"]: each["size_bytes"] for each in listed(local).values()}
    assert {each["project_id"]: each["size_bytes"] for each in found} == {
        None: sizes[path],
        "p": sizes[copied],
    }
    mine = local.http.get("billing/usage/checkpoints/current", params={"project_id": "p"}).json()
    assert [each["checkpoint_count"] for each in mine["data"]] == [1]


@pytest.mark.parametrize(
    ("method", "at"),
    [
        ("GET", "billing/usage/events"),
        ("POST", "auth/token"),
        ("GET", "auth/apikey/me"),
        ("DELETE", "auth/apikey/me"),
    ],
)
def test_hosted_only_routes_explain_themselves(local: Local, method: str, at: str) -> None:
    answer = local.http.request(method, at, json={} if method == "POST" else None)
    assert answer.status_code == 404
    assert "his service" in answer.json()["detail"] or "self-hosted" in answer.json()["detail"]


def test_vault_metadata_survives_unrelated_changes(local: Local, home: Path) -> None:
    run, path = saved(local)
    vault = Vault(home / "vault", writer=False)
    local.http.put(f"{route(path)}/ttl", json={"ttl_seconds": 60})
    assert local.post("everstep/vault/collect", grace_seconds=0)["expired"] == []
    with later(61):
        dry = local.post("everstep/vault/collect", grace_seconds=0, dry_run=True)
    assert dry["expired"] == [], "the wall clock says when it is collected"
    assert vault.manifest("training", run, "a").name == "a"
    local.http.delete(route(path))
    with pytest.raises(CheckpointNotFound):
        vault.manifest("training", run, "a")
    assert json.loads(local.http.get("everstep/vault/quarantine").text) == {"notes": []}
