"""The doctor: runs all checks and prints their findings."""

from __future__ import annotations

import itertools
from pathlib import Path

from everstep.cli.common import output
from everstep.cli.doctor.finding import State
from everstep.cli.doctor.home import check_home
from everstep.cli.doctor.machine import check_machine
from everstep.cli.doctor.service import check_service


def run(base_url: str | None, api_key: str | None, home: Path, as_json: bool) -> bool:
    """Run all checks and print each finding as soon as it is known.

    Args:
        base_url: address of the service, or None for the service of the home.
        api_key: its API key.
        home: the home.
        as_json: print JSON.

    Returns:
        Whether there is no problem.
    """
    found = []
    for each in itertools.chain(
        check_machine(), check_home(home), check_service(base_url, api_key, home)
    ):
        found.append(each)
        if not as_json:
            output.print_finding(each.state, each.name, each.found, each.advice)
    good = all(each.state is not State.PROBLEM for each in found)
    if as_json:
        output.print_json({"ok": good, "checks": [vars(each) for each in found]})
    return good
