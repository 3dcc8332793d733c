"""JSON Schema 2020-12: a validator of the keywords that the document uses.

An unknown keyword is an error. The validator is small, so the tests need no library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

ANNOTATIONS = {
    *("title", "description", "default", "format", "discriminator"),
    *("contentEncoding", "contentMediaType"),
}
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}
BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}
LENGTHS: dict[str, Callable[[int, int], bool]] = {
    "minItems": lambda length, bound: length >= bound,
    "maxItems": lambda length, bound: length <= bound,
    "minLength": lambda length, bound: length >= bound,
    "maxLength": lambda length, bound: length <= bound,
}


def problems(
    schema: Mapping[str, Any] | bool, value: Any, document: Mapping[str, Any], at: str = "body"
) -> list[str]:
    """Return a message for each mismatch between a value and a schema."""
    if isinstance(schema, bool):
        return [] if schema else [f"{at}: nothing is allowed here"]
    return list(_problems(schema, value, document, at))


def _problems(
    schema: Mapping[str, Any], value: Any, document: Mapping[str, Any], at: str
) -> Iterator[str]:
    for key, rule in schema.items():
        if key == "$ref":
            yield from problems(resolved(rule, document), value, document, at)
        elif key == "type":
            names = rule if isinstance(rule, list) else [rule]
            if not any(TYPES[name](value) for name in names):
                yield f"{at}: {value!r} is not {' or '.join(names)}"
        elif key == "const":
            if value != rule:
                yield f"{at}: {value!r} is not {rule!r}"
        elif key == "enum":
            if value not in rule:
                yield f"{at}: {value!r} is none of {rule}"
        elif key in ("anyOf", "oneOf"):
            fitting = [one for one in rule if not problems(one, value, document, at)]
            if not fitting or (key == "oneOf" and len(fitting) > 1):
                yield f"{at}: {value!r} fits {len(fitting)} of {key}"
        elif key in BOUNDS:
            if TYPES["number"](value) and not BOUNDS[key](value, rule):
                yield f"{at}: {value!r} breaks {key} {rule}"
        elif key in LENGTHS:
            if isinstance(value, list | str) and not LENGTHS[key](len(value), rule):
                yield f"{at}: its length breaks {key} {rule}"
        elif key in ("prefixItems", "items"):
            if isinstance(value, list):
                fixed = len(schema.get("prefixItems", []))
                rules = rule if key == "prefixItems" else [rule] * max(0, len(value) - fixed)
                rest = value[:fixed] if key == "prefixItems" else value[fixed:]
                for index, (one, item) in enumerate(zip(rules, rest, strict=False)):
                    yield from problems(one, item, document, f"{at}[{index}]")
        elif key == "properties":
            for name, one in rule.items():
                if isinstance(value, dict) and name in value:
                    yield from problems(one, value[name], document, f"{at}.{name}")
        elif key == "required":
            missing = set(rule) - set(value) if isinstance(value, dict) else set()
            yield from (f"{at}: {name} is missing" for name in sorted(missing))
        elif key == "additionalProperties":
            if isinstance(value, dict):
                for name in value.keys() - schema.get("properties", {}).keys():
                    yield from problems(rule, value[name], document, f"{at}.{name}")
        elif key not in ANNOTATIONS:
            raise AssertionError(f"{at}: {key} is not a keyword that is known here")


def resolved(reference: str, document: Mapping[str, Any]) -> Any:
    """Return the target of a reference, or raise KeyError if there is none."""
    found: Any = document
    assert reference.startswith("#/"), reference
    for part in reference[2:].split("/"):
        found = found[part]
    return found


def schemas_in(value: Any, at: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every schema of a document and every nested one, with its location."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from schemas_in(item, f"{at}/{index}")
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "schema":
                yield from _inside(item, f"{at}/{key}")
            elif key == "schemas":
                for name, schema in item.items():
                    yield from _inside(schema, f"{at}/{key}/{name}")
            else:
                yield from schemas_in(item, f"{at}/{key}")


def _inside(schema: Any, at: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(schema, bool):
        return
    yield at, schema
    for key in ("anyOf", "oneOf", "prefixItems"):
        for index, one in enumerate(schema.get(key, [])):
            yield from _inside(one, f"{at}/{key}/{index}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from _inside(schema[key], f"{at}/{key}")
    for name, one in schema.get("properties", {}).items():
        yield from _inside(one, f"{at}/properties/{name}")
