"""What came of something that was done to several checkpoints, each for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import typer

from everstep.cli import output
from everstep.cli.errors import Code, exit_code, text_of


@dataclass(frozen=True)
class Outcome:
    """What came of one.

    Attributes:
        tinker_path: of the checkpoint.
        error: why it was not done; None: it was.
        code: the exit code that this is worth.
        told: what more is told of it to programs.
    """

    tinker_path: str
    error: str | None = None
    code: Code = Code.DONE
    told: dict[str, Any] | None = None


def each(paths: Iterable[str], do: Callable[[str], dict[str, Any] | None]) -> list[Outcome]:
    """Do something to each of some checkpoints; one that fails keeps none of the others up.

    When the service is gone, or refuses the key, the others are not tried.

    Args:
        paths: of the checkpoints.
        do: does it, and gives what more is told to programs.
    """
    done: list[Outcome] = []
    for path in dict.fromkeys(paths):
        if done and done[-1].code in (Code.UNREACHABLE, Code.NO_ACCESS):
            done.append(Outcome(path, "not tried, for the same reason", done[-1].code))
            continue
        try:
            done.append(Outcome(path, told=do(path)))
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            done.append(Outcome(path, text_of(error), code))
    return done


def tell(outcomes: list[Outcome], done: str, as_json: bool) -> None:
    """Print what came of each; exit with the code of the first that failed.

    Args:
        outcomes: of `each`.
        done: what a person is told of one that succeeded, before its path.
        as_json: print JSON.
    """
    if as_json:
        results = [
            {"tinker_path": one.tinker_path, "error": one.error, **(one.told or {})}
            for one in outcomes
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
