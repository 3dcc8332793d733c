"""REST and admin clients: each call sends the same request as the official SDK's."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import pytest
import tinker

import everstep
from everstep.types import CheckpointSearchRequest, SessionSearchRequest
from tests.client.fake_service import GIVE_UP_SECONDS, Answered, FakeService, Recorded, Reply

PATH = "tinker://s:train:0/weights/a"
EXTERNAL = "tinker://s:train:0/external_weights/a"
NOW = datetime.now(UTC).isoformat()
RUN = {
    "training_run_id": "s:train:0",
    "base_model": "m",
    "model_owner": "me",
    "is_lora": True,
    "last_request_time": NOW,
}
CURSOR = {"offset": 0, "limit": 20, "total_count": 0}
CALLS: list[tuple[str, Callable[[Any], Any], str, Any]] = [
    ("RestClient", lambda c: c.get_training_run("r", "accessible"), "/training_runs/r", RUN),
    (
        "RestClient",
        lambda c: c.get_training_run_by_tinker_path(PATH),
        "/training_runs/s:train:0",
        RUN,
    ),
    (
        "RestClient",
        lambda c: c.list_training_runs(limit=3, offset=2, project_id="p"),
        "/training_runs",
        {"training_runs": [], "cursor": CURSOR},
    ),
    ("RestClient", lambda c: c.list_checkpoints("r"), "/training_runs/r/checkpoints", None),
    ("RestClient", lambda c: c.list_user_checkpoints(7, 1), "/checkpoints", {"checkpoints": []}),
    ("RestClient", lambda c: c.get_weights_info_by_tinker_path(PATH), "/weights_info", None),
    ("RestClient", lambda c: c.get_sampler("x"), "/samplers/x", None),
    (
        "RestClient",
        lambda c: c.get_external_weights_urls(EXTERNAL),
        "/training_runs/s:train:0/checkpoints/external_weights/a/external_weights_urls",
        {"urls": {"a": "http://x"}, "expires": NOW},
    ),
    (
        "RestClient",
        lambda c: c.delete_checkpoint("r", "weights/a"),
        "/training_runs/r/checkpoints/weights/a",
        None,
    ),
    (
        "RestClient",
        lambda c: c.delete_checkpoint_from_tinker_path(PATH),
        "/training_runs/s:train:0/checkpoints/weights/a",
        None,
    ),
    (
        "RestClient",
        lambda c: c.publish_checkpoint_from_tinker_path(PATH),
        "/training_runs/s:train:0/checkpoints/weights/a/publish",
        None,
    ),
    (
        "RestClient",
        lambda c: c.unpublish_checkpoint_from_tinker_path(PATH),
        "/training_runs/s:train:0/checkpoints/weights/a/publish",
        None,
    ),
    (
        "RestClient",
        lambda c: c.set_checkpoint_ttl_from_tinker_path(PATH, None),
        "/training_runs/s:train:0/checkpoints/weights/a/ttl",
        None,
    ),
    (
        "RestClient",
        lambda c: c.copy_weights(PATH, "p", ttl_seconds=3600, weights_access_token="t"),
        "/copy_weights",
        {"tinker_path": PATH},
    ),
    (
        "RestClient",
        lambda c: c.get_session("s"),
        "/sessions/s",
        {"training_run_ids": [], "sampler_ids": []},
    ),
    ("RestClient", lambda c: c.list_sessions(5, 1), "/sessions", {"sessions": ["s"]}),
    ("RestClient", lambda c: c.assign_session_project("s", "p"), "/sessions/s/project", {}),
    (
        "RestClient",
        lambda c: c.export_session_trace("s"),
        "/sessions/s/trace_export",
        {"status": "ready", "url": "http://x"},
    ),
    ("AdminClient", lambda c: c.get_audit_log("projects", date(2026, 1, 2)), "/audit", None),
    (
        "AdminClient",
        lambda c: c.get_billing_usage("2026-07-13T00:00:00Z", "2026-07-14T00:00:00Z"),
        "/billing/usage/events",
        {"data": []},
    ),
    (
        "AdminClient",
        lambda c: c.get_current_checkpoint_storage_usage("p"),
        "/billing/usage/checkpoints/current",
        {"data": []},
    ),
]


def sent(request: Recorded) -> tuple[str, str, str, Any, str | None]:
    token = request.headers.get("x-tinker-weights-access-token")
    query = "&".join(sorted(request.query.split("&")))
    return request.method, request.path, query, request.body, token


@pytest.mark.parametrize(("client", "call", "path", "answer"), CALLS)
def test_call_sends_the_official_sdks_request(
    fake: FakeService, client: str, call: Callable[[Any], Any], path: str, answer: Any
) -> None:
    body = {"entries": []} if path == "/audit" else answer
    made = []
    for package in (tinker, everstep):
        if body is not None:
            fake.script(path, Answered(Reply(200, json.loads(json.dumps(body)))))
        result = call(getattr(package, client)(base_url=fake.url, api_key="tml-rest")).result(20)
        request = fake.to(path)[-1]
        made.append((sent(request), _plain(result)))
    (their_request, theirs), (our_request, ours) = made
    assert our_request == their_request
    if isinstance(ours, dict):  # ignore our extra fields that the service leaves out
        ours = {key: value for key, value in ours.items() if key in theirs or value is not None}
    assert ours == theirs


def _plain(result: Any) -> Any:
    return result.model_dump(mode="json") if hasattr(result, "model_dump") else result


def test_search_sessions_sends_the_query(fake: FakeService) -> None:
    summary = {
        "session_id": "s",
        "created_at": NOW,
        "owner": "me",
        "project_id": "p",
        "checkpoints_count": 0,
        "status": {"type": "client_finished", "reason": {"type": "success"}},
    }
    fake.script("/sessions/search", Answered(Reply(200, {"sessions": [summary]})))
    client = everstep.RestClient(base_url=fake.url)
    with pytest.warns(everstep.ExperimentalWarning):
        found = client.search_sessions(SessionSearchRequest(display_name="a b", limit=3))
    status = found.result(GIVE_UP_SECONDS).sessions[0].status
    assert status is not None
    assert status.type == "client_finished"
    assert fake.to("/sessions/search")[0].body == {
        "display_name": "a b",
        "limit": 3,
        "owner": {"type": "own"},
        "user_metadata": {},
    }


def test_search_checkpoints_sends_the_query(fake: FakeService) -> None:
    cursor = {"last_created_at": NOW, "last_checkpoint_uuid": "u"}
    page = {"checkpoints": [], "next_cursor": cursor}
    fake.script("/checkpoints/search", Answered(Reply(200, page)))
    client = everstep.RestClient(base_url=fake.url)
    with pytest.warns(everstep.ExperimentalWarning):
        found = client.search_checkpoints(CheckpointSearchRequest(base_models=["m"], limit=3))
    following = found.result(GIVE_UP_SECONDS).next_cursor
    assert following is not None
    assert following.last_checkpoint_uuid == "u"
    assert fake.to("/checkpoints/search")[0].body == {
        "base_models": ["m"],
        "limit": 3,
        "owner": {"type": "own"},
        "user_metadata": {},
    }


def test_flags_are_fetched_once_and_no_session_is_opened(fake: FakeService) -> None:
    client = everstep.RestClient(base_url=fake.url)
    for _ in range(2):
        client.list_checkpoints("r").result(GIVE_UP_SECONDS)
    paths = [request.path for request in fake.requests]
    assert paths[:2] == ["/client/config", "/client/dynamic_config"]
    assert paths[2:] == ["/training_runs/r/checkpoints"] * 2


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda c: c.get_external_weights_urls(PATH), "not an external checkpoint"),
        (lambda c: c.delete_checkpoint_from_tinker_path("tinker://x"), "tinker"),
        (lambda c: c.copy_weights(PATH), "TINKER_PROJECT_ID"),
        (lambda c: c.get_billing_usage("yesterday", "today"), "starting_on"),
    ],
)
def test_invalid_arguments_are_rejected(
    fake: FakeService, monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], Any], text: str
) -> None:
    monkeypatch.delenv("TINKER_PROJECT_ID", raising=False)
    with pytest.raises(ValueError, match=text):
        call(everstep.RestClient(base_url=fake.url))


async def _awaited(client: everstep.RestClient) -> int:
    awaited = await client.list_user_checkpoints()
    older = await client.list_user_checkpoints_async()
    return len(awaited.checkpoints) + len(older.checkpoints)


def test_results_can_be_awaited(fake: FakeService) -> None:
    import asyncio

    for _ in range(2):
        fake.script("/checkpoints", Answered(Reply(200, {"checkpoints": []})))
    assert asyncio.run(_awaited(everstep.RestClient(base_url=fake.url))) == 0
