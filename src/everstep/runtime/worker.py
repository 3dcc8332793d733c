"""The worker: a child process that owns the models, the runs in memory, and all the arithmetic.

One thread reads commands, the main thread computes (see `turns`), one more writes checkpoints.
Commands and replies are `channel` messages; `commands` says what each one does.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from everstep.engine import Model, load_model
from everstep.engine.environment import environment
from everstep.engine.pico import PICO_NAME, write_pico
from everstep.runtime.channel import BlockingChannel, Message
from everstep.runtime.commands import Commands
from everstep.runtime.progress import ProgressPage
from everstep.runtime.tokenizers import write_tokenizer
from everstep.runtime.turns import Turns
from everstep.vault import VaultError, open_vault


def main(argv: list[str]) -> None:
    """Serve commands.

    Args:
        argv: descriptors of the socket and of the page of progress; then JSON: what to serve.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = BlockingChannel(socket.socket(fileno=int(argv[0])))
    page = ProgressPage(int(argv[1]))
    arguments = json.loads(argv[2])
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), name="reader", daemon=True).start()
    torch.set_num_threads(arguments["threads"])
    if not sys.stderr.isatty():
        disable_progress_bar()  # it would fill the log with carriage returns
    home = Path(arguments["home"])
    _sole_worker(home)  # held for the life of this process
    try:
        models = _load_models(home, arguments)
        vault = open_vault(
            home,
            reserve_bytes=arguments["disk_reserve_bytes"],
            retry_seconds=arguments["vault_retry_seconds"],
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, VaultError) as error:
        channel.send({"event": "unusable", "message": str(error)})
        return
    turns = Turns(page)
    commands = Commands(models, vault, channel, turns, arguments["prefix_bytes"])
    infos = [model.info.to_dict() for model in models.values()]
    channel.send({"event": "ready", "models": infos, "environment": environment()})
    while True:
        while not (turns.busy and inbox.empty()):
            commands.handle(inbox.get())
        turns.step()


def _sole_worker(home: Path) -> None:
    """Wait until no other worker is alive on a home, and let no other begin while we live."""
    lock = os.open(home / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)


def _read(channel: BlockingChannel, inbox: queue.SimpleQueue[Message]) -> None:
    """Pass commands on; end the process at once when the service is gone.

    A worker that outlived its service could race the service's successor.
    """
    try:
        while (message := channel.receive()) is not None:
            inbox.put(message)
    finally:
        os._exit(0)


def _load_models(home: Path, arguments: dict[str, Any]) -> dict[str, Model]:
    models = {}
    for name, source in arguments["models"].items():
        if source == PICO_NAME:
            source = str(home / "models" / PICO_NAME)  # noqa: PLW2901
            write_pico(Path(source))
        try:
            models[name] = load_model(
                name, source, device=arguments["device"], dtype=arguments["dtype"]
            )
            write_tokenizer(home, name, models[name].tokenizer)
        except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
            raise ValueError(f"model {name!r} can't be loaded from {source!r}: {error}") from error
    return models


if __name__ == "__main__":
    main(sys.argv[1:])
