"""Logs: they leave through the standard library's logging, and never on standard output."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from everstep import logs


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Undo what `configure` does."""
    ours = logging.getLogger("everstep")
    before = ours.handlers, ours.level, ours.propagate
    yield
    ours.handlers, ours.level, ours.propagate = before


def test_a_log_line_does_not_reach_the_output_of_a_command(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        logs.get_logger("everstep.test").error("damaged row skipped", reason="its checksum")
        print(json.dumps({"ok": True}))

    done = CliRunner().invoke(app)
    assert json.loads(done.stdout) == {"ok": True}
    (record,) = caplog.records
    assert record.getMessage() == "damaged row skipped reason='its checksum'"


def test_without_configuration_only_warnings_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logs.get_logger("everstep.test")
    log.info("worker ready")
    log.warning("worker ended")
    assert caplog.messages == ["worker ended"]


def test_configured_lines_hold_time_level_fields_and_traceback() -> None:
    stream = io.StringIO()
    logs.configure(stream)
    log = logs.get_logger("everstep.test")
    log.info("worker ready", models=2)
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("operation failed", run="r")
    first, second, *traceback = stream.getvalue().splitlines()
    time, _, rest = first.partition(" ")
    assert len(time) == 8
    assert rest.split() == ["[info", "]", "worker", "ready", "models=2"]
    assert second.split()[1:] == ["[error", "]", "operation", "failed", "run=r"]
    assert traceback[-1] == "ValueError: bad"
    assert sys.stdout is not stream


def test_each_line_is_followed_by_a_call() -> None:
    stream, seen = io.StringIO(), list[str]()
    logs.configure(stream, lambda: seen.append(stream.getvalue()))
    log = logs.get_logger("everstep.test")
    log.info("worker ready")
    log.info("worker ended")
    assert [each.count("\n") for each in seen] == [1, 2]


def test_lines_in_a_file_hold_the_date(tmp_path: Path) -> None:
    with (tmp_path / "service.log").open("w") as stream:
        logs.configure(stream)
        logs.get_logger("everstep.test").info("worker ready")
    line = (tmp_path / "service.log").read_text()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[info", line)
