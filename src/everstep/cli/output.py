"""What commands print: text and progress for people, JSON for programs.

A row ends with the path of what it is about, which nothing shortens and no line break cuts, so
that it can be copied from the terminal. Where the terminal is too narrow for that, the path gets a
line of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from everstep.cli.errors import Refused
from everstep.vault.room import readable

_GAP = "  "
_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0
_AGES = ((365 * _DAY, "y"), (_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min"), (1.0, "s"))


def console() -> Console:
    """Standard output; nothing in a text is markup, or ``:train:`` a tram."""
    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def messages() -> Console:
    """Standard error: what is not the result of a command."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; gives a function of the bytes done and all bytes."""
    terminal = Console(stderr=True)
    off = quiet or not terminal.is_terminal
    with Progress(*transfer_columns(what), console=terminal, transient=True, disable=off) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def transfer_columns(what: str) -> tuple[ProgressColumn, ...]:
    """The columns of a bar of bytes: how many, how fast, how long still.

    Args:
        what: is written before it.
    """
    return (
        TextColumn(what, markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )


@contextmanager
def steps(what: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of things that are done; gives a function of how many more are."""
    columns = (
        TextColumn(what, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    terminal = Console(stderr=True)
    off = quiet or not terminal.is_terminal
    with Progress(*columns, console=terminal, transient=True, disable=off) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def agree(question: str, refusal: str) -> None:
    """Ask a person; raises `Refused` unless the answer is yes.

    Args:
        question: that yes or no answer.
        refusal: says that nothing was done.
    """
    try:
        if typer.confirm(question):
            return
    except typer.Abort as error:
        raise Refused(f"{refusal} There is nobody to ask: give --yes.") from error
    raise Refused(refusal)


def printable(text: str) -> str:
    """The text without what would upset a terminal."""
    return "".join(each if each.isprintable() or each == "\n" else "·" for each in text)


def in_line(text: str) -> str:
    """The same in one line, whatever somebody gave as a name."""
    return printable(text).replace("\n", "·")


def print_json(content: Any) -> None:
    """Print a value for programs; where standard output can't hold a character, its escape."""
    whole = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(content, indent=1, ensure_ascii=not whole))


def print_rows(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows whose last cell is a path; below their paths where the terminal is narrow.

    Args:
        headers: of the columns.
        rows: of text, a cell a column.
    """
    out = console()
    if not fits([headers, *rows]):
        for *cells, path in rows:
            told = (
                f"{name} {in_line(cell)}".strip()
                for name, cell in zip(headers, cells, strict=False)
                if cell
            )
            out.print(Text(in_line(path), style="bold"))
            out.print(Text("  " + " · ".join(told), style="dim"))
        return
    print_columns([each.upper() for each in headers], rows)


def fits(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the terminal is wide enough for a row a line; what is no terminal always is."""
    out = console()
    return not out.is_terminal or sum(_widths(rows)) <= out.width


def print_columns(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below their headers, a line each, however long."""
    out = console()
    widths = _widths([headers, *rows])
    for index, row in enumerate([headers, *rows]):
        shown = map(in_line, row)
        padded = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(shown, widths, strict=True)
        )
        out.print(Text("".join(padded).rstrip(), style="" if index else "bold"))


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """How many columns of a terminal each column takes, with the gap behind all but the last."""
    widest = [max(cell_len(in_line(cell)) for cell in cells) for cells in zip(*rows, strict=True)]
    return [width + len(_GAP) for width in widest[:-1]] + widest[-1:]


def print_listing(
    headers: Sequence[str], rows: Sequence[Sequence[str]], total: int, what: str
) -> None:
    """Print the rows of a list, and how many there are where not all are shown.

    Args:
        headers: of the columns; one that is empty in every row is left out.
        rows: as for `print_rows`.
        total: how many there are.
        what: one of them.
    """
    if not total:
        console().print(f"No {what}s.")
        return
    used = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    print_rows([headers[i] for i in used], [[row[i] for i in used] for row in rows])
    if len(rows) < total:
        messages().print(f"{len(rows):,} of {counted(total, what)}; --limit 0 shows all.")


def print_facts(facts: Iterable[tuple[str, str | None]]) -> None:
    """Print what is known of one thing, a line each; what is None is left out."""
    known = [(name, value) for name, value in facts if value is not None]
    known = [(in_line(name), in_line(value)) for name, value in known]
    width = max((cell_len(name) for name, _ in known), default=0)
    out = console()
    for name, value in known:
        out.print(Text.assemble((name + " " * (width - cell_len(name)) + _GAP, "bold"), value))


def own_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The user's part of ``user_metadata``, without what training loops keep there."""
    return {k: v for k, v in (metadata or {}).items() if not k.startswith("everstep_")}


_STATES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def print_finding(state: str, name: str, found: str, advice: str | None) -> None:
    """Print what the doctor found of one thing, and below it what to do."""
    out = console()
    out.print(Text.assemble((f"{state:<8} ", _STATES[state]), (f"{name:<10} ", "bold"), found))
    if advice is not None:
        out.print(f"{'':<20}→ {advice}")


def counted(count: int, what: str) -> str:
    """``1 checkpoint``, ``2 checkpoints``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def size_text(size: int | None) -> str:
    """Bytes as people say them; nothing when they are not known."""
    return "" if size is None else readable(size)


def time_text(time: datetime | None) -> str:
    """A moment to the minute, in UTC."""
    return "" if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M}"


def age_text(span: timedelta) -> str:
    """A span in its largest unit."""
    seconds = max(span.total_seconds(), 0.0)
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return "0 s"


def left_text(expires_at: datetime | None) -> str:
    """How long something stays; nothing when that is for ever."""
    if expires_at is None:
        return ""
    left = expires_at - datetime.now(UTC)
    return f"in {age_text(left)}" if left > timedelta() else "now"
