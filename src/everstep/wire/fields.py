"""Foreign objects: instances of another package's classes, read by their fields.

Helpers that were written for the official SDK return that SDK's own classes. A request takes any
object that has its fields: a pydantic model, a dataclass, a named tuple or a plain object.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

_UNSET = (PydanticUndefined, dataclasses.MISSING)


def fields_of(value: Any, known: Collection[str]) -> Any:
    """Return the fields of a foreign object, or the value itself if it is no such object.

    A field that is not known is left out while it has its default: it then means nothing. With
    another value it is kept, so that a message which forbids unknown fields names it.

    Args:
        value: any value.
        known: the names of the fields to read. An object that has none of them is returned as
            it is.
    """
    if isinstance(value, type | str | bytes | Mapping):
        return value
    found = {
        name: item
        for name, item, default in _fields(value, known)
        if name in known or not _equal(item, default)
    }
    return found if any(name in known for name in found) else value


def _fields(value: Any, known: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the value and the default of each public field."""
    if isinstance(value, BaseModel):
        for name, info in type(value).model_fields.items():
            yield name, getattr(value, name), info.get_default(call_default_factory=True)
        yield from _without_defaults(value.model_extra or {})
    elif dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            if not each.name.startswith("_"):
                factory = each.default_factory
                default = each.default if factory is dataclasses.MISSING else factory()
                yield each.name, getattr(value, each.name), default
    elif hasattr(value, "_asdict"):
        yield from _without_defaults(value._asdict())
    elif hasattr(value, "__dict__"):
        held = vars(value)
        others = [name for name in known if name not in held and hasattr(value, name)]
        yield from _without_defaults(held)
        yield from _without_defaults({name: getattr(value, name) for name in others})


def _without_defaults(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    return ((name, item, None) for name, item in fields.items() if not name.startswith("_"))


def _equal(value: Any, default: Any) -> bool:
    if default is None or any(default is unset for unset in _UNSET):
        return value is None
    return type(value) is type(default) and bool(value == default)
