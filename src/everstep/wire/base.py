"""The base of every type on the wire, and the lenient parse of the server.

A client that misspells a field is told so when it builds the request. A server takes what any
release of an SDK sends: unknown fields are ignored, a null stands for the default, ``type`` may
be absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from everstep.wire.errors import InvalidRequest

Model = TypeVar("Model", bound=BaseModel)


class Request(BaseModel):
    """Base of what a client sends."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), frozen=False)


class Response(BaseModel):
    """Base of what a server answers."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


def parse(model: type[Model], body: bytes | Mapping[str, Any]) -> Model:
    """Read a request as leniently as the protocol asks.

    Args:
        model: the type that is wanted.
        body: JSON bytes, or what they hold.

    Raises:
        InvalidRequest: it can't be read; the text names each field that is wrong.
    """
    try:
        content = from_json(body) if isinstance(body, bytes | bytearray) else dict(body)
    except ValueError as error:  # also of text that is not UTF-8, and of nesting without end
        raise InvalidRequest(f"The body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"The body has to be a JSON object, not {type(content).__name__}.")
    try:
        return model.model_validate(_without_nulls(content), extra="ignore")
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'body'}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False, include_input=False)[:5]
        )
        raise InvalidRequest(f"{model.__name__}: {problems}") from error


def _without_nulls(value: Any) -> Any:
    """Objects without their null members: a null means the default."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_without_nulls(item) for item in value]
    return value
