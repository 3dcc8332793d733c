"""What /openapi.json says of bodies and answers.

The routes read their bodies themselves: they come compressed, as JSON of many releases of an SDK
or as protobuf. So each route names here what it takes and how it can refuse it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from everstep.wire import types
from everstep.wire.proto import PROTOBUF

DESCRIPTION = """\
Fine-tuning over the Tinker protocol, on a service of your own. What it has acknowledged is never
lost, and what it restores is exact to the bit.

* **Operations** (`create_model`, `forward_backward`, `optim_step`, `save_weights`, …) answer with
  a `request_id` as soon as they are durable. `retrieve_future` waits for their result. One that
  was wrong has a failed future: 200 with `error` and `category`.
* **Order**: a run's operations are executed by their `seq_id`, 1, 2, 3, …, in whatever order they
  arrive. A retry of a request gets the `request_id` that it got before.
* **Errors** that can't be put into a future are `{"detail": …}` with a 4xx or 503 status.
* **Bodies** may be compressed with gzip or zstd (`Content-Encoding`). Unknown fields are ignored,
  and a null stands for the field's default.
"""
_REF = "#/components/schemas/"
_ERRORS = {
    400: "The request is wrong; the text says how",
    403: "The link is not valid, or not any more",
    404: "What it names does not exist",
    410: "The session is finished, or the result was acknowledged and is dropped",
    413: "The body is over the limit",
    429: "Too many at a time; send it again after `Retry-After`",
    503: "Not ready; try again",
}
_TENSOR: JsonSchemaValue = {
    "title": "TensorData",
    "description": "An array: dense, or sparse CSR with `shape` [rows, columns].",
    "type": "object",
    "properties": {
        "data": {
            "description": "The values, flat; of a sparse tensor those that are listed. "
            "A null is NaN.",
            "type": "array",
            "items": {"type": ["number", "null"]},
        },
        "dtype": {"enum": ["float32", "int64"]},
        "shape": {
            "description": "Absent: one dimension.",
            "type": "array",
            "items": {"type": "integer", "minimum": 0},
        },
        "sparse_crow_indices": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "sparse_col_indices": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    },
    "required": ["data"],
}
_read_tensor = TypeAdapter(types.TensorData).core_schema["function"]
_described: dict[str, type[BaseModel]] = {}


def takes(model: type[BaseModel], *, protobuf: str | None = None, empty: bool = False) -> Any:
    """What a route's body is, as its ``openapi_extra``.

    Args:
        model: its JSON form.
        protobuf: the message that may be sent instead.
        empty: whether there may be no body.
    """
    _described[model.__name__] = model
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": _REF + model.__name__}}}
    if protobuf is not None:
        content[PROTOBUF] = message(protobuf)
    return {"requestBody": {"required": not empty, "content": content}}


TAKES_TAR: Any = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-tar": {
                "schema": {"type": "string", "contentMediaType": "application/x-tar"}
            }
        },
    }
}
"""The body of a route that takes an archive."""


def message(text: str) -> dict[str, Any]:
    """The media type of a protobuf message; OpenAPI has no schema for one."""
    schema = {"type": "string", "contentMediaType": PROTOBUF, "description": text}
    return {"schema": schema}


def errors(
    *statuses: int, model: type[BaseModel] = types.ErrorResponse
) -> dict[int | str, dict[str, Any]]:
    """The statuses with which a route refuses, as its ``responses``; 503 is always one.

    Args:
        statuses: the others.
        model: the form of an error.
    """
    return {status: {"model": model, "description": _ERRORS[status]} for status in (*statuses, 503)}


def stream_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`errors` of a route whose answer is a stream, and whose errors are JSON all the same."""
    content = {"application/json": {"schema": {"$ref": _REF + types.ErrorResponse.__name__}}}
    return {
        status: {"description": error["description"], "content": content}
        for status, error in errors(*statuses).items()
    }


def describe(app: FastAPI) -> None:
    """Have the application's document hold what its routes named."""
    generate = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(generate())
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation does it


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    """Add the schemas of bodies; remove the error that FastAPI would give, and we don't."""
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for schema in schemas.values():
        _open(schema)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            for answer in operation["responses"].values():
                _describe_streams(answer.get("content", {}))
    requests = _request_schemas()
    names = {
        name: f"{name}-Input" if schemas.get(name, schema) != schema else name
        for name, schema in requests.items()
    }
    schemas |= {names[name]: _renamed(schema, names) for name, schema in requests.items()}
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    return document


def _describe_streams(content: dict[str, Any]) -> None:
    """Say of streams what OpenAPI 3.1 can say; FastAPI describes their items as 3.2 does."""
    for form in content.values():
        if form.pop("itemSchema", None) is not None:
            form["schema"] = {"type": "string", "description": "Server-sent events"}


def _request_schemas() -> dict[str, Any]:
    _, schema = models_json_schema(
        [(model, "validation") for model in _described.values()],
        ref_template=_REF + "{model}",
        schema_generator=_LenientSchema,
    )
    definitions: dict[str, Any] = schema["$defs"]
    return definitions


def _renamed(schema: Any, names: dict[str, str]) -> Any:
    """The schema with its references changed."""
    if isinstance(schema, list):
        return [_renamed(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _REF + names[item.removeprefix(_REF)] if key == "$ref" else _renamed(item, names)
        for key, item in schema.items()
    }


def _open(schema: JsonSchemaValue) -> JsonSchemaValue:
    """The schema, with fields allowed that it does not know: whoever reads it ignores them."""
    if schema.get("additionalProperties") is False:
        del schema["additionalProperties"]
    return schema


class _LenientSchema(GenerateJsonSchema):
    """The schemas as the service reads them."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        return _open(super().model_schema(schema))

    def bytes_schema(self, schema: core_schema.BytesSchema) -> JsonSchemaValue:
        return {"type": "string", "contentEncoding": "base64"}

    def function_plain_schema(
        self, schema: core_schema.PlainValidatorFunctionSchema
    ) -> JsonSchemaValue:
        if schema["function"] == _read_tensor:
            return dict(_TENSOR)
        return super().function_plain_schema(schema)
