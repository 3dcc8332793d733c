"""``everstep doctor``: what is wrong with this set-up, and what to do."""

from __future__ import annotations

import itertools

import typer

from everstep.cli.errors import Code, told
from everstep.cli.options import DEFAULT_HOME, Home, Json
from everstep.cli.target import ApiKey, BaseUrl


def doctor(
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Look at this machine, the home and the service, and say what is wrong and what to do.

    Changes nothing. Exits with 1 when there is a problem; warnings are none.
    """
    from everstep.cli import doctor_home, doctor_machine, doctor_service, output
    from everstep.cli.finding import State

    with told():
        home = home.expanduser().resolve()
        looks = (
            doctor_machine.findings(),
            doctor_home.findings(home),
            doctor_service.findings(base_url, api_key, home),
        )
        found = []
        for each in itertools.chain(*looks):
            found.append(each)
            if not as_json:
                output.print_finding(each.state, each.name, each.found, each.advice)
        worst = max((each.state for each in found), key=list(State).index)
        if as_json:
            checks = [vars(each) for each in found]
            output.print_json({"ok": worst is not State.PROBLEM, "checks": checks})
    raise typer.Exit(Code.FAILED if worst is State.PROBLEM else Code.DONE)
