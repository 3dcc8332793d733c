"""The checks by name, each with the sentence that it looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from everstep.conformance.bench import Bench

Body = Callable[[Bench], str | None]


@dataclass(frozen=True)
class Check:
    """One promise, and how to find out whether it holds.

    Attributes:
        name: what ``--only`` takes.
        promise: a sentence.
        body: returns a remark or nothing where the promise holds; raises `CheckEnded` otherwise.
    """

    name: str
    promise: str
    body: Body


_checks: dict[str, Check] = {}


def check(name: str, promise: str) -> Callable[[Body], Body]:
    """Make a function a check.

    Args:
        name: unique among the checks.
        promise: what the service promises, in a sentence.
    """

    def register(body: Body) -> Body:
        if name in _checks:
            raise ValueError(f"there are two checks named {name!r}")
        _checks[name] = Check(name, promise, body)
        return body

    return register


def all_checks() -> list[Check]:
    """Every check, in the order in which they run."""
    from everstep.conformance import checks

    checks.load()
    return list(_checks.values())
