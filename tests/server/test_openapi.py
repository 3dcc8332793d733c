"""/openapi.json describes the whole service, and the requests of real clients match it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
from fastapi.routing import APIRoute

from everstep.engine import Model
from everstep.server import create_app
from everstep.wire.codecs.proto import PROTOBUF
from tests.client import test_same_requests as official
from tests.runtime.local import Local, batch
from tests.scenario import MODEL
from tests.server.json_schema import ANNOTATIONS, BOUNDS, LENGTHS, TYPES, problems, schemas_in

PREFIX = "/api/v1"
METHODS = ("get", "head", "put", "post", "delete", "patch")
BODIES = ("post", "put", "patch")
WITHOUT_BODY = ("/v1/responses", "/publish", "/auth/token", "_upload_start", "_upload_finish")
UPLOADS = ("/checkpoints/import",)
"""Endings of routes that take an archive, whose options are in the URL."""
KEYWORDS = {
    *("$ref", "type", "const", "enum", "anyOf", "oneOf", "items", "prefixItems"),
    *("properties", "required", "additionalProperties"),
    *(*ANNOTATIONS, *BOUNDS, *LENGTHS),
}


async def never() -> Any:
    raise AssertionError("no runtime is needed to describe it")


@pytest.fixture(scope="module")
def app() -> Any:
    return create_app(never)


@pytest.fixture(scope="module")
def document(app: Any) -> Any:
    return app.openapi()


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def request_schema(document: Any, method: str, path: str) -> Any:
    """Return the JSON schema of a route's body, by a requested path."""
    for template, methods in document["paths"].items():
        pattern = re.sub(r"\{[^}]+\}", "[^/]+", template.removeprefix(PREFIX))
        if re.fullmatch(pattern, path) and method.lower() in methods:
            content = methods[method.lower()]["requestBody"]["content"]
            return content["application/json"]["schema"]
    return None


def test_every_route_describes_its_body(app: Any, document: Any) -> None:
    described = {(method, path) for method, path, _ in operations(document)}
    assert described == everything_routed(app)
    for method, path, operation in operations(document):
        assert operation.get("description"), path
        if method not in BODIES or path.endswith(WITHOUT_BODY):
            assert "requestBody" not in operation, path
            continue
        content = operation["requestBody"]["content"]
        if path.endswith(UPLOADS):
            assert list(content) == ["application/x-tar"], path
            continue
        schema = content["application/json"]["schema"]
        name = schema["$ref"].rsplit("/", 1)[-1]
        assert document["components"]["schemas"][name]["properties"], path
    for path in ("forward", "forward_backward"):
        content = document["paths"][f"{PREFIX}/{path}"]["post"]["requestBody"]["content"]
        assert "ForwardBackwardRequest" in content[PROTOBUF]["schema"]["description"]


def everything_routed(app: Any) -> set[tuple[str, str]]:
    """Return method and path of every route from the application's routes, not its document."""
    found: set[tuple[str, str]] = set()

    def walk(routes: Any, prefix: str) -> None:
        for route in routes:
            if isinstance(route, APIRoute):
                path = re.sub(r":\w+\}", "}", prefix + route.path)
                assert route.methods
                found.update((method.lower(), path) for method in route.methods)
            inner = getattr(route, "original_router", None)
            if inner is not None:
                walk(inner.routes, prefix + (route.include_context.prefix or ""))

    walk(app.routes, "")
    assert ("post", f"{PREFIX}/optim_step") in found
    return found


def test_every_error_is_described_in_its_form(document: Any) -> None:
    described = list(operations(document))
    assert described
    for method, path, operation in described:
        answers = operation["responses"]
        assert "422" not in answers, f"{path}: FastAPI's own error is answered as 400"
        assert any(status.startswith("2") for status in answers), path
        for status, answer in answers.items():
            if status[0] in "45" and status != "408":
                schema = answer["content"]["application/json"]["schema"]
                form = "CompletionErrorResponse" if path.startswith("/v1/") else "ErrorResponse"
                assert schema == {"$ref": f"#/components/schemas/{form}"}, (path, status)
        if method in BODIES and "client/" not in path and not path.endswith(WITHOUT_BODY):
            assert {"400", "413", "503"} <= answers.keys(), path
        if "{" in path or "model_id" in str(operation.get("requestBody")):
            assert "404" in answers, path
    found = document["paths"][f"{PREFIX}/retrieve_future"]["post"]["responses"]
    assert found["408"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "TryAgainResponse"
    )
    assert PROTOBUF in found["200"]["content"]


