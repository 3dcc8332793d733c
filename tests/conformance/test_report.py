"""Reports for programs: JSON, JUnit XML, the exit code, and the command's options."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from everstep.cli.app import app
from everstep.conformance import Report, Result, Target, UnknownCheck, Verdict, all_checks, chosen
from everstep.conformance.numbers import Point, difference
from everstep.conformance.operations import Outcome
from everstep.conformance.transport import Exchange, short
from everstep.conformance.verdicts import CheckError, NotSupported, PromiseBroken

PASSED = Result("a", "A holds.", Verdict.PASS, seconds=0.25)
FAILED = Result("b", "B holds.", Verdict.FAIL, "It < does & not\x00.", "POST /x", "200 {}", 0.5)
ABSENT = Result("c", "C holds.", Verdict.NOT_SUPPORTED, "There is no C.")
STUCK = Result("d", "D holds.", Verdict.ERROR, "No answer.", "GET /y", "503")


def report(*results: Result) -> Report:
    return Report("http://h", "m", results, noise=0.0)


@pytest.mark.parametrize(
    ("results", "code"),
    [((), 0), ((PASSED, ABSENT), 0), ((PASSED, FAILED), 1), ((PASSED, STUCK), 1)],
)
def test_exit_code_is_1_for_failures_and_errors_only(
    results: tuple[Result, ...], code: int
) -> None:
    assert report(*results).exit_code == code


def test_json_report_contains_every_result(tmp_path: Path) -> None:
    report(PASSED, FAILED, ABSENT, STUCK).write_json(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["counts"] == {"pass": 1, "fail": 1, "not supported": 1, "error": 1}
    assert (content["base_url"], content["model"], content["exit_code"]) == ("http://h", "m", 1)
    assert content["checks"][1] == {
        "name": "b",
        "promise": "B holds.",
        "verdict": "fail",
        "detail": "It < does & not\x00.",
        "sent": "POST /x",
        "came_back": "200 {}",
        "seconds": 0.5,
    }


def test_junit_report_is_valid_xml_for_any_response(tmp_path: Path) -> None:
    report(PASSED, FAILED, ABSENT, STUCK).write_junit(tmp_path / "r.xml")
    root = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert root.tag == "testsuites"
    suite = root.find("testsuite")
    assert suite is not None
    counts = [suite.get(name) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == ["4", "1", "1", "1"]
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == ["a", "b", "c", "d"]
    assert [[child.tag for child in case] for case in cases] == [
        [],
        ["failure"],
        ["skipped"],
        ["error"],
    ]
    failure = cases[1][0]
    assert failure.get("message") == "It < does & not�."
    assert failure.text == "B holds.\nsent: POST /x\ncame back: 200 {}"


def test_differences_compare_bits_and_are_quantified() -> None:
    def point(*values: float, loss: float = 1.0) -> Point:
        return Point(np.asarray(values, np.float32), loss)

    same = difference([point(1, 2)], [point(1, 2)])
    assert same.count == 0
    assert same.within(0)
    apart = difference([point(1, 2), point(3)], [point(1, 2), point(3.25, loss=1.5)])
    assert (apart.count, apart.total, apart.first) == (2, 5, 1)
    assert (apart.largest, apart.largest_loss) == (0.25, 0.5)
    assert not apart.within(0)
    assert not apart.within(0.2)
    assert apart.within(0.25)
    zeros = difference([point(0.0)], [point(-0.0)])
    assert zeros.count == 1, "equal numbers with different bits differ"
    assert math.isinf(difference([point(1)], [point(1, 2)]).largest)
    assert math.isinf(difference([point(math.nan)], [point(1)]).largest)
    assert not difference([point(1)], []).within(1e9)


def test_failure_has_to_blame_the_request_and_have_a_message() -> None:
    def outcome(error: str, category: str | None, status: int = 200) -> Outcome:
        return Outcome("POST /x", "…", False, {}, None, error, category, status)

    outcome("The name is taken.", "user").must_blame_user("")
    outcome("taken", None, 409).must_blame_user("")
    for wrong in (
        outcome("broke", "server"),
        outcome("broke", None, 500),
        outcome(" ", "user"),
        Outcome("POST /x", "…", True, {}),
    ):
        with pytest.raises(PromiseBroken):
            wrong.must_blame_user("It was refused.")
    with pytest.raises(CheckError):
        outcome("broke", "server").require("A save")
    with pytest.raises(NotSupported):
        outcome("", None, 405).require("A save")


def test_request_and_response_are_recorded_on_one_short_line() -> None:
    assert short("a\n  b") == "a b"
    assert len(short("x" * 10_000)) == 400
    answer = Exchange("GET /x", 200, "application/x-protobuf", b"123")
    assert answer.came_back == "200 (3 bytes of application/x-protobuf)"
    assert Exchange("GET /x", 404, "application/json", b"[1]").json() == {}


def test_checks_have_unique_names_and_a_sentence() -> None:
    checks = all_checks()
    assert len({check.name for check in checks}) == len(checks) >= 30
    for check in checks:
        assert check.promise.endswith(".")
        assert check.body.__doc__, f"{check.name} has no docstring"
    assert [check.name for check in chosen(["ttl", "exact-resume"])] == ["exact-resume", "ttl"]
    with pytest.raises(UnknownCheck, match="'nothing'"):
        chosen(["nothing"])


def test_guide_lists_exactly_the_checks() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "conformance.md"
    rows = [line.split("`")[1] for line in guide.read_text().splitlines() if line[:3] == "| `"]
    names = [check.name for check in all_checks()]
    assert [row for row in rows if not row.startswith("--")] == names


def test_command_lists_checks_and_rejects_unknown_ones() -> None:
    listed = CliRunner().invoke(app, ["conformance", "--list"])
    assert listed.exit_code == 0
    for check in all_checks():
        assert check.name in listed.stdout
    assert CliRunner().invoke(app, ["conformance", "--only", "nothing"]).exit_code == 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://127.0.0.1"])
def test_unreachable_service_is_one_line_and_exit_code_1(url: str) -> None:
    done = CliRunner().invoke(app, ["conformance", "--base-url", url])
    assert done.exit_code == 1
    assert done.stderr.startswith("everstep: no answer to ")
    assert done.stderr.count("\n") == 1


def test_checks_import_nothing_of_a_service() -> None:
    code = (
        "import sys, everstep.conformance as c; c.all_checks(); "
        "heavy = {'torch', 'fastapi', 'sqlalchemy', 'everstep.client', 'everstep.server'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert Target("http://h", "k").second_api_key is None
