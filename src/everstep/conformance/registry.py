"""Registry: the checks by name, each with the promise that it tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from everstep.conformance.bench import Bench

Body = Callable[[Bench], str | None]


@dataclass(frozen=True)
class Check:
    """One promise, and a function that tests it.

    Attributes:
        name: name for ``--only``.
        promise: a sentence.
        body: returns a remark or None if the promise holds, and raises `CheckEnded` otherwise.
    """

    name: str
    promise: str
    body: Body


_checks: dict[str, Check] = {}


def check(name: str, promise: str) -> Callable[[Body], Body]:
    """Register a function as a check.

    Args:
        name: unique among the checks.
        promise: the service's promise, in a sentence.
    """

    def register(body: Body) -> Body:
        if name in _checks:
            raise ValueError(f"two checks are named {name!r}")
        _checks[name] = Check(name, promise, body)
        return body

    return register


def all_checks() -> list[Check]:
    """Return every check in the order of execution."""
    from everstep.conformance import checks

    checks.load()
    return list(_checks.values())
