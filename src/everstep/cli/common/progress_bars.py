"""Progress bars of commands, on standard error. Nothing is shown where that is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def progress_bar(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar of bytes on standard error.

    Args:
        label: text before the bar.
        quiet: show nothing.

    Yields:
        A function that takes the bytes done and the total, and updates the bar.
    """
    terminal = Console(stderr=True)
    off = quiet or not terminal.is_terminal
    with Progress(*transfer_columns(label), console=terminal, transient=True, disable=off) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def transfer_columns(label: str) -> tuple[ProgressColumn, ...]:
    """Create the columns of a bar of bytes: done, rate and time left.

    Args:
        label: text before the bar.
    """
    return (
        TextColumn(label, markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )


@contextmanager
def count_bar(label: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of items on standard error.

    Args:
        label: text before the bar.
        total: number of items.
        quiet: show nothing.

    Yields:
        A function that advances the bar by a number of items.
    """
    columns = (
        TextColumn(label, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    terminal = Console(stderr=True)
    off = quiet or not terminal.is_terminal
    with Progress(*columns, console=terminal, transient=True, disable=off) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def waiting(text: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal's standard error what is waited for, and for how long.

    Args:
        text: what is going on.

    Yields:
        A function that takes a detail and shows it behind the text.
    """
    terminal = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False, style="dim"),
    )
    off = not terminal.is_terminal
    with Progress(*columns, console=terminal, transient=True, disable=off) as progress:
        task = progress.add_task(text, total=None, detail="")
        yield lambda detail: progress.update(task, detail=detail)
