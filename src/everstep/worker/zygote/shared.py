"""Zygotes for services: which one a service forks its workers from.

``EVERSTEP_ZYGOTE`` in the environment names the Unix socket of a zygote that several services
share. Tests do so, to import torch and transformers once. ``off`` has workers spawned instead.
Without the variable every service starts a zygote of its own.

A test session shares one like this::

    with shared_zygote(directory) as path:
        os.environ["EVERSTEP_ZYGOTE"] = str(path)
        ...

A service uses a shared zygote only if a worker that is forked from it would be the same as one
that the service spawns (see `everstep.worker.zygote.fit`): with the same ``OMP_NUM_THREADS``, say.
Otherwise it starts its own.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from everstep.worker.zygote.owner import Zygote

VARIABLE = "EVERSTEP_ZYGOTE"
OFF = "off"


def forking_disabled() -> bool:
    """Whether workers are spawned: by the environment's choice, or on another system than Linux."""
    return sys.platform != "linux" or os.environ.get(VARIABLE) == OFF


def shared_path() -> Path | None:
    """The socket of the shared zygote that the environment names, if it does."""
    value = os.environ.get(VARIABLE)
    return Path(value) if value and value != OFF else None


@cache
def start_early() -> Zygote | None:
    """Start a service's own zygote before the service imports its own modules.

    Further calls return the same one.

    Returns:
        The zygote, or None where the service spawns its workers or shares a zygote.
    """
    if forking_disabled() or shared_path() is not None:
        return None
    return Zygote.start(json.dumps({"command": sys.argv[1:]}))


@contextmanager
def shared_zygote(directory: Path) -> Iterator[Path]:
    """Start a zygote that several services use. It ends with the block.

    It takes on the environment that this process has at the beginning of the block. Services that
    set ``OMP_NUM_THREADS``, say, need it set here as well. Workers that are still running at the
    end of the block go on. The block must be left in the thread that entered it.

    Args:
        directory: where its socket is created. Must be this user's own.

    Yields:
        The socket's path, for ``EVERSTEP_ZYGOTE``. Its length is bounded by the system (107 bytes).
    """
    path = directory / "zygote.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(128)
        zygote = Zygote.start(str(path), listener)
    try:
        yield path
    finally:
        zygote.close()
        path.unlink(missing_ok=True)
