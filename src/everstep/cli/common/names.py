"""Names: the run, session or checkpoint that a user means by what they type.

    run         its id, a unique beginning of its id, or the name that a training loop gave it
    session     its id, or a unique beginning of it
    checkpoint  tinker://RUN/weights/NAME, or RUN:NAME, or RUN:latest

A training loop that resumes may give several runs one name. The name means the run that was used
last, and with a checkpoint's name the checkpoint of any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from everstep.cli.common.errors import NotFound, WrongUsage
from everstep.cli.common.filters import Filters, run_name
from everstep.cli.common.listing import check_run, run_not_found, runs
from everstep.client import RestClient
from everstep.client._transport.errors import NotFoundError
from everstep.wire.messages.responses import Checkpoint, TrainingRun
from everstep.wire.paths import SCHEME

LATEST = "latest"
_SHOWN = 5
_PAGE_SIZE = 1000


def run_id(rest: RestClient, text: str) -> str:
    """Return the id of the run that a text means.

    Raises:
        WrongUsage: it is empty, or means several runs.
        NotFound: it means none.
    """
    return _runs_meant(rest, text)[0].training_run_id


def session_id(rest: RestClient, text: str) -> str:
    """Return the id of the session that a text means. Raises as `run_id` does."""
    if not text.strip():
        raise WrongUsage("the session id is empty; 'everstep session list' lists the sessions.")
    found: list[str] = []
    while page := rest.list_sessions(_PAGE_SIZE, len(found)).result().sessions:
        found += page
        if len(page) < _PAGE_SIZE:
            break
    if text in found:
        return text
    chosen = [each for each in found if each.startswith(text)]
    if not chosen:
        raise NotFound(
            f"There is no session {text}. 'everstep session list' lists those that are there."
        )
    return _only(chosen, text, "sessions")


def checkpoint_path(rest: RestClient, text: str) -> str:
    """Return the path of the checkpoint that a text means. A ``tinker://`` path is not looked up.

    Raises:
        WrongUsage: it is no name of a checkpoint, or means several.
        NotFound: it means none.
    """
    if text.startswith(SCHEME):
        return text
    run, name = split_checkpoint(text)
    saved = [
        each
        for meant in _runs_meant(rest, run)
        for each in rest.list_checkpoints(meant.training_run_id).result().checkpoints
    ]
    named = [each for each in saved if name in (each.checkpoint_id, _name(each))]
    if not named and name == LATEST:
        named = sorted(saved, key=lambda each: each.time)[-1:]
    if not named:
        raise NotFound(
            f"Run {run} has no checkpoint {name}. 'everstep checkpoint list --run {run}' lists its "
            "checkpoints."
        )
    return _only([each.tinker_path for each in named], text, "checkpoints")


def split_checkpoint(text: str) -> tuple[str, str]:
    """Split ``RUN:NAME``. Raises `WrongUsage` if it is malformed."""
    run, colon, name = text.rpartition(":")
    if not colon or not run or not name:
        raise WrongUsage(
            f"{text!r} is not a checkpoint: give tinker://<run>/weights/<name>, <run>:<name> or "
            f"<run>:{LATEST}. 'everstep checkpoint list' lists the checkpoints."
        )
    return run, name


def of_filters(rest: RestClient, filters: Filters) -> Filters:
    """Return filters with the id of the run that they name. Raises as `run_id` does."""
    return filters if filters.run is None else replace(filters, run=run_id(rest, filters.run))


def _runs_meant(rest: RestClient, text: str) -> Sequence[TrainingRun]:
    """Return the runs that a text means, the last used first: one, or all with that name."""
    check_run(text)
    try:
        return [rest.get_training_run(text).result()]
    except NotFoundError:
        found = runs(rest, Filters())
    named = [each for each in found if run_name(each) == text]
    if named:
        return named
    chosen = {each.training_run_id: each for each in found if each.training_run_id.startswith(text)}
    if not chosen:
        raise run_not_found(text)
    return [chosen[_only(list(chosen), text, "runs")]]


def _only(found: Sequence[str], text: str, what: str) -> str:
    if len(found) > 1:
        shown = ", ".join(found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
        raise WrongUsage(f"{text!r} means {len(found)} {what}: {shown}. Give more of the id.")
    return found[0]


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.checkpoint_id.rpartition("/")[2]
