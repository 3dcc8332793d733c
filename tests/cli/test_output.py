"""Output of commands at several terminal widths, errors, and completion."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from rich.cells import cell_len

import everstep
from everstep.cli.common import completion, output
from everstep.cli.common.errors import Code, NotOffered, error_text, exit_code, report_errors
from everstep.client._transport.errors import APIConnectionError, status_error
from everstep.wire.errors import WireError
from everstep.wire.messages.inspection import TagCheckpointRequest
from everstep.wire.paths import parse_path
from tests.conftest import Service
from tests.scenario import MODEL, connect

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
def test_row_is_a_line_that_ends_with_its_path(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    columns: int,
    terminal: str,
) -> None:
    header, row = printed(monkeypatch, capsys, columns, terminal)
    assert header.split("  ")[0] == "SAVED (UTC)"
    assert row.split("  ") == [*ROW[:3], PATH]


def test_path_has_its_own_line_in_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(monkeypatch, capsys, 80, "1")
    assert lines == [PATH, "  saved (UTC) 2026-11-25 09:37 · size 270.1 KiB · public"]


def test_columns_align_with_wide_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output.print_rows(("name", "path"), [("実験 🚀", PATH), ("plain", PATH)])
    lines = capsys.readouterr().out.splitlines()
    assert {cell_len(line.partition("tinker://")[0]) for line in lines[1:]} == {9}


def test_control_characters_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2Jb\nc"
    output.print_rows(("name", "path"), [(name, PATH)])
    output.print_facts([("name", name)])
    told_ = capsys.readouterr().out
    assert "\x1b" not in told_ and told_.count("a·[2Jb·c") == 2 and len(told_.splitlines()) == 3


def test_json_is_valid_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    output.print_json({"name": "größe 🚀"})
    plain.seek(0)
    assert json.loads(plain.read()) == {"name": "größe 🚀"}


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
def test_span_is_formatted_in_its_largest_unit(span: timedelta, text: str) -> None:
    assert output.age_text(span) == text
    assert output.expiry_text(datetime.now(UTC) - timedelta(days=1)) == "now"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "just now"),
        (-30, "just now"),
        (1.2, "1 second ago"),
        (200, "3 minutes ago"),
        (3700, "1 hour ago"),
        (3 * 86400 + 5, "3 days ago"),
        (800 * 86400, "2 years ago"),
    ],
)
def test_time_is_shown_as_its_age(seconds: float, text: str) -> None:
    assert output.ago_text(datetime.now(UTC) - timedelta(seconds=seconds)) == text


def test_errors_have_exit_codes_and_texts() -> None:
    assert exit_code(NotOffered("x")) is Code.NOT_OFFERED
    assert exit_code(APIConnectionError("x")) is Code.UNREACHABLE
    assert exit_code(KeyError("x")) is None, "an unexpected error"
    assert exit_code(BrokenPipeError()) is None and exit_code(OSError()) is Code.FAILED
    for status, code in ((400, 1), (401, 5), (403, 5), (404, 3), (500, 1)):
        error = status_error(status, {"detail": "no"})
        assert (exit_code(error), error_text(error)) == (code, "the service refused: no")
    with pytest.raises(WireError) as wrong:
        parse_path("tinker://a")
    assert exit_code(wrong.value) is Code.USAGE
    with pytest.raises(ValueError) as long:
        TagCheckpointRequest(tinker_path="x", tags={"": "y"})
    assert exit_code(long.value) is Code.USAGE and error_text(long.value).startswith("tags: ")


def test_error_is_reported_in_one_line_with_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, report_errors():
        raise NotOffered("not here")
    assert ended.value.exit_code == 6
    assert capsys.readouterr().err == "everstep: not here\n"
    with pytest.raises(KeyError), report_errors():
        raise KeyError("a mistake of ours")


@pytest.mark.slow
def test_completion_lists_paths_runs_and_sessions(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(everstep, service.url) as client:
        run = client.create_lora_training_client(MODEL, 4, 1).result()
        path = run.save_state("completed").result().path
    session = run.model_id.split(":")[0]
    monkeypatch.setenv("TINKER_BASE_URL", service.url)
    assert completion.checkpoint_paths(path[:-3]) == [path]
    assert completion.run_ids(run.model_id[:-1]) == [run.model_id]
    assert completion.session_ids(session[:-1]) == [session]
    assert run.model_id in completion.run_ids("")
    assert completion.run_ids("no run begins so") == []
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:1")
    assert completion.run_ids("") == completion.checkpoint_paths("") == []


WORDS = {
    "everstep\ncheckpoint\ninfo\ntinker\n:\n//a": (["tinker://a"], "tinker:"),
    "everstep\ncheckpoint\ninfo\ntinker\n:": (["tinker:"], "tinker:"),
    "everstep\ncheckpoint\ninfo\ntinker\n:\n//a\n:\ntrain\n:\n0": (
        ["tinker://a:train:0"],
        "tinker://a:train:",
    ),
    "everstep\ncheckpoint\ninfo\ntinker\n:\n//a\nnext": (["tinker://a", "next"], ""),
    "everstep\ncheckpoint\ninfo\ntinker://a": (["tinker://a"], ""),
}


@pytest.mark.parametrize("words", WORDS)
def test_words_that_bash_split_at_colons_are_joined(words: str) -> None:
    environment = {
        "_EVERSTEP_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count("\n")),
    }
    expected, stays = WORDS[words]
    assert completion.join_words(environment) == stays
    assert environment["COMP_WORDS"].split("\n") == ["everstep", "checkpoint", "info", *expected]
    assert environment["COMP_CWORD"] == str(2 + len(expected))


@pytest.mark.slow
def test_bash_completes_path_with_colons(service: Service) -> None:
    with connect(everstep, service.url) as client:
        run = client.create_lora_training_client(MODEL, 4, 1).result()
        path = run.save_state("completed-in-bash").result().path
    bin_ = Path(sys.executable).parent
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TINKER_BASE_URL"},
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "TERM": "dumb",
        "PS1": "$ ",
    }
    own, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 500))
    bash = ["bash", "--norc", "--noprofile", "-i"]
    with subprocess.Popen(
        bash, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    ) as process:
        try:
            os.write(own, b'eval "$(everstep --show-completion bash)"; echo rea""dy\n')
            _read_until(own, b"ready\r\n")
            typed = f"everstep checkpoint info --base-url {service.url} {path[:20]}"
            os.write(own, typed.encode() + b"\t")
            shown = b""
            while path.encode() not in shown:
                found = _read_until(own, b"\a", path.encode())
                shown += found
                if found.endswith(b"\a"):
                    os.write(own, b"\t")  # the service did not respond in time
        finally:
            process.kill()
            os.close(own)
            os.close(theirs)


def _read_until(terminal: int, *ends: bytes) -> bytes:
    """Read a terminal until it shows one of these."""
    found = b""
    while not any(end in found for end in ends):
        found += os.read(terminal, 1024)
    return found
