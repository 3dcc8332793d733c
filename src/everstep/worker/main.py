"""The worker's process: owns the models and the runs in memory, and does all the arithmetic.

One thread reads commands, the main thread computes (see `round_robin`), a third one writes
checkpoints. Commands and replies are `protocol.messages`.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from everstep import logs
from everstep.engine import Model, load_model
from everstep.engine.determinism import GIVEN_UP
from everstep.engine.environment import environment
from everstep.engine.errors import first_line
from everstep.engine.models.load import memory_for_states
from everstep.engine.models.pico import PICO_NAME, write_pico
from everstep.system_memory import release_unused_memory
from everstep.vault import VaultError, open_vault
from everstep.worker.commands import Commands
from everstep.worker.protocol.channel import NO_CALL, BlockingChannel, Envelope
from everstep.worker.protocol.heartbeat import HeartbeatPage
from everstep.worker.protocol.messages import Ready, Unusable
from everstep.worker.protocol.tokenizer_files import write_tokenizer
from everstep.worker.round_robin import RoundRobin

_log = logs.get_logger("everstep.worker")
IDLE_SECONDS = 5.0
"""How long a worker has no command before it gives unused memory back to the system."""


def main(argv: list[str]) -> None:
    """Serve commands in a process of its own.

    Args:
        argv: descriptors of the channel and of the heartbeat page, then the arguments of `serve`
            as JSON.
    """
    serve(int(argv[0]), int(argv[1]), json.loads(argv[2]))


def serve(channel_descriptor: int, page_descriptor: int, arguments: Mapping[str, Any]) -> None:
    """Serve commands until the service is gone, or return when the worker can't serve.

    Args:
        channel_descriptor: the worker's end of the socket pair.
        page_descriptor: the file of the heartbeat page.
        arguments: the home, the models and the settings of the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure(sys.stderr)
    channel = BlockingChannel(socket.socket(fileno=channel_descriptor))
    page = HeartbeatPage(page_descriptor)
    inbox: queue.SimpleQueue[Envelope] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), name="reader", daemon=True).start()
    torch.set_num_threads(arguments["threads"])
    if not sys.stderr.isatty():
        disable_progress_bar()  # it would fill the log with carriage returns
    if arguments["determinism"] != "exact":
        _log.warning("determinism is off", given_up=GIVEN_UP)
    home = Path(arguments["home"])
    _sole_worker(home)  # held for the life of this process
    try:
        models, refused = _load_models(home, arguments)
        vault = open_vault(
            home,
            reserve_bytes=arguments["disk_reserve_bytes"],
            retry_seconds=arguments["vault_retry_seconds"],
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, VaultError) as error:
        channel.send(NO_CALL, Unusable(str(error)))
        return
    tasks = RoundRobin(page)
    commands = Commands(models, vault, home, channel, tasks, page, arguments["prefix_bytes"])
    infos = [model.info for model in models.values()]
    states = memory_for_states(models.values())
    channel.send(NO_CALL, Ready(infos, environment(), refused, states))
    while True:
        while not (tasks.busy and inbox.empty()):
            commands.handle(next_command(inbox))
        tasks.step()


def next_command(inbox: queue.SimpleQueue[Envelope]) -> Envelope:
    """Wait for a command. A worker that had none for a while gives unused memory back first."""
    try:
        return inbox.get(timeout=IDLE_SECONDS)
    except queue.Empty:
        release_unused_memory()
        return inbox.get()


def _sole_worker(home: Path) -> None:
    """Wait until no other worker is alive on a home. None can start while this process lives."""
    lock = os.open(home / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)


def _read(channel: BlockingChannel, inbox: queue.SimpleQueue[Envelope]) -> None:
    """Queue commands. End the process at once when the service is gone.

    A worker that outlived its service could race the service's successor.
    """
    try:
        while (message := channel.receive()) is not None:
            inbox.put(message)
    finally:
        os._exit(0)


def _load_models(
    home: Path, arguments: Mapping[str, Any]
) -> tuple[dict[str, Model], dict[str, str]]:
    """Load the models. Returns them, and for each that can't be served the reason.

    Raises:
        ValueError: none of them can be served.
    """
    models, refused = {}, {}
    for name, source in arguments["models"].items():
        if source == PICO_NAME:
            source = str(home / "models" / PICO_NAME)  # noqa: PLW2901
            write_pico(Path(source))
        try:
            model = load_model(
                name,
                source,
                device=arguments["device"],
                dtype=arguments["dtype"],
                context_length=arguments["context_length"],
                deterministic=arguments["determinism"] == "exact",
                lora_products=arguments["lora_products"],
            )
            write_tokenizer(home, name, model.tokenizer, source)
        except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
            refused[name] = f"can't be loaded from {source!r}: {first_line(error)}"
        else:
            models[name] = model
    if not models:
        raise ValueError(". ".join(f"model {name!r} {why}" for name, why in refused.items()))
    return models, refused


if __name__ == "__main__":
    main(sys.argv[1:])