def test_query_parameters_are_described_with_their_bounds(document: Any) -> None:
    parameters = document["paths"][f"{PREFIX}/checkpoints"]["get"]["parameters"]
    found = {each["name"]: (each["in"], each["schema"]) for each in parameters}
    assert found["limit"][0] == found["offset"][0] == "query"
    assert (found["limit"][1]["minimum"], found["limit"][1]["maximum"]) == (1, 1000)
    parameters = document["paths"][f"{PREFIX}/create_session"]["post"]["parameters"]
    assert [(each["name"], each["in"]) for each in parameters] == [("x-idempotency-key", "header")]


def test_document_is_valid_openapi_3_1(document: Any) -> None:
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    assert document.keys() <= {"openapi", "info", "paths", "components", "tags", "servers"}
    assert {"title", "version", "description"} <= document["info"].keys()
    assert document["components"].keys() <= {"schemas", "securitySchemes"}
    ids = []
    for method, path, operation in operations(document):
        assert path.startswith("/") and method in METHODS
        ids.append(operation["operationId"])
        assert operation.keys() <= {
            *("tags", "summary", "description", "operationId", "parameters"),
            *("requestBody", "responses", "deprecated", "security"),
        }
        in_path = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert in_path == set(re.findall(r"\{(\w+)\}", path)), path
        for parameter in operation.get("parameters", []):
            assert {"name", "in", "schema", "required"} <= parameter.keys()
            assert parameter["in"] in ("query", "header", "path", "cookie")
            assert parameter["required"] or parameter["in"] != "path"
        assert operation["responses"]
        for status, answer in operation["responses"].items():
            assert re.fullmatch(r"[1-5]\d\d|default", status)
            assert answer["description"], (path, status)
            check_content(answer.get("content", {}))
        check_content(operation.get("requestBody", {}).get("content", {}))
    assert len(ids) == len(set(ids))
    for name in document["components"]["schemas"]:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)


def check_content(content: Any) -> None:
    for media, form in content.items():
        assert re.fullmatch(r"[\w.+-]+/[\w.+-]+", media)
        assert form.keys() <= {"schema", "example", "examples", "encoding"}


def test_every_schema_is_valid_and_every_reference_resolves(document: Any) -> None:
    seen = set()
    for at, schema in schemas_in(document):
        assert schema.keys() <= KEYWORDS, f"{at}: {schema.keys() - KEYWORDS}"
        if "$ref" in schema:
            name = schema["$ref"].removeprefix("#/components/schemas/")
            assert name in document["components"]["schemas"], f"{at}: {schema['$ref']}"
            seen.add(name)
        types = schema.get("type", [])
        assert ({types} if isinstance(types, str) else set(types)) <= TYPES.keys(), at
        assert set(schema.get("required", [])) <= schema.get("properties", {}).keys(), at
        for key in ("anyOf", "oneOf", "enum"):
            assert schema.get(key, [None]), f"{at}: {key} is empty"
        if "default" in schema:
            rest = {key: item for key, item in schema.items() if key != "default"}
            if schema["default"] is not None:
                assert not problems(rest, schema["default"], document, at)
    assert seen == document["components"]["schemas"].keys(), "what nothing refers to"


@pytest.mark.filterwarnings("ignore")
def test_official_client_requests_match_the_schemas(document: Any) -> None:
    checked = set()
    for script in (official.train, official.save, official.sample):
        _, fake = official.drive(tinker, script)
        for request in fake.requests:
            if request.method != "POST" or request.path == "/forward_backward":
                continue  # that one is protobuf
            schema = request_schema(document, request.method, request.path)
            if schema is None:
                continue
            assert problems(schema, request.body, document) == [], (request.path, request.body)
            checked.add(request.path)
    assert checked >= {
        *("/create_session", "/create_model", "/optim_step", "/save_weights", "/load_weights"),
        *("/save_weights_for_sampler", "/create_sampling_session", "/asample"),
        *("/retrieve_future", "/get_info", "/telemetry", "/client/config"),
    }


OLD_SDKS = [
    ("/optim_step", {"model_id": "m", "seq_id": 1, "adam_params": {}}),
    (
        "/asample",
        {
            "prompt": {"chunks": [{"tokens": [1]}]},
            "sampling_params": {"max_tokens": 2},
            "sampling_session_id": "s",
            "seq_id": 10**18,
        },
    ),
    ("/forward_backward", {"forward_backward_input": batch(), "model_id": "m", "seq_id": 1}),
    ("/forward", {"forward_input": batch(), "model_id": "m", "seq_id": 1, "new": True}),
    ("/sessions/a/finish", {}),
]


@pytest.mark.parametrize(("path", "body"), OLD_SDKS, ids=lambda value: "")
def test_older_sdk_requests_match_the_schemas(document: Any, path: str, body: Any) -> None:
    assert problems(request_schema(document, "POST", path), body, document) == []


