"""Time budget: a test that takes long says why, and a run reports those that don't.

A test may take 20 seconds. One that needs more carries `@pytest.mark.long(reason="…")`; a marker
without a reason fails the collection. Every run lists unmarked tests over the budget. In CI a run
fails if one took six times the budget: a busy machine alone doesn't do that.
"""

from __future__ import annotations

import os

import pytest

BUDGET_SECONDS = 20.0
LIMIT_SECONDS = 6 * BUDGET_SECONDS
"""Above it an unmarked test fails a run in CI."""


class Budget:
    """Plugin: measures tests and reports those over the budget.

    Args:
        enforced: whether an unmarked test over the limit fails the run.
    """

    def __init__(self, *, enforced: bool) -> None:
        self._enforced = enforced
        self._seconds: dict[str, float] = {}

    @property
    def over_limit(self) -> list[str]:
        """The unmarked tests that took longer than the limit."""
        return [name for name, seconds in self._seconds.items() if seconds > LIMIT_SECONDS]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Fail the collection if a marker has no reason."""
        for item in items:
            for marker in item.iter_markers("long"):
                if not str(marker.kwargs.get("reason", "")).strip() or marker.args:
                    raise pytest.UsageError(f"{item.nodeid}: long needs reason=… and nothing else")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record how long an unmarked test took, without its fixtures."""
        if report.when == "call" and "long" not in report.keywords:
            self._seconds[report.nodeid] = report.duration

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail the run if a test exceeded the limit."""
        if self._enforced and self.over_limit and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List the unmarked tests over the budget, the slowest first."""
        over = {name: s for name, s in self._seconds.items() if s > BUDGET_SECONDS}
        if not over:
            return
        terminalreporter.section(f"over {BUDGET_SECONDS:g} s without @pytest.mark.long(reason=…)")
        for name, seconds in sorted(over.items(), key=lambda entry: -entry[1]):
            failed = " (fails the run)" if self._enforced and name in self.over_limit else ""
            terminalreporter.write_line(f"{seconds:7.1f} s  {name}{failed}")


def register(config: pytest.Config) -> None:
    """Add the plugin to a run; under pytest-xdist the controller measures and workers check."""
    enforced = os.environ.get("CI") == "true"
    config.pluginmanager.register(Budget(enforced=enforced), "everstep-budget")
