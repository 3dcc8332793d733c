"""The ``everstep`` command.

Each group of commands has a folder. Its ``app.py`` declares options and help. The modules beside it
do the work and are imported when a command runs. ``common/`` is shared by all groups.
"""

from __future__ import annotations

import sys

from everstep.cli.common.extras import INSTALL_SERVER, is_server_package


def main() -> None:
    """Run the command. Without the ``server`` extra, exit with 2 and say how to install it."""
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
