"""Everstep's own service keeps every promise that the checks test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest

from everstep.conformance import Verdict, all_checks
from tests.conftest import Service

pytestmark = pytest.mark.slow
MAY_BE_ABSENT = {"ttl-change", "isolation"}


@pytest.mark.long(reason="every check of the suite against a real service")
def test_every_check_passes_or_is_not_supported_for_a_reason(
    service: Service, tmp_path: Path
) -> None:
    listed = f"{service.url}/api/v1/checkpoints"
    before = httpx.get(listed).json()["checkpoints"]
    command = [sys.executable, "-m", "everstep.cli", "conformance", "--base-url", service.url]
    command += ["--json", str(tmp_path / "r.json"), "--junit", str(tmp_path / "r.xml")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "TINKER_API_KEY": "tml-conformance"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["model"] == "everstep/pico"
    assert report["noise"] == 0
    assert [each["name"] for each in report["checks"]] == [check.name for check in all_checks()]
    for each in report["checks"]:
        assert each["name"] in done.stdout
        if each["verdict"] != Verdict.PASS:
            assert each["verdict"] == Verdict.NOT_SUPPORTED
            assert each["name"] in MAY_BE_ABSENT
            assert each["detail"]
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert suite.get("tests") == str(len(all_checks()))
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
    assert httpx.get(listed).json()["checkpoints"] == before, "the checks clean up after themselves"
