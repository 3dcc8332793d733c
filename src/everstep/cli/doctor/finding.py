"""Findings of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """State of a check, from good to bad."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: name of the check.
        state: its state.
        found: the finding.
        advice: how to fix it, or None if the state is ``ok``.
    """

    name: str
    state: State
    found: str
    advice: str | None = None


def ok(name: str, found: str) -> Finding:
    """Create a finding that needs no action."""
    return Finding(name, State.OK, found)


def warning(name: str, found: str, advice: str) -> Finding:
    """Create a finding that may need action."""
    return Finding(name, State.WARNING, found, advice)


def problem(name: str, found: str, advice: str) -> Finding:
    """Create a finding that needs action."""
    return Finding(name, State.PROBLEM, found, advice)
