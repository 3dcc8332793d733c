"""What the doctor found of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How well something is; the later the worse."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        name: of the thing.
        state: how well it is.
        found: what is so.
        advice: what to do; None where it is well.
    """

    name: str
    state: State
    found: str
    advice: str | None = None


def ok(name: str, found: str) -> Finding:
    """It is well."""
    return Finding(name, State.OK, found)


def warning(name: str, found: str, advice: str) -> Finding:
    """It works, and not as it could."""
    return Finding(name, State.WARNING, found, advice)


def problem(name: str, found: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(name, State.PROBLEM, found, advice)
