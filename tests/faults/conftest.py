"""A failed test's report includes the logs of the services that it started."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

MAX_CHARACTERS = 6000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    report = yield
    directory: Path | None = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and directory is not None:
        for log in sorted(directory.glob("*.log")):
            report.sections.append(
                (f"{log.name}", log.read_text(errors="replace")[-MAX_CHARACTERS:])
            )
    return report
