"""Deletion of runs and sessions, with all that they own, after a confirmation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from everstep.cli.common import outcomes, output
from everstep.cli.common.errors import NotFound, WrongUsage, error_text, exit_code
from everstep.cli.common.outcomes import Outcome
from everstep.cli.common.target import Target
from everstep.client import RestClient
from everstep.wire.messages.deletion import DeletionResponse

_HEADERS = ("runs", "checkpoints", "size", "operations")


@dataclass(frozen=True)
class Deletable:
    """What a command deletes: runs, or sessions.

    Attributes:
        noun: name of one.
        key: name of its id in JSON.
        find: returns the id that a text means.
        delete: deletes one, or only says what would be deleted.
    """

    noun: str
    key: str
    find: Callable[[RestClient, str], str]
    delete: Callable[[RestClient, str, bool], DeletionResponse]


def delete(
    target: Target, texts: Sequence[str], kind: Deletable, *, dry_run: bool, yes: bool
) -> None:
    """Delete runs or sessions after a confirmation, and print the outcomes.

    Args:
        target: the service.
        texts: the names of the runs or sessions.
        kind: which of both they are.
        dry_run: only list what would be deleted.
        yes: skip the confirmation.

    Raises:
        WrongUsage: JSON is wanted, which allows no question, without ``yes`` or ``dry_run``, or a
            name means several. Nothing is deleted.
        NotOffered: the service is not Everstep.
        Refused: the answer was no.
    """
    if target.as_json and not (yes or dry_run):
        raise WrongUsage("--json asks no questions: give --yes or --dry-run with it.")
    with target.service() as service:
        service.require_everstep(f"deleting {kind.noun}s")
        chosen, failed = _choose(service.rest, texts, kind)
        if chosen and not target.as_json:
            _print(chosen, kind)
        if chosen and not dry_run and not yes:
            output.confirm(f"Delete {_total(chosen, kind)}?", "Nothing was deleted.")
        freed = 0

        def remove(key: str) -> dict[str, Any]:
            nonlocal freed
            answer = kind.delete(service.rest, key, False)
            freed += answer.freed_bytes or 0
            return _json(answer)

        if dry_run:
            found = [Outcome(each.id, details=_json(each)) for each in chosen]
            done = found if target.as_json else []
        else:
            done = outcomes.for_each([each.id for each in chosen], remove)
    try:
        outcomes.report([*failed, *done], "deleted", target.as_json, key=kind.key)
    finally:
        if freed and not target.as_json:
            output.messages().print(
                f"The service's garbage collection frees {output.size_text(freed)} in the next "
                "hours, 'everstep checkpoint gc --grace 0s' at once."
            )


def _choose(
    rest: RestClient, texts: Sequence[str], kind: Deletable
) -> tuple[list[DeletionResponse], list[Outcome]]:
    """Return what would be deleted, and the failures of those that can't be."""
    failed: list[Outcome] = []
    keys: dict[str, str] = {}
    for text in texts:
        try:
            keys.setdefault(kind.find(rest, text), text)
        except NotFound as error:
            failed.append(Outcome(text, str(error), error.code))
    found: list[DeletionResponse] = []
    for key in keys:
        try:
            found.append(kind.delete(rest, key, True))
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            failed.append(Outcome(key, error_text(error), code))
    return found, failed


def _print(chosen: Sequence[DeletionResponse], kind: Deletable) -> None:
    rows = [
        (
            str(len(each.training_run_ids)) if kind.noun == "session" else "",
            str(each.checkpoints or ""),
            output.size_text(each.size_bytes or None),
            _operations(each),
            each.id,
        )
        for each in chosen
    ]
    output.print_listing((*_HEADERS, kind.noun), rows, len(rows), kind.noun)


def _operations(each: DeletionResponse) -> str:
    left = f" ({each.unfinished_operations:,} unfinished)" if each.unfinished_operations else ""
    return f"{each.operations:,}{left}"


def _total(chosen: Sequence[DeletionResponse], kind: Deletable) -> str:
    """Return the number of runs or sessions, and of their checkpoints with their size."""
    checkpoints = sum(each.checkpoints for each in chosen)
    size = output.size_text(sum(each.size_bytes for each in chosen))
    runs = sum(len(each.training_run_ids) for each in chosen)
    own = [output.counted(runs, "run")] if kind.noun == "session" else []
    own.append(output.counted(checkpoints, "checkpoint") + (f", {size}" if checkpoints else ""))
    return f"{output.counted(len(chosen), kind.noun)} with {' and '.join(own)}"


def _json(answer: DeletionResponse) -> dict[str, Any]:
    return answer.model_dump(mode="json", exclude={"id"})
