"""What went wrong, in one line for a person and in an exit code for a script.

0 done   1 failed   2 wrong usage   3 there is no such thing   4 the service can't be reached
5 the API key is missing or refused   6 the service doesn't offer that   130 interrupted by Ctrl-C
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import typer


class Code(IntEnum):
    """Exit codes; 130 is what Ctrl-C gives everywhere."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 4
    NO_ACCESS = 5
    NOT_OFFERED = 6
    INTERRUPTED = 130


class Refused(Exception):
    """A command can't do what it was asked; the text says why and what to do."""

    code = Code.FAILED


class WrongUsage(Refused):
    """What was typed can't be meant; the text says what can."""

    code = Code.USAGE


class NotFound(Refused):
    """There is no such run, checkpoint, session or file."""

    code = Code.NOT_FOUND


class Unreachable(Refused):
    """No service answers."""

    code = Code.UNREACHABLE


class NoAccess(Refused):
    """There is no API key, or it can't be one."""

    code = Code.NO_ACCESS


class NotOffered(Refused):
    """The service has no call for it: it is not Everstep, or an older one."""

    code = Code.NOT_OFFERED


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Print an error as one line on standard error, and exit with its code."""
    try:
        yield
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"everstep: {text_of(error)}", file=sys.stderr)
        raise typer.Exit(code) from error


def exit_code(error: Exception) -> Code | None:
    """The exit code of an error; None: nobody foresaw it."""
    if isinstance(error, Refused):
        return error.code
    for module, name, code in _FORESEEN:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return code
    if isinstance(error, BrokenPipeError):
        return None  # whoever read our output has seen enough; typer ends quietly
    return Code.FAILED if isinstance(error, OSError) else None


def text_of(error: Exception) -> str:
    """What an error says; of a service's refusal the service's own words."""
    body: Any = getattr(error, "body", None)
    if isinstance(body, dict) and isinstance(body.get("detail"), str):
        return f"the service refused: {body['detail']}"
    problems: Any = getattr(error, "errors", None)
    if callable(problems) and type(error).__name__ == "ValidationError":
        return "; ".join(
            f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in problems()
        )
    if isinstance(error, OSError) and error.errno in _NO_ROOM and error.strerror:
        where = error.filename2 or error.filename
        place = f" for {where}" if where else ""
        return f"there is no room left{place} ({error.strerror}). Make some, and try again."
    if isinstance(error, UnicodeEncodeError):
        return f"what was typed is not UTF-8 text: {error}"
    text = str(error) or type(error).__name__
    if type(error).__name__ == "APIResponseValidationError":
        return text.splitlines()[0]  # the rest is pydantic's, field by field
    return text


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_FORESEEN = (
    ("builtins", "UnicodeEncodeError", Code.USAGE),
    ("everstep.client._errors", "APIConnectionError", Code.UNREACHABLE),
    ("everstep.client._errors", "LocalServiceError", Code.UNREACHABLE),
    ("everstep.client._errors", "AuthenticationError", Code.NO_ACCESS),
    ("everstep.client._errors", "PermissionDeniedError", Code.NO_ACCESS),
    ("everstep.client._errors", "NotFoundError", Code.NOT_FOUND),
    ("everstep.client._errors", "TinkerError", Code.FAILED),
    ("everstep.wire.errors", "WireError", Code.USAGE),
    ("pydantic", "ValidationError", Code.USAGE),
    ("httpx", "HTTPError", Code.UNREACHABLE),
    ("everstep.vault", "VaultError", Code.FAILED),
    ("everstep.interchange.errors", "InterchangeError", Code.FAILED),
    ("everstep.ledger", "LedgerError", Code.FAILED),
    ("everstep.runtime.errors", "OperationFailed", Code.FAILED),
    ("everstep.runtime.errors", "Rejected", Code.FAILED),
    ("everstep.cli.training_text", "DataError", Code.FAILED),
    ("sqlalchemy.exc", "SQLAlchemyError", Code.FAILED),
)
"""By module, so that none is imported for its errors: what was not loaded can't be raised."""
