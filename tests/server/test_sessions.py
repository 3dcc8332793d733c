"""Sessions: lists, search and its cursors, projects, traces, ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.engine import Model
from everstep.runtime.queries import traces
from tests.profiles import example_count
from tests.runtime.local import Local

NAMES = [None, "Run one", "run TWO", "100%_x", "other", "Étude"]
PROJECTS = [None, "p", "q"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[tuple[Local, Any]]:
    """A service with sessions of every kind, and their properties, newest first."""
    with Local(tmp_path_factory.mktemp("sessions") / "home", pico) as local:
        made = []
        for number in range(30):
            body: dict[str, Any] = {
                "display_name": NAMES[number % 6],
                "project_id": PROJECTS[number % 3],
                "user_metadata": {"n": str(number % 4), "even": number % 2 == 0},
            }
            body = {key: value for key, value in body.items() if value is not None}
            session = local.post("create_session", **body)["session_id"]
            ends = ["success", "errored", "interrupted", None]
            if (end := ends[number % 4]) is not None:
                reason: dict[str, Any] = {"reason": {"type": end}, "detail": "d"}
                local.post(f"sessions/{session}/finish", **reason)
            made.append({"id": session, "finished": end, **body})
        yield local, made[::-1]


SEARCHES = st.fixed_dictionaries(
    {},
    optional={
        "display_name": st.sampled_from(
            ["run", "RUN one", "%", "_", "none", "one run", "étude", "ÉTUDE"]
        ),
        "project_ids": st.lists(st.sampled_from(["p", "q", "r", "default"]), max_size=2),
        "user_metadata": st.dictionaries(
            st.sampled_from(["n", "even", "x"]), st.sampled_from(["0", "1", "true"]), max_size=2
        ),
        "statuses": st.lists(
            st.one_of(
                st.just({"type": "active"}),
                st.just({"type": "failed"}),
                st.just({"type": "client_finished"}),
                st.just({"type": "client_finished", "reasons": ["errored", "success"]}),
            ),
            min_size=1,
            max_size=2,
        ),
        "owner": st.sampled_from([{"type": "own"}, {"type": "accessible"}]),
    },
)


def meets(session: Any, search: Any) -> bool:
    words = search.get("display_name", "").lower().split()
    if not all(word in session.get("display_name", "").lower() for word in words):
        return False
    project = session.get("project_id", "default")  # the reported one of a session without one
    if "project_ids" in search and project not in search["project_ids"]:
        return False
    metadata = session["user_metadata"]
    texts = {"n": metadata["n"], "even": json.dumps(metadata["even"])}
    if not search.get("user_metadata", {}).items() <= texts.items():
        return False
    ends = {
        "active": [None],
        "failed": [],
        "client_finished": ["success", "errored", "interrupted"],
    }
    wanted = [
        end
        for status in search.get("statuses", [])
        for end in status.get("reasons", ends[status["type"]])
    ]
    return "statuses" not in search or session["finished"] in wanted


@example_count(60)
@given(search=SEARCHES, limit=st.integers(1, 40))
def test_search_pages_contain_each_match_once(
    many: tuple[Local, Any], search: Any, limit: int
) -> None:
    local, made = many
    found: list[str] = []
    cursor = None
    while True:
        body = {**search, "limit": limit} | ({"cursor": cursor} if cursor else {})
        page = local.post("sessions/search", **body)
        assert len(page["sessions"]) <= limit
        found += [each["session_id"] for each in page["sessions"]]
        cursor = page.get("next_cursor")
        if cursor is None:
            break
    assert found == [each["id"] for each in made if meets(each, search)]


@example_count(30)
@given(limit=st.integers(1, 40), scope=st.sampled_from(["owned", "accessible"]))
def test_list_pages_contain_each_session_once(
    many: tuple[Local, Any], limit: int, scope: str
) -> None:
    local, made = many
    found: list[str] = []
    while True:
        params: dict[str, int | str] = {
            "limit": limit,
            "offset": len(found),
            "access_scope": scope,
        }
        page = local.http.get("sessions", params=params).json()["sessions"]
        found += page
        if len(page) < limit:
            break
    assert found == [each["id"] for each in made]


def test_session_is_found_by_its_id_or_its_name(many: tuple[Local, Any]) -> None:
    local, made = many
    other = next(each for each in made if each.get("display_name") == "other")
    one = next(each for each in made if each.get("display_name") == "Run one")
    search = {"session_id": one["id"], "display_name": "OTHER", "limit": 200}
    found = {each["session_id"] for each in local.post("sessions/search", **search)["sessions"]}
    assert {one["id"], other["id"]} <= found
    (found,) = local.post("sessions/search", session_id=one["id"])["sessions"]
    assert found["owner"] == "local"
    nobody = {"type": "user", "owner_urns": ["someone"]}
    assert local.post("sessions/search", owner=nobody)["sessions"] == []
    assert local.refused("sessions/search", limit=0)[0] == 400
    assert local.http.get("sessions", params={"access_scope": "x"}).status_code == 400


@pytest.fixture
def local(home: Path, pico: Model) -> Iterator[Local]:
    with Local(home, pico) as service:
        yield service


def test_unknown_finish_reason_keeps_the_session_open(local: Local) -> None:
    session = local.session(user_metadata={"a": {"b": 1}})
    status, text = local.refused(f"sessions/{session}/finish", reason={"type": "bored"})
    assert (status, "'success', 'errored' or 'interrupted'" in text) == (400, True)
    (found,) = local.post("sessions/search", session_id=session)["sessions"]
    assert (found["status"], found["project_id"]) == ({"type": "active"}, "default")
    assert found["user_metadata"] == {"a": '{"b": 1}'}
    assert local.http.get(f"sessions/{session}").json()["user_metadata"] == {"a": {"b": 1}}
    assert local.new_run()


def test_session_lists_its_members_and_can_change_its_project(local: Local) -> None:
    session = local.session(user_metadata={"a": "b"}, display_name="d")
    run = local.new_run()
    sampler = local.do(run, "save_weights_for_sampler", sampling_session_seq_id=0)
    assert local.http.get(f"sessions/{session}").json() == {
        "training_run_ids": [run],
        "sampler_ids": [sampler["sampling_session_id"]],
        "user_metadata": {"a": "b"},
        "display_name": "d",
    }
    for project in ("p", "p", "q"):
        body = {"project_id": project}
        assert local.http.put(f"sessions/{session}/project", json=body).status_code == 204
    assert local.http.put("sessions/x/project", json={"project_id": "p"}).status_code == 404
    assert local.http.put(f"sessions/{session}/project", json={}).status_code == 400
    assert local.http.get("sessions/x").status_code == 404
    for project, runs in (("p", []), ("q", [run])):
        found = local.http.get("training_runs", params={"project_id": project}).json()
        assert [each["training_run_id"] for each in found["training_runs"]] == runs
        assert found["cursor"]["total_count"] == len(runs)


def test_trace_has_every_operation_and_needs_no_headers(local: Local) -> None:
    run = local.new_run()
    local.train(run, 1, 2)
    local.result(local.send(run, "load_weights", path="tinker://x/weights/none"))
    session = local.session()
    export = local.http.get(f"sessions/{session}/trace_export").json()
    assert export["status"] == "ready"
    content = local.http.get(export["url"]).json()
    events = content["traceEvents"]
    begun = [each for each in events if each["ph"] == "b"]
    assert [(e["args"]["seq_id"], e["name"], e["args"]["status"]) for e in begun] == [
        (0, "create_model", "succeeded"),
        (1, "forward_backward", "succeeded"),
        (2, "optim_step", "succeeded"),
        (3, "forward_backward", "succeeded"),
        (4, "optim_step", "succeeded"),
        (5, "load_weights", "failed"),
    ]
    ended = {each["id"]: each["ts"] for each in events if each["ph"] == "e"}
    assert all(ended[each["id"]] >= each["ts"] for each in begun)
    executed = [each for each in events if each["ph"] == "X"]
    assert {each["args"]["seq_id"] for each in executed} >= {1, 3}
    assert all(each["dur"] > 0 for each in executed)
    tracks = {each["args"]["name"] for each in events if each["name"] == "thread_name"}
    assert tracks == {run}
    again = local.http.get(f"sessions/{session}/trace_export").json()
    assert urlsplit(again["url"]).path == urlsplit(export["url"]).path, "it is not made again"
    assert local.http.get("sessions/none/trace_export").status_code == 404


def test_trace_url_opens_one_trace_until_it_expires(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.new_run()
    session = local.session()
    url = local.http.get(f"sessions/{session}/trace_export").json()["url"]
    parts = urlsplit(url)
    query = {key: value for key, (value,) in parse_qs(parts.query).items()}
    route = url.split("?")[0]
    for wrong in (
        {"signature": "0" * 64},
        {"signature": "é"},
        {"expires": str(int(query["expires"]) + 1)},
        {"expires": "never"},
    ):
        assert local.http.get(route, params={**query, **wrong}).status_code == 403, wrong
    other = route.rsplit("/", 1)[0] + "/" + "0" * 64 + ".json"
    assert local.http.get(other, params=query).status_code == 403
    assert local.http.get(route).status_code == 400
    local.__exit__()
    with local.after() as again:
        assert again.http.get(url).status_code == 200, "also after a restart"
        monkeypatch.setattr(traces, "LINK_SECONDS", -1.0)
        url = again.http.get(f"sessions/{session}/trace_export").json()["url"]
        answer = again.http.get(url)
        assert (answer.status_code, "expired" in answer.json()["detail"]) == (403, True)
    local.__enter__()


def test_unwritable_trace_reports_the_failure(local: Local, home: Path) -> None:
    local.new_run()
    (home / "traces").write_text("in the way")
    found = local.http.get(f"sessions/{local.session()}/trace_export").json()
    assert (found["status"], bool(found["error"])) == ("failed", True)
    (home / "traces").unlink()
    found = local.http.get(f"sessions/{local.session()}/trace_export").json()
    assert found["status"] == "ready"


def test_unnamed_save_in_flight_is_collected_after_its_session_ends(
    local: Local, home: Path
) -> None:
    run = local.new_run()
    manifests = home / "vault" / "manifests" / "sampler"
    with local.writes.shut():
        future = local.send(run, "save_weights_for_sampler", sampling_session_seq_id=0)
        local.writes.wait_reached()
        local.post(f"sessions/{local.session()}/finish")
    local.result(future)
    assert len(list(manifests.rglob("*.json"))) == 1
    done = local.post("everstep/vault/collect", grace_seconds=0)
    assert len(done["ended"]) == 1
    assert list(manifests.rglob("*.json")) == []
    assert len(json.loads(json.dumps(done["files"]))) >= 1
