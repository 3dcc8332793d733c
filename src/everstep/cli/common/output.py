"""Output of commands: text and progress for people, JSON for programs.

A row ends with a path or an id, which is never shortened and never wrapped, so that it can be
copied from the terminal. If the terminal is too narrow, the path gets a line of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from everstep.cli.common.errors import Refused

_GAP = "  "
_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0
_AGES = ((365 * _DAY, "y"), (_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min"), (1.0, "s"))
_UNITS = {"y": "year", "d": "day", "h": "hour", "min": "minute", "s": "second"}


def console() -> Console:
    """Open standard output, without markup and emoji codes (``:train:`` is not a tram)."""
    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def messages() -> Console:
    """Open standard error, for everything but the result of a command."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def confirm(question: str, refusal: str) -> None:
    """Ask for a confirmation.

    Args:
        question: a yes-or-no question.
        refusal: says that nothing was done.

    Raises:
        Refused: the answer is not yes, or there is no terminal to ask on.
    """
    try:
        if typer.confirm(question):
            return
    except typer.Abort as error:
        raise Refused(f"{refusal} There is no terminal to ask on: give --yes.") from error
    raise Refused(refusal)


def printable(text: str) -> str:
    """Replace control characters, which could change the terminal's state."""
    return "".join(each if each.isprintable() or each == "\n" else "·" for each in text)


def one_line(text: str) -> str:
    """Make a text printable and put it in one line."""
    return printable(text).replace("\n", "·")


def print_json(content: Any) -> None:
    """Print a value as JSON. Non-ASCII characters are escaped unless standard output is UTF-8."""
    whole = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(content, indent=1, ensure_ascii=not whole))


def print_rows(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows whose last cell is a path.

    In a narrow terminal each path has a line of its own, with the other cells below it.

    Args:
        headers: headers of the columns.
        rows: the rows, each with a cell for every column.
    """
    out = console()
    if not fits([headers, *rows]):
        for *cells, path in rows:
            labelled = (
                f"{name} {one_line(cell)}".strip()
                for name, cell in zip(headers, cells, strict=False)
                if cell
            )
            out.print(Text(one_line(path), style="bold"))
            out.print(Text("  " + " · ".join(labelled), style="dim"))
        return
    print_columns([each.upper() for each in headers], rows)


def fits(rows: Sequence[Sequence[str]]) -> bool:
    """Return whether every row fits on a line. Always true if the output is not a terminal."""
    out = console()
    return not out.is_terminal or sum(_widths(rows)) <= out.width


def print_columns(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below their headers, one a line, whatever the width of the terminal."""
    out = console()
    widths = _widths([headers, *rows])
    for index, row in enumerate([headers, *rows]):
        shown = map(one_line, row)
        padded = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(shown, widths, strict=True)
        )
        out.print(Text("".join(padded).rstrip(), style="" if index else "bold"))


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of each column, with the gap after all but the last."""
    widest = [max(cell_len(one_line(cell)) for cell in cells) for cells in zip(*rows, strict=True)]
    return [width + len(_GAP) for width in widest[:-1]] + widest[-1:]


def print_listing(
    headers: Sequence[str], rows: Sequence[Sequence[str]], total: int, noun: str
) -> None:
    """Print the rows of a list, and the total if not all are shown.

    Args:
        headers: headers of the columns. A column that is empty in every row is omitted.
        rows: the rows, as for `print_rows`.
        total: number of items in the list.
        noun: name of one item.
    """
    if not total:
        console().print(f"No {noun}s.")
        return
    used = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    print_rows([headers[i] for i in used], [[row[i] for i in used] for row in rows])
    if len(rows) < total:
        messages().print(f"{len(rows):,} of {counted(total, noun)}; --limit 0 shows all.")


def print_facts(facts: Iterable[tuple[str, str | None]]) -> None:
    """Print names and values, one pair a line. Pairs without a value are omitted."""
    known = [(name, value) for name, value in facts if value is not None]
    known = [(one_line(name), one_line(value)) for name, value in known]
    width = max((cell_len(name) for name, _ in known), default=0)
    out = console()
    for name, value in known:
        out.print(Text.assemble((name + " " * (width - cell_len(name)) + _GAP, "bold"), value))


def own_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return the user's entries of ``user_metadata``, without those of training loops."""
    return {k: v for k, v in (metadata or {}).items() if not k.startswith("everstep_")}


_STATES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def print_finding(state: str, name: str, found: str, advice: str | None) -> None:
    """Print a finding of the doctor, and the advice below it."""
    out = console()
    out.print(Text.assemble((f"{state:<8} ", _STATES[state]), (f"{name:<10} ", "bold"), found))
    if advice is not None:
        out.print(f"{'':<20}→ {advice}")


def counted(count: int, noun: str) -> str:
    """Return a number and its noun: ``1 checkpoint``, ``2 checkpoints``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size_text(size: int | None) -> str:
    """Format a size in bytes. An unknown size is empty."""
    from everstep.vault.disk_guard import readable

    return "" if size is None else readable(size)


def time_text(time: datetime | None) -> str:
    """Format a time to the minute, in UTC. None is empty."""
    return "" if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M}"


def age_text(span: timedelta) -> str:
    """Format a time span in its largest unit."""
    seconds = max(span.total_seconds(), 0.0)
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return "0 s"


def ago_text(time: datetime | None) -> str:
    """Format a time as its distance from now: ``3 minutes ago``. None is empty."""
    if time is None:
        return ""
    count, unit = age_text(datetime.now(UTC) - time).split()
    return "just now" if count == "0" else f"{counted(int(count), _UNITS[unit])} ago"


def when_text(time: datetime) -> str:
    """Format a time with its distance from now."""
    return f"{time_text(time)} UTC, {ago_text(time)}"


def expiry_text(expires_at: datetime | None) -> str:
    """Format the time until an expiry. None is empty."""
    if expires_at is None:
        return ""
    left = expires_at - datetime.now(UTC)
    return f"in {age_text(left)}" if left > timedelta() else "now"
