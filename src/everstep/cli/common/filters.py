"""Filters of runs and checkpoints: by run, kind, time and name.

A time is ISO (``2026-11-01``, ``2026-11-01T09:30``, UTC if it has no zone) or an age: ``90s``,
``30m``, ``12h``, ``7d``, ``2w``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

import typer

from everstep.cli.common.completion import run_ids
from everstep.cli.common.errors import WrongUsage

if TYPE_CHECKING:
    from everstep.wire.messages.responses import Checkpoint, TrainingRun
    from everstep.wire.paths import CheckpointKind

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_AGE = re.compile(r"(\d{1,9})([smhdw])", re.ASCII)
_RUN_NAME = "everstep_run"

Run = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="RUN",
        help="Run of the checkpoints: its id, the beginning of its id, or its name.",
        autocompletion=run_ids,
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--kind", metavar="KIND", help="Kind of checkpoint: training, sampler or external."
    ),
]
Before = Annotated[
    str | None,
    typer.Option(
        "--before", metavar="TIME", help="Upper bound of the time: 2026-11-01, or an age as 7d."
    ),
]
After = Annotated[
    str | None, typer.Option("--after", metavar="TIME", help="Lower bound of the time.")
]
Name = Annotated[
    str | None, typer.Option("--name", metavar="GLOB", help="Pattern of the name, as 'step-*'.")
]


@dataclass(frozen=True)
class Filters:
    """Conditions on a checkpoint or a run. None admits everything.

    Attributes:
        run: id of the run.
        kind: kind of checkpoint.
        before: upper bound, exclusive, of the time of the save or of the last use.
        after: lower bound, inclusive.
        name: pattern of the name.
    """

    run: str | None = None
    kind: CheckpointKind | None = None
    before: datetime | None = None
    after: datetime | None = None
    name: str | None = None

    @classmethod
    def of(
        cls,
        run: str | None = None,
        kind: str | None = None,
        before: str | None = None,
        after: str | None = None,
        name: str | None = None,
    ) -> Filters:
        """Parse filters as they are typed. All arguments are optional.

        Raises:
            WrongUsage: one is malformed.
        """
        now = datetime.now(UTC)
        return cls(
            run,
            None if kind is None else read_kind(kind),
            None if before is None else read_time(before, now),
            None if after is None else read_time(after, now),
            name,
        )

    @property
    def given(self) -> bool:
        """Whether any condition is set."""
        return self != Filters()

    def admit(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint meets all conditions."""
        run, _, checkpoint_id = checkpoint.tinker_path.removeprefix("tinker://").partition("/")
        return (
            self.run in (None, run)
            and self.kind in (None, checkpoint.checkpoint_type)
            and self._admits_time(checkpoint.time)
            and self._admits_name(checkpoint_id.rpartition("/")[2])
        )

    def admit_run(self, run: TrainingRun) -> bool:
        """Return whether a run meets all conditions. Its name is that of its training loop."""
        name = (run.user_metadata or {}).get(_RUN_NAME, "")
        return (
            self.run in (None, run.training_run_id)
            and self._admits_time(run.last_request_time)
            and self._admits_name(name)
        )

    def _admits_time(self, time: datetime) -> bool:
        late = self.before is not None and time >= self.before
        return not late and (self.after is None or time >= self.after)

    def _admits_name(self, name: str) -> bool:
        return self.name is None or fnmatchcase(name, self.name)


def read_time(text: str, now: datetime) -> datetime:
    """Parse a time. See the module.

    Args:
        text: the time.
        now: the time from which ages count.

    Raises:
        WrongUsage: it is malformed.
    """
    if age := _AGE.fullmatch(text):
        try:
            return now - timedelta(**{_UNITS[age[2]]: int(age[1])})
        except OverflowError as error:
            raise WrongUsage(f"{text} ago is before the year 1.") from error
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise WrongUsage(
            f"{text!r} is not a time: give 2026-11-01, 2026-11-01T09:30, or an age as 90s, 30m, "
            "12h, 7d or 2w."
        ) from error
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def read_span(text: str) -> int:
    """Parse a time span, ``7d`` or plain seconds, into seconds.

    Raises:
        WrongUsage: it is malformed.
    """
    found = _AGE.fullmatch(text if not text.isdecimal() else f"{text}s")
    try:
        span = found and timedelta(**{_UNITS[found[2]]: int(found[1])})
    except OverflowError as error:
        raise WrongUsage(f"{text!r} is longer than the longest time span.") from error
    if span is None:
        raise WrongUsage(f"{text!r} is not a time span: give 90s, 30m, 12h, 7d or 2w.")
    return int(span.total_seconds())


def read_kind(text: str) -> CheckpointKind:
    """Parse a kind of checkpoint: its name, or its segment in paths.

    Raises:
        WrongUsage: there is no such kind.
    """
    from everstep.wire.errors import WireError
    from everstep.wire.paths import CheckpointKind

    try:
        return CheckpointKind(text)
    except ValueError:
        pass
    try:
        return CheckpointKind.from_segment(text)
    except WireError as error:
        kinds = ", ".join(CheckpointKind)
        raise WrongUsage(f"{text!r} is not a kind of checkpoint; give one of {kinds}.") from error


def run_name(run: TrainingRun) -> str:
    """Return the name that a training loop gave its run, or empty if it has none."""
    return (run.user_metadata or {}).get(_RUN_NAME, "")


def read_pair(text: str) -> tuple[str, str]:
    """Split ``KEY=VALUE``. Raises `WrongUsage` if it is malformed."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise WrongUsage(f"{text!r} is not KEY=VALUE.")
    return key, value
