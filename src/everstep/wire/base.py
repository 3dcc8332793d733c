"""Bases of all messages, and the lenient parser of the server.

A client that misspells a field gets an error when it builds the request. A server accepts the
requests of every SDK release: it reads a null as the default, and doesn't require ``type``. One
null is an error: that of a float which has to be a number, because the official client sends NaN
and infinity as null. An unknown field is an error unless it is off (null, false or empty): a
misspelt ``learning_rate`` must not train with the default. An SDK that is newer than this release
may send further fields in a request, but not in its parts (`parse`).
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails, from_json

from everstep.json_values import check_json
from everstep.logs import get_logger
from everstep.wire.errors import InvalidRequest
from everstep.wire.fields import fields_of

Model = TypeVar("Model", bound=BaseModel)
_log = get_logger("everstep.wire")
_LENIENT = "lenient"
_CHECKED = (int, dict)
_NOT_A_NUMBER = "a number is required, not null. Clients send NaN and infinity as null"


class Request(BaseModel):
    """Base of requests. Unknown fields are errors when one is built, and floats are finite.

    Whatever a request holds can be stored and served back: see `check_json`. Where a request has a
    part, it takes any object with that part's fields: see `fields_of`.
    """

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), frozen=False, allow_inf_nan=False
    )

    ignores_unknown: ClassVar[bool] = False
    """Whether a server ignores fields that it does not know: no result depends on them."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            value = fields_of(value, cls.model_fields)
        if not isinstance(value, dict):
            return value
        _check_no_flags(cls, value)
        return _read_leniently(cls, value) if info.context == _LENIENT else value

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        """Check the values that no field's type bounds."""
        for name, value in self.__dict__.items():
            if isinstance(value, _CHECKED):
                check_json(value, name)
        return self


def _read_leniently(model: type[Request], value: dict[str, Any]) -> dict[str, Any]:
    """Drop the nulls that mean a default, and the unknown fields that ask for nothing.

    Raises:
        ValueError: an unknown field asks for something.
    """
    known = _names(model)
    if not model.ignores_unknown and not known.issuperset(value):
        for name in value.keys() - known:
            if not _asks_nothing(value[name]):
                others = ", ".join(sorted(known - {"type"}))
                raise ValueError(f"there is no field {str(name)!r}; there are {others}")
    if None not in value.values():
        return value
    numbers = _float_fields(model)
    return {name: each for name, each in value.items() if each is not None or name in numbers}


def _asks_nothing(value: Any) -> bool:
    """Return whether an unknown field is off, as newer SDKs send what their callers left out."""
    return value is None or value is False or value in ("", [], {})


def _check_no_flags(model: type[Request], value: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a boolean where a number is meant: it would become 0 or 1."""
    for name in _number_fields(model):
        given = value.get(name)
        for each in given.values() if isinstance(given, dict) else (given,):
            if isinstance(each, bool):
                raise ValueError(f"{name} takes a number; got {str(each).lower()}")


@cache
def _names(model: type[BaseModel]) -> frozenset[str]:
    """Return the names under which a model's fields are read."""
    found = set(model.model_fields)
    for field in model.model_fields.values():
        alias = field.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        found |= {each for each in choices if isinstance(each, str)}
    return frozenset(found)


@cache
def _number_fields(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the names of a model's fields that hold numbers, alone or as a mapping's values."""
    return tuple(
        name for name, kinds in _kinds(model) if kinds & {int, float} and bool not in kinds
    )


@cache
def _float_fields(model: type[BaseModel]) -> frozenset[str]:
    """Return the names of a model's fields that hold a float and can't be None."""
    return frozenset(
        name for name, kinds in _kinds(model) if float in kinds and NoneType not in kinds
    )


def _kinds(model: type[BaseModel]) -> Iterator[tuple[str, set[Any]]]:
    """Yield the names of a model's fields and the types of their values."""
    for name, field in model.model_fields.items():
        yield name, set(_alternatives(field.annotation))


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the types of a union, those of a mapping's values, and what annotations annotate."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _alternatives(inner[0])
    elif origin in (Union, UnionType):
        for each in inner:
            yield from _alternatives(each)
    elif origin is dict:
        yield from _alternatives(inner[1])
    else:
        yield annotation


class Response(BaseModel):
    """Base of responses. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


def parse(
    model: type[Model], body: bytes | Mapping[str, Any], *, newer_client: bool = False
) -> Model:
    """Parse a request leniently, as the protocol requires.

    Args:
        model: the type of the message.
        body: JSON bytes, or their decoded object.
        newer_client: the client is an SDK of a later release than any that is known here. Fields
            of the message itself that are unknown are then ignored, and logged once.

    Raises:
        InvalidRequest: the body is invalid. The text names each invalid field.
    """
    try:
        content = from_json(_unmarked(body)) if isinstance(body, bytes | bytearray) else dict(body)
    except ValueError as error:  # also for text that is not UTF-8, and for excessive nesting
        raise InvalidRequest(f"The body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"The body has to be a JSON object, not {type(content).__name__}.")
    if newer_client and not (known := _names(model)).issuperset(content):
        _log_ignored(model.__name__, ", ".join(sorted(content.keys() - known)))
        content = {name: value for name, value in content.items() if name in known}
    try:
        return model.model_validate(content, extra="ignore", context=_LENIENT)
    except ValidationError as error:
        raise InvalidRequest(f"{model.__name__}: {problems(error, 'body')}") from error


@lru_cache(maxsize=256)
def _log_ignored(message: str, names: str) -> None:
    _log.warning("a newer SDK sends fields that are ignored", message=message, fields=names)


def convert(model: type[Model], value: Any, name: str) -> Model:
    """Return a caller's object as a message: itself, or one with the object's fields.

    Args:
        model: the type of the message.
        value: a message, a mapping, or any object with the message's fields.
        name: what the caller calls it, for the error.

    Raises:
        TypeError: the value is no such object.
        ValueError: a field has a wrong value, or means something that the message doesn't have.
    """
    if isinstance(value, model):
        return value
    if not isinstance(value, Mapping) and fields_of(value, model.model_fields) is value:
        raise TypeError(f"{name} has to be a {model.__name__}; got {type(value).__name__}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(
            f"{name} ({kind}) is not a {model.__name__}: {problems(error, name)}"
        ) from error


def problems(error: ValidationError, name: str) -> str:
    """Describe the first problems of a message, each with its field.

    Args:
        error: the error.
        name: of the message itself.
    """
    return "; ".join(_describe(each, name) for each in error.errors(include_url=False)[:5])


def _describe(problem: ErrorDetails, name: str) -> str:
    """Name a field and say what is wrong with it."""
    where = ".".join(str(part) for part in problem["loc"]) or name
    if problem["input"] is None and problem["type"] == "float_type":
        return f"{where}: {_NOT_A_NUMBER}"
    if problem["type"] == "extra_forbidden":
        return f"{where}: there is no such field"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}"


def _unmarked(body: bytes | bytearray) -> bytes | bytearray:
    """Return a body without the byte order mark of the file that it came from."""
    return body.removeprefix(BOM_UTF8)
