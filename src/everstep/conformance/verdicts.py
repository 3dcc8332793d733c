"""Verdicts: how a check ends, and the exceptions that end it."""

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
    """The result of one check.

    Attributes:
        name: of the check.
        promise: the promise that it tests, in a sentence.
        verdict: how it ended.
        detail: why it did not pass, else a remark or nothing.
        sent: for a failure or an error, the request that showed it.
        came_back: the response, or the difference.
        seconds: duration.
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
        """Whether the result makes the service fail the suite."""
        return self.verdict in (Verdict.FAIL, Verdict.ERROR)


class CheckEnded(Exception):
    """Base of exceptions that end a check.

    Args:
        detail: the reason.
        sent: the request that showed it.
        came_back: the response.
    """

    verdict = Verdict.ERROR

    def __init__(self, detail: str, sent: str = "", came_back: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.sent = sent
        self.came_back = came_back


class PromiseBroken(CheckEnded):
    """The promise does not hold."""

    verdict = Verdict.FAIL


class NotSupported(CheckEnded):
    """The service does not offer an endpoint or option that the check needs."""

    verdict = Verdict.NOT_SUPPORTED


class CheckError(CheckEnded):
    """A prerequisite of the check failed, so the check has no verdict."""

    verdict = Verdict.ERROR
