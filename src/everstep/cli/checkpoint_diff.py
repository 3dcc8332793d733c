"""``everstep checkpoint diff``."""

from __future__ import annotations

from typing import Annotated

import typer

from everstep.cli.completion import checkpoint_paths
from everstep.cli.target import Target, with_target


@with_target
def diff(
    target: Target,
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="tinker://…, or a directory.", autocompletion=checkpoint_paths
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="Likewise.", autocompletion=checkpoint_paths)
    ],
    limit: Annotated[
        int, typer.Option(min=0, metavar="N", help="Show so many tensors; 0: all.")
    ] = 20,
) -> None:
    """Say how the adapter of B differs from that of A, tensor by tensor.

    Step, configuration and lineage stand side by side. A directory holds adapter_model.safetensors
    and adapter_config.json, as a download does. Exits with 1 when a tensor differs.
    """
    from everstep.cli.diff_work import diff as command

    command(target, a, b, limit)
