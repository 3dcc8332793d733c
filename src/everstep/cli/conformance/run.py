"""Conformance checks of a service: progress, and a table of the results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from everstep.conformance import (
    Check,
    CheckEnded,
    Report,
    Result,
    Target,
    UnknownCheck,
    Unreachable,
    Verdict,
    all_checks,
    chosen,
    opened,
    run,
)

_STYLES = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.NOT_SUPPORTED: "yellow",
    Verdict.ERROR: "magenta",
}


def print_checks() -> None:
    """Print every check and the promise it tests."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for check in all_checks():
        table.add_row(check.name, check.promise)
    Console().print(table)


def check_service(
    target: Target, only: Sequence[str], json_file: Path | None, junit_file: Path | None
) -> int:
    """Check a service and print the results.

    Args:
        target: the service.
        only: names of the checks to run, or empty for all.
        json_file: where to write the report as JSON.
        junit_file: where to write the report as JUnit XML.

    Returns:
        The exit code.
    """
    try:
        checks = chosen(only)
    except UnknownCheck as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error
    try:
        report = _run_checks(target, checks)
    except (Unreachable, CheckEnded) as error:
        print(f"everstep: {_error_text(error)}", file=sys.stderr)
        return 1
    Console().print(_table(report), _summary(report), sep="\n")
    if json_file is not None:
        report.write_json(json_file)
    if junit_file is not None:
        report.write_junit(junit_file)
    return report.exit_code


def _run_checks(target: Target, checks: Sequence[Check]) -> Report:
    results: list[Result] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with opened(target) as bench, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(checks))
        for check in checks:
            progress.update(task, description=check.name)
            results.extend(run(bench, [check]))
            progress.advance(task)
        return Report(target.base_url, bench.model, results, bench.noise)


def _error_text(error: Unreachable | CheckEnded) -> str:
    if isinstance(error, Unreachable):
        return f"no answer to {error}"
    return f"{error.detail}: {error.sent} → {error.came_back}"


def _table(report: Report) -> Table:
    """Build a table with a row for each check, and the reason below each that did not pass."""
    title = Text(f"{report.base_url}, {report.model}")  # an address may look like markup
    table = Table(title=title, title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("promise, and findings")
    table.add_column("s", justify="right", no_wrap=True)
    for result in report.results:
        findings = Text(result.promise)
        if result.detail:
            findings.append(f"\n{result.detail}", _STYLES[result.verdict])
        if result.sent:
            findings.append(f"\nsent: {result.sent}", "dim")
        if result.came_back:
            findings.append(f"\ncame back: {result.came_back}", "dim")
        verdict = Text(str(result.verdict), _STYLES[result.verdict])
        table.add_row(result.name, verdict, findings, f"{result.seconds:.1f}")
    return table


def _summary(report: Report) -> Text:
    parts = [f"{count} {verdict}" for verdict, count in report.counts.items() if count]
    text = f"{', '.join(parts)} in {report.seconds:.1f} s."
    if report.noise:
        text += f" Two equal runs of this service differ by up to {report.noise:.3g}."
    return Text(text, "bold")
