"""Local processes: workers that are processes on this machine.

On Linux a worker is forked from a zygote (`everstep.worker.zygote`), which takes milliseconds.
Elsewhere, and where no zygote is to be had, it is spawned: a new Python process that imports torch
and transformers first.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from everstep.runtime.settings import Settings
from everstep.runtime.workers.forked_process import ForkLauncher
from everstep.runtime.workers.launch import Handle, Launcher
from everstep.runtime.workers.supervisor import SupervisedPool
from everstep.runtime.workers.zygote import forking_disabled
from everstep.worker.protocol.heartbeat import HeartbeatPage
from everstep.worker.zygote.fit import worker_environment
from everstep.worker.zygote.owner import Zygote


def local_process_pool(
    home: Path, models: Mapping[str, str], settings: Settings, zygote: Zygote | None = None
) -> SupervisedPool:
    """Create the pool of one worker process on this machine.

    Args:
        home: the service's home directory.
        models: sources of models by name.
        settings: of the runtime.
        zygote: one that was started before. The pool owns it from now on. None: the pool connects
            to the one that ``EVERSTEP_ZYGOTE`` names, or starts its own.
    """
    arguments = worker_arguments(home, models, settings)
    launcher: Launcher = SpawnLauncher(arguments)
    if not forking_disabled():
        launcher = ForkLauncher(arguments, launcher, zygote)
    return SupervisedPool(launcher, settings.hang_seconds)


def worker_arguments(home: Path, models: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """The arguments of `everstep.worker.main.serve`, as JSON values."""
    return {
        "home": str(home),
        "models": dict(models),
        "threads": settings.threads or os.cpu_count() or 1,
        "device": settings.device,
        "dtype": settings.dtype,
        "context_length": settings.context_length,
        "determinism": settings.determinism,
        "lora_products": settings.lora_products,
        "disk_reserve_bytes": settings.disk_reserve_bytes,
        "prefix_bytes": settings.prefix_bytes,
        "vault_retry_seconds": settings.vault_retry_seconds,
    }


class SpawnLauncher:
    """Starts a new Python process for every worker. Implements `Launcher`.

    Args:
        arguments: of `everstep.worker.main.serve`.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments

    async def launch(self, sock: socket.socket, page: HeartbeatPage) -> Handle:
        """See `Launcher.launch`."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "everstep.worker.main"),
            *(str(sock.fileno()), str(page.descriptor), json.dumps(self._arguments)),
            pass_fds=(sock.fileno(), page.descriptor),
            stdin=asyncio.subprocess.DEVNULL,
            env=worker_environment(),
            start_new_session=True,  # Ctrl-C in the terminal is the service's to handle
        )
        return SpawnedProcess(process)

    async def close(self) -> None:
        """See `Launcher.close`."""


class SpawnedProcess:
    """A process that was spawned. Implements `Handle`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def id(self) -> str:
        """See `Handle.id`."""
        return f"process {self._process.pid}"

    def kill(self) -> None:
        """See `Handle.kill`."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int:
        """See `Handle.wait`."""
        return await self._process.wait()
