"""How a check ends, and what a check raises so that it ends in another way than well."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a check ended."""

    PASS = "pass"
    FAIL = "fail"
    NOT_SUPPORTED = "not supported"
    ERROR = "error"


@dataclass(frozen=True)
class Result:
    """What came of one check.

    Attributes:
        name: the check's name.
        promise: what it looks at, in a sentence.
        verdict: how it ended.
        detail: why, where it did not pass; else a remark, or nothing.
        sent: for a failure or an error, the request that showed it.
        came_back: what was answered, or by how much it was off.
        seconds: how long it took.
    """

    name: str
    promise: str
    verdict: Verdict
    detail: str = ""
    sent: str = ""
    came_back: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether this makes the service fail the suite."""
        return self.verdict in (Verdict.FAIL, Verdict.ERROR)


class CheckEnded(Exception):
    """Base of what ends a check.

    Args:
        detail: why.
        sent: the request that showed it.
        came_back: what was answered.
    """

    verdict = Verdict.ERROR

    def __init__(self, detail: str, sent: str = "", came_back: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.sent = sent
        self.came_back = came_back


class Broken(CheckEnded):
    """The promise does not hold."""

    verdict = Verdict.FAIL


class NotSupported(CheckEnded):
    """The service does not offer what the check needs."""

    verdict = Verdict.NOT_SUPPORTED


class Stuck(CheckEnded):
    """Something that is not what the check looks at did not work, so it can't tell."""

    verdict = Verdict.ERROR
