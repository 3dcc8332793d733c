"""Errors of commands: one line on standard error, and an exit code.

0 done   1 failed   2 wrong usage   3 not found   4 the service can't be reached
5 the API key is missing or refused   6 not offered by the service   130 interrupted by Ctrl-C
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
    """Exit codes. 130 is the usual one of Ctrl-C."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 4
    NO_ACCESS = 5
    NOT_OFFERED = 6
    INTERRUPTED = 130


class Refused(Exception):
    """A command can't be carried out. The text gives the reason and the remedy."""

    code = Code.FAILED


class WrongUsage(Refused):
    """Options or arguments are wrong. The text says how to correct them."""

    code = Code.USAGE


class NotFound(Refused):
    """The run, checkpoint, session, home or directory does not exist."""

    code = Code.NOT_FOUND


class Unreachable(Refused):
    """No service answers."""

    code = Code.UNREACHABLE


class NoAccess(Refused):
    """The API key is missing or malformed."""

    code = Code.NO_ACCESS


class NotOffered(Refused):
    """The service has no such route: it is not Everstep, or an older release."""

    code = Code.NOT_OFFERED


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Print an expected error as one line on standard error, and exit with its code."""
    try:
        yield
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"everstep: {error_text(error)}", file=sys.stderr)
        raise typer.Exit(code) from error


def exit_code(error: Exception) -> Code | None:
    """Return the exit code of an error, or None for an unexpected one."""
    if isinstance(error, Refused):
        return error.code
    for module, name, code in _EXPECTED:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return code
    if isinstance(error, BrokenPipeError):
        return None  # the reader of our output closed the pipe; typer exits quietly
    return Code.FAILED if isinstance(error, OSError) else None


def error_text(error: Exception) -> str:
    """Return the text of an error, or the service's own text for its refusal."""
    body: Any = getattr(error, "body", None)
    if isinstance(body, dict) and isinstance(body.get("detail"), str):
        return f"the service refused: {body['detail']}"
    problems: Any = getattr(error, "errors", None)
    if callable(problems) and type(error).__name__ == "ValidationError":
        return "; ".join(
            f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in problems()
        )
    if isinstance(error, OSError) and error.errno in _DISK_FULL and error.strerror:
        where = error.filename2 or error.filename
        place = f" for {where}" if where else ""
        return f"no disk space left{place} ({error.strerror}). Free some and try again."
    if isinstance(error, UnicodeEncodeError):
        return f"an argument is not UTF-8 text: {error}"
    text = str(error) or type(error).__name__
    if type(error).__name__ == "APIResponseValidationError":
        return text.splitlines()[0]  # the rest lists pydantic's errors, field by field
    return text


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_EXPECTED = (
    ("builtins", "UnicodeEncodeError", Code.USAGE),
    ("everstep.client._transport.errors", "APIConnectionError", Code.UNREACHABLE),
    ("everstep.client._transport.errors", "LocalServiceError", Code.UNREACHABLE),
    ("everstep.client._transport.errors", "AuthenticationError", Code.NO_ACCESS),
    ("everstep.client._transport.errors", "PermissionDeniedError", Code.NO_ACCESS),
    ("everstep.client._transport.errors", "NotFoundError", Code.NOT_FOUND),
    ("everstep.client._transport.errors", "TinkerError", Code.FAILED),
    ("everstep.wire.errors", "WireError", Code.USAGE),
    ("pydantic", "ValidationError", Code.USAGE),
    ("httpx", "HTTPError", Code.UNREACHABLE),
    ("everstep.vault", "VaultError", Code.FAILED),
    ("everstep.interchange.errors", "InterchangeError", Code.FAILED),
    ("everstep.ledger", "LedgerError", Code.FAILED),
    ("everstep.runtime.errors", "OperationFailed", Code.FAILED),
    ("everstep.runtime.errors", "Rejected", Code.FAILED),
    ("everstep.cli.train.examples", "DataError", Code.FAILED),
    ("everstep.conversations", "ConversationError", Code.FAILED),
    ("everstep.text_files", "TextFileError", Code.FAILED),
    ("sqlalchemy.exc", "SQLAlchemyError", Code.FAILED),
)
"""Errors by module and name: an error whose module was never imported can't be raised."""
