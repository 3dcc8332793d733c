"""``<method>_async``: the names under which older scripts await a method."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def gives_future(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A coroutine that returns what the method does: its future, to be awaited in turn."""

    @functools.wraps(method)
    async def twin(*args: P.args, **kwargs: P.kwargs) -> T:
        return method(*args, **kwargs)

    return _named(twin, method)


def gives_result(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A coroutine that returns the result of the method's future."""

    @functools.wraps(method)
    async def twin(*args: P.args, **kwargs: P.kwargs) -> T:
        return await method(*args, **kwargs)

    return _named(twin, method)


def _named(twin: Callable[P, T], method: Callable[..., Any]) -> Callable[P, T]:
    twin.__name__ = f"{method.__name__}_async"
    twin.__qualname__ = f"{method.__qualname__}_async"
    twin.__doc__ = f"`{method.__name__}` under the name that older scripts await."
    return twin
