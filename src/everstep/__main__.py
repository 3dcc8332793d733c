"""``python -m everstep``: the ``everstep`` command."""

from everstep.cli import main

main()
