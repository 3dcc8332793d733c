"""Direct routes: found by their exact path, called without FastAPI's resolution of dependencies.

A training step is a few small requests, and FastAPI spends more on each than the service does: it
tries one route after the other, and resolves every dependency through generic code. Most routes
need neither: their path has no parameters, and what they take is read from the request alone.
Everything else, and the document of the API, stays FastAPI's. So do errors: a request whose direct
handler raised takes the way through FastAPI and its middleware, where the error is raised again.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar, get_args

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import ASGIApp, Receive, Scope, Send

Handler = Callable[[Request], Awaitable[Response]]
Reader = Callable[[Request], Awaitable[Any]]
Value = TypeVar("Value")
_RAISED = "everstep.raised"
"""The key in a request's scope of what its direct handler raised."""


class ExactPaths(BaseRoute):
    """Routes whose paths have no parameters, by method and path.

    Args:
        routes: the routes, with the prefix that their router is included with.
    """

    def __init__(self, routes: Iterable[tuple[str, APIRoute]]) -> None:
        self._routes: dict[tuple[str, str], APIRoute] = {}
        self._handlers: dict[tuple[str, str], Handler] = {}
        for prefix, route in routes:
            if not route.param_convertors:
                for method in route.methods or ():
                    key = method, prefix + route.path
                    if self._routes.setdefault(key, route) is route and _is_direct(route):
                        self._handlers[key] = route.get_route_handler()

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Find the route of a request. Requests with another method are left to FastAPI."""
        route = self._of(scope)
        if route is None:
            return Match.NONE, {}
        return Match.FULL, {"endpoint": route.endpoint, "path_params": {}, "route": route}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the route, or raise the error of its direct handler."""
        if _RAISED in scope:
            raise scope[_RAISED]
        app: ASGIApp = scope["route"].app
        await app(scope, receive, send)

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        """Leave addresses to the routes themselves."""
        raise NoMatchFound(name, path_params)

    def direct(self, scope: Scope) -> Handler | None:
        """Return the direct handler of a request, if it has one."""
        return self._found(self._handlers, scope)

    def _of(self, scope: Scope) -> APIRoute | None:
        return self._found(self._routes, scope)

    def _found(self, values: Mapping[tuple[str, str], Value], scope: Scope) -> Value | None:
        if scope["type"] != "http" or scope.get("root_path"):
            return None
        return values.get((scope["method"], scope["path"]))


class DirectFastAPI(FastAPI):
    """A FastAPI that calls direct handlers past its middleware.

    Attributes:
        exact: the routes that are found by their path, None until they are known.
    """

    exact: ExactPaths | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        handler = self.exact.direct(scope) if self.exact is not None else None
        if handler is None:
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        try:
            response = await handler(Request(scope, receive, send))
        except Exception as error:  # noqa: BLE001  raised again where errors are answered
            scope[_RAISED] = error
            await super().__call__(scope, receive, send)
        else:
            await response(scope, receive, send)


def _is_direct(route: APIRoute) -> bool:
    """Return whether a route's own handler takes nothing that FastAPI's middleware prepares."""
    own = type(route).get_route_handler is not APIRoute.get_route_handler
    return own and direct_handler(route) is not None


def direct_handler(route: APIRoute) -> Handler | None:
    """Return a handler that calls a route's endpoint, or None where that takes FastAPI.

    A parameter can be the request, or a dependency on an asynchronous function of the request. The
    result is a response, or the model that the endpoint is annotated with.
    """
    endpoint = route.endpoint
    signature = inspect.signature(endpoint, eval_str=True)
    readers = {name: _reader(each) for name, each in signature.parameters.items()}
    model = signature.return_annotation
    if not (inspect.iscoroutinefunction(endpoint) and isinstance(model, type)):
        return None
    if not issubclass(model, Response | BaseModel) or route.status_code not in (None, 200, 204):
        return None
    found = {name: reader for name, reader in readers.items() if reader is not None}
    return _handler(endpoint, found, model) if len(found) == len(readers) else None


def _handler(
    endpoint: Callable[..., Awaitable[Any]],
    readers: Mapping[str, Reader],
    model: type[Response | BaseModel],
) -> Handler:
    async def respond(request: Request) -> Response:
        response: Response = await endpoint(
            **{name: await read(request) for name, read in readers.items()}
        )
        return response

    async def serialize(request: Request) -> Response:
        result = await endpoint(**{name: await read(request) for name, read in readers.items()})
        if type(result) is not model:
            raise TypeError(f"{endpoint.__name__} returned {type(result)}, not {model}")
        content = to_json(result, by_alias=True)
        return Response(content, media_type="application/json")

    if issubclass(model, Response):
        return respond
    to_json = model.__pydantic_serializer__.to_json
    return serialize


def _reader(parameter: inspect.Parameter) -> Reader | None:
    """Return what reads a parameter from the request, if it needs nothing else."""
    if parameter.annotation is Request:
        return _itself
    for mark in get_args(parameter.annotation)[1:]:
        dependency = getattr(mark, "dependency", None)
        if dependency is None:
            continue
        call = dependency if inspect.isroutine(dependency) else type(dependency).__call__
        taken = list(inspect.signature(dependency, eval_str=True).parameters.values())
        if inspect.iscoroutinefunction(call) and [each.annotation for each in taken] == [Request]:
            return dependency  # type: ignore[no-any-return]
    return None


async def _itself(request: Request) -> Request:
    return request
