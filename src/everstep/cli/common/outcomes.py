"""Outcomes of an action on several checkpoints, runs or sessions, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import typer

from everstep.cli.common import output
from everstep.cli.common.errors import Code, error_text, exit_code


@dataclass(frozen=True)
class Outcome:
    """The outcome for one checkpoint, run or session.

    Attributes:
        tinker_path: path of the checkpoint, or id of the run or session.
        error: reason of the failure, or None if the action succeeded.
        code: the exit code of the error.
        details: further fields of the JSON output.
    """

    tinker_path: str
    error: str | None = None
    code: Code = Code.DONE
    details: dict[str, Any] | None = None


def for_each(paths: Iterable[str], action: Callable[[str], dict[str, Any] | None]) -> list[Outcome]:
    """Apply an action to each checkpoint. A failure does not stop the others.

    If the service can't be reached, or refuses the API key, the remaining ones are not tried.

    Args:
        paths: paths of the checkpoints. Duplicates are ignored.
        action: takes a path and returns further fields of the JSON output.
    """
    done: list[Outcome] = []
    for path in dict.fromkeys(paths):
        if done and done[-1].code in (Code.UNREACHABLE, Code.NO_ACCESS):
            done.append(Outcome(path, "not tried, for the same reason", done[-1].code))
            continue
        try:
            done.append(Outcome(path, details=action(path)))
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            done.append(Outcome(path, error_text(error), code))
    return done


def report(outcomes: list[Outcome], done: str, as_json: bool, *, key: str = "tinker_path") -> None:
    """Print the outcomes.

    Args:
        outcomes: the outcomes of `for_each`.
        done: a word for success, printed before the path.
        as_json: print JSON.
        key: name of the path in JSON, or of another id that stands in its place.

    Raises:
        typer.Exit: with the code of the first failure, if there is one.
    """
    if as_json:
        results = [
            {key: one.tinker_path, "error": one.error, **(one.details or {})} for one in outcomes
        ]
        output.print_json({"results": results})
    for one in outcomes:
        if one.error is not None:
            output.messages().print(f"everstep: {one.tinker_path}: {one.error}")
        elif not as_json:
            output.console().print(f"{done} {one.tinker_path}")
    failed = [one.code for one in outcomes if one.error is not None]
    if failed:
        raise typer.Exit(failed[0])
