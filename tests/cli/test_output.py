"""What commands print, at the widths of real terminals; and what errors are worth."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
import typer

from everstep.cli import completion, output
from everstep.cli.errors import Code, NotOffered, exit_code, text_of, told
from everstep.client._errors import APIConnectionError, status_error
from everstep.wire.errors import WireError
from everstep.wire.inspection import TagCheckpointRequest
from everstep.wire.paths import parse_path
from tests.conftest import Service

PATH = "tinker://853138c3-ddd1-4f60-b320-7870875ce7b8:train:0/weights/step-000100"
HEADERS = ("saved (UTC)", "size", "", "path")
ROW = ("2026-11-25 09:37", "270.1 KiB", "public", PATH)


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int, terminal: str
) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    output.print_rows(HEADERS, [ROW])
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()


@pytest.mark.parametrize(("columns", "terminal"), [(120, "1"), (200, "1"), (80, "0")])
def test_where_there_is_room_a_row_is_a_line_that_ends_with_its_path(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    columns: int,
    terminal: str,
) -> None:
    header, row = printed(monkeypatch, capsys, columns, terminal)
    assert header.split("  ")[0] == "SAVED (UTC)"
    assert row.split("  ") == [*ROW[:3], PATH]


def test_in_a_narrow_terminal_a_path_has_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(monkeypatch, capsys, 80, "1")
    assert lines == [PATH, "  saved (UTC) 2026-11-25 09:37 · size 270.1 KiB · public"]


@pytest.mark.parametrize(
    ("span", "text"),
    [
        (timedelta(seconds=5), "5 s"),
        (timedelta(minutes=3), "3 min"),
        (timedelta(hours=30), "1 d"),
        (timedelta(days=400), "1 y"),
        (timedelta(seconds=-5), "0 s"),
    ],
)
def test_a_span_is_said_in_its_largest_unit(span: timedelta, text: str) -> None:
    assert output.age_text(span) == text
    assert output.left_text(datetime.now(UTC) - timedelta(days=1)) == "now"


def test_what_an_error_is_worth_and_says() -> None:
    assert exit_code(NotOffered("x")) is Code.NOT_OFFERED
    assert exit_code(APIConnectionError("x")) is Code.UNREACHABLE
    assert exit_code(KeyError("x")) is None, "nobody foresaw it"
    assert exit_code(BrokenPipeError()) is None and exit_code(OSError()) is Code.FAILED
    for status, code in ((400, 1), (401, 5), (403, 5), (404, 3), (500, 1)):
        error = status_error(status, {"detail": "no"})
        assert (exit_code(error), text_of(error)) == (code, "the service refused: no")
    with pytest.raises(WireError) as wrong:
        parse_path("tinker://a")
    assert exit_code(wrong.value) is Code.USAGE
    with pytest.raises(ValueError) as long:
        TagCheckpointRequest(tinker_path="x", tags={"": "y"})
    assert exit_code(long.value) is Code.USAGE and text_of(long.value).startswith("tags: ")


def test_an_error_is_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, told():
        raise NotOffered("not here")
    assert ended.value.exit_code == 6
    assert capsys.readouterr().err == "everstep: not here\n"
    with pytest.raises(KeyError), told():
        raise KeyError("a mistake of ours")


@pytest.mark.slow
def test_the_shell_completes_paths_and_runs_of_the_service(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.cli.remote import told as asked

    monkeypatch.setenv("TINKER_BASE_URL", service.url)
    runs = [each["training_run_id"] for each in asked(service.url, "run", "list")["runs"]]
    assert set(completion.run_ids("")) == set(runs[:100])
    assert all(each.startswith("tinker://") for each in completion.checkpoint_paths(""))
    assert completion.run_ids("no run begins so") == []
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:1")
    assert completion.run_ids("") == completion.checkpoint_paths("") == []
