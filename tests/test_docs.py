"""What the README and the guides show can be done, and what they point to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub does it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_pages_and_anchors(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def test_architecture_page_names_existing_files() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    names = re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.(?:py|proto))`", page)
    assert len(names) > 10
    for name in names:
        assert (ROOT / "src" / "everstep" / name).exists(), name


def test_contributing_page_fits_a_screen() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 24


@pytest.mark.slow
def test_readme_program_prints_its_output(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    ((program, shown),) = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", readme, re.DOTALL)
    statements = re.sub(r"\n {4,}(?=[a-z_]+=|\))|\n {8}", " ", program)
    assert len([line for line in statements.splitlines() if line.strip()]) <= 12
    environment = {k: v for k, v in os.environ.items() if k != "TINKER_BASE_URL"}
    environment["EVERSTEP_HOME"] = str(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    session = r"[0-9a-f-]{36}"
    assert re.sub(session, "<session>", done.stdout) == re.sub(session, "<session>", shown)
    assert (tmp_path / "home" / "ledger.sqlite").exists()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
