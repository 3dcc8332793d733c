"""OpenAPI: descriptions of bodies and errors that FastAPI can't derive from the routes.

Bodies are parsed by `everstep.server.body`, so their schemas are added to the document here.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from everstep.wire import types
from everstep.wire.codecs.proto import PROTOBUF

DESCRIPTION = """\
Fine-tuning over the Tinker protocol, on a service of your own. What it has acknowledged is never
lost, and what it restores is exact to the bit.

* **Operations** (`create_model`, `forward_backward`, `optim_step`, `save_weights`, …) answer with
  a `request_id` as soon as they are durable. `retrieve_future` waits for their result. An invalid
  operation has a failed future: 200 with `error` and `category`.
* **Order**: a run's operations are executed by their `seq_id`, 1, 2, 3, …, in any order of
  arrival. A retry of a request gets the same `request_id`.
* **Errors** that can't be recorded in a future are `{"detail": …}` with a 4xx or 503 status.
* **Bodies** may be compressed with gzip or zstd (`Content-Encoding`). Unknown fields are ignored,
  and a null stands for the field's default.
"""
_REF = "#/components/schemas/"
_ERRORS = {
    400: "The request is invalid, the text says how",
    403: "The URL's signature is invalid or expired",
    404: "The object does not exist",
    409: "The run or session is in use, the text says by what",
    410: "The session is finished, or the result was acknowledged and is dropped",
    413: "The body is over the limit",
    429: "Too many at a time, send it again after `Retry-After`",
    503: "Not ready, try again",
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
_request_models: dict[str, type[BaseModel]] = {}


def request_body(
    model: type[BaseModel], *, protobuf: str | None = None, required: bool = True
) -> dict[str, Any]:
    """Describe a route's body, as its ``openapi_extra``.

    Args:
        model: the type of its JSON form.
        protobuf: the description of the protobuf message that may be sent instead.
        required: whether an empty body is an error.
    """
    _request_models[model.__name__] = model
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": _REF + model.__name__}}}
    if protobuf is not None:
        content[PROTOBUF] = protobuf_content(protobuf)
    return {"requestBody": {"required": required, "content": content}}


TAR_BODY: Any = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-tar": {
                "schema": {"type": "string", "contentMediaType": "application/x-tar"}
            }
        },
    }
}
"""The body of a route that reads an archive, as its ``openapi_extra``."""


def protobuf_content(text: str) -> dict[str, Any]:
    """Describe a protobuf message in words, because OpenAPI has no schema for one."""
    schema = {"type": "string", "contentMediaType": PROTOBUF, "description": text}
    return {"schema": schema}


def errors(
    *statuses: int, model: type[BaseModel] = types.ErrorResponse
) -> dict[int | str, dict[str, Any]]:
    """Describe the error statuses of a route, as its ``responses``. 503 is always one of them.

    Args:
        statuses: the other statuses.
        model: the type of an error.
    """
    return {status: {"model": model, "description": _ERRORS[status]} for status in (*statuses, 503)}


def stream_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the error statuses of a route that streams, whose errors are JSON all the same."""
    content = {"application/json": {"schema": {"$ref": _REF + types.ErrorResponse.__name__}}}
    return {
        status: {"description": error["description"], "content": content}
        for status, error in errors(*statuses).items()
    }


def describe(app: FastAPI) -> None:
    """Complete the application's document with the schemas of request bodies."""
    generate = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(generate())
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation does it


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    """Add the schemas of bodies, and remove FastAPI's own validation error, which is never sent."""
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
    """Describe streams as OpenAPI 3.1 can. FastAPI describes their items in OpenAPI 3.2."""
    for form in content.values():
        if form.pop("itemSchema", None) is not None:
            form["schema"] = {"type": "string", "description": "Server-sent events"}


def _request_schemas() -> dict[str, Any]:
    _, schema = models_json_schema(
        [(model, "validation") for model in _request_models.values()],
        ref_template=_REF + "{model}",
        schema_generator=_LenientSchema,
    )
    definitions: dict[str, Any] = schema["$defs"]
    return definitions


def _renamed(schema: Any, names: dict[str, str]) -> Any:
    """Return a schema with its references renamed."""
    if isinstance(schema, list):
        return [_renamed(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _REF + names[item.removeprefix(_REF)] if key == "$ref" else _renamed(item, names)
        for key, item in schema.items()
    }


def _open(schema: JsonSchemaValue) -> JsonSchemaValue:
    """Allow unknown fields in a schema, because readers ignore them."""
    if schema.get("additionalProperties") is False:
        del schema["additionalProperties"]
    return schema


class _LenientSchema(GenerateJsonSchema):
    """Generates the schemas of messages as the service parses them."""

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
