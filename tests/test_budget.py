"""The time budget reports tests over it, and refuses markers without a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
from tests import budget

budget.BUDGET_SECONDS, budget.LIMIT_SECONDS = 0.0, {limit}

def pytest_configure(config):
    config.addinivalue_line("markers", "long: x")
    config.pluginmanager.register(budget.Budget(enforced={enforced}))
"""
TESTS = """
import pytest

def test_unmarked():
    pass

@pytest.mark.long(reason="it trains")
def test_marked():
    pass
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pytest's own processes import `tests`."""
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


def run(pytester: pytest.Pytester, *, limit: float, enforced: bool) -> pytest.RunResult:
    pytester.makeconftest(CONFTEST.format(limit=limit, enforced=enforced))
    pytester.makepyfile(TESTS)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-n", "0")


def test_unmarked_test_over_the_budget_is_reported(pytester: pytest.Pytester) -> None:
    result = run(pytester, limit=1000.0, enforced=True)
    assert result.ret == 0
    text = result.stdout.str()
    assert "without @pytest.mark.long" in text
    assert "test_unmarked" in text and "test_marked" not in text.partition("without")[2]


@pytest.mark.parametrize("enforced", [True, False])
def test_unmarked_test_over_the_limit_fails_the_run_in_ci(
    pytester: pytest.Pytester, enforced: bool
) -> None:
    result = run(pytester, limit=0.0, enforced=enforced)
    assert result.ret == int(enforced)
    assert ("fails the run" in result.stdout.str()) == enforced


@pytest.mark.parametrize("arguments", ["", "'it trains'", "reason=' '"])
def test_marker_without_a_reason_fails_the_collection(
    pytester: pytest.Pytester, arguments: str
) -> None:
    pytester.makeconftest(CONFTEST.format(limit=1000.0, enforced=False))
    pytester.makepyfile(f"import pytest\n@pytest.mark.long({arguments})\ndef test_it(): pass")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-n", "0")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_it: long needs reason*"])
