"""The ``everstep`` command.

Each group of commands has a folder. Its ``app.py`` declares options and help. The modules beside it
do the work and are imported when a command runs. ``common/`` is shared by all groups.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from everstep.cli.common.extras import INSTALL_SERVER, is_server_package
from everstep.worker.zygote.shared import start_early

_NO_SERVICE = {"--help", "-d", "--detach"}
"""Options with which ``everstep serve`` runs no service in this process."""


def main() -> None:
    """Run the command. Without the ``server`` extra, exit with 2 and say how to install it."""
    if _runs_service(sys.argv[1:]):
        start_early()  # its imports take longer than all that this process does before it is ready
    try:
        from everstep.cli.app import run

        run()
    except ModuleNotFoundError as error:
        if not is_server_package(error.name):
            raise
        command = " ".join(["everstep", *sys.argv[1:2]])
        print(
            f"everstep: '{command}' needs {error.name}, which is not installed. Commands and the "
            f"service come with {INSTALL_SERVER}. Without it, this is a client: 'import everstep "
            "as tinker' trains and samples on any Tinker service, such as "
            "ServiceClient(base_url='http://…:8055').",
            file=sys.stderr,
        )
        sys.exit(2)


def _runs_service(arguments: Sequence[str]) -> bool:
    """Return whether a command line looks as if it runs the service in this process."""
    command, options = arguments[:1], arguments[1:]
    alone = not options or options[0].startswith("-")
    return command == ["serve"] and alone and _NO_SERVICE.isdisjoint(options)
