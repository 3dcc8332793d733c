"""The protocol's types, under the names of the official SDK."""

from typing import TYPE_CHECKING, Any

from everstep.wire import types

if TYPE_CHECKING:
    from everstep.wire.types import *  # noqa: F403  this is the module's whole purpose

__all__ = types.__all__


def __dir__() -> list[str]:
    return list(__all__)


def __getattr__(name: str) -> Any:
    """Return a type. It is loaded when it is first used."""
    return getattr(types, name)