WRONG = [
    ("/optim_step", {"seq_id": 1}, "model_id is missing"),
    ("/optim_step", {"model_id": "m", "seq_id": "first"}, "fits 0 of anyOf"),
    ("/create_model", {"session_id": "s", "model_seq_id": -1}, "breaks minimum 0"),
    ("/asample", {"prompt": {"chunks": [{"words": "a"}]}}, "fits 0 of oneOf"),
    (
        "/forward",
        {
            "model_id": "m",
            "forward_input": {
                "data": [{"model_input": {}, "loss_fn_inputs": {"weights": {"data": "x"}}}],
                "loss_fn": "ppo",
            },
        },
        "weights.data: 'x' is not array",
    ),
]


@pytest.mark.parametrize(("path", "body", "text"), WRONG, ids=lambda value: "")
def test_rejected_requests_do_not_match_the_schemas(
    document: Any, home: Path, pico: Model, path: str, body: Any, text: str
) -> None:
    assert text in "; ".join(problems(request_schema(document, "POST", path), body, document))
    with Local(home, pico) as service:
        assert service.refused(path, **body)[0] == 400


def test_service_responses_match_the_schemas(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        document = service.http.get("http://test/openapi.json").json()

        def check(method: str, path: str, template: str = "", /, **body: Any) -> Any:
            answer = service.http.request(method, path, json=body if method == "POST" else None)
            found = document["paths"][f"{PREFIX}/{template or path}"][method.lower()]["responses"]
            described = found[str(answer.status_code)]
            if answer.content:
                schema = described["content"]["application/json"]["schema"]
                assert problems(schema, answer.json(), document) == [], path
            return answer.json() if answer.content else None

        session = check("POST", "create_session")["session_id"]
        created = check(
            "POST", "create_model", session_id=session, model_seq_id=0, base_model=MODEL
        )
        run = check("POST", "retrieve_future", **pick(created))["model_id"]
        futures = [
            check("POST", "forward_backward", **ids(run, 1), forward_backward_input=batch()),
            check("POST", "optim_step", **ids(run, 2), adam_params={}),
            check("POST", "save_weights", **ids(run, 3), path="a"),
            check("POST", "save_weights_for_sampler", **ids(run, 4), sampling_session_seq_id=0),
            check("POST", "load_weights", **ids(run, 5), path="nonsense"),
            check("POST", "unload_model", model_id=run),
        ]
        results = [check("POST", "retrieve_future", **pick(future)) for future in futures]
        sampler = results[3]["sampling_session_id"]
        sample = check(
            "POST",
            "asample",
            sampling_session_id=sampler,
            seq_id=0,
            prompt={"chunks": [{"tokens": [1, 2]}]},
            sampling_params={"max_tokens": 2},
            prompt_logprobs=True,
            topk_prompt_logprobs=2,
            topk_sample_logprobs=2,
        )
        kinds = {"TrainingPassResult": results[0], "SaveWeightsResponse": results[2]}
        kinds["SampleResult"] = check("POST", "retrieve_future", **pick(sample))
        kinds["RequestFailedResponse"] = results[4]
        for kind, result in kinds.items():  # any object fits one of the others
            schema = {"$ref": f"#/components/schemas/{kind}"}
            assert problems(schema, result, document) == []
        check("GET", f"samplers/{sampler}", "samplers/{sampler_id}")
        check("POST", "get_info", model_id=run)
        check("POST", "weights_info", tinker_path=results[2]["path"])
        check("GET", "get_server_capabilities")
        check("GET", "checkpoints")
        check("GET", "training_runs")
        check("GET", f"training_runs/{run}", "training_runs/{run_id}")
        listed = "training_runs/{run_id}/checkpoints"
        check("GET", f"training_runs/{run}/checkpoints", listed)
        name = f"{listed}/{{kind}}/{{name}}"
        check("DELETE", f"training_runs/{run}/checkpoints/weights/a", name)
        check("DELETE", f"training_runs/{run}/checkpoints/weights/none", name)
        check("GET", f"tokenizers/{MODEL}x", "tokenizers/{model_name}")
        check("POST", "session_heartbeat", session_id=session)
        check("POST", f"sessions/{session}/finish", "sessions/{session_id}/finish")
        check("POST", "session_heartbeat", session_id=session)
        check("POST", "telemetry")
        check("POST", "retrieve_future", request_id="none")
        check("POST", "client/config")
        check("GET", "healthz")


def ids(run: str, seq_id: int) -> dict[str, Any]:
    return {"model_id": run, "seq_id": seq_id}


def pick(future: Any) -> dict[str, Any]:
    return {"request_id": future["request_id"]}
