"""Which runs and checkpoints a command is about: by run, kind, time and name.

Times are ISO (``2026-11-01``, ``2026-11-01T09:30``; UTC where no zone is given) or so long ago:
``90s``, ``30m``, ``12h``, ``7d``, ``2w``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

import typer

from everstep.cli.completion import run_ids
from everstep.cli.errors import WrongUsage
from everstep.wire.errors import WireError
from everstep.wire.paths import CheckpointKind

if TYPE_CHECKING:
    from everstep.wire.responses import Checkpoint, TrainingRun

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_AGO = re.compile(r"(\d{1,9})([smhdw])", re.ASCII)
_RUN_NAME = "everstep_run"

Run = Annotated[
    str | None,
    typer.Option("--run", metavar="ID", help="Of this run.", autocompletion=run_ids),
]
Kind = Annotated[
    str | None,
    typer.Option("--kind", metavar="KIND", help="training, sampler or external."),
]
Before = Annotated[
    str | None, typer.Option("--before", metavar="TIME", help="Older than 2026-11-01, or 7d.")
]
After = Annotated[str | None, typer.Option("--after", metavar="TIME", help="Newer than that.")]
Name = Annotated[str | None, typer.Option("--name", metavar="GLOB", help="So named: 'step-*'.")]


@dataclass(frozen=True)
class Filters:
    """What has to be true of a checkpoint or a run; None: whatever.

    Attributes:
        run: its run's id.
        kind: what it is for.
        before: it was saved, or used, before that.
        after: it was saved, or used, then or later.
        name: what its name matches.
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
        """Read filters as they are typed.

        Raises:
            WrongUsage: one can't be read; the text says how it is written.
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
        """Whether there is any."""
        return self != Filters()

    def admit(self, checkpoint: Checkpoint) -> bool:
        """Whether all of it is true of a checkpoint."""
        run, _, checkpoint_id = checkpoint.tinker_path.removeprefix("tinker://").partition("/")
        return (
            self.run in (None, run)
            and self.kind in (None, checkpoint.checkpoint_type)
            and self._at(checkpoint.time)
            and self._called(checkpoint_id.rpartition("/")[2])
        )

    def admit_run(self, run: TrainingRun) -> bool:
        """Whether all of it is true of a run; its name is the one that a loop gave it."""
        name = (run.user_metadata or {}).get(_RUN_NAME, "")
        return (
            self.run in (None, run.training_run_id)
            and self._at(run.last_request_time)
            and self._called(name)
        )

    def _at(self, time: datetime) -> bool:
        late = self.before is not None and time >= self.before
        return not late and (self.after is None or time >= self.after)

    def _called(self, name: str) -> bool:
        return self.name is None or fnmatchcase(name, self.name)


def read_time(text: str, now: datetime) -> datetime:
    """A time as it is typed; see the module.

    Raises:
        WrongUsage: it is none.
    """
    if ago := _AGO.fullmatch(text):
        try:
            return now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        except OverflowError as error:
            raise WrongUsage(f"{text} ago was before there was a calendar.") from error
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise WrongUsage(
            f"{text!r} is no time: give 2026-11-01, 2026-11-01T09:30, or so long ago as 90s, 30m, "
            "12h, 7d or 2w."
        ) from error
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def read_span(text: str) -> int:
    """A span as it is typed, ``7d`` or plain seconds, in seconds.

    Raises:
        WrongUsage: it is none.
    """
    found = _AGO.fullmatch(text if not text.isdecimal() else f"{text}s")
    try:
        span = found and timedelta(**{_UNITS[found[2]]: int(found[1])})
    except OverflowError as error:
        raise WrongUsage(f"{text!r} is longer than any service keeps anything.") from error
    if span is None:
        raise WrongUsage(f"{text!r} is no span: give one as 90s, 30m, 12h, 7d or 2w.")
    return int(span.total_seconds())


def read_kind(text: str) -> CheckpointKind:
    """A kind by its name, or by its segment in paths.

    Raises:
        WrongUsage: it is none.
    """
    try:
        return CheckpointKind(text)
    except ValueError:
        pass
    try:
        return CheckpointKind.from_segment(text)
    except WireError as error:
        kinds = ", ".join(CheckpointKind)
        raise WrongUsage(f"{text!r} is no kind of checkpoint; give one of {kinds}.") from error


def run_name(run: TrainingRun) -> str:
    """The name that a training loop gave its run; nothing where none did."""
    return (run.user_metadata or {}).get(_RUN_NAME, "")
