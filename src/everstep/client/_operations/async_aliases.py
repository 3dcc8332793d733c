"""``<method>_async``: aliases under which older scripts await a method."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def future_alias(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Return a coroutine function that returns the method's future, to be awaited in turn."""

    @functools.wraps(method)
    async def alias(*args: P.args, **kwargs: P.kwargs) -> T:
        return method(*args, **kwargs)

    return _named(alias, method, method.__annotations__.get("return"))


def result_alias(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Return a coroutine function that returns the result of the method's future."""

    @functools.wraps(method)
    async def alias(*args: P.args, **kwargs: P.kwargs) -> T:
        return await method(*args, **kwargs)

    future = str(method.__annotations__.get("return"))
    result = re.fullmatch(r"\w*Future\[(.*)\]", future)
    return _named(alias, method, result[1] if result else future)


def _named(alias: Callable[P, T], method: Callable[..., Any], result: Any) -> Callable[P, T]:
    alias.__signature__ = inspect.signature(method).replace(return_annotation=result)  # type: ignore[attr-defined]
    alias.__name__ = f"{method.__name__}_async"
    alias.__qualname__ = f"{method.__qualname__}_async"
    alias.__doc__ = f"Alias of `{method.__name__}` that older scripts await."
    return alias
