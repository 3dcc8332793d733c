"""Direct routes answer as FastAPI does, in far fewer steps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from unittest import mock

import fastapi.routing
import pytest
import starlette.concurrency
from fastapi import FastAPI
from fastapi.dependencies import utils as dependencies
from starlette.testclient import TestClient

from everstep.engine import Model
from everstep.server import app as application
from everstep.server import body as bodies
from everstep.server import create_app
from everstep.server.direct import direct_handler
from everstep.server.stopping import Stopping
from everstep.wire.codecs.proto import PROTOBUF
from tests.runtime.local import Local, batch

HOT = ("forward", "forward_backward", "optim_step", "retrieve_future", "session_heartbeat")
"""The routes that a training loop calls all the time."""


async def never() -> Any:
    raise AssertionError("the runtime is another application's")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    with Local(tmp_path_factory.mktemp("direct"), pico, poll_seconds=0) as service:
        yield service


@pytest.fixture
def by_fastapi(local: Local) -> Iterator[TestClient]:
    """The same service, whose every route goes through FastAPI."""
    with (
        mock.patch.object(bodies, "direct_handler", lambda route: None),
        mock.patch.object(application, "_direct_routes", lambda: iter([])),
    ):
        app = create_app(never)
        app.state.runtime, app.state.stopping = local.app.state.runtime, Stopping()
        client = TestClient(app, base_url="http://test/api/v1")
        client.portal = local.http.portal
        yield client


@pytest.fixture(scope="module")
def requests(local: Local) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Requests, by name, that get the same answer every time."""
    run = local.new_run()
    done = local.send(run, "forward_backward", forward_backward_input=batch())
    stepped = local.send(run, "optim_step", adam_params={})
    local.result(done), local.result(stepped)
    waits = local.send(run, "optim_step", seq_id=5, adam_params={})
    passed = {"model_id": run, "seq_id": 1, "forward_backward_input": batch()}
    step = {"model_id": run, "seq_id": 2, "adam_params": {}}
    json = {"accept": "application/json"}
    return {
        "health": ("GET", "healthz", {}),
        "capabilities": ("GET", "get_server_capabilities", {}),
        "pass": ("POST", "forward_backward", {"json": passed}),
        "step": ("POST", "optim_step", {"json": step}),
        "conflict": ("POST", "optim_step", {"json": {**step, "seq_id": 1}}),
        "unknown run": ("POST", "optim_step", {"json": {**step, "model_id": "x"}}),
        "no seq_id": ("POST", "optim_step", {"json": {"model_id": run}}),
        "wrong type": ("POST", "optim_step", {"json": {**step, "seq_id": 3, "adam_params": 1}}),
        "not JSON": ("POST", "optim_step", {"content": b"{"}),
        "empty": ("POST", "optim_step", {}),
        "not protobuf": (
            "POST",
            "forward_backward",
            {"content": b"\xff", "headers": {"content-type": PROTOBUF}},
        ),
        "not zstd": (
            "POST",
            "optim_step",
            {"content": b"{}", "headers": {"content-encoding": "zstd"}},
        ),
        "result": ("POST", "retrieve_future", {"json": {"request_id": stepped}}),
        "JSON": ("POST", "retrieve_future", {"json": {"request_id": done}, "headers": json}),
        "protobuf": (
            "POST",
            "retrieve_future",
            {"json": {"request_id": done}, "headers": {"accept": PROTOBUF}},
        ),
        "pending": ("POST", "retrieve_future", {"json": {"request_id": waits}}),
        "unknown future": ("POST", "retrieve_future", {"json": {"request_id": "x"}}),
        "tinkex": (
            "POST",
            "retrieve_future",
            {"json": {"request_id": "x"}, "headers": {"user-agent": "AsyncTinkex"}},
        ),
        "heartbeat": ("POST", "session_heartbeat", {"json": {"session_id": local.session()}}),
        "info": ("POST", "get_info", {"json": {"model_id": run}}),
        "wrong method": ("GET", "optim_step", {}),
        "head": ("HEAD", "healthz", {}),
        "unknown path": ("POST", "optim_steps", {"json": {}}),
        "slash": ("POST", "optim_step/", {"json": step, "follow_redirects": False}),
        "hosted": (
            "POST",
            "http://test/services/tinker-prod/api/v1/optim_step",
            {"json": step},
        ),
    }


def test_answers_are_those_of_fastapi_to_the_byte(
    local: Local,
    by_fastapi: TestClient,
    requests: dict[str, tuple[str, str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statuses = set()
    resolved = mock.Mock(side_effect=dependencies.solve_dependencies)
    monkeypatch.setattr(fastapi.routing, "solve_dependencies", resolved)
    for name, (method, path, options) in requests.items():
        ours = local.http.request(method, path, **options)
        theirs = by_fastapi.request(method, path, **options)
        assert (name, ours.status_code, ours.headers.raw, ours.content) == (
            name,
            theirs.status_code,
            theirs.headers.raw,
            theirs.content,
        )
        statuses.add(ours.status_code)
    assert resolved.call_count > 20, "of FastAPI's answers"
    assert statuses == {200, 307, 400, 404, 405, 408}


def test_hot_routes_pass_no_middleware_resolve_nothing_and_start_no_thread(
    local: Local,
    requests: dict[str, tuple[str, str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        async def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return await function(*arguments, **options)

        return call

    for module, name in [
        (fastapi.routing, "solve_dependencies"),
        (fastapi.routing, "serialize_response"),
        (dependencies, "run_in_threadpool"),
        (starlette.concurrency, "run_in_threadpool"),
    ]:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    matched = mock.Mock(
        side_effect=AssertionError("a route was searched for, or middleware was passed")
    )
    for router in local.app.router.routes[1:]:
        monkeypatch.setattr(router, "matches", matched, raising=False)
    monkeypatch.setattr(local.app, "middleware_stack", matched)
    for name in ("health", "pass", "step", "result", "protobuf", "pending", "heartbeat"):
        method, path, options = requests[name]
        assert local.http.request(method, path, **options).status_code in (200, 408), name
    assert calls == []


def test_no_dependency_runs_in_a_thread(local: Local) -> None:
    def calls(dependant: Any) -> Iterator[Any]:
        for each in dependant.dependencies:
            yield each.call
            yield from calls(each)

    routes = [route for _, route in application._direct_routes()]
    found = {call for route in routes for call in calls(route.dependant)}
    assert len(found) > 10
    for call in found:
        assert asyncio.iscoroutinefunction(call) or asyncio.iscoroutinefunction(
            type(call).__call__
        ), call


def test_hot_routes_are_direct() -> None:
    routes = {route.name: route for _, route in application._direct_routes()}
    for name in (*HOT, "healthz"):
        assert direct_handler(routes[name]) is not None, name
    assert direct_handler(routes["asample"]) is None, "it reads a header"


def test_addresses_and_the_document_are_those_of_fastapi(local: Local) -> None:
    app: FastAPI = local.app
    assert app.url_path_for("optim_step") == "/api/v1/optim_step"
    assert "/api/v1/optim_step" in app.openapi()["paths"]
