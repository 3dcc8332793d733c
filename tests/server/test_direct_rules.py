"""Which routes are called directly, and how. Anything else is left to FastAPI."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.routing import Match, NoMatchFound
from starlette.testclient import TestClient

from everstep.server.direct import ExactPaths, direct_handler
from tests.server.asgi import call


class Answer(BaseModel):
    """An answer whose field has another name on the wire."""

    text: str = Field("yes", serialization_alias="content")


class Longer(Answer):
    """An answer that says more than its route declares."""

    secret: str = "s"


async def reader(request: Request) -> str:
    return request.headers["x-name"]


class Reader:
    """A dependency that is called."""

    async def __call__(self, request: Request) -> str:
        return request.headers["x-name"]


def in_a_thread(request: Request) -> str:
    return request.headers["x-name"]


async def of_header(x_name: Annotated[str, Header()]) -> str:
    return x_name


async def of_two(request: Request, x_name: Annotated[str, Header()]) -> str:
    return x_name


Name = Annotated[str, Depends(reader)]
# Annotations are evaluated here, as FastAPI does.


async def plain() -> Answer:
    return Answer()


async def with_request(request: Request, name: Name) -> Answer:
    return Answer(text=f"{request.method} {name}")


async def with_object(name: Annotated[str, Depends(Reader())]) -> Answer:
    return Answer(text=name)


async def with_response(name: Name) -> Response:
    return Response(name, status_code=202)


def synchronous() -> Answer:
    return Answer()


async def with_thread(name: Annotated[str, Depends(in_a_thread)]) -> Answer:
    return Answer(text=name)


async def with_header(x_name: Annotated[str, Header()]) -> Answer:
    return Answer(text=x_name)


async def with_header_below(name: Annotated[str, Depends(of_header)]) -> Answer:
    return Answer(text=name)


async def with_both(name: Annotated[str, Depends(of_two)]) -> Answer:
    return Answer(text=name)


async def with_query(name: str = "x") -> Answer:
    return Answer(text=name)


async def union() -> Answer | None:
    return None


async def listed() -> list[Answer]:
    return []


async def no_annotation():  # type: ignore[no-untyped-def]  # as a route may have none
    return {}


def route(endpoint: Callable[..., Any], path: str = "/it", **options: Any) -> APIRoute:
    return APIRoute(path, endpoint, **options)


@pytest.mark.parametrize("endpoint", [plain, with_request, with_object, with_response])
def test_endpoint_that_reads_the_request_alone_is_direct(endpoint: Any) -> None:
    assert direct_handler(route(endpoint)) is not None


@pytest.mark.parametrize(
    "endpoint",
    [
        synchronous,
        with_thread,
        with_header,
        with_header_below,
        with_both,
        with_query,
        union,
        listed,
        no_annotation,
    ],
)
def test_other_endpoint_is_left_to_fastapi(endpoint: Any) -> None:
    assert direct_handler(route(endpoint)) is None


def test_another_status_is_left_to_fastapi() -> None:
    assert direct_handler(route(plain, status_code=201)) is None


@pytest.mark.parametrize(
    "endpoint", [plain, with_request, with_object, with_response], ids=lambda each: each.__name__
)
def test_direct_answer_is_that_of_fastapi(endpoint: Any) -> None:
    class Direct(APIRoute):
        """As the service's routes are."""

        def get_route_handler(self) -> Any:
            handler = direct_handler(self)
            assert handler is not None
            return handler

    answers = []
    for kind in (Direct, APIRoute):
        router = APIRouter(route_class=kind)
        router.post("/it")(endpoint)
        app = FastAPI()
        app.include_router(router)
        with TestClient(app) as client:
            answer = client.post("/it", headers={"x-name": "n"})
        answers.append((answer.status_code, answer.headers.raw, answer.content))
    assert answers[0] == answers[1]


def test_answer_of_another_type_is_an_error_and_not_sent() -> None:
    """FastAPI would filter its fields."""

    async def wrong() -> Answer:
        return Longer()

    handler = direct_handler(route(wrong))
    assert handler is not None
    scope = {"type": "http", "method": "GET", "path": "/it", "headers": []}
    with pytest.raises(TypeError, match="wrong returned"):
        asyncio.run(handler(Request(scope)))  # type: ignore[arg-type]  # it is a coroutine


# Paths

EXACT = ExactPaths(
    [
        ("/a", route(plain, "/it", methods=["POST"])),
        ("/a", route(with_request, "/it", methods=["POST", "PUT"])),
        ("/a", route(plain, "/of/{name}", methods=["POST"])),
    ]
)


def scope(method: str = "POST", path: str = "/a/it", **more: Any) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "root_path": "", **more}


def test_route_is_found_by_its_method_and_whole_path() -> None:
    match, found = EXACT.matches(scope())
    assert (match, found["endpoint"], found["path_params"]) == (Match.FULL, plain, {})
    assert EXACT.matches(scope("PUT"))[1]["endpoint"] is with_request, "the first that has it"


@pytest.mark.parametrize(
    "other",
    [
        scope("GET"),
        scope(path="/it"),
        scope(path="/a/it/"),
        scope(path="/a/of/{name}"),
        scope(path="/a/of/x"),
        scope(root_path="/a"),
        {"type": "websocket", "path": "/a/it", "root_path": ""},
    ],
    ids=str,
)
def test_other_request_is_left_to_fastapi(other: dict[str, Any]) -> None:
    assert EXACT.matches(other) == (Match.NONE, {})


def test_names_are_left_to_the_routes_themselves() -> None:
    with pytest.raises(NoMatchFound):
        EXACT.url_path_for("plain")


def test_found_route_is_called() -> None:
    app = FastAPI()
    app.router.routes.insert(0, EXACT)
    start, body = asyncio.run(call(app, "/a/it", []))
    assert (start["status"], body["body"]) == (200, b'{"content":"yes"}')
